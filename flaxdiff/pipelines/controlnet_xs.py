"""Stable Diffusion 1, 2 and XL led by pictures through ControlNet-XS.

The pipeline holds the U-Net and the adapter, `controlnet`, each under its own names. Where the network runs, the two
are one (`UNetControlNetXSModel`), which costs nothing: their parameters share a dictionary while it is compiled.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flaxdiff.adapters import control
from flaxdiff.core import Params, Spec
from flaxdiff.models.controlnet_xs import UNetControlNetXSModel
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines import stable_diffusion_xl as xl
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    image: control.Pictures | None = None,
    controlnet_conditioning_scale: float = 1.0,
    control_guidance_start: float = 0.0,
    control_guidance_end: float = 1.0,
) -> dict[str, Any]:
    """What the adapter sees, and how much it counts when; arguments as of `control.prepare_controlnets`."""
    names = control.named(dict(pipe.specs), "controlnet")
    windows = control.windows(names, controlnet_conditioning_scale, control_guidance_start, control_guidance_end)
    return control.pictures(pipe, size, names, image, "image") | windows


def _joined(networks: Networks) -> Networks:
    """The networks with the U-Net and the adapter as one, in the U-Net's place."""
    specs, params = dict(networks.specs), dict(networks.params)
    specs["unet"] = UNetControlNetXSModel.joined(specs["unet"], specs.pop("controlnet"))
    both = {"base": params["unet"], "ctrl": params.pop("controlnet")}
    params["unet"] = {f"{at}.{name}": weight for at, own in both.items() for name, weight in own.items()}
    return Networks(specs, params)


def _added(cond: Cond) -> tuple[Any, ...]:
    """What the U-Net of XL is told beside the text."""
    return (xl.added(cond),) if "pooled" in cond else ()


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """As of the family, and what the adapter makes of the picture, and its scale at each row [B, N]."""
    networks = _joined(networks)
    family = xl.STABLE_DIFFUSION_XL if "time_ids" in inputs else sd.STABLE_DIFFUSION
    told = {"condition": networks("unet", inputs["controlnet_image"], method="condition")}
    told |= {"scale": control.table(inputs, "controlnet"), "within": control.within(inputs, "controlnet")}
    return {branch: {**cond, "control": told} for branch, cond in family.encode(networks, inputs).items()}


def times(networks: Networks, timesteps: jax.Array, cond: Cond) -> Any:
    """What both networks make of times [N], and the adapter's scale at each."""
    scale, within = (jnp.swapaxes(cond["control"][name], 0, 1) for name in ("scale", "within"))
    options = {"method": "times", "within": within, **sd.told(cond)}
    return {"unet": _joined(networks)("unet", timesteps[:, None], *_added(cond), **options), "scale": scale}


def predict(networks: Networks, x: jax.Array, t: Any, cond: Cond) -> jax.Array:
    """The output of both networks as one."""
    told = {"condition": cond["control"]["condition"], "scale": t["scale"]}
    return _joined(networks)("unet", x, t["unet"], cond["text"], *_added(cond), **told, **sd.weighed(cond))


class StableDiffusionControlNetXSPipeline(DiffusionPipeline):
    """Text to image with Stable Diffusion 1 or 2, led by `image` through a ControlNet-XS.

    It comes from a folder that has one, or as `controlnet=(spec, params)` to `from_pretrained` of one that has not.
    """

    family = sd.STABLE_DIFFUSION._replace(encode=encode, times=times, predict=predict)
    task = staticmethod(control.text_to_image)
    extras = (prepare,)
    steers = {"controlnet": "ControlNetXSAdapter"}

    @classmethod
    def separate(cls, specs: Mapping[str, Spec], params: Mapping[str, Params]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Specs and parameters with the U-Net and its adapter apart, where a folder holds them as one."""
        specs, params = dict(specs), dict(params)
        if specs["unet"].module is UNetControlNetXSModel:
            for name, (spec, own) in UNetControlNetXSModel.split(specs["unet"], params["unet"]).items():
                specs[name], params[name] = spec, own
        return specs, params


class StableDiffusionXLControlNetXSPipeline(StableDiffusionControlNetXSPipeline):
    """Text to image with Stable Diffusion XL, led by `image` through a ControlNet-XS."""

    family = xl.STABLE_DIFFUSION_XL._replace(encode=encode, times=times, predict=predict)
    defaults = xl.StableDiffusionXLPipeline.defaults
