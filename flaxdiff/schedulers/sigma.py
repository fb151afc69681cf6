"""Schedulers in sigma whose sample is x_0 + sigma eps, as in k-diffusion: Euler, Heun, LMS, DPM-2, DPM++ 2S and SDE.

Each class lists its options, the levels it visits and its solver. Names, options and defaults are diffusers', as far as
diffusers has the class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from . import path, solvers, spacing
from .discrete import _Discrete
from .path import Grid

# Where rescale_betas_zero_snr leaves a signal of zero, solvers in sigma go on with this power: sigma stays finite.
LEAST_POWER = 2.0**-24


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
    whole_karras: ClassVar[bool] = False  # is the network told whole times on Karras' sigmas?

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
            t = t.round() if self.whole_karras and self.use_karras_sigmas else t
        return path.chain(t, np.ones(n + 1), np.append(sigma, self.final_sigma()))

    def _times(self, n: int) -> np.ndarray:
        if self.timestep_spacing == "leading":
            self._bounded(n)
        return spacing.spaced(self.timestep_spacing, n, self.num_train_timesteps, self.steps_offset)

    def columns(self, grid: Grid) -> dict[str, Any]:
        top = float(grid.sigma[0])
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
        gamma = solvers.churn(grid, s_churn, s_tmin, s_tmax)
        # an epsilon stays what it is at the raised level, as diffusers has it; the other outputs are read at their own
        raised = grid.sigma * (1 + gamma) if self.prediction_type == "epsilon" else grid.sigma
        return solvers.euler(grid, gamma, s_noise, path.prediction(self.prediction_type, grid.alpha, raised))


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
class LMSDiscreteScheduler(_VarianceExploding):
    """Linear multistep of order 4 in sigma, by `plan(order=...)` of a lower one (Karras' k-diffusion).

    >>> from flaxdiff.schedulers import LMSDiscreteScheduler
    >>> (LMSDiscreteScheduler().plan(9).mix[5, 0, 1:4] != 0).all()   # three earlier slopes
    np.True_
    """

    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    lacks: ClassVar[frozenset[str]] = frozenset({"rescale_betas_zero_snr"})
    options: ClassVar[Mapping[str, Any]] = {"order": 4}

    def solver(self, grid: Grid, n: int, order: int) -> solvers.Step:
        if order not in (1, 2, 3, 4):
            raise ValueError(f"LMSDiscreteScheduler: order={order} must be 1, 2, 3 or 4.")
        return solvers.lms(grid, order)


# --- two evaluations a step: level, midpoint or end, next level … the last step makes one ----------------------------


@dataclass(frozen=True, kw_only=True)
class _TwoStage(_VarianceExploding):
    beta_start: float = 0.00085
    beta_end: float = 0.012
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    order: ClassVar[int] = 2
    lacks: ClassVar[frozenset[str]] = frozenset({"rescale_betas_zero_snr"})

    def second(self, g: Grid) -> tuple[np.ndarray, np.ndarray]:
        """Time and sigma of each step's second evaluation; here halfway in log sigma."""
        sigma = np.sqrt(g.sigma * self.aims(g))[:-1]
        return spacing.sigma_to_t(sigma, self.train_sigmas()), sigma

    def aims(self, g: Grid) -> np.ndarray:
        """The sigma that each step reaches before noise is added."""
        return g.sigma_to

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        g = super().grid(n, custom)
        t, sigma, to = (a.repeat(2)[:-1] for a in (g.t, g.sigma, g.sigma_to))
        t[1::2], sigma[1::2] = self.second(g)
        return Grid(t, np.ones_like(t), sigma, np.ones_like(t), to)


@dataclass(frozen=True, kw_only=True)
class HeunDiscreteScheduler(_TwoStage):
    """Heun's method in sigma, of order 2 (Karras et al., 2206.00364, algorithm 1).

    >>> from flaxdiff.schedulers import HeunDiscreteScheduler
    >>> HeunDiscreteScheduler().plan(3).timesteps
    array([999. , 499.5, 499.5,   0. ,   0. ], dtype=float32)
    """

    clip_sample: bool = False
    clip_sample_range: float = 1.0

    def second(self, g: Grid) -> tuple[np.ndarray, np.ndarray]:
        return g.t[1:], g.sigma_to[:-1]

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        return solvers.heun(grid, 0 * grid.sigma)


@dataclass(frozen=True, kw_only=True)
class KDPM2DiscreteScheduler(_TwoStage):
    """DPM-Solver-2 in sigma: the slope at the midpoint of each step (2206.00364 on 2206.00927).

    >>> from flaxdiff.schedulers import KDPM2DiscreteScheduler
    >>> int(KDPM2DiscreteScheduler().plan(10).steps)
    19
    """

    whole_karras: ClassVar[bool] = True

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        down = grid.sigma_to.copy()
        down[:-1:2] = grid.sigma[1::2]  # first to the midpoint
        return solvers.two_stage(grid, down, 0 * down, data=False)


def ancestral(sigma: np.ndarray, sigma_to: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far down to step from sigma and how much noise to add, to be at sigma_to with DDPM's posterior."""
    up = np.minimum(sigma_to, sigma_to * np.sqrt(np.maximum(1 - (sigma_to / sigma) ** 2, 0)))
    return np.sqrt(np.maximum(sigma_to**2 - up**2, 0)), up


@dataclass(frozen=True, kw_only=True)
class KDPM2AncestralDiscreteScheduler(_TwoStage):
    """DPM-Solver-2 down past each level, and fresh noise back up to it.

    >>> from flaxdiff.schedulers import KDPM2AncestralDiscreteScheduler
    >>> KDPM2AncestralDiscreteScheduler().plan(3).noisy
    array([False,  True, False,  True, False])
    """

    whole_karras: ClassVar[bool] = True
    data: ClassVar[bool] = False

    def aims(self, g: Grid) -> np.ndarray:
        return ancestral(g.sigma, g.sigma_to)[0]

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        down, up = grid.sigma_to.copy(), 0 * grid.sigma
        down[:-1:2] = grid.sigma[1::2]
        down[1::2], up[1::2] = ancestral(grid.sigma[:-1:2], grid.sigma_to[1::2])
        return solvers.two_stage(grid, down, up, data=self.data)


@dataclass(frozen=True, kw_only=True)
class DPMSolver2SAncestralScheduler(KDPM2AncestralDiscreteScheduler):
    """DPM-Solver++(2S) down past each level and fresh noise back up: "DPM++ 2S a", which diffusers lacks (2211.01095).

    >>> from flaxdiff.schedulers import DPMSolver2SAncestralScheduler
    >>> DPMSolver2SAncestralScheduler().plan(2).noisy
    array([False,  True, False])
    """

    whole_karras: ClassVar[bool] = False
    data: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class DPMSolverSDEScheduler(_TwoStage):
    """DPM-Solver++'s SDE in single steps of two evaluations, each with ancestral noise (k-diffusion's "DPM++ SDE").

    The noise of the two evaluations of a step belongs to one Brownian motion, here from the run's PRNG keys:
    `noise_sampler_seed` is kept for configs and has no effect.

    >>> from flaxdiff.schedulers import DPMSolverSDEScheduler
    >>> DPMSolverSDEScheduler().plan(2).noisy
    array([ True,  True, False])
    """

    noise_sampler_seed: int | None = None
    options: ClassVar[Mapping[str, Any]] = {"s_noise": 1.0}

    def solver(self, grid: Grid, n: int, s_noise: float) -> solvers.Step:
        down, up = grid.sigma_to.copy(), 0 * grid.sigma
        down[:-1:2], up[:-1:2] = ancestral(grid.sigma[:-1:2], grid.sigma[1::2])
        down[1::2], up[1::2] = ancestral(grid.sigma[:-1:2], grid.sigma_to[1::2])
        return solvers.two_stage(grid, down, s_noise * up, brownian=True)


@dataclass(frozen=True, kw_only=True)
class DPMSolverFastScheduler(_VarianceExploding):
    """DPM-Solver-fast: n evaluations in steps of three, evenly in log sigma ("DPM fast", which diffusers lacks).

    It ends at the schedule's least sigma (2206.00927, appendix D.3).

    >>> from flaxdiff.schedulers import DPMSolverFastScheduler
    >>> int(DPMSolverFastScheduler().plan(10).steps)
    10
    """

    accepts: ClassVar[frozenset[str]] = frozenset()
    lacks: ClassVar[frozenset[str]] = frozenset({"rescale_betas_zero_snr", "timestep_spacing", "steps_offset"})

    def _stages(self, n: int) -> np.ndarray:
        """(order, stage) of each evaluation."""
        orders = [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]
        return np.array([(order, stage) for order in orders for stage in range(order)])

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        train, stages = self.train_sigmas(), self._stages(n)
        ends = spacing.exponential(train[0], train[-1], int((stages[:, 1] == 0).sum()) + 1)
        step = np.cumsum(stages[:, 1] == 0) - 1
        share = stages[:, 1] / stages[:, 0]
        sigma, one = ends[step] ** (1 - share) * ends[step + 1] ** share, np.ones(n)
        return Grid(spacing.sigma_to_t(sigma, train), one, sigma, one, ends[step + 1])

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        return solvers.dpm_fast(grid, self._stages(n))

    def _window(self, t: np.ndarray, n: int, *part: float | None) -> range:
        rows = super()._window(t, n, *part)
        begin = rows.start - int(self._stages(n)[rows.start, 1])  # a run begins with a whole step
        return range(begin, rows.stop)
