"""Schedulers over a discrete schedule of betas: the DDPM family in time, the Euler and DPM-Solver families in sigma.

Each class lists its options, the levels it visits and its solver. Names, options and defaults are diffusers'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from . import path, solvers, spacing
from .base import Scheduler
from .path import Grid

# Where rescale_betas_zero_snr leaves a signal of zero, solvers in sigma go on with this power: sigma stays finite.
LEAST_POWER = 2.0**-24


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
    family: ClassVar[str] = "karras"

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
        return self._between(t, to, 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod()[0]))

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


# --- in sigma: x = x_0 + sigma eps, or the same rotated back to unit variance ----------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Sigma(_Discrete):
    """Schedulers whose levels are sigma = sqrt(1 - power) / sqrt(power), read between training times."""

    timestep_spacing: str = "linspace"
    rescale_betas_zero_snr: bool = False

    def train_sigmas(self) -> np.ndarray:
        """sigma at each training time, float64 [num_train_timesteps], ascending."""
        power = self.alphas_cumprod()
        if getattr(self, "rescale_betas_zero_snr", False):
            power = np.append(power[:-1], LEAST_POWER)
        return np.sqrt((1 - power) / power)

    def ramp(self, low: float, high: float, n: int) -> np.ndarray | None:
        """The n sigmas that a `use_..._sigmas` flag asks for, if any is set; sigma_min and sigma_max move the ends."""
        low, high = (getattr(self, name, None) or end for name, end in (("sigma_min", low), ("sigma_max", high)))
        return next((f(low, high, n) for flag, f in spacing.RAMPS.items() if getattr(self, flag, False)), None)

    def final_sigma(self) -> float:
        """Where the last step leads."""
        ends_at_zero = getattr(self, "final_sigmas_type", "zero") == "zero"
        return 0.0 if ends_at_zero else float(np.sqrt(1 / self.alphas_cumprod()[0] - 1))


@dataclass(frozen=True, kw_only=True)
class _VarianceExploding(_Sigma):
    """The sample is x_0 + sigma eps, as in k-diffusion; the network sees it scaled to unit variance."""

    accepts: ClassVar[frozenset[str]] = frozenset({"timesteps", "sigmas"})

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        train = self.train_sigmas()
        if "sigmas" in custom:
            sigma = np.asarray(custom["sigmas"], float)
            return path.chain(spacing.sigma_to_t(sigma[:-1], train), np.ones(n + 1), sigma)
        t = np.asarray(custom["timesteps"], float) if "timesteps" in custom else self._times(n)
        sigma = np.interp(t, np.arange(len(train)), train)
        ramp = self.ramp(sigma[-1], sigma[0], n)
        if ramp is not None:
            sigma, t = ramp, spacing.sigma_to_t(ramp, train)
        return path.chain(t, np.ones(n + 1), np.append(sigma, self.final_sigma()))

    def _times(self, n: int) -> np.ndarray:
        if self.timestep_spacing == "leading":
            self._bounded(n)
        return spacing.spaced(self.timestep_spacing, n, self.num_train_timesteps, self.steps_offset)

    def columns(self, grid: Grid) -> dict[str, Any]:
        top = float(grid.sigma.max())
        start = np.hypot(top, 1) if self.timestep_spacing == "leading" else top
        return {**super().columns(grid), "scale": 1 / np.hypot(grid.sigma, 1), "init_noise_sigma": start}

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        sigma = self.train_sigmas()
        return np.ones_like(sigma), sigma


@dataclass(frozen=True, kw_only=True)
class EulerDiscreteScheduler(_VarianceExploding):
    """Euler's method in sigma, with optional churn (Karras et al., 2206.00364, algorithm 2).

    >>> from flaxdiff.schedulers import EulerDiscreteScheduler
    >>> s = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    >>> s.plan(3, s_churn=1.0).sigma.round(3)
    array([14.615,  1.616,  0.029], dtype=float32)
    """

    interpolation_type: str = "linear"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: str = "discrete"
    final_sigmas_type: str = "zero"
    options: ClassVar[Mapping[str, Any]] = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
    choices: ClassVar[Mapping[str, tuple]] = {
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
    }
    aliases: ClassVar[Mapping[str, Mapping[str, str]]] = {"prediction_type": {"original_sample": "sample"}}

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        g = super().grid(n, custom)
        if self.interpolation_type == "log_linear" and "sigmas" not in custom and self.ramp(1.0, 2.0, 2) is None:
            train = self.train_sigmas()
            g = path.chain(g.t, np.ones(n + 1), spacing.exponential(train[0], train[-1], n + 1))
        if self.timestep_type == "continuous" and self.prediction_type == "v_prediction":
            if "timesteps" in custom:
                raise ValueError(
                    "EulerDiscreteScheduler: continuous times follow from sigma; give sigmas=, not timesteps=."
                )
            g = g._replace(t=0.25 * np.log(g.sigma))
        return g

    def solver(self, grid: Grid, n: int, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> solvers.Step:
        return solvers.euler(grid, self.prediction_type, s_churn, s_tmin, s_tmax, s_noise)


@dataclass(frozen=True, kw_only=True)
class EulerAncestralDiscreteScheduler(_VarianceExploding):
    """Euler's method down past each level, and fresh noise back up to it: the posterior of DDPM in sigma.

    >>> from flaxdiff.schedulers import EulerAncestralDiscreteScheduler
    >>> EulerAncestralDiscreteScheduler().plan(4).noisy
    array([ True,  True,  True, False])
    """

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        return solvers.ddim(grid, solvers.posterior_std(grid))


@dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepScheduler(_Sigma):
    """Exponential integrator of order 1 to 3 in log SNR (Lu et al., 2206.00927 and, for ++, 2211.01095).

    `algorithm_type` chooses the integrand (x_0 with "++", else eps) and the ODE or the SDE ("sde-").

    >>> from flaxdiff.schedulers import DPMSolverMultistepScheduler
    >>> DPMSolverMultistepScheduler(use_karras_sigmas=True).plan(4).timesteps
    array([999., 775., 301.,   0.], dtype=float32)
    """

    solver_order: int = 2
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_lu_lambdas: bool | None = False
    use_flow_sigmas: bool | None = False
    flow_shift: float | None = 1.0
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf
    variance_type: str | None = None
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    accepts: ClassVar[frozenset[str]] = frozenset({"timesteps", "mu"})
    choices: ClassVar[Mapping[str, tuple]] = {
        "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
        "solver_order": (1, 2, 3),
        "variance_type": (None, "learned", "learned_range"),
        "time_shift_type": ("exponential",),
    }
    aliases: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.algorithm_type.endswith("++") and self.final_sigmas_type == "zero":
            raise ValueError(
                f"algorithm_type={self.algorithm_type!r} integrates eps, which diverges at sigma = 0: "
                "set final_sigmas_type='sigma_min'."
            )
        if self.algorithm_type == "sde-dpmsolver" and self.solver_order == 3:
            raise ValueError("algorithm_type='sde-dpmsolver' has orders 1 and 2; set solver_order=2.")
        if self.prediction_type == "flow_prediction" and not self.use_flow_sigmas:
            raise ValueError(
                "prediction_type='flow_prediction' means x = (1 - sigma) x_0 + sigma eps: set use_flow_sigmas."
            )

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        if "mu" in custom and not self.use_dynamic_shifting:
            raise ValueError(f"{type(self).__name__}: mu= needs use_dynamic_shifting=True.")
        train, T = self.train_sigmas(), self.num_train_timesteps
        ramp = self.ramp(train[0], train[-1], n)
        if ramp is not None:
            sigma, t = ramp, spacing.sigma_to_t(ramp, train)
            whole = (self.use_karras_sigmas or self.use_lu_lambdas) and self.beta_schedule != "squaredcos_cap_v2"
            t = t.round() if whole else t
        elif self.use_flow_sigmas:
            shift = math.exp(custom["mu"]) if "mu" in custom else self.flow_shift
            sigma = 1 - np.linspace(1, 1 / T, n + 1)[:0:-1]
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
            t = sigma * T
        else:
            t = np.asarray(custom["timesteps"], float) if "timesteps" in custom else self._times(n)
            sigma = np.interp(t, np.arange(T), train)
        sigma = np.append(sigma, self.final_sigma())
        # the network is told whole times; one that is whole but for rounding stays what it is
        return path.chain(np.trunc(t + 1e-6), *self._rotate(sigma))

    def _times(self, n: int) -> np.ndarray:
        # the log-SNR from which the run starts may be bounded, which cosine schedules need
        last = int((-np.log(self.train_sigmas()) >= self.lambda_min_clipped).sum())
        return spacing.spaced_open(
            self.timestep_spacing, self._bounded(n), self.num_train_timesteps, last, self.steps_offset
        )

    def _rotate(self, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma of the sample whose noise-to-signal ratio (for flows: whose sigma) is given."""
        return (1 - sigma, sigma) if self.use_flow_sigmas else (1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma))

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        rows = len(grid.t)
        few = self.lower_order_final and rows < 15
        orders = np.full(rows, self.solver_order)
        if rows > 1 and few:
            orders[-2] = min(self.solver_order, 2)
        if self.euler_at_final or few or self.final_sigmas_type == "zero":
            orders[-1] = 1
        heun, from_x0 = self.solver_type == "heun", self.thresholding
        return solvers.dpm_multistep(grid, self.solver_order, self.algorithm_type, heun, orders, from_x0)

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        T = self.num_train_timesteps
        return self._rotate(np.arange(T) / T if self.use_flow_sigmas else self.train_sigmas())
