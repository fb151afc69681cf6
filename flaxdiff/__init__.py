"""flaxdiff: diffusion models in JAX, as pure functions.

The verbs (`load`, `save`, `init`, `apply`, …) and every documented class, imported when first used.
"""

import importlib

from flaxdiff.registry import PUBLIC

__all__ = sorted(PUBLIC)


def __getattr__(name: str):
    if name not in PUBLIC:
        raise AttributeError(f"flaxdiff has no {name!r}; it has {', '.join(__all__)}.")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
