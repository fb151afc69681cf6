"""Stable Diffusion 1 and 2: a CLIP text encoder, a U-Net over latents, and an autoencoder.

Reference: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxdiff import core
from flaxdiff.adapters import control
from flaxdiff.pipelines.generate import Cond, Family, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks import image_to_image
from flaxdiff.pipelines.text import check_prompts, texts


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    prompt_embeds: jax.Array | None = None,
    negative_prompt_embeds: jax.Array | None = None,
    clip_skip: int = 0,
) -> dict[str, Any]:
    """The prompts as tokens, or as embeddings where those are given.

    Args:
      prompt, negative_prompt: what to draw and what to avoid; one text or several.
      prompt_embeds, negative_prompt_embeds: in their place, [B, N, D].
      clip_skip: how many of the text encoder's last layers to leave out, for the prompt (as diffusers: not its
        negative).
    """
    prompts = check_prompts(pipe, prompt, prompt_embeds)
    arrays: dict[str, Any] = {"clip_skip": clip_skip}
    for prefix, text, embeds in (("", prompts, prompt_embeds), ("negative_", negative_prompt, negative_prompt_embeds)):
        if embeds is not None:
            arrays[f"{prefix}prompt_embeds"] = embeds
        elif guided or not prefix:
            arrays[f"{prefix}prompt_ids"] = pipe.tokenizer(texts(text))
    return arrays if guided else {k: v for k, v in arrays.items() if not k.startswith("negative_")}


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch, as the U-Net reads it; the positive one's `clip_skip` layers before the last."""
    cond = {}
    for branch, prefix in (("positive", ""), ("negative", "negative_")):
        if f"{prefix}prompt_embeds" in inputs:
            text = inputs[f"{prefix}prompt_embeds"]
        elif f"{prefix}prompt_ids" in inputs:
            skip = 0 if prefix else inputs["clip_skip"]
            text = networks("text_encoder", inputs[f"{prefix}prompt_ids"], skip, method="skip")
        else:
            continue
        steered = control.encode(networks, inputs, text, branch)
        cond[branch] = {"text": networks("unet", text, method="keys_values"), **steered}
    return cond


def times(networks: Networks, timesteps: jax.Array, cond: Cond) -> Any:
    """What the U-Net makes of times [N]."""
    return control.times(networks, timesteps, cond, networks("unet", timesteps[:, None], method="times"))


def predict(networks: Networks, x: jax.Array, t: Any, cond: Cond) -> jax.Array:
    """The U-Net's output."""
    t, residuals = control.residuals(networks, x, t, cond)
    return networks("unet", x, t, cond["text"], **residuals)


def latent_shape(specs: Mapping[str, core.Spec], size: Size) -> tuple[int, int, int]:
    """(h, w, channels) of the latent of a picture."""
    vae = specs["vae"].config
    factor = 2 ** (len(vae.block_out_channels) - 1)
    return size.height // factor, size.width // factor, vae.latent_channels


def decode(networks: Networks, latents: jax.Array) -> jax.Array:
    """Latents as the denoiser knows them -> images in [-1, 1]."""
    vae = networks.config("vae")
    return networks("vae", latents / vae.scaling_factor + (vae.shift_factor or 0), method="decode")


def encode_image(networks: Networks, images: jax.Array, keys: jax.Array) -> jax.Array:
    """Images in [-1, 1] -> latents as the denoiser knows them, drawn from the posterior, one key for each image."""
    vae = networks.config("vae")
    posterior = networks("vae", images, method="encode")
    noise = jax.vmap(lambda key: jax.random.normal(key, posterior.mean.shape[1:]))(keys)
    z = posterior.mean + jnp.exp(0.5 * posterior.logvar) * noise
    return (z - (vae.shift_factor or 0)) * vae.scaling_factor


STABLE_DIFFUSION = Family(prepare, encode, predict, latent_shape, decode, encode_image, times)


class StableDiffusionPipeline(DiffusionPipeline):
    """Text to image with Stable Diffusion 1 or 2.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.load()
    >>> inputs = pipe.prepare_inputs(prompt=["red apple", "blue book"])
    >>> inputs["prompt_ids"].shape[0], inputs["size"]
    (2, Size(height=64, width=64))
    """

    family = STABLE_DIFFUSION


class StableDiffusionImg2ImgPipeline(DiffusionPipeline):
    """Image to image with Stable Diffusion 1 or 2.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.StableDiffusionImg2ImgPipeline.from_pretrained(flaxdiff.EMOJI)
    >>> pipe.defaults["strength"]
    0.8
    """

    family = STABLE_DIFFUSION
    task = staticmethod(image_to_image)
    defaults = {**DiffusionPipeline.defaults, "strength": 0.8}


class StableDiffusionControlNetPipeline(DiffusionPipeline):
    """Text to image with Stable Diffusion 1 or 2, led by pictures through ControlNets."""

    family = STABLE_DIFFUSION
    task = staticmethod(control.text_to_image)
    extras = (control.prepare_controlnets,)
    steers = {"controlnet": "ControlNetModel"}


class StableDiffusionControlNetImg2ImgPipeline(StableDiffusionControlNetPipeline):
    """Image to image with Stable Diffusion 1 or 2, led by `control_image` through ControlNets."""

    task = staticmethod(image_to_image)
    defaults = {**StableDiffusionImg2ImgPipeline.defaults, "controlnet_conditioning_scale": 0.8}


class StableDiffusionAdapterPipeline(DiffusionPipeline):
    """Text to image with Stable Diffusion 1 or 2, led by pictures through T2I-Adapters."""

    family = STABLE_DIFFUSION
    task = staticmethod(control.text_to_image)
    extras = (control.prepare_adapters,)
    steers = {"adapter": "T2IAdapter"}
