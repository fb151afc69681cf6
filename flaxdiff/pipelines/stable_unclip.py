"""Stable unCLIP: Stable Diffusion 2 that is told CLIP's embedding of a picture beside the text.

The embedding enters with the time, as a class would. It is given, or that of a picture, and is brought under some noise
first: the more, the freer the network is to leave the picture.

Reference: Ramesh et al., Hierarchical Text-Conditional Image Generation with CLIP Latents, 2022.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import images as pictures
from flaxdiff.nn.embeddings import sinusoids
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines.beside import EMBEDS
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import Before, DiffusionPipeline
from flaxdiff.pipelines.prior import PriorPipeline


def noising(pipe: DiffusionPipeline, size: Size, guided: bool, noise_level: int = 0) -> dict[str, Any]:
    """How noisy the embedding is to be.

    Args:
      noise_level: training time of `image_noising_scheduler` that the embedding is brought to; the network is told.

    Raises:
      ValueError: the scheduler has no such time.
    """
    levels = pipe.image_noising_scheduler.levels()
    if not 0 <= noise_level < len(levels[0]):
        raise ValueError(f"noise_level={noise_level} must lie between 0 and {len(levels[0]) - 1}.")
    alpha, sigma = (np.float32(level[noise_level]) for level in levels)
    return {"embeds_alpha": alpha, "embeds_sigma": sigma, "noise_level": np.float32(noise_level)}


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    prompt_embeds: jax.Array | None = None,
    negative_prompt_embeds: jax.Array | None = None,
    clip_skip: int = 0,
    image: Any = None,
    image_embeds: jax.Array | None = None,
) -> dict[str, Any]:
    """The prompts, where none is an empty one, and the picture.

    Args:
      prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, clip_skip: as of Stable Diffusion.
      image, image_embeds: see `shown`.
    """
    prompt = "" if prompt is None and prompt_embeds is None else prompt
    of_text = prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, clip_skip
    return sd.prepare(pipe, size, guided, *of_text) | shown(pipe, image, image_embeds)


def shown(pipe: DiffusionPipeline, image: Any = None, image_embeds: jax.Array | None = None) -> dict[str, Any]:
    """A picture as the image encoder reads it, or its embedding.

    Args:
      image: Pillow pictures or arrays [B, H, W, 3] in [0, 1]; or
      image_embeds: what the image encoder made of some, [B, D].

    Raises:
      ValueError: neither is given, or both are.
    """
    if (image is None) == (image_embeds is None):
        given = "neither" if image is None else "both"
        raise ValueError(f"{type(pipe).__name__} needs image or image_embeds, and was given {given}; give one of them.")
    if image_embeds is not None:
        return {"image_embeds": image_embeds}
    return {"image_pixels": pictures.clip_pixels(image, pipe.image_encoder.config.image_size)}


def embedded(networks: Networks, inputs: Inputs) -> jax.Array:
    """The embeddings [B, D] of the pictures that are shown."""
    if "image_embeds" in inputs:
        return jnp.asarray(inputs["image_embeds"], jnp.float32)
    return networks("image_encoder", inputs["image_pixels"]).image_embeds


def noised(networks: Networks, inputs: Inputs, embeds: jax.Array) -> jax.Array:
    """Embeddings [B, D] under noise, and sinusoids of how much that is: [B, 2 D]."""
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, EMBEDS), embeds.shape[1:])
    x = networks("image_normalizer", embeds, method="scale")
    x = inputs["embeds_alpha"] * x + inputs["embeds_sigma"] * jax.vmap(draw)(inputs["keys"])
    x = networks("image_normalizer", x, method="unscale")
    return jnp.concatenate([x, jnp.broadcast_to(sinusoids(inputs["noise_level"], x.shape[-1]), x.shape)], -1)


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch, and in the place of a class the embedding; the negative branch knows of no picture."""
    labels = noised(networks, inputs, embedded(networks, inputs))
    labels = {"positive": labels, "negative": jnp.zeros_like(labels)}
    return {branch: {**cond, "class_labels": labels[branch]} for branch, cond in sd.encode(networks, inputs).items()}


STABLE_UNCLIP = sd.STABLE_DIFFUSION._replace(encode=encode)


class StableUnCLIPImg2ImgPipeline(DiffusionPipeline):
    """Pictures like a given one, with or without a prompt."""

    family = STABLE_UNCLIP._replace(prepare=prepare)
    extras = (noising,)
    reads = ("image_encoder",)
    defaults = {"num_inference_steps": 20, "guidance_scale": 10.0}


class StableUnCLIPPipeline(DiffusionPipeline):
    """Text to image in two loops: a prior finds the embedding of a picture, and that is drawn.

    What begins with `prior_` is for the first: `prior_num_inference_steps`, `prior_guidance_scale`, `prior_latents`.
    Published folders have no prior; it is Karlo's, with the text encoder that it was trained with:

        karlo, params = flaxdiff.load("kakaobrain/karlo-v1-alpha")
        parts = {name: (getattr(karlo, name), params[name]) for name in ("prior", "text_encoder")}
        pipe, params = flaxdiff.StableUnCLIPPipeline.from_pretrained(
            "stabilityai/stable-diffusion-2-1-unclip-small",
            prior=parts["prior"],
            prior_text_encoder=parts["text_encoder"],
            prior_tokenizer=karlo.tokenizer,
            prior_scheduler=flaxdiff.DDPMScheduler.from_config(karlo.prior_scheduler),
        )
    """

    family = STABLE_UNCLIP
    extras = (noising,)
    before = (
        Before(
            name="prior",
            gives="image_embeds",
            pipeline=PriorPipeline,
            components=(
                ("prior", "prior"),
                ("text_encoder", "prior_text_encoder"),
                ("tokenizer", "prior_tokenizer"),
                ("scheduler", "prior_scheduler"),
            ),
        ),
    )
    defaults = StableUnCLIPImg2ImgPipeline.defaults
