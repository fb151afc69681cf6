"""Stable Diffusion led by pictures: ControlNets and T2I-Adapters with 1, 2 and XL; see adapters/control.py.

Each class is a task of the family's plain pipeline with the networks that steer it. Those come from a folder that has
them, or as `controlnet=(spec, params)`, or a list of such, to `from_pretrained` of one that has not.
"""

from flaxdiff.adapters import control
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines import stable_diffusion_xl as xl
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks import image_to_image
from flaxdiff.pipelines.tasks.inpaint import inpaint, paste_back


class StableDiffusionControlNetPipeline(DiffusionPipeline):
    """Text to image with Stable Diffusion 1 or 2, led by `image` through ControlNets.

    >>> import flaxdiff, jax
    >>> base, params = flaxdiff.load()
    >>> net = flaxdiff.ControlNetModel.from_unet(base.unet, params["unet"], jax.random.key(0))
    >>> pipe, params = StableDiffusionControlNetPipeline.from_pretrained(flaxdiff.EMOJI, controlnet=net)
    >>> sorted(params)
    ['controlnet', 'text_encoder', 'unet', 'vae']
    """

    family = sd.STABLE_DIFFUSION
    task = staticmethod(control.text_to_image)
    extras = (control.prepare_controlnets,)
    steers = {"controlnet": "ControlNetModel"}


class StableDiffusionControlNetImg2ImgPipeline(StableDiffusionControlNetPipeline):
    """Image to image with Stable Diffusion 1 or 2, led by `control_image` through ControlNets."""

    task = staticmethod(image_to_image)
    defaults = {**sd.StableDiffusionImg2ImgPipeline.defaults, "controlnet_conditioning_scale": 0.8}


class StableDiffusionControlNetInpaintPipeline(StableDiffusionControlNetPipeline):
    """Paint over a part of a picture with Stable Diffusion 1 or 2, led by `control_image` through ControlNets."""

    task, finish = staticmethod(inpaint), staticmethod(paste_back)
    defaults = {**sd.StableDiffusionInpaintPipeline.defaults, "controlnet_conditioning_scale": 0.5}


class StableDiffusionAdapterPipeline(DiffusionPipeline):
    """Text to image with Stable Diffusion 1 or 2, led by `image` through T2I-Adapters."""

    family = sd.STABLE_DIFFUSION
    task = staticmethod(control.text_to_image)
    extras = (control.prepare_adapters,)
    steers = {"adapter": "T2IAdapter"}


class StableDiffusionXLControlNetPipeline(StableDiffusionControlNetPipeline):
    """Text to image with Stable Diffusion XL, led by `image` through ControlNets."""

    family, defaults = xl.STABLE_DIFFUSION_XL, xl.StableDiffusionXLPipeline.defaults


class StableDiffusionXLControlNetImg2ImgPipeline(StableDiffusionControlNetImg2ImgPipeline):
    """Image to image with Stable Diffusion XL, led by `control_image` through ControlNets."""

    family = xl.STABLE_DIFFUSION_XL
    defaults = {**StableDiffusionControlNetImg2ImgPipeline.defaults, **xl.StableDiffusionXLPipeline.defaults}


class StableDiffusionXLControlNetInpaintPipeline(StableDiffusionControlNetInpaintPipeline):
    """Paint over a part of a picture with Stable Diffusion XL, led by `control_image` through ControlNets."""

    family = xl.STABLE_DIFFUSION_XL
    defaults = {**xl.StableDiffusionXLPipeline.defaults, "strength": 0.9999, "controlnet_conditioning_scale": 1.0}


class StableDiffusionXLAdapterPipeline(StableDiffusionAdapterPipeline):
    """Text to image with Stable Diffusion XL, led by `image` through T2I-Adapters."""

    family, defaults = xl.STABLE_DIFFUSION_XL, xl.StableDiffusionXLPipeline.defaults
