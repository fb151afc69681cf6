"""Stable Diffusion XL: two text encoders, and a U-Net that is told the sizes of the picture as well.

The base makes latents from noise. The refiner, which has the second text encoder only and is told an aesthetic score,
takes over where `denoising_end` left off, or reworks a picture.

Reference: Podell et al., SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis, 2023.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.adapters import control, ip_adapter
from flaxdiff.pipelines import stable_diffusion
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.stable_diffusion import latent_shape
from flaxdiff.pipelines.tasks import image_to_image
from flaxdiff.pipelines.tasks.edit import edit
from flaxdiff.pipelines.tasks.inpaint import inpaint, paste_back
from flaxdiff.pipelines.text import branches as text_branches
from flaxdiff.pipelines.text import check_prompts, texts

Pair = tuple[int, int]


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    prompt_2: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    negative_prompt_2: str | Sequence[str] | None = None,
    prompt_embeds: jax.Array | None = None,
    negative_prompt_embeds: jax.Array | None = None,
    pooled_prompt_embeds: jax.Array | None = None,
    negative_pooled_prompt_embeds: jax.Array | None = None,
    clip_skip: int = 0,
    original_size: Pair | None = None,
    crops_coords_top_left: Pair = (0, 0),
    target_size: Pair | None = None,
    negative_original_size: Pair | None = None,
    negative_crops_coords_top_left: Pair = (0, 0),
    negative_target_size: Pair | None = None,
    aesthetic_score: float = 6.0,
    negative_aesthetic_score: float = 2.5,
) -> dict[str, Any]:
    """The prompts as tokens of both encoders, or as embeddings, and the sizes.

    Args:
      prompt, negative_prompt: what to draw and what to avoid.
      prompt_2, negative_prompt_2: the same for the second encoder; by default what the first reads.
      prompt_embeds, pooled_prompt_embeds, …: in their place, [B, N, D] and [B, P].
      clip_skip: how many layers before the last but one to read the text encoders at, for the prompt.
      original_size, crops_coords_top_left, target_size: (height, width) in pixels of the picture that this is to look
        like, before it was cropped; where the crop began; and the size it has now. By default the picture's own.
      negative_…: the same for the negative branch; by default it is told what the positive one is.
      aesthetic_score, negative_aesthetic_score: for the refiner.
    """
    check_prompts(pipe, prompt, prompt_embeds)
    if prompt_embeds is not None and pooled_prompt_embeds is None:
        raise ValueError("prompt_embeds need pooled_prompt_embeds beside them; give both, as the encoders make them.")
    # An absent negative prompt is not an empty text to the checkpoints that say so, but zeros.
    settings = dict(pipe.settings)
    zeros = bool(settings.get("force_zeros_for_empty_prompt")) and negative_prompt is None
    arrays: dict[str, Any] = {"clip_skip": clip_skip, "negative_keep": np.float32(not zeros)}
    branches = (
        ("", prompt, prompt_2, prompt_embeds, pooled_prompt_embeds),
        ("negative_", negative_prompt, negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds),
    )
    for prefix, text, text_2, embeds, pooled in branches[: 1 + guided]:
        if embeds is not None:
            arrays |= {f"{prefix}prompt_embeds": embeds, f"{prefix}pooled_prompt_embeds": pooled}
            continue
        for (name, tokenizer), words in zip(pipe.tokenizers, (text, text if text_2 is None else text_2)):
            arrays[prefix + name.replace("tokenizer", "prompt_ids")] = tokenizer(texts(words))

    own, scored = (size.height, size.width), settings.get("requires_aesthetics_score")
    original, crop, target = original_size or own, crops_coords_top_left, target_size or own
    arrays["time_ids"] = np.float32([(*original, *crop, *((aesthetic_score,) if scored else target))])
    if guided:
        last = (negative_aesthetic_score,) if scored else negative_target_size or target
        first = (*(negative_original_size or original), *negative_crops_coords_top_left)
        told = scored or negative_original_size or negative_target_size  # else the branches differ in text alone
        arrays["negative_time_ids"] = np.float32([(*first, *last)]) if told else arrays["time_ids"]
    return arrays


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch: both encoders' hidden states side by side, the second's pooled state, and the sizes."""
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in networks.specs]
    cond = {}
    for branch, prefix in text_branches(inputs).items():
        if f"{prefix}prompt_embeds" in inputs:
            text, pooled = inputs[f"{prefix}prompt_embeds"], inputs[f"{prefix}pooled_prompt_embeds"]
        else:
            ids = [inputs[prefix + name.replace("text_encoder", "prompt_ids")] for name in encoders]
            outputs = [networks(name, i) for name, i in zip(encoders, ids)]
            skip = 0 if prefix else jnp.asarray(inputs["clip_skip"])
            layers = [o.hidden_states[len(o.hidden_states) - 2 - skip] for o in outputs]
            text, pooled = jnp.concatenate(layers, -1), outputs[-1].text_embeds
            if f"{prefix}keep" in inputs:
                keep = jnp.asarray(inputs[f"{prefix}keep"]).astype(text.dtype)
                text, pooled = text * keep, pooled * keep
        steered = control.encode(networks, inputs, text, branch)
        text, latent = networks("unet", text, method="keys_values"), latent_shape(networks.specs, inputs["size"])
        text = ip_adapter.encode(networks, inputs, branch, text, latent)
        sizes = inputs.get(f"{prefix}time_ids", inputs["time_ids"])
        cond[branch] = {"text": text, "pooled": pooled, "time_ids": sizes, **steered}
    return cond


