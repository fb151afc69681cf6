"""Schedulers over a discrete schedule of betas that step in its training times: DDPM, DDIM, PNDM and their kin.

Each class lists its options, the levels it visits and its solver. Names, options and defaults are diffusers'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from . import exponential, path, solvers, spacing
from .base import Scheduler
from .path import Grid


@dataclass(frozen=True, kw_only=True)
class _Discrete(Scheduler):
    """A schedule of betas over num_train_timesteps."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: Sequence[float] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    swaps: ClassVar[bool] = True

    def alphas_cumprod(self) -> np.ndarray:
        """Signal power alpha^2 at each training time, float64 [num_train_timesteps]."""
        zero_snr = bool(getattr(self, "rescale_betas_zero_snr", False))
        args = (self.num_train_timesteps, self.beta_start, self.beta_end, self.beta_schedule, self.trained_betas)
        return path.alphas_cumprod(*args, zero_snr)

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        power = self.alphas_cumprod()
        return np.sqrt(power), np.sqrt(1 - power)

    def _bounded(self, n: int) -> int:
        if n > self.num_train_timesteps:
            raise ValueError(
                f"{type(self).__name__}: num_inference_steps={n} exceeds num_train_timesteps="
                f"{self.num_train_timesteps}, and it visits whole training times only: take fewer steps."
            )
        return n


# --- in time: x_t = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1 -------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Variance(_Discrete):
    """Schedulers that visit whole training times and may clip x_0."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    rescale_betas_zero_snr: bool = False

    def _between(self, t: np.ndarray, to: np.ndarray, final: float = 1.0) -> Grid:
        """From training times to training times; a negative one is the end, of signal power `final`."""
        power = self.alphas_cumprod()
        end = np.where(to < 0, final, power[np.maximum(to, 0)])
        return Grid(t.astype(float), np.sqrt(power[t]), np.sqrt(1 - power[t]), np.sqrt(end), np.sqrt(1 - end))

    def _first_power(self) -> float:
        return float(self.alphas_cumprod()[0])

    def _times(self, n: int, custom: Mapping[str, Any]) -> np.ndarray:
        if "timesteps" in custom:
            return np.asarray(custom["timesteps"]).astype(int)
        t = spacing.spaced(self.timestep_spacing, self._bounded(n), self.num_train_timesteps, self.steps_offset)
        return np.minimum(t.round().astype(int), self.num_train_timesteps - 1)


@dataclass(frozen=True, kw_only=True)
class DDPMScheduler(_Variance):
    """Ancestral sampling, one posterior q(x_to | x, x_0) a step (Ho et al., 2006.11239).

    A network with twice the sample's channels also predicts the variance (`variance_type` "learned_range", as in
    Nichol and Dhariwal, 2102.09672, or "learned").

    >>> from flaxdiff.schedulers import DDPMScheduler
    >>> DDPMScheduler(beta_schedule="squaredcos_cap_v2").plan(3).timesteps
    array([666., 333.,   0.], dtype=float32)
    """

    variance_type: str = "fixed_small"
    choices: ClassVar[Mapping[str, tuple]] = {
        "variance_type": (
            *("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
            *("learned", "learned_range"),
        )
    }

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        t = self._times(n, custom)
        return self._between(t, np.append(t[1:], -1))

    def _variances(self, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """The posterior's variance, kept from zero, and beta: the two ends that a learned variance lies between."""
        small = np.maximum(solvers.posterior_std(grid) ** 2, 1e-20)
        return small, 1 - (grid.alpha / grid.alpha_to) ** 2

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        small, large = self._variances(grid)
        if self.variance_type.startswith("fixed_large"):
            variance = large
        else:
            variance = np.ones_like(small) if self.variance_type == "learned" else small
        noise_std = np.where(grid.t > 0, np.sqrt(variance), 0.0)
        return solvers.ddim(grid, solvers.posterior_std(grid), noise_std, from_x0=True)

    def columns(self, grid: Grid) -> dict[str, Any]:
        small, large = self._variances(grid)
        spread = np.log(large / small) if self.variance_type == "learned_range" else np.zeros(len(grid.t))
        direct = np.full(len(grid.t), float(self.variance_type == "learned"))
        return {**super().columns(grid), "variance": np.stack([spread, direct], 1)}


