"""Image to image that keeps the depth of the scene: the network sees a depth map beside the sample."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from flaxdiff import images as pictures
from flaxdiff.pipelines.tasks import Prepared, check_channels, image_to_image, vae_factor

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline


def depth_to_image(
    pipe: "DiffusionPipeline",
    image: Any = None,
    depth_map: Any = None,
    strength: float | None = None,
    latents: jax.Array | None = None,
) -> Prepared:
    """Start from a picture under noise, with its depth beside it.

    Args:
      image, strength, latents: as of `image_to_image`.
      depth_map: [B, H, W] of any size and unit: larger is nearer, as estimators of relative depth have it.

    Raises:
      ValueError: no picture, no depth map or one of a wrong shape, a network that takes none.
    """
    size, arrays, window = image_to_image(pipe, image, strength, None, latents)
    check_channels(pipe, 1)
    if depth_map is None:
        raise ValueError(f"{type(pipe).__name__} keeps the depth of a picture; give depth_map= [B, H, W].")
    depth = np.asarray(depth_map, np.float32)
    if depth.ndim != 3:
        raise ValueError(f"depth_map has shape {depth.shape}; expected [B, H, W].")
    factor = vae_factor(pipe)
    depth = pictures.bicubic(depth[..., None], size.height // factor, size.width // factor)
    low, high = depth.min((1, 2), keepdims=True), depth.max((1, 2), keepdims=True)
    flat = np.where(high > low, high - low, 1)
    return size, arrays | {"beside": np.float32(2 * (depth - low) / flat - 1)}, window
