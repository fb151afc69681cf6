"""A larger picture: the network sees the small one, pixel for latent, beside the sample."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from flaxdiff import images as pictures
from flaxdiff.pipelines.generate import Size
from flaxdiff.pipelines.tasks import Prepared, check_channels, need, noise, vae_factor

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline


def upscale(
    pipe: "DiffusionPipeline", image: Any = None, noise_level: int = 20, latents: jax.Array | None = None
) -> Prepared:
    """Start from noise, with a small picture under some noise beside it.

    Args:
      image: Pillow pictures or arrays [B, H, W, 3] in [0, 1]; the result is as many times larger as the autoencoder
        makes it, four times for the published network.
      noise_level: training time of `low_res_scheduler` that the small picture is brought to; the network is told.
      latents: the noise to start from [B, H, W, Z], of unit variance, in place of what the key gives.

    Raises:
      ValueError: no picture, a network that takes none, a level beyond what it was trained with.
    """
    need(pipe, image)
    small = pictures.to_array(image)
    check_channels(pipe, small.shape[-1])
    limit = dict(pipe.settings).get("max_noise_level", 350)
    if not 0 <= noise_level <= limit:
        raise ValueError(f"noise_level={noise_level} must lie between 0 and {limit}, as the network was trained.")
    alpha, sigma = (np.float32(level[noise_level]) for level in pipe.low_res_scheduler.levels())
    beside = {"beside": small, "beside_alpha": alpha, "beside_sigma": sigma}
    beside["class_labels"] = np.full(1, noise_level, np.int32)
    size = Size(*(side * vae_factor(pipe) for side in small.shape[1:3]))
    return size, beside | noise(pipe, size, latents), {}