def added(cond: Cond) -> dict[str, jax.Array]:
    return {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}


def times(networks: Networks, timesteps: jax.Array, cond: Cond) -> Any:
    """What the U-Net makes of times [N] and of the conditions."""
    of_unet = networks("unet", timesteps[:, None], added(cond), method="times", **stable_diffusion.told(cond))
    return control.times(networks, timesteps, cond, of_unet, added(cond))


def predict(networks: Networks, x: jax.Array, t: Any, cond: Cond) -> jax.Array:
    """The U-Net's output."""
    t, residuals = control.residuals(networks, x, t, cond)
    return networks("unet", x, t, cond["text"], added(cond), **residuals, **stable_diffusion.weighed(cond))


STABLE_DIFFUSION_XL = stable_diffusion.STABLE_DIFFUSION._replace(
    prepare=prepare, encode=encode, predict=predict, times=times
)


class StableDiffusionXLPipeline(DiffusionPipeline):
    """Text to image with the base of Stable Diffusion XL; `denoising_end` leaves the rest to the refiner."""

    family = STABLE_DIFFUSION_XL
    defaults = {"num_inference_steps": 50, "guidance_scale": 5.0}


class StableDiffusionXLImg2ImgPipeline(DiffusionPipeline):
    """Image to image with Stable Diffusion XL, and its refiner: `image` may be the base's latents."""

    family = STABLE_DIFFUSION_XL
    task = staticmethod(image_to_image)
    defaults = {**StableDiffusionXLPipeline.defaults, "strength": 0.3}


class StableDiffusionXLInpaintPipeline(DiffusionPipeline):
    """Paint over a part of a picture with Stable Diffusion XL, its refiner, or a U-Net made for that."""

    family = STABLE_DIFFUSION_XL
    task = staticmethod(inpaint)
    finish = staticmethod(paste_back)
    defaults = {"num_inference_steps": 50, "guidance_scale": 7.5, "strength": 0.9999}


class StableDiffusionXLInstructPix2PixPipeline(DiffusionPipeline):
    """Change a picture as an instruction says; `image_guidance_scale` is how closely to follow the picture."""

    family = STABLE_DIFFUSION_XL
    task = staticmethod(edit)
    defaults = {"num_inference_steps": 100, "guidance_scale": 5.0, "image_guidance_scale": 1.5}