@dataclass(frozen=True, kw_only=True)
class DDIMScheduler(_Variance):
    """Deterministic steps, or with `plan(eta=1)` as much noise as DDPM's (Song et al., 2010.02502).

    >>> from flaxdiff.schedulers import DDIMScheduler
    >>> plan = DDIMScheduler(timestep_spacing="trailing").plan(4, eta=0.5)
    >>> plan.timesteps, plan.noisy
    (array([999., 749., 499., 249.], dtype=float32), array([ True,  True,  True, False]))
    """

    set_alpha_to_one: bool = True
    options: ClassVar[Mapping[str, Any]] = {"eta": 0.0, "use_clipped_model_output": False}

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        t = self._times(n, custom)
        # each step goes a fixed stretch down, also where the spacing is not even
        to = np.append(t[1:], -1) if "timesteps" in custom else t - self.num_train_timesteps // n
        return self._between(t, to, 1.0 if self.set_alpha_to_one else self._first_power())

    def solver(self, grid: Grid, n: int, eta: float, use_clipped_model_output: bool) -> solvers.Step:
        return solvers.ddim(grid, solvers.posterior_std(grid, eta), from_x0=use_clipped_model_output)


@dataclass(frozen=True, kw_only=True)
class PNDMScheduler(_Discrete):
    """Linear multistep of order four on the network's outputs (Liu et al., 2202.09778).

    It starts with twelve Runge-Kutta evaluations, or with `skip_prk_steps`, as Stable Diffusion does, by making its
    first step twice; so a run of n steps makes n + 9 or n + 1 evaluations.

    >>> from flaxdiff.schedulers import PNDMScheduler
    >>> PNDMScheduler(skip_prk_steps=True).plan(4).timesteps
    array([750., 500., 500., 250.,   0.], dtype=float32)
    """

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    accepts: ClassVar[frozenset[str]] = frozenset()

    def _times(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """All times visited, and those of them that belong to the Runge-Kutta warm-up."""
        t = spacing.spaced(self.timestep_spacing, self._bounded(n), self.num_train_timesteps, self.steps_offset)
        t = t.round().astype(int)
        if self.skip_prk_steps:
            return np.concatenate([t[:1], t[1:2], t[1:]]), t[:0]
        if n < 4:
            raise ValueError(
                f"PNDMScheduler: {n} steps do not hold the Runge-Kutta warm-up; take 4 or skip_prk_steps=True."
            )
        # four evaluations a step: the start, twice half-way, the end
        half = self.num_train_timesteps // n // 2
        warm_up = np.concatenate([[a, b + half, b + half, b] for a, b in zip(t[:3], t[1:4])])
        return np.concatenate([warm_up, t[3:]]), warm_up

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        alpha, sigma = self.levels()
        t, _ = self._times(n)
        t = np.minimum(t, self.num_train_timesteps - 1)
        # the solver reads levels by time itself: where each evaluation leads depends on how many went before
        return Grid(t.astype(float), alpha[t], sigma[t], alpha[t], sigma[t])

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        alpha, sigma = self.levels()
        final = 0.0 if self.set_alpha_to_one else sigma[0]
        predict = path.prediction(self.prediction_type, alpha, sigma)

        def transfer(t: int, to: int) -> tuple[float, float]:
            t = min(t, self.num_train_timesteps - 1)
            sigma_to = sigma[to] if to >= 0 else final
            ratio = np.sqrt(1 - sigma_to**2) / alpha[t]
            by_eps = sigma_to - sigma[t] * ratio
            return ratio + by_eps * predict.eps_sample[t], by_eps * predict.eps_output[t]

        return solvers.pndm(transfer, grid.t, self.num_train_timesteps // n, self._times(n)[1])


@dataclass(frozen=True, kw_only=True)
class DDPMParallelScheduler(DDPMScheduler):
    """DDPM under the name that parallel sampling knows (2305.16317): `jax.vmap` of `step` takes many at once."""


@dataclass(frozen=True, kw_only=True)
class DDIMParallelScheduler(DDIMScheduler):
    """DDIM under the name that parallel sampling knows (2305.16317): `jax.vmap` of `step` takes many at once."""


@dataclass(frozen=True, kw_only=True)
class DDIMInverseScheduler(_Variance):
    """DDIM from an image towards noise: the output at a time taken for that at the next (2010.02502, section 4.3).

    >>> from flaxdiff.schedulers import DDIMInverseScheduler
    >>> DDIMInverseScheduler().plan(4).timesteps
    array([  0., 250., 500., 750.], dtype=float32)
    """

    set_alpha_to_one: bool = True
    swaps: ClassVar[bool] = False
    ascends: ClassVar[bool] = True
    accepts: ClassVar[frozenset[str]] = frozenset()
    lacks: ClassVar[frozenset[str]] = frozenset(
        {"thresholding", "dynamic_thresholding_ratio", "sample_max_value"},
    )
    choices: ClassVar[Mapping[str, tuple]] = {"timestep_spacing": ("leading", "trailing")}

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        t = self._times(n, custom)[::-1]
        g = self._between(t, t - self.num_train_timesteps // n, 1.0 if self.set_alpha_to_one else self._first_power())
        return Grid(g.t, g.alpha_to, g.sigma_to, g.alpha, g.sigma)

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        return solvers.ddim(grid, 0 * grid.sigma)


@dataclass(frozen=True, kw_only=True)
class UnCLIPScheduler(DDPMScheduler):
    """DDPM over a cosine schedule from its very first to its very last time, as unCLIP's priors use it (2204.06125).

    >>> from flaxdiff.schedulers import UnCLIPScheduler
    >>> UnCLIPScheduler().plan(4).timesteps
    array([999., 666., 333.,   0.], dtype=float32)
    """

    beta_schedule: str = "squaredcos_cap_v2"
    variance_type: str = "fixed_small_log"
    swaps: ClassVar[bool] = False
    lacks: ClassVar[frozenset[str]] = frozenset(
        "beta_start beta_end trained_betas timestep_spacing steps_offset thresholding dynamic_thresholding_ratio "
        "sample_max_value rescale_betas_zero_snr".split()
    )
    choices: ClassVar[Mapping[str, tuple]] = {
        "variance_type": ("fixed_small_log", "learned_range"),
        "prediction_type": ("epsilon", "sample"),
        "beta_schedule": ("squaredcos_cap_v2",),
    }

    def _times(self, n: int, custom: Mapping[str, Any]) -> np.ndarray:
        if "timesteps" in custom:
            return np.asarray(custom["timesteps"]).astype(int)
        return np.linspace(self.num_train_timesteps - 1, 0, self._bounded(n)).round().astype(int)


@dataclass(frozen=True, kw_only=True)
class CogVideoXDDIMScheduler(_Variance):
    """DDIM over levels whose signal-to-noise ratio is divided by `snr_shift_scale`; never clips (2408.06072).

    >>> from flaxdiff.schedulers import CogVideoXDDIMScheduler
    >>> s = CogVideoXDDIMScheduler(snr_shift_scale=1.0)
    >>> float((s.snr(500) / CogVideoXDDIMScheduler().snr(500)).round())
    3.0
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    set_alpha_to_one: bool = True
    snr_shift_scale: float = 3.0
    accepts: ClassVar[frozenset[str]] = frozenset()
    lacks: ClassVar[frozenset[str]] = frozenset({"thresholding", "dynamic_thresholding_ratio"})

    def alphas_cumprod(self) -> np.ndarray:
        args = (self.num_train_timesteps, self.beta_start, self.beta_end, self.beta_schedule, self.trained_betas)
        power = path.alphas_cumprod(*args)
        power = power / (self.snr_shift_scale + (1 - self.snr_shift_scale) * power)
        return path.zero_terminal_snr(power) if self.rescale_betas_zero_snr else power

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        t = self._times(n, custom)
        final = 1.0 if self.set_alpha_to_one else self._first_power()
        return self._between(t, t - self.num_train_timesteps // n, final)

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        return solvers.ddim(grid, 0 * grid.sigma, from_x0=True)

    def columns(self, grid: Grid) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class CogVideoXDPMScheduler(CogVideoXDDIMScheduler):
    """The same levels crossed by DPM-Solver++'s SDE of order 2 (2211.01095).

    >>> from flaxdiff.schedulers import CogVideoXDPMScheduler
    >>> CogVideoXDPMScheduler().plan(3).noisy
    array([ True,  True, False])
    """

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        orders = np.where(grid.t < self.num_train_timesteps // n, 1, 2)
        return exponential.dpm_multistep(grid, 2, "sde-dpmsolver++", False, orders)
