"""Pictures that steer a U-Net: ControlNets and T2I-Adapters, one or several at once, for every family.

The networks are components of the pipeline, `controlnet`, `controlnet_1`, … and `adapter`, `adapter_1`, …. Each has a
picture, a scale and a window of the run in which it counts; all are arguments of the compiled program. What does not
depend on the time is worked out once: a T2I-Adapter's features, the first convolutions of a ControlNet.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flaxdiff.core import Model, Params, Spec
from flaxdiff.images import Box, to_array
from flaxdiff.models.controlnet import ControlNetModel
from flaxdiff.models.controlnet_flux import FluxControlNetModel
from flaxdiff.models.controlnet_sd3 import SD3ControlNetModel
from flaxdiff.models.t2i_adapter import T2IAdapter
from flaxdiff.pipelines import tasks
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.tasks.inpaint import region

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

Pictures = Image.Image | np.ndarray | Sequence
Each = float | Sequence[float]  # one number, or one for each network
KINDS = ("controlnet", "adapter")


def named(components: Iterable[str], kind: str) -> list[str]:
    """The components of one kind, in their order.

    >>> named(["unet", "controlnet", "controlnet_1"], "controlnet")
    ['controlnet', 'controlnet_1']
    """
    return sorted(
        (n for n in components if re.fullmatch(rf"{kind}(_\d+)?", n)), key=lambda n: int("0" + n[len(kind) + 1 :])
    )


class Several(list[tuple[Spec, Params]]):
    """Networks that steer one U-Net together: a list of (spec, params), for `from_pretrained` of a pipeline."""

    member: ClassVar[type[Model]]

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> "Several":
        """Those in `folder`, `folder_1`, …, as PyTorch's class of this name saves them; options as of `load_model`.

        Raises:
          FileNotFoundError: there is no such folder.
        """
        found = cls([cls.member.from_pretrained(folder, **options)])
        while Path(further := f"{folder}_{len(found)}").is_dir():
            found.append(cls.member.from_pretrained(further, **options))
        return found


class MultiControlNetModel(Several):
    """Several ControlNets."""

    member = ControlNetModel


class FluxMultiControlNetModel(Several):
    """Several ControlNets for Flux."""

    member = FluxControlNetModel


class SD3MultiControlNetModel(Several):
    """Several ControlNets for Stable Diffusion 3."""

    member = SD3ControlNetModel


class MultiAdapter(Several):
    """Several T2I-Adapters."""

    member = T2IAdapter


# --- on the host -----------------------------------------------------------------------------------------------------


def text_to_image(
    pipe: "DiffusionPipeline",
    image: Pictures | None = None,
    height: int | None = None,
    width: int | None = None,
    latents: jax.Array | None = None,
) -> tasks.Prepared:
    """Start from noise; the picture is by default as large as the first `image` that it is to follow.

    Args:
      image: as of `prepare_controlnets`.
      height, width, latents: as of `tasks.text_to_image`.
    """
    first = image
    while isinstance(first, list | tuple) and first:
        first = first[0]
    if first is not None and (height is None or width is None):
        sides = (first.height, first.width) if isinstance(first, Image.Image) else np.shape(first)[-3:-1]
        factor = tasks.vae_factor(pipe)
        height, width = (given or side // factor * factor for given, side in zip((height, width), sides, strict=True))
    return tasks.text_to_image(pipe, height, width, latents)


def prepare_controlnets(
    pipe: "DiffusionPipeline",
    size: Size,
    guided: bool,
    image: Pictures | None = None,
    control_image: Pictures | None = None,
    controlnet_conditioning_scale: Each | None = None,
    control_guidance_start: Each = 0.0,
    control_guidance_end: Each = 1.0,
    guess_mode: bool = False,
    mask_image: Any = None,
    padding_mask_crop: int | None = None,
) -> dict[str, Any]:
    """What the ControlNets see, and how much each counts when.

    Args:
      image: the picture to follow, or one for each prompt, Pillow's or [B, H, W, 3] in [0, 1]; of several
        ControlNets, a list with the pictures of each (or for each prompt a list with a picture for each ControlNet).
      control_image: the same where `image` is what the run starts from.
      controlnet_conditioning_scale: how much each counts.
      control_guidance_start, control_guidance_end: from which share of the steps on, and up to which.
      guess_mode: the ControlNet leads even without a prompt: it counts in the positive branch only, and less for what
        is fine.
      mask_image, padding_mask_crop: as of inpainting; Pillow's control images are cut as the picture is.

    Raises:
      ValueError: no picture, not one for each ControlNet, one of another size, or a window that is none.
    """
    names, scale = named(dict(pipe.specs), "controlnet"), controlnet_conditioning_scale
    if scale is None:
        scale = pipe.defaults.get("controlnet_conditioning_scale", 1.0)
    starts = "strength" in pipe.defaults  # then `image` is what the run starts from
    given, option = (control_image, "control_image") if starts else (image, "image")
    box = region(image, mask_image, size, padding_mask_crop)
    arrays = pictures(pipe, size, names, given, option, box)
    arrays |= windows(names, scale, control_guidance_start, control_guidance_end)
    guess_mode |= any(dict(pipe.specs)[name].config.global_pool_conditions for name in names[:1])
    return arrays | {"guess_mode": np.asarray([guess_mode])}


def prepare_adapters(
    pipe: "DiffusionPipeline",
    size: Size,
    guided: bool,
    image: Pictures | None = None,
    adapter_conditioning_scale: Each = 1.0,
    adapter_conditioning_factor: float = 1.0,
) -> dict[str, Any]:
    """What the T2I-Adapters see, and how much each counts up to when.

    Args:
      image: as of `prepare_controlnets`.
      adapter_conditioning_scale: how much each counts.
      adapter_conditioning_factor: up to which share of the steps.

    Raises:
      ValueError: as `prepare_controlnets`.
    """
    names = named(dict(pipe.specs), "adapter")
    window = windows(names, adapter_conditioning_scale, 0.0, adapter_conditioning_factor)
    return pictures(pipe, size, names, image, "image") | window


def pictures(
    pipe: "DiffusionPipeline",
    size: Size,
    names: Sequence[str],
    given: Pictures | None,
    option: str,
    box: Box | None = None,
) -> dict[str, np.ndarray]:
    """The picture of each network, [1 or B, H, W, C] in [0, 1]."""
    if not names:
        raise ValueError(f"{type(pipe).__name__} has no network to steer it; load it with controlnet= or adapter=.")
    if given is None:
        raise ValueError(f"{type(pipe).__name__} follows a picture; give {option}=.")
    if len(names) == 1:
        given = [given]
    elif isinstance(given, list | tuple) and given and all(isinstance(g, list | tuple) for g in given):
        given = [list(of_one) for of_one in zip(*given, strict=True)]
    if not isinstance(given, list | tuple) or len(given) != len(names):
        many = len(given) if isinstance(given, list | tuple) else 1
        raise ValueError(
            f"{option} holds pictures for {many} of {len(names)} networks; give a list with those of each."
        )
    return {f"{n}_image": _picture(dict(pipe.specs)[n].config, size, g, option, box) for n, g in zip(names, given)}


def _picture(config: Any, size: Size, given: Pictures, option: str, box: Box | None) -> np.ndarray:
    channels = getattr(config, "conditioning_channels", None) or config.in_channels
    given = list(given) if isinstance(given, list | tuple) else [given]
    if box is not None:
        array = (to_array(given, size.height, size.width, box) + 1) / 2
    elif all(isinstance(g, Image.Image) for g in given):
        resized = [
            g.convert("RGB" if channels == 3 else "L").resize((size.width, size.height), Image.Resampling.LANCZOS)
            for g in given
        ]
        array = np.stack([np.asarray(g, np.float32).reshape(size.height, size.width, -1) / 255 for g in resized])
    else:
        array = np.concatenate([np.asarray(g, np.float32)[(None,) * (4 - np.ndim(g))] for g in given])
    if array.shape[1:] != (size.height, size.width, channels):
        raise ValueError(
            f"{option} has shape {array.shape}; the picture of {size.height} x {size.width} pixels and the network "
            f"need [B, {size.height}, {size.width}, {channels}]: resize it, or give a Pillow image."
        )
    factor = getattr(config, "downscale_factor", 1)
    if size.height % factor or size.width % factor:
        raise ValueError(f"{size}: the adapter needs multiples of {factor}; change height and width.")
    return array


def windows(names: Sequence[str], scale: Each, start: Each, end: Each) -> dict[str, np.ndarray]:
    """(scale, start, end) of each network, [1, 3]."""
    rows = []
    for option, value in (("scale", scale), ("start", start), ("end", end)):
        value = np.asarray(value, np.float32)
        if value.ndim > 1 or value.ndim and len(value) != len(names):
            raise ValueError(
                f"{option} of the control: {value.shape} numbers for {len(names)} networks; give one, or one each."
            )
        rows.append(np.broadcast_to(value, len(names)))
    for first, last in zip(*rows[1:]):
        if not 0 <= first < last <= 1:
            raise ValueError(
                f"The control counts from {first} to {last} of the steps; it must begin in [0, 1) and end after."
            )
    return {f"{name}_window": row[None] for name, row in zip(names, np.stack(rows, 1))}


# --- on the device ---------------------------------------------------------------------------------------------------


def encode(networks: Networks, inputs: Inputs, text: jax.Array, branch: str) -> Cond:
    """What the networks make of their pictures and a branch's text [B, M, D], and their scale at each row [B, N, …]."""
    told: dict[str, Any] = {}
    for name in named(networks.specs, "controlnet"):
        guess = jnp.asarray(inputs["guess_mode"])[:, None]
        strengths = networks(name, guess, method="strengths")  # [B, residuals]
        strengths = jnp.where(guess, 0, strengths) if branch == "negative" else strengths
        told[name] = {
            "text": networks(name, text, method="keys_values"),
            "condition": networks(name, inputs[f"{name}_image"], method="condition"),
            "scale": table(inputs, name)[..., None] * strengths[:, None],
        }
    for name in named(networks.specs, "adapter"):
        told[name] = {"features": networks(name, inputs[f"{name}_image"]), "scale": table(inputs, name)}
    return told


