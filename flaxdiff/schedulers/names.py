"""Samplers by the names that A1111's web UI and k-diffusion give them, and the published AYS schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import SCHEDULERS, Scheduler, _unknown

_SDE = {"algorithm_type": "sde-dpmsolver++"}

# name -> class and options
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", _SDE),
    "DPM++ 2M SDE Heun": ("DPMSolverMultistepScheduler", {**_SDE, "solver_type": "heun"}),
    "DPM++ 3M SDE": ("DPMSolverMultistepScheduler", {**_SDE, "solver_order": 3}),
    "DPM++ 2S a": ("DPMSolver2SAncestralScheduler", {}),
    "DPM++ SDE": ("DPMSolverSinglestepScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM adaptive": ("DPMSolverAdaptiveScheduler", {}),
    "DPM fast": ("DPMSolverFastScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}

# k-diffusion's functions -> the names above
K_SAMPLERS: dict[str, str] = {
    "sample_dpm_2": "DPM2",
    "sample_dpm_2_ancestral": "DPM2 a",
    "sample_dpm_adaptive": "DPM adaptive",
    "sample_dpm_fast": "DPM fast",
    "sample_dpmpp_2m": "DPM++ 2M",
    "sample_dpmpp_2m_sde": "DPM++ 2M SDE",
    "sample_dpmpp_2s_ancestral": "DPM++ 2S a",
    "sample_dpmpp_3m_sde": "DPM++ 3M SDE",
    "sample_dpmpp_sde": "DPM++ SDE",
    "sample_euler": "Euler",
    "sample_euler_ancestral": "Euler a",
    "sample_heun": "Heun",
    "sample_lms": "LMS",
}

# schedule type, which may follow a sampler's name -> options
SCHEDULES: dict[str, dict[str, Any]] = {
    "Karras": {"use_karras_sigmas": True},
    "SGM Uniform": {"timestep_spacing": "trailing"},
    "Simple": {"timestep_spacing": "trailing"},
    "Exponential": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "Beta": {"timestep_spacing": "linspace", "use_beta_sigmas": True},
}


def scheduler(name: str, config: Mapping[str, Any] | Scheduler | None = None, **changes: Any) -> Scheduler:
    """The scheduler behind a name such as "DPM++ 2M SDE Karras".

    Args:
      name: a sampler, perhaps followed by a schedule type; capitals do not matter, and "sgm_uniform" will do.
      config: of a checkpoint's scheduler, for its betas and prediction type.
      changes: further options.

    Raises ValueError for a name that is not known, or a schedule type that the sampler cannot follow.

    >>> s = scheduler("DPM++ 2M SDE Karras", beta_schedule="scaled_linear")
    >>> type(s).__name__, s.algorithm_type, s.use_karras_sigmas
    ('DPMSolverMultistepScheduler', 'sde-dpmsolver++', True)
    """
    plain = " ".join(name.replace("_", " ").lower().split())
    for kind, options in {"": {}, **SCHEDULES}.items():
        for sampler, (cls, own) in SAMPLERS.items():
            if plain == f"{sampler} {kind}".lower().strip():
                options = {key: v for key, v in options.items() if kind != "Exponential" or key in _takes(cls)}
                return SCHEDULERS[cls].from_config(config or {}, **{**own, **options, **changes})
    known = (*SAMPLERS, *(f"{sampler} {kind}" for sampler in SAMPLERS for kind in SCHEDULES))
    raise _unknown("sampler", name, "flaxdiff", known)


def _takes(cls: str) -> tuple[str, ...]:
    return SCHEDULERS[cls].option_names()


# Align Your Steps (Sabour et al., 2404.14507): ten-step schedules tuned to a model, as `plan(timesteps=...)` or
# `plan(sigmas=...)` takes them, under diffusers' names.
AysSchedules: dict[str, tuple[float, ...]] = {
    "StableDiffusionTimesteps": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "StableDiffusionSigmas": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0),
    "StableDiffusionXLTimesteps": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
    "StableDiffusionXLSigmas": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.0),
    "StableDiffusionVideoSigmas": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.0),
}
