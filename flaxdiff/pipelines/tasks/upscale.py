"""A larger picture: the network sees the small one, pixel for latent, beside the sample."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from flaxdiff import images as pictures
from flaxdiff.pipelines.generate import Size
from flaxdiff.pipelines.tasks import Prepared, check_channels, check_size, is_latents, need, noise, vae_factor

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

SIDE = 32  # pixels of a picture that the stages of a U-Net halve without a rest


def super_resolution(pipe: "DiffusionPipeline", image: Any = None, latents: jax.Array | None = None) -> Prepared:
    """Start from noise, with a small picture beside it.

    Args:
      image: Pillow pictures or arrays [B, H, W, 3] in [0, 1]; the result is as many times larger as the autoencoder
        makes it. Pillow's are resampled where their sides are no multiples of `SIDE`.
      latents: the noise to start from [B, H, W, Z], of unit variance, in place of what the key gives.

    Raises:
      ValueError: no picture, or a network that takes none.
    """
    need(pipe, image)
    first = image[0] if isinstance(image, Sequence) else image
    sides = {k: getattr(first, k) // SIDE * SIDE for k in ("height", "width") if hasattr(first, k)}
    small = pictures.to_array(image, **sides)
    check_channels(pipe, small.shape[-1])
    size = Size(*(side * vae_factor(pipe) for side in small.shape[1:3]))
    return size, {"beside": small} | noise(pipe, size, latents), {}


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


def latent_upscale(pipe: "DiffusionPipeline", image: Any = None, latents: jax.Array | None = None) -> Prepared:
    """Start from noise, with the latent of a picture half as high and wide beside it.

    Args:
      image: Pillow pictures, arrays [B, H, W, 3] in [0, 1], or latents [B, h, w, Z] as `output_type="latent"` returns
        them.
      latents: the noise to start from [B, 2h, 2w, Z], of unit variance, in place of what the key gives.

    Raises:
      ValueError: no picture, a size that the networks do not divide, a network that takes none.
    """
    need(pipe, image)
    check_channels(pipe, pipe.vae.config.latent_channels)
    if is_latents(pipe, image):
        beside = {"beside": image}
        size = Size(*(2 * side * vae_factor(pipe) for side in image.shape[1:3]))
    else:
        beside = {
            "beside_image": pictures.to_array(image),
            "beside_gain": np.float32(1),
            "beside_spread": np.float32(1),
        }
        size = Size(*(2 * side for side in beside["beside_image"].shape[1:3]))
    check_size(pipe, size)
    factor = vae_factor(pipe) * 2 ** (len(pipe.unet.config.block_out_channels) - 1)  # its stages halve exactly
    if size.height % factor or size.width % factor:
        raise ValueError(
            f"A result of {size.height} x {size.width} pixels does not divide into what the U-Net halves; give a "
            f"picture whose sides are multiples of {factor // 2}."
        )
    return size, beside | noise(pipe, size, latents), {}
