"""flaxdiff: diffusion models in JAX, as pure functions.

The verbs (`load`, `save`, `init`, `apply`, …) and every documented class, imported when first used.
"""

import importlib

_WHERE = {
    "flaxdiff.core": ("Spec", "abstract", "apply", "init", "layout"),
    "flaxdiff.models.autoencoder_kl": ("AutoencoderKL",),
    "flaxdiff.models.clip": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "flaxdiff.models.unet_2d": ("UNet2DModel",),
    "flaxdiff.models.unet_2d_condition": ("UNet2DConditionModel",),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"flaxdiff has no {name!r}; it has {', '.join(__all__)}.")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
