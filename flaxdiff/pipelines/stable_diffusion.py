"""Stable Diffusion 1 and 2: a CLIP text encoder, a U-Net over latents, and an autoencoder.

Reference: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import core
from flaxdiff.adapters import control, ip_adapter
from flaxdiff.nn.embeddings import sinusoids
from flaxdiff.pipelines.generate import Cond, Family, Inputs, Networks, Size, autoencoder
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks import distilled_image_to_image, image_to_image
from flaxdiff.pipelines.tasks.depth import depth_to_image
from flaxdiff.pipelines.tasks.edit import edit
from flaxdiff.pipelines.tasks.inpaint import inpaint, paste_back
from flaxdiff.pipelines.tasks.upscale import upscale
from flaxdiff.pipelines.text import branches, check_prompts, texts


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
    for branch, prefix in branches(inputs).items():
        if f"{prefix}prompt_embeds" in inputs:
            text = inputs[f"{prefix}prompt_embeds"]
        else:
            skip = 0 if prefix else inputs["clip_skip"]
            text = networks("text_encoder", inputs[f"{prefix}prompt_ids"], skip, method="skip")
        cond[branch] = attended(networks, inputs, branch, text)
    return cond


def attended(networks: Networks, inputs: Inputs, branch: str, text: jax.Array) -> Cond:
    """A branch's text [B, N, D], as the U-Net and what steers it read it."""
    steered = control.encode(networks, inputs, text, branch)
    contexts = networks("unet", text, method="keys_values")
    contexts = ip_adapter.encode(networks, inputs, branch, contexts, latent_shape(networks.specs, inputs["size"]))
    return {"text": contexts, **steered}


def times(networks: Networks, timesteps: jax.Array, cond: Cond) -> Any:
    """What the U-Net makes of times [N], and of a class or a strength that it is told."""
    of_unet = networks("unet", timesteps[:, None], method="times", **told(cond))
    return control.times(networks, timesteps, cond, of_unet)


def told(cond: Cond) -> dict[str, jax.Array]:
    """What enters the U-Net's embedding of time."""
    return {k: cond[k] for k in ("class_labels", "timestep_cond") if k in cond}


def weighed(cond: Cond) -> dict[str, Any]:
    """What changes how the U-Net computes: blocks that are hindered, FreeU, what it need not compute again, objects."""
    return {k: cond[k] for k in ("perturb", "freeu", "deep", "objects") if k in cond}


def distilled(specs: Mapping[str, core.Spec], scale: Any) -> dict[str, Any]:
    """Sinusoids of guidance_scale - 1 in thousandths, for a U-Net that was distilled with it."""
    width = specs["unet"].config.time_cond_proj_dim
    if width is None:
        return {}
    strength = 1000 * (np.atleast_1d(np.asarray(scale, np.float32)) - 1)
    return {"timestep_cond": np.asarray(sinusoids(strength, width, flip_sin_to_cos=False, freq_shift=1))}


def predict(networks: Networks, x: jax.Array, t: Any, cond: Cond) -> jax.Array:
    """The U-Net's output."""
    t, residuals = control.residuals(networks, x, t, cond)
    return networks("unet", x, t, cond["text"], **residuals, **weighed(cond))


def latent_shape(specs: Mapping[str, core.Spec], size: Size) -> tuple[int, int, int]:
    """(h, w, channels) of the latent of a picture."""
    vae = specs[autoencoder(specs)].config
    factor = 2 ** (len(vae.block_out_channels) - 1)
    return size.height // factor, size.width // factor, vae.latent_channels


def decode(networks: Networks, latents: jax.Array, **told: jax.Array) -> jax.Array:
    """Latents as the denoiser knows them -> images in [-1, 1]; some autoencoders are told of the known part."""
    vae = networks.config(name := autoencoder(networks.specs))
    return networks(name, latents / vae.scaling_factor + (vae.shift_factor or 0), **told, method="decode")


def encode_image(networks: Networks, images: jax.Array, keys: jax.Array, spread: jax.Array | float = 1.0) -> jax.Array:
    """Images in [-1, 1] -> latents as the denoiser knows them, drawn from the posterior, one key for each image."""
    vae = networks.config(name := autoencoder(networks.specs))
    posterior = networks(name, images, method="encode")
    noise = jax.vmap(lambda key: jax.random.normal(key, posterior.mean.shape[1:]))(keys)
    z = posterior.mean + spread * jnp.exp(0.5 * posterior.logvar) * noise
    return (z - (vae.shift_factor or 0)) * vae.scaling_factor


STABLE_DIFFUSION = Family(prepare, encode, predict, latent_shape, decode, encode_image, times, distilled)


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


class StableDiffusionInpaintPipeline(DiffusionPipeline):
    """Paint over a part of a picture, with a U-Net made for that or with any of Stable Diffusion 1 or 2.

    >>> import flaxdiff, jax, numpy as np
    >>> pipe, params = flaxdiff.StableDiffusionInpaintPipeline.from_pretrained(flaxdiff.EMOJI)
    >>> inputs = pipe.prepare_inputs(prompt="red apple", image=np.ones((64, 64, 3)), mask_image=np.eye(64))
    >>> inputs["mask"].shape
    (1, 16, 16, 1)
    """

    family = STABLE_DIFFUSION
    task = staticmethod(inpaint)
    finish = staticmethod(paste_back)
    defaults = {**DiffusionPipeline.defaults, "strength": 1.0}


class StableDiffusionInstructPix2PixPipeline(DiffusionPipeline):
    """Change a picture as an instruction says; `image_guidance_scale` is how closely to follow the picture."""

    family = STABLE_DIFFUSION
    task = staticmethod(edit)
    defaults = {"num_inference_steps": 100, "guidance_scale": 7.5, "image_guidance_scale": 1.5}


class StableDiffusionDepth2ImgPipeline(DiffusionPipeline):
    """Image to image that keeps the depth of the scene."""

    family = STABLE_DIFFUSION
    task = staticmethod(depth_to_image)
    reads = ("depth_estimator",)
    defaults = StableDiffusionImg2ImgPipeline.defaults


class StableDiffusionUpscalePipeline(DiffusionPipeline):
    """A picture four times as high and wide."""

    family = STABLE_DIFFUSION
    task = staticmethod(upscale)
    defaults = {"num_inference_steps": 75, "guidance_scale": 9.0}


class LatentConsistencyModelPipeline(DiffusionPipeline):
    """Text to image in a few steps, with a U-Net that was distilled with the strength of guidance."""

    family = STABLE_DIFFUSION
    defaults = {"num_inference_steps": 4, "guidance_scale": 8.5}


class LatentConsistencyModelImg2ImgPipeline(DiffusionPipeline):
    """Image to image in a few steps, with a U-Net that was distilled with the strength of guidance."""

    family = STABLE_DIFFUSION
    task = staticmethod(distilled_image_to_image)
    defaults = {**LatentConsistencyModelPipeline.defaults, "strength": 0.8}
