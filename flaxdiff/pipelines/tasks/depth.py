"""Image to image that keeps the depth of the scene: the network sees a depth map beside the sample.

The map is given, or what the depth model of the checkpoint makes of the picture.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from flaxdiff import images as pictures
from flaxdiff.pipelines.tasks import Prepared, check_channels, image_to_image, is_latents, vae_factor

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
      depth_map: [B, H, W] of any size and unit: larger is nearer, as estimators of relative depth have it. By default
        what the pipeline's own depth model makes of the picture.

    Raises:
      ValueError: no picture, a depth map of a wrong shape, none and no depth model, a network that takes none.
    """
    size, arrays, window = image_to_image(pipe, image, strength, None, latents)
    check_channels(pipe, 1)
    if depth_map is None:
        estimator = dict(pipe.specs).get("depth_estimator")
        if estimator is None or is_latents(pipe, image):
            raise ValueError(
                f"{type(pipe).__name__} keeps the depth of a picture; give depth_map= [B, H, W], or a picture (no "
                "latents) to a checkpoint with a depth_estimator."
            )
        return size, arrays | {"depth_pixels": pictures.square_pixels(image, estimator.config.image_size)}, window
    depth = np.asarray(depth_map, np.float32)
    if depth.ndim != 3:
        raise ValueError(f"depth_map has shape {depth.shape}; expected [B, H, W].")
    factor = vae_factor(pipe)
    depth = pictures.bicubic(depth[..., None], size.height // factor, size.width // factor)
    return size, arrays | {"depth": np.float32(depth)}, window
