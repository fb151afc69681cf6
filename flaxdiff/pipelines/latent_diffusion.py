"""The first latent diffusion models: text to image with an encoder of their own, and a picture made four times larger.

Reference: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines import unconditional
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks.upscale import super_resolution
from flaxdiff.pipelines.text import branches, check_prompts, texts

TOKENS = 77  # of a prompt, whatever its tokenizer was made for


def prepare(
    pipe: DiffusionPipeline, size: Size, guided: bool, prompt: str | Sequence[str] | None = None
) -> dict[str, Any]:
    """The prompts as tokens, and with guidance the empty one.

    Args:
      prompt: what to draw; one text or several.
    """
    ids = pipe.tokenizer(texts(check_prompts(pipe, prompt, None)), TOKENS)
    return {"prompt_ids": ids} | ({"negative_prompt_ids": pipe.tokenizer([""], TOKENS)} if guided else {})


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch, as the U-Net reads it."""
    text = {branch: networks("bert", inputs[f"{prefix}prompt_ids"]) for branch, prefix in branches(inputs).items()}
    return {branch: {"text": networks("unet", x, method="keys_values")} for branch, x in text.items()}


def decode(networks: Networks, latents: jax.Array) -> jax.Array:
    """Latents, which have the autoencoder's own scale -> images in [-1, 1]."""
    return networks("vqvae", latents, method="decode")


class LDMTextToImagePipeline(DiffusionPipeline):
    """Text to image with latent diffusion's own text encoder; at a `guidance_scale` of 1, the default, unguided."""

    family = sd.STABLE_DIFFUSION._replace(prepare=prepare, encode=encode, encode_image=None, distilled=None)
    defaults = {"num_inference_steps": 50, "guidance_scale": 1.0}


class LDMSuperResolutionPipeline(DiffusionPipeline):
    """A picture as many times larger as the autoencoder makes it: four times for the published network."""

    family = unconditional.UNCONDITIONAL._replace(
        prepare=unconditional.prepare_nothing, latent_shape=sd.latent_shape, decode=decode
    )
    task = staticmethod(super_resolution)
    defaults = {"num_inference_steps": 100, "guidance_scale": 1.0}
