"""What all schedulers share: configs in diffusers' format, plans, and the training side (noise, velocity).

A scheduler class is a frozen dataclass whose fields are diffusers' config keys with diffusers' defaults. It says which
levels a run visits (`grid`) and which arithmetic crosses them (`solver`); everything else is here.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from . import spacing, tables
from .path import BETAS, Grid, Prediction, prediction
from .solvers import Step
from .tables import Plan, SchedulerState

CONFIG_NAME = "scheduler_config.json"

# Every scheduler class by name; a class enters when it is defined.
SCHEDULERS: dict[str, type[Scheduler]] = {}

# What an option may be, wherever it occurs; a class narrows or widens it in `choices`.
CHOICES: dict[str, tuple] = {
    "beta_schedule": tuple(BETAS),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": spacing.SPACINGS,
    "final_sigmas_type": ("zero", "sigma_min"),
}

# Keys of diffusers' schedulers that no class here has: a config may carry them along.
FOREIGN = frozenset("set_alpha_to_zero skip_sample_noise".split())

# The classes among which a pipeline's scheduler may be swapped: from_config of any takes the config of any other.
KarrasDiffusionSchedulers = enum.Enum(
    "KarrasDiffusionSchedulers",
    "DDIMScheduler DDPMScheduler PNDMScheduler LMSDiscreteScheduler EulerDiscreteScheduler HeunDiscreteScheduler "
    "EulerAncestralDiscreteScheduler DPMSolverMultistepScheduler DPMSolverSinglestepScheduler KDPM2DiscreteScheduler "
    "KDPM2AncestralDiscreteScheduler DEISMultistepScheduler UniPCMultistepScheduler DPMSolverSDEScheduler "
    "EDMEulerScheduler",
)


def _unknown(what: str, name: str, where: str, known: Sequence[str]) -> ValueError:
    close = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it takes {', '.join(sorted(known))}."
    return ValueError(f"{where} has no {what} {name!r}: {hint}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduler:
    """Base of all schedulers: a frozen, hashable config that makes plans.

    >>> import jax
    >>> from flaxdiff.schedulers import EulerDiscreteScheduler
    >>> s = EulerDiscreteScheduler(use_karras_sigmas=True)
    >>> plan = s.plan(num_inference_steps=10)
    >>> noise = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    >>> state = s.init(plan, noise * plan.init_noise_sigma, jax.random.key(1))
    >>> for _ in range(int(plan.steps)):
    ...     output = jax.numpy.tanh(state.model_input)          # a network would also see state.timestep
    ...     state = s.step(state, output)
    >>> state.sample.shape
    (1, 8, 8, 4)
    """

    num_train_timesteps: int = 1000

    order: ClassVar[int] = 1  # evaluations a step
    accepts: ClassVar[frozenset[str]] = frozenset({"timesteps"})  # custom schedules that `plan` takes
    options: ClassVar[Mapping[str, Any]] = {}  # what else `plan` takes: options of the solver
    choices: ClassVar[Mapping[str, tuple]] = {}
    aliases: ClassVar[Mapping[str, Mapping[str, str]]] = {}  # another class's values for a shared key
    lacks: ClassVar[frozenset[str]] = frozenset()  # options of a parent class that this one does not have
    swaps: ClassVar[bool] = False  # may one of KarrasDiffusionSchedulers take its place?
    ascends: ClassVar[bool] = False  # does a run lead from an image to noise?
    ends: ClassVar[frozenset[str]] = frozenset({"sigmas"})  # custom schedules whose last entry is where the run ends

    def __new__(cls, **given: Any) -> Self:
        for name in sorted(cls.lacks & given.keys()):
            raise _unknown("option", name, cls.__name__, cls.option_names())
        self = object.__new__(cls)
        # As diffusers does, an option left at its default does not follow the config into another class.
        object.__setattr__(self, "given", frozenset(given))
        return self

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__name__.endswith("Scheduler"):
            SCHEDULERS[cls.__name__] = cls

    def __post_init__(self) -> None:
        for name, value in self.option_values().items():
            if isinstance(value, (list, np.ndarray)):
                value = tuple(float(v) for v in value)
            value = self.aliases.get(name, {}).get(value, value)
            object.__setattr__(self, name, value)
            allowed = {**CHOICES, **self.choices}.get(name)
            if allowed and value not in allowed:
                raise ValueError(
                    f"{type(self).__name__}: {name}={value!r} must be one of {', '.join(map(repr, allowed))}."
                )
        ramps = [name for name in spacing.RAMPS if getattr(self, name, False)]
        if len(ramps) > 1:
            raise ValueError(f"{type(self).__name__}: {' and '.join(ramps)} exclude each other; set one.")
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps={self.num_train_timesteps} must be positive.")

    # --- configs -----------------------------------------------------------------------------------------------------

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of the config's options."""
        return tuple(f.name for f in dataclasses.fields(cls) if f.name not in cls.lacks)

    def option_values(self) -> dict[str, Any]:
        """The config's options and their values."""
        return {name: getattr(self, name) for name in self.option_names()}

    @property
    def config(self) -> dict[str, Any]:
        """The config as diffusers writes it, with its class name and which options are merely defaults."""
        defaults = sorted(set(self.option_names()) - self.given)
        return {"_class_name": type(self).__name__, **self.option_values(), "_use_default_values": defaults}

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Scheduler, **changes: Any) -> Self:
        """This class with the options of another scheduler or of a config dict, and the given changes.

        Options that belong to other schedulers are left out, as are private keys. Raises ValueError for a key that no
        scheduler has.

        >>> from flaxdiff.schedulers import DPMSolverMultistepScheduler, PNDMScheduler
        >>> DPMSolverMultistepScheduler.from_config(PNDMScheduler(beta_end=0.012), solver_order=3).beta_end
        0.012
        """
        config = config.config if isinstance(config, Scheduler) else dict(config)
        skip = set(config.get("_use_default_values", ()))
        known = FOREIGN.union(*(c.option_names() for c in SCHEDULERS.values()))
        for name in [n for n in config if not n.startswith("_") and n not in known]:
            raise _unknown("option", name, cls.__name__, cls.option_names())
        for name in [n for n in changes if n not in cls.option_names()]:
            raise _unknown("option", name, cls.__name__, cls.option_names())
        kept = {n: v for n, v in config.items() if n in cls.option_names() and n not in skip}
        return cls(**{**kept, **changes})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, subfolder: str = "", **changes: Any) -> Self:
        """This class with the options in a folder's scheduler_config.json, whichever class wrote them."""
        return cls.from_config(read_config(folder, subfolder), **changes)

    def save_config(self, folder: str | os.PathLike) -> None:
        """Write scheduler_config.json, which diffusers reads as well; beside it first, then renamed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {k: v for k, v in self.config.items() if k != "_use_default_values"}
        beside = folder / f".{CONFIG_NAME}.{secrets.token_hex(4)}.partial"
        try:
            beside.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            os.replace(beside, folder / CONFIG_NAME)
        finally:
            beside.unlink(missing_ok=True)

    @property
    def compatibles(self) -> tuple[type[Scheduler], ...]:
        """The classes that a config like this one can be given to, this one included."""
        swaps = KarrasDiffusionSchedulers.__members__ if self.swaps else ()
        return tuple(c for name, c in SCHEDULERS.items() if c is type(self) or name in swaps)

    def _no_levels(self) -> TypeError:
        return TypeError(f"{type(self).__name__} has no levels alpha and sigma; {', '.join(SCHEDULERS)} may have.")

    # --- plans -------------------------------------------------------------------------------------------------------

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        """The levels of a run of n steps; `custom` holds what `plan` was given of timesteps, sigmas, mu and options."""
        raise self._no_levels()

    def solver(self, grid: Grid, n: int, **options: Any) -> Step:
        """The step function that crosses these levels in n steps, see `solvers`."""
        raise self._no_levels()

    def prediction(self, grid: Grid) -> Prediction:
        """How the network's output becomes x_0 and eps."""
        return prediction(self.prediction_type, grid.alpha, grid.sigma)

    def columns(self, grid: Grid) -> dict[str, Any]:
        """Further columns of the table: see `tables.tabulate`."""
        if getattr(self, "thresholding", False):
            return {"threshold": (self.dynamic_thresholding_ratio, self.sample_max_value)}
        if getattr(self, "clip_sample", False):
            return {"clip": self.clip_sample_range}
        return {}

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        strength: float | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        pad_to: int | None = None,
        **options: Any,
    ) -> Plan:
        """The tables of one run.

        Args:
          num_inference_steps: how many steps; or else
          timesteps: the training times to visit, descending; or
          sigmas: the noise levels to visit, descending, the last being where the run ends.
          mu: log of the time shift, for schedulers with `use_dynamic_shifting`.
          strength: image to image: keep this share of the steps, those with the least noise.
          denoising_start: begin where this share of the denoising is done (as an SDXL refiner does).
          denoising_end: stop where this share is done.
          pad_to: rows of the table, for programs that are to serve several step counts.
          options: of the solver, by class: `eta` for DDIM, `s_churn` for Euler …

        Raises ValueError for a schedule or an option that this scheduler cannot follow.

        >>> from flaxdiff.schedulers import DDIMScheduler
        >>> DDIMScheduler().plan(4).timesteps
        array([750., 500., 250.,   0.], dtype=float32)
        >>> DDIMScheduler().plan(4, strength=0.5).timesteps
        array([250.,   0.], dtype=float32)
        """
        custom = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu}
        custom = {k: v for k, v in custom.items() if v is not None}
        n = self._steps(num_inference_steps, custom)
        for name in [name for name in options if name not in self.options]:
            raise _unknown("option of plan", name, type(self).__name__, tuple(self.options))
        grid = self.grid(n, {**custom, **options})
        step = self.solver(grid, n, **{**self.options, **options})
        rows = self._window(grid.t, n, strength, denoising_start, denoising_end)
        plan = tables.tabulate(grid, step, self.prediction(grid), rows, **self.columns(grid))
        return plan if pad_to is None else plan.pad(pad_to)

    def _steps(self, n: int | None, custom: Mapping[str, Any]) -> int:
        """Check what was asked for, and count its steps."""
        name = type(self).__name__
        for key in custom:
            if key not in self.accepts:
                other = ", ".join(("num_inference_steps", *sorted(self.accepts)))
                raise ValueError(f"{name}.plan does not take {key}=; it takes {other}.")
        ways = [w for w in ("timesteps", "sigmas") if w in custom] + ["num_inference_steps"] * (n is not None)
        if len(ways) != 1:
            raise ValueError(
                f"{name}.plan was given {' and '.join(ways) or 'no schedule'}: give exactly one of "
                "num_inference_steps, timesteps and sigmas."
            )
        for way in ways[:1] if n is None else ():
            values = np.asarray(custom[way], float)
            ramps = [r for r in spacing.RAMPS if getattr(self, r, False)]
            if ramps:
                raise ValueError(f"{name}: {way}= excludes {ramps[0]}, which chooses the schedule itself.")
            if values.ndim != 1 or not len(values) or not (np.diff(values) < 0).all() or not np.isfinite(values).all():
                raise ValueError(f"{name}: {way}={custom[way]} must be a descending list without duplicates.")
            if way == "timesteps" and not (0 <= values[-1] and values[0] < self.time_limit()):
                raise ValueError(f"{name}: timesteps={custom[way]} must lie in [0, {self.time_limit():g}).")
            n = len(values) - (way in self.ends)
        if n != int(n) or n < 1:
            raise ValueError(f"{name}: num_inference_steps={n} must be a positive whole number.")
        return int(n)

    def time_limit(self) -> float:
        """Custom timesteps stay below this."""
        return self.num_train_timesteps

    def _window(self, t: np.ndarray, n: int, strength: float | None, start: float | None, end: float | None) -> range:
        """The rows of the grid that a partial run makes."""
        train, begin, rows = self.num_train_timesteps, 0, len(t)
        if start is not None:
            left = int((t < spacing.cutoff(train, start, "denoising_start")).sum())
            # a step of two evaluations is not to be cut in the middle
            begin = rows - (left + (self.order == 2 and left % 2 == 0))
        elif strength is not None:
            begin = spacing.strength_window(n, strength, self.order, rows)
            if self.ascends:
                begin, rows = 0, rows - begin
        stop = rows
        if end is not None:
            if start is not None and start >= end:
                raise ValueError(f"denoising_start={start} must be smaller than denoising_end={end}.")
            stop = begin + int((t[begin:] >= spacing.cutoff(train, end, "denoising_end")).sum())
        if not 0 <= begin < stop:
            raise ValueError(
                f"denoising_start={start}, denoising_end={end} leave none of the {rows} evaluations: take more steps."
            )
        return range(begin, stop)

    def init(self, plan: Plan, latents: jax.Array, key: jax.Array) -> SchedulerState:
        """The state before the first evaluation; see `tables.init`."""
        return tables.init(plan, latents, key)

    def step(self, state: SchedulerState, model_output: jax.Array, noise: jax.Array | None = None) -> SchedulerState:
        """Advance by one evaluation; see `tables.step`, which is the pipelines' own loop body."""
        return tables.step(state, model_output, noise)

    # --- training ----------------------------------------------------------------------------------------------------

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma at each training time, float64 [num_train_timesteps], in this scheduler's scale."""
        raise self._no_levels()

    def level(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """alpha and sigma at any times, float32 in the shape of `timesteps`; read between the training times."""
        t = jnp.asarray(timesteps, jnp.float32)
        alpha, sigma = (jnp.asarray(v, jnp.float32) for v in self.levels())
        times = jnp.arange(len(alpha), dtype=jnp.float32)
        return jnp.interp(t, times, alpha), jnp.interp(t, times, sigma)

    def snr(self, timesteps: jax.Array) -> jax.Array:
        """The signal-to-noise ratio alpha(t)^2 / sigma(t)^2, float32 in the shape of `timesteps`.

        >>> from flaxdiff.schedulers import DDPMScheduler
        >>> DDPMScheduler().snr(0).round()
        Array(9999., dtype=float32)
        """
        alpha, sigma = self.level(timesteps)
        return (alpha / sigma) ** 2

    def add_noise(self, sample: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
        """alpha(t) sample + sigma(t) noise, in the sample's dtype.

        Args:
          sample, noise: [B, ...].
          timesteps: [] or [B] training times; fractional ones are read between their neighbours.
        """
        alpha, sigma = (_shaped(v, sample) for v in self.level(timesteps))
        return alpha * sample + sigma * jnp.asarray(noise, sample.dtype)

    def get_velocity(self, sample: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
        """The target of v-prediction, alpha(t) noise - sigma(t) sample with alpha^2 + sigma^2 = 1 (2202.00512)."""
        alpha, sigma = self.level(timesteps)
        norm = jnp.hypot(alpha, sigma)
        alpha, sigma = _shaped(alpha / norm, sample), _shaped(sigma / norm, sample)
        return alpha * jnp.asarray(noise, sample.dtype) - sigma * sample


def _shaped(a: jax.Array, like: jax.Array) -> jax.Array:
    return a.astype(like.dtype).reshape(a.shape + (1,) * (like.ndim - a.ndim))


def read_config(folder: str | os.PathLike, subfolder: str = "") -> dict[str, Any]:
    """The dict in a folder's scheduler_config.json. Raises FileNotFoundError, or ValueError if it is not one."""
    path = Path(folder) / subfolder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a scheduler is a folder with {CONFIG_NAME} in it.")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, and a config is an object of options.")
    return config


def from_config(config: Mapping[str, Any]) -> Scheduler:
    """The scheduler that a config names in `_class_name`. Raises ValueError for a class that is not known."""
    name = config.get("_class_name", "")
    if name not in SCHEDULERS:
        raise _unknown("scheduler class", name, "flaxdiff", tuple(SCHEDULERS))
    return SCHEDULERS[name].from_config(config)
