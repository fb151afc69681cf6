"""Stable Diffusion that reads CLIP's image of a picture where others read a text, to make others like it
or to paint what it shows.

Reference: Yang et al., Paint by Example: Exemplar-based Image Editing with Diffusion Models, 2023.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flaxdiff import images as pictures
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.stable_diffusion import STABLE_DIFFUSION
from flaxdiff.pipelines.tasks import need
from flaxdiff.pipelines.tasks.inpaint import by_example


def prepare(pipe: DiffusionPipeline, size: Size, guided: bool, image: Any = None) -> dict[str, Any]:
    """The picture as the image encoder reads it.

    Args:
      image: Pillow pictures or arrays [B, H, W, 3] in [0, 1].
    """
    need(pipe, image)
    pixels = pictures.clip_pixels(image, pipe.image_encoder.config.image_size)
    return {"image_pixels": pixels} | ({"negative_image": True} if guided else {})


def prepare_example(pipe: DiffusionPipeline, size: Size, guided: bool, example_image: Any = None) -> dict[str, Any]:
    """The example as the image encoder reads it.

    Args:
      example_image: what to paint: Pillow pictures or arrays [B, H, W, 3] in [0, 1].
    """
    if example_image is None:
        raise ValueError(f"{type(pipe).__name__} paints what another picture shows; give example_image=.")
    return prepare(pipe, size, guided, example_image)


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """One token, the embedding of the picture; of nothing, zeros."""
    token = networks("image_encoder", inputs["image_pixels"]).image_embeds[:, None]
    return attended(networks, inputs, token, jnp.zeros_like(token))


def encode_example(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """One token; of nothing, the one that was learned for it."""
    token = networks("image_encoder", inputs["image_pixels"])
    return attended(networks, inputs, token, jnp.broadcast_to(networks("image_encoder", method="nothing"), token.shape))


def attended(networks: Networks, inputs: Inputs, token: jax.Array, nothing: jax.Array) -> Mapping[str, Cond]:
    """What the U-Net makes of a token [B, 1, D], and when guided of nothing."""
    tokens = {"positive": token} | ({"negative": nothing} if "negative_image" in inputs else {})
    return {branch: {"text": networks("unet", token, method="keys_values")} for branch, token in tokens.items()}


class StableDiffusionImageVariationPipeline(DiffusionPipeline):
    """Pictures like a given one; there is no prompt."""

    family = STABLE_DIFFUSION._replace(prepare=prepare, encode=encode)
    reads = ("image_encoder",)


class PaintByExamplePipeline(DiffusionPipeline):
    """Paint over a part of a picture with what `example_image` shows; there is no prompt."""

    family = STABLE_DIFFUSION._replace(prepare=prepare_example, encode=encode_example)
    task = staticmethod(by_example)
    reads = ("image_encoder",)
    defaults = {"num_inference_steps": 50, "guidance_scale": 5.0}
