"""Which levels a flow transformer is sampled at: what depends on the size of the picture, and on strength.

A larger picture shows more through the same noise, so schedulers with `use_dynamic_shifting` spend more of the steps
at high levels the more tokens there are.

Reference: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, section 5.3.2.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from flaxdiff.pipelines.generate import Size
from flaxdiff.pipelines.tasks import stride

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

# diffusers' names in a scheduler's configuration, and what stands for those that it does not have
LINE = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


def log_shift(pipe: "DiffusionPipeline", size: Size) -> float:
    """mu of a picture: on the line through two numbers of tokens that the scheduler names."""
    few, many, low, high = (getattr(pipe.solver, name, other) for name, other in LINE.items())
    tokens = (size.height // stride(pipe)) * (size.width // stride(pipe))
    return low + (high - low) / (many - few) * (tokens - few)


def shifted(pipe: "DiffusionPipeline", size: Size, asked: dict[str, Any]) -> dict[str, Any]:
    """The scheduler's own levels, shifted by the size of the picture where it does that; steps are run whole."""
    if asked.get("strength") is not None:
        given = [asked[way] for way in ("sigmas", "timesteps") if asked[way] is not None]
        n = len(given[0]) if given else asked["num_inference_steps"]
        kept = n - int(n - n * asked["strength"])
        asked = {**asked, "strength": min(1.0, (kept + 0.5) / n)}
    dynamic = getattr(pipe.solver, "use_dynamic_shifting", False) and asked.get("mu") is None
    return {**asked, "mu": log_shift(pipe, size)} if dynamic else asked


def even(pipe: "DiffusionPipeline", size: Size, asked: dict[str, Any]) -> dict[str, Any]:
    """As `shifted`, of n levels from 1 to 1/n in equal steps."""
    n, solver = asked["num_inference_steps"], pipe.solver
    if n is not None and "sigmas" in solver.accepts and not getattr(solver, "use_flow_sigmas", False):
        asked = {**asked, "num_inference_steps": None, "sigmas": np.linspace(1, 1 / n, n)}
    return shifted(pipe, size, asked)
