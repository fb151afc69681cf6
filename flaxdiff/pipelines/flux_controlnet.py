"""Flux led by pictures through ControlNets, one or several at once, of one kind of control each or unions of many.

What the networks add is worked out from the positive prompt, and is the same for all branches.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.adapters import control
from flaxdiff.nn.packing import pack
from flaxdiff.pipelines import flux
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines.beside import CONTROL
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks import native_image_to_image
from flaxdiff.pipelines.tasks.inpaint import inpaint, paste_back
from flaxdiff.schedulers.tables import folded

Each = control.Each


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    control_image: control.Pictures | None = None,
    control_mode: int | Sequence[int] | None = None,
    controlnet_conditioning_scale: Each = 1.0,
    control_guidance_start: Each = 0.0,
    control_guidance_end: Each = 1.0,
) -> dict[str, Any]:
    """What the ControlNets see, and how much each counts when.

    Args:
      control_image: the picture to follow, as of `control.prepare_controlnets`; of several ControlNets, a list.
      control_mode: of a union, which kind of control the picture is; of several ControlNets, a list.
      controlnet_conditioning_scale: how much each counts.
      control_guidance_start, control_guidance_end: from which share of the steps on, and up to which.

    Raises:
      ValueError: as `control.prepare_controlnets`, and for a mode that a union does not have, or that none asks for.
    """
    names = control.named(dict(pipe.specs), "controlnet")
    arrays = control.pictures(pipe, size, names, control_image, "control_image")
    arrays |= control.windows(names, controlnet_conditioning_scale, control_guidance_start, control_guidance_end)
    modes = list(control_mode) if isinstance(control_mode, Sequence) else [control_mode] * len(names)
    if len(modes) != len(names):
        raise ValueError(
            f"control_mode holds {len(modes)} modes for {len(names)} ControlNets; a union that is to follow several "
            "pictures is given as often, as a list."
        )
    for name, mode in zip(names, modes):
        kinds = dict(pipe.specs)[name].config.num_mode
        if kinds is not None:
            if mode is None or not 0 <= mode < kinds:
                raise ValueError(f"{name} is a union of {kinds}: control_mode={mode!r} must be a number below that.")
            arrays[f"{name}_mode"] = np.int32([mode])
    return arrays


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch, and what the ControlNets are told throughout."""
    cond = flux.encode(networks, inputs)
    text, told = cond["positive"], {}
    for i, name in enumerate(control.named(networks.specs, "controlnet")):
        keys = folded(inputs["keys"], CONTROL + i)
        seen = 2 * jnp.asarray(inputs[f"{name}_image"]) - 1
        if networks.config(name).conditioning_embedding_channels is None:
            seen = pack(sd.encode_image(networks, seen, keys))
        told[name] = {
            **text,
            "condition": networks(name, seen, method="condition"),
            "scale": control.table(inputs, name),
            **({"mode": inputs[f"{name}_mode"]} if f"{name}_mode" in inputs else {}),
        }
    return {branch: {**own, **told} for branch, own in cond.items()}


def times(networks: Networks, timesteps: jax.Array, cond: Cond) -> Any:
    """What times [N] say to the blocks of each network, and how much each ControlNet counts [N, B]."""
    made = {"transformer": flux.times(networks, timesteps, cond)}
    for name in control.named(networks.specs, "controlnet"):
        own = {**cond[name], **({"timestep_cond": cond["timestep_cond"]} if "timestep_cond" in cond else {})}
        made[name] = flux.times(networks, timesteps, own, name), cond[name]["scale"].T
    return made


def both(one: jax.Array | None, other: jax.Array | None) -> jax.Array | None:
    """What two ControlNets add behind blocks of a kind: as far as both go, and nothing where the first adds nothing."""
    return one if one is None or other is None else one[: len(other)] + other[: len(one)]


def predict(networks: Networks, x: jax.Array, t: Any, cond: Cond) -> jax.Array:
    """The velocity of latents [B, H, W, C]."""
    tokens, where = flux.seen([x])
    added: Any = None
    for name in control.named(networks.specs, "controlnet"):
        told, (of_time, scale) = cond[name], t[name]
        mine = tokens, told["condition"], told.get("mode"), scale, told["text"], of_time, where
        more = networks(name, *mine, method="residuals")
        added = more if added is None else tuple(map(both, added, more))
    repeat = networks.config("controlnet").conditioning_embedding_channels is not None
    return flux.predict(networks, x, t["transformer"], cond, (*added, repeat))


class FluxControlNetPipeline(flux.FluxPipeline):
    """Text to image with Flux, led by `control_image` through ControlNets."""

    family = flux.FLUX._replace(encode=encode, times=times, predict=predict)
    extras = (prepare,)
    steers = {"controlnet": "FluxControlNetModel"}
    defaults = {**flux.FluxPipeline.defaults, "guidance_scale": 7.0}


class FluxControlNetImg2ImgPipeline(FluxControlNetPipeline):
    """Image to image with Flux, led by `control_image` through ControlNets."""

    task = staticmethod(native_image_to_image)
    defaults = flux.FluxImg2ImgPipeline.defaults


class FluxControlNetInpaintPipeline(FluxControlNetPipeline):
    """Paint over a part of a picture with Flux, led by `control_image` through ControlNets."""

    task, finish = staticmethod(inpaint), staticmethod(paste_back)
    defaults = flux.FluxInpaintPipeline.defaults
