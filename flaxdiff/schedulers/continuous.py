"""Schedulers without a table of betas: flow matching, EDM, and schedules given by a formula in continuous time.

Each class lists its options, the levels it visits and its solver. Names, options and defaults are diffusers'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from . import exponential, path, solvers, spacing
from .base import Scheduler
from .dpm import time_shift
from .path import Grid, Prediction

# --- flow matching: x = (1 - sigma) x_0 + sigma eps, the network predicts eps - x_0, times are sigma in training steps


@dataclass(frozen=True, kw_only=True)
class _Flow(Scheduler):
    """Sigmas from 1 to almost 0, shifted towards noise; the run ends at 0."""

    shift: float = 1.0
    ends: ClassVar[frozenset[str]] = frozenset()

    def time_limit(self) -> float:
        return self.num_train_timesteps * (1 + 1e-6)

    def _ends(self, dynamic: bool) -> tuple[float, float]:
        last = 1 / self.num_train_timesteps
        return 1.0, last if dynamic else spacing.shifted(last, self.shift)

    def prediction(self, grid: Grid) -> Prediction:
        return path.prediction("flow_prediction", grid.alpha, grid.sigma)

    def level(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        sigma = jnp.asarray(timesteps, jnp.float32) / self.num_train_timesteps
        return 1 - sigma, sigma


@dataclass(frozen=True, kw_only=True)
class FlowMatchEulerDiscreteScheduler(_Flow):
    """Euler's method along a flow (Esser et al., 2403.03206), or with `stochastic_sampling` fresh noise at each level.

    `plan` takes sigmas= or timesteps= before shifting and without the final zero. `use_dynamic_shifting` needs
    `plan(mu=...)`, the log of the shift (the shift itself with `time_shift_type="linear"`), by image size.

    >>> from flaxdiff.schedulers import FlowMatchEulerDiscreteScheduler
    >>> FlowMatchEulerDiscreteScheduler(shift=3.0).plan(3).sigma.round(4)
    array([1.    , 0.7511, 0.0089], dtype=float32)
    """

    use_dynamic_shifting: bool = False
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    time_shift_type: str = "exponential"
    stochastic_sampling: bool = False
    accepts: ClassVar[frozenset[str]] = frozenset({"timesteps", "sigmas", "mu"})
    choices: ClassVar[Mapping[str, tuple]] = {"time_shift_type": ("exponential", "linear")}

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        if self.use_dynamic_shifting != ("mu" in custom):
            raise ValueError(f"{type(self).__name__}: use_dynamic_shifting=True and plan(mu=...) go together.")
        T = self.num_train_timesteps
        high, low = self._ends(self.use_dynamic_shifting)
        sigma = np.asarray(custom.get("sigmas", np.linspace(high, low, n)), float)
        if "timesteps" in custom:
            sigma = np.asarray(custom["timesteps"], float) / T
        if "mu" in custom:
            sigma = spacing.shifted(sigma, time_shift(self.time_shift_type, custom["mu"]))
        else:
            sigma = spacing.shifted(sigma, self.shift)
        sigma = spacing.stretched(sigma, self.shift_terminal)
        sigma = next((f(sigma[-1], sigma[0], n) for flag, f in spacing.RAMPS.items() if getattr(self, flag, 0)), sigma)
        t, end = np.asarray(custom.get("timesteps", sigma * T), float), 0.0
        if self.invert_sigmas:
            sigma, end = 1 - sigma, 1.0
            t = sigma * T
        sigma = np.append(sigma, end)
        return path.chain(t, 1 - sigma, sigma)

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        return solvers.ddim(grid, grid.sigma_to if self.stochastic_sampling else 0 * grid.sigma)


@dataclass(frozen=True, kw_only=True)
class FlowMatchLCMScheduler(FlowMatchEulerDiscreteScheduler):
    """Latent consistency along a flow: x_0, then fresh noise for the next level (2310.04378).

    `scale_factors` would change the sample's size between steps, which arrays of fixed shape cannot follow: it must be
    None.

    >>> from flaxdiff.schedulers import FlowMatchLCMScheduler
    >>> FlowMatchLCMScheduler().plan(3).noisy
    array([ True,  True, False])
    """

    scale_factors: None = None
    upscale_mode: str = "bicubic"
    lacks: ClassVar[frozenset[str]] = frozenset({"stochastic_sampling"})
    choices: ClassVar[Mapping[str, tuple]] = {**FlowMatchEulerDiscreteScheduler.choices, "scale_factors": (None,)}

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        return solvers.ddim(grid, grid.sigma_to)


@dataclass(frozen=True, kw_only=True)
class FlowMatchHeunDiscreteScheduler(_Flow):
    """Heun's method along a flow, of order 2, with optional churn (2206.00364, algorithm 2).

    >>> from flaxdiff.schedulers import FlowMatchHeunDiscreteScheduler
    >>> FlowMatchHeunDiscreteScheduler().plan(2).timesteps
    array([1000.,    1.,    1.], dtype=float32)
    """

    order: ClassVar[int] = 2
    accepts: ClassVar[frozenset[str]] = frozenset()
    options: ClassVar[Mapping[str, Any]] = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        sigma = np.append(spacing.shifted(np.linspace(*self._ends(False), n), self.shift), 0.0)
        at, to = sigma[:-1].repeat(2)[1:], sigma[1:].repeat(2)[:-1]
        return Grid(at * self.num_train_timesteps, 1 - at, at, 1 - to, to)

    def solver(self, grid: Grid, n: int, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> solvers.Step:
        return solvers.heun(grid, solvers.churn(grid, s_churn, s_tmin, s_tmax), s_noise)


# --- EDM: x = x_0 + sigma eps, and a network wrapped so that its input and output have unit variance ------------------


@dataclass(frozen=True, kw_only=True)
class _EDM(Scheduler):
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_schedule: str = "karras"
    prediction_type: str = "epsilon"
    rho: float = 7.0
    final_sigmas_type: str = "zero"
    accepts: ClassVar[frozenset[str]] = frozenset({"sigmas"})
    choices: ClassVar[Mapping[str, tuple]] = {
        "prediction_type": ("epsilon", "v_prediction"),
        "sigma_schedule": ("karras", "exponential"),
    }

    def told(self, sigma: np.ndarray) -> np.ndarray:
        """The time that the network is told at a level."""
        return 0.25 * np.log(sigma)

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        if "sigmas" in custom:
            sigma = np.asarray(custom["sigmas"], float)
        else:
            ends = (self.sigma_min, self.sigma_max, n)
            karras = self.sigma_schedule == "karras"
            sigma = spacing.karras(*ends, self.rho) if karras else spacing.exponential(*ends)
            sigma = np.append(sigma, 0.0 if self.final_sigmas_type == "zero" else self.sigma_min)
        return path.chain(self.told(sigma[:-1]), np.ones(n + 1), sigma)

    def precondition(self, sigma: np.ndarray) -> Prediction:
        """x_0 = c_skip x + c_out output (2206.00364, table 1); "v_prediction" has the other sign."""
        data, norm = self.sigma_data, np.hypot(sigma, self.sigma_data)
        skip, out = (data / norm) ** 2, sigma * data / norm * (1 if self.prediction_type == "epsilon" else -1)
        return Prediction(skip, out, (1 - skip) / sigma, -out / sigma)

    def prediction(self, grid: Grid) -> Prediction:
        return self.precondition(grid.sigma)

    def columns(self, grid: Grid) -> dict[str, Any]:
        scale = 1 / np.hypot(grid.sigma, self.sigma_data)
        return {**super().columns(grid), "scale": scale, "init_noise_sigma": float(np.hypot(self.sigma_max, 1))}

    def level(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        t = jnp.asarray(timesteps, jnp.float32)
        return jnp.ones_like(t), jnp.exp(4 * t)


@dataclass(frozen=True, kw_only=True)
class EDMEulerScheduler(_EDM):
    """Euler's method over EDM's preconditioning, with optional churn (Karras et al., 2206.00364, algorithm 2).

    >>> from flaxdiff.schedulers import EDMEulerScheduler
    >>> EDMEulerScheduler().plan(3).sigma.round(3)
    array([8.000e+01, 2.515e+00, 2.000e-03], dtype=float32)
    """

    options: ClassVar[Mapping[str, Any]] = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}

    def solver(self, grid: Grid, n: int, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> solvers.Step:
        gamma = solvers.churn(grid, s_churn, s_tmin, s_tmax)
        return solvers.euler(grid, gamma, s_noise, self.precondition(grid.sigma * (1 + gamma)))


@dataclass(frozen=True, kw_only=True)
class EDMDPMSolverMultistepScheduler(_EDM):
    """DPM-Solver++ of order 1 to 3 over EDM's preconditioning (2206.00364 and 2211.01095).

    >>> from flaxdiff.schedulers import EDMDPMSolverMultistepScheduler
    >>> EDMDPMSolverMultistepScheduler().plan(5).timesteps.round(2)
    array([ 1.1 ,  0.72,  0.23, -0.44, -1.55], dtype=float32)
    """

    solver_order: int = 2
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    choices: ClassVar[Mapping[str, tuple]] = {
        **_EDM.choices,
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
        "solver_order": (1, 2, 3),
    }
    aliases: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    }

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        final = self.euler_at_final or self.final_sigmas_type == "zero"
        orders = exponential.capped(len(grid.t), self.solver_order, self.lower_order_final, final)
        heun = self.solver_type == "heun"
        return exponential.dpm_multistep(grid, self.solver_order, self.algorithm_type, heun, orders)


@dataclass(frozen=True, kw_only=True)
class CosineDPMSolverMultistepScheduler(EDMDPMSolverMultistepScheduler):
    """DPM-Solver++'s SDE where the network is told the angle atan(sigma), as in Stable Audio (2211.01095).

    >>> from flaxdiff.schedulers import CosineDPMSolverMultistepScheduler
    >>> CosineDPMSolverMultistepScheduler().plan(3).timesteps.round(3)
    array([0.999, 0.948, 0.186], dtype=float32)
    """

    sigma_min: float = 0.3
    sigma_max: float = 500.0
    sigma_data: float = 1.0
    sigma_schedule: str = "exponential"
    prediction_type: str = "v_prediction"
    algorithm_type: str = "sde-dpmsolver++"
    lacks: ClassVar[frozenset[str]] = frozenset(
        {"thresholding", "dynamic_thresholding_ratio", "sample_max_value", "algorithm_type"}
    )
    choices: ClassVar[Mapping[str, tuple]] = {**EDMDPMSolverMultistepScheduler.choices, "solver_order": (1, 2)}

    def told(self, sigma: np.ndarray) -> np.ndarray:
        return np.arctan(sigma) / np.pi * 2

    def level(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        t = jnp.asarray(timesteps, jnp.float32)
        return jnp.ones_like(t), jnp.tan(t * math.pi / 2)


# --- schedules given by a formula -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IPNDMScheduler(Scheduler):
    """Linear multistep of order 4 without a warm-up, from pure noise (2202.09778; Katherine Crowson's v-diffusion).

    Times go from 1 to 0 and the network predicts v. `trained_betas`, n + 1 sigmas from 1 to 0, fixes n.

    >>> from flaxdiff.schedulers import IPNDMScheduler
    >>> IPNDMScheduler().plan(4).sigma.round(3)
    array([1.   , 0.854, 0.5  , 0.146], dtype=float32)
    """

    trained_betas: Sequence[float] | None = None
    accepts: ClassVar[frozenset[str]] = frozenset()

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        sigma = np.sin(np.linspace(1, 0, n + 1) * np.pi / 2) ** 2
        if self.trained_betas is not None:
            sigma = np.asarray(self.trained_betas, float)
            if len(sigma) != n + 1:
                raise ValueError(f"IPNDMScheduler: trained_betas holds {len(sigma)} levels; {n} steps need {n + 1}.")
        alpha = np.sqrt(1 - sigma**2)
        return path.chain(np.arctan2(sigma, alpha)[:-1] / np.pi * 2, alpha, sigma)

    def prediction(self, grid: Grid) -> Prediction:
        return path.prediction("v_prediction", grid.alpha, grid.sigma)

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        return solvers.ipndm(grid)

    def level(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        angle = jnp.asarray(timesteps, jnp.float32) * (math.pi / 2)
        return jnp.cos(angle), jnp.sin(angle)


@dataclass(frozen=True, kw_only=True)
class DDPMWuerstchenScheduler(Scheduler):
    """DDPM over a cosine schedule in continuous time from 1 to 0 (2306.00637); custom timesteps include the end.

    >>> from flaxdiff.schedulers import DDPMWuerstchenScheduler
    >>> DDPMWuerstchenScheduler().plan(4).timesteps
    array([1.  , 0.75, 0.5 , 0.25], dtype=float32)
    """

    scaler: float = 1.0
    s: float = 0.008
    lacks: ClassVar[frozenset[str]] = frozenset({"num_train_timesteps"})
    ends: ClassVar[frozenset[str]] = frozenset({"timesteps"})

    def time_limit(self) -> float:
        return 1.001

    def power(self, t: Any, xp: Any = np) -> Any:
        """Signal power alpha^2 at time t in [0, 1]; `xp` is numpy or jax.numpy."""
        t = 1 - (1 - t) ** self.scaler if self.scaler > 1 else t**self.scaler
        angle = lambda t: (t + self.s) / (1 + self.s) * math.pi / 2
        return xp.clip(xp.cos(angle(t)) ** 2 / math.cos(angle(0.0)) ** 2, 0.0001, 0.9999)

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        t = np.asarray(custom.get("timesteps", np.linspace(1, 0, n + 1)), float)
        power = self.power(t)
        return path.chain(t[:-1], np.sqrt(power), np.sqrt(1 - power))

    def prediction(self, grid: Grid) -> Prediction:
        return path.prediction("epsilon", grid.alpha, grid.sigma)

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        std = solvers.posterior_std(grid)
        return solvers.ddim(grid, std, np.append(std[:-1], 0.0))

    def level(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        power = self.power(jnp.asarray(timesteps, jnp.float32), jnp)
        return jnp.sqrt(power), jnp.sqrt(1 - power)
