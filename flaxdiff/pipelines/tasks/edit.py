"""What a picture is changed to, by an instruction: the network sees the picture's latent beside the sample.

Reference: Brooks et al., InstructPix2Pix: Learning to Follow Image Editing Instructions, 2023.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from flaxdiff import images as pictures
from flaxdiff.pipelines.generate import Size
from flaxdiff.pipelines.tasks import Prepared, check_channels, check_size, is_latents, need, noise, vae_factor

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline


def edit(
    pipe: "DiffusionPipeline",
    image: Any = None,
    height: int | None = None,
    width: int | None = None,
    latents: jax.Array | None = None,
) -> Prepared:
    """Start from noise, with a picture to change beside it; how closely to follow it is the guidance's to say.

    Args:
      image: Pillow pictures, arrays [B, H, W, 3] in [0, 1], or their latents [B, h, w, Z].
      height, width: of the result in pixels, by default the picture's.
      latents: the noise to start from, of unit variance, in place of what the key gives.

    Raises:
      ValueError: no picture, a size that the networks do not divide, a network that takes no picture.
    """
    need(pipe, image)
    check_channels(pipe, pipe.vae.config.latent_channels)
    if is_latents(pipe, image):
        size = Size(*(side * vae_factor(pipe) for side in image.shape[1:3]))
        beside = {"beside": image}
    else:
        pixels = pictures.to_array(image, height, width)
        size = Size(*pixels.shape[1:3])
        # The network knows the latent as the autoencoder gives it, but that of CosXL at the scale of the sample.
        gain = 1 if dict(pipe.settings).get("is_cosxl_edit") else 1 / pipe.vae.config.scaling_factor
        beside = {"beside_image": pixels, "beside_gain": np.float32(gain), "beside_spread": np.float32(0)}
    check_size(pipe, size)
    return size, beside | noise(pipe, size, latents), {}