def table(inputs: Inputs, name: str) -> jax.Array:
    """The scale of a network at each row of the plan, [B, N]: zero outside its window."""
    return jnp.where(within(inputs, name), jnp.asarray(inputs[f"{name}_window"])[:, :1], 0)


def within(inputs: Inputs, name: str) -> jax.Array:
    """Whether each row of the plan lies in a network's window, [B, N]."""
    start, end = (jnp.asarray(inputs[f"{name}_window"])[:, i, None] for i in (1, 2))
    row, steps = jnp.arange(len(inputs["plan"].timesteps), dtype=jnp.float32), jnp.float32(inputs["plan"].steps)
    # a share that is meant to fall on a step falls on it however it was rounded
    return (row >= start * steps - 1e-3) & (row + 1 <= end * steps + 1e-3)


def times(networks: Networks, timesteps: jax.Array, cond: Cond, of_unet: Any, *added: Any) -> Any:
    """What the U-Net makes of times [N], and what networks of control, if any, make of them, with their scales."""
    told = {name: jnp.swapaxes(cond[name]["scale"], 0, 1) for kind in KINDS for name in named(networks.specs, kind)}
    of_nets = {n: networks(n, timesteps[:, None], *added, method="times") for n in named(networks.specs, "controlnet")}
    return {"unet": of_unet, "scale": told, **of_nets} if told else of_unet


def residuals(networks: Networks, x: jax.Array, t: Any, cond: Cond) -> tuple[Any, Mapping[str, Any]]:
    """What the U-Net reads of the time, and what is added to it, as its keyword arguments."""
    more: dict[str, Any] = {}
    for name in named(networks.specs, "controlnet"):
        x = x[..., : networks.config(name).in_channels]  # of an inpainting U-Net's, the noisy latent
        told, scale = cond[name], t["scale"][name]
        out = networks(name, x, t[name], told["text"], told["condition"], scale, method="residuals")
        keys = ("down_block_additional_residuals", "mid_block_additional_residual")
        more = {key: _sum(more.get(key), part) for key, part in zip(keys, out)}
    for name in named(networks.specs, "adapter"):
        scaled = lambda f, name=name: f * t["scale"][name][:, None, None, None].astype(f.dtype)
        key = "down_intrablock_additional_residuals"
        more[key] = _sum(more.get(key), tuple(map(scaled, cond[name]["features"])))
    return (t["unet"] if more else t), more


def _sum(one: Any, other: Any) -> Any:
    return other if one is None else jax.tree.map(jnp.add, one, other)
