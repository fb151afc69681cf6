"""Stable Diffusion 3 and 3.5 led by pictures through ControlNets, one or several at once.

The networks see the latents of the pictures; those for inpainting see the picture without what is to be painted over,
and the mask beside it. They read the text of each branch, and of CLIP's pooled state some see nothing.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flaxdiff import images
from flaxdiff.adapters import control
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines import stable_diffusion_3 as sd3
from flaxdiff.pipelines.beside import CONTROL
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.schedulers.tables import folded


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    control_image: control.Pictures | None = None,
    controlnet_conditioning_scale: control.Each = 1.0,
    control_guidance_start: control.Each = 0.0,
    control_guidance_end: control.Each = 1.0,
) -> dict[str, Any]:
    """What the ControlNets see, and how much each counts when.

    Args:
      control_image: the picture to follow, as of `control.prepare_controlnets`; of several ControlNets, a list.
      controlnet_conditioning_scale: how much each counts.
      control_guidance_start, control_guidance_end: from which share of the steps on, and up to which.

    Raises:
      ValueError: as `control.prepare_controlnets`.
    """
    names = control.named(dict(pipe.specs), "controlnet")
    arrays = control.pictures(pipe, size, names, control_image, "control_image")
    return arrays | control.windows(names, controlnet_conditioning_scale, control_guidance_start, control_guidance_end)


def prepare_mask(pipe: DiffusionPipeline, size: Size, guided: bool, control_mask: Any = None) -> dict[str, Any]:
    """Which part of the picture is to be painted over.

    Args:
      control_mask: Pillow pictures, or arrays [B, H, W, 1] in [0, 1]: what is at least half white is.

    Raises:
      ValueError: there is none.
    """
    if control_mask is None:
        raise ValueError(f"{type(pipe).__name__} paints over a part of a picture; give control_mask=.")
    return {"control_mask": images.to_mask(control_mask, size.height, size.width)}


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch, and what the ControlNets see throughout."""
    told, vae = {}, networks.config("vae")
    for i, name in enumerate(control.named(networks.specs, "controlnet")):
        keys = folded(inputs["keys"], CONTROL + i)
        blind = networks.config(name).force_zeros_for_pooled_projection
        seen = 2 * jnp.asarray(inputs[f"{name}_image"]) - 1
        if "control_mask" in inputs:
            mask = jnp.asarray(inputs["control_mask"])
            z = sd.encode_image(networks, jnp.where(mask > 0, -1, seen), keys)
            factor = seen.shape[1] // z.shape[1]
            z = jnp.concatenate([z, 1 - mask[:, ::factor, ::factor].astype(z.dtype)], -1)
        else:  # those who see no pooled state were trained on latents that are not shifted either
            z = sd.encode_image(networks, seen, keys)
            z = z + blind * (vae.shift_factor or 0) * vae.scaling_factor
        told[name] = {"condition": networks(name, z, method="condition"), "scale": control.table(inputs, name)}
    return {branch: {**own, **told} for branch, own in sd3.encode(networks, inputs).items()}


def times(networks: Networks, timesteps: jax.Array, cond: Cond) -> Any:
    """What times [N] say to the blocks of each network, and how much each ControlNet counts [N, B]."""
    made = sd3.times(networks, timesteps, cond)
    for name in control.named(networks.specs, "controlnet"):
        config = networks.config(name)
        blind = config.force_zeros_for_pooled_projection or config.extra_conditioning_channels
        pooled = jnp.zeros_like(cond["pooled"]) if blind else cond["pooled"]
        made[name] = networks(name, timesteps[:, None], pooled, method="times"), cond[name]["scale"].T
    return made


def predict(networks: Networks, x: jax.Array, t: Any, cond: Cond) -> jax.Array:
    """The velocity of latents [B, H, W, C]."""
    added: Any = None
    for name in control.named(networks.specs, "controlnet"):
        of_time, scale = t[name]
        own = networks.config(name).use_pos_embed
        seen = x if own else networks("transformer", x, method="tokens")
        mine = seen, cond["text"], of_time, cond[name]["condition"], scale
        more = networks(name, *mine, method="residuals")
        added = more if added is None else added[: len(more)] + more[: len(added)]
    return sd3.predict(networks, x, t, cond, added)


class StableDiffusion3ControlNetPipeline(sd3.StableDiffusion3Pipeline):
    """Text to image with Stable Diffusion 3 or 3.5, led by `control_image` through ControlNets."""

    family = sd3.STABLE_DIFFUSION_3._replace(encode=encode, times=times, predict=predict)
    extras = (prepare,)
    steers = {"controlnet": "SD3ControlNetModel"}


class StableDiffusion3ControlNetInpaintingPipeline(StableDiffusion3ControlNetPipeline):
    """Paint over a part of `control_image` with Stable Diffusion 3 or 3.5, through ControlNets made for that."""

    extras = (prepare, prepare_mask)
