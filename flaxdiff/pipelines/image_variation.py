"""Variations of a picture: Stable Diffusion that reads CLIP's image of it where others read a text."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from flaxdiff import images as pictures
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.stable_diffusion import STABLE_DIFFUSION
from flaxdiff.pipelines.tasks import need


def prepare(pipe: DiffusionPipeline, size: Size, guided: bool, image: Any = None) -> dict[str, Any]:
    """The picture as the image encoder reads it.

    Args:
      image: Pillow pictures or arrays [B, H, W, 3] in [0, 1].
    """
    need(pipe, image)
    pixels = pictures.clip_pixels(image, pipe.image_encoder.config.image_size)
    return {"image_pixels": pixels} | ({"negative_image": True} if guided else {})


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """One token, the embedding of the picture; of nothing, zeros."""
    token = networks("image_encoder", inputs["image_pixels"]).image_embeds[:, None]
    tokens = {"positive": token} | ({"negative": jnp.zeros_like(token)} if "negative_image" in inputs else {})
    return {branch: {"text": networks("unet", token, method="keys_values")} for branch, token in tokens.items()}


class StableDiffusionImageVariationPipeline(DiffusionPipeline):
    """Pictures like a given one; there is no prompt."""

    family = STABLE_DIFFUSION._replace(prepare=prepare, encode=encode)
    reads = ("image_encoder",)
