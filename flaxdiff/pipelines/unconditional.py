"""DDPM and DDIM: pictures without a prompt, from a U-Net over pixels.

Reference: Ho et al., Denoising Diffusion Probabilistic Models, 2020; Song et al., Denoising Diffusion Implicit
Models, 2020.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flaxdiff import core
from flaxdiff.pipelines.generate import Cond, Family, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline


def prepare(pipe: DiffusionPipeline, size: Size, guided: bool, batch_size: int = 1) -> dict[str, Any]:
    """Nothing but how many.

    Args:
      batch_size: pictures to make.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: ask for at least one.")
    return {"index": np.arange(batch_size, dtype=np.int32)}


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """One branch, with nothing to tell."""
    return {"positive": {}}


def predict(networks: Networks, x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
    """The U-Net's output."""
    return networks("unet", x, t)


def latent_shape(specs: Mapping[str, core.Spec], size: Size) -> tuple[int, int, int]:
    """The shape of a picture: the network works on pixels."""
    return size.height, size.width, specs["unet"].config.in_channels


def decode(networks: Networks, images: jax.Array) -> jax.Array:
    """The sample is the picture."""
    return images


UNCONDITIONAL = Family(prepare, encode, predict, latent_shape, decode)


class DDPMPipeline(DiffusionPipeline):
    """Unconditional pictures, a thousand steps by default."""

    family = UNCONDITIONAL
    defaults = {"num_inference_steps": 1000, "guidance_scale": 1.0}


class DDIMPipeline(DiffusionPipeline):
    """Unconditional pictures, fifty steps by default; `eta` between 0 (DDIM) and 1 (as noisy as DDPM)."""

    family = UNCONDITIONAL
    defaults = {"num_inference_steps": 50, "guidance_scale": 1.0}
