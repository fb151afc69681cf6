"""Schedulers in log SNR whose sample has unit variance: DPM-Solver in its forms, DEIS, UniPC and SA-Solver.

All cross the same levels, over betas or (`use_flow_sigmas`) over a flow, with the integrators of `exponential`. Each
class lists its options and its solver. Names, options and defaults are diffusers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from . import exponential, path, spacing
from .path import Grid
from .sigma import _Sigma
from .solvers import Step

# Options that a class of this family may not have.
_SPACING = frozenset({"timestep_spacing", "steps_offset"})
_ZERO_SNR = frozenset({"rescale_betas_zero_snr"})


@dataclass(frozen=True, kw_only=True)
class _Rotated(_Sigma):
    """Levels alpha = 1 / sqrt(1 + sigma^2) and alpha sigma; for flows 1 - sigma and sigma."""

    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    lower_order_final: bool = True
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_flow_sigmas: bool | None = False
    flow_shift: float | None = 1.0
    final_sigmas_type: str = "sigma_min"
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    lambda_min_clipped: float = -math.inf
    accepts: ClassVar[frozenset[str]] = frozenset({"timesteps", "mu"})
    choices: ClassVar[Mapping[str, tuple]] = {
        "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
        "time_shift_type": ("exponential",),
    }
    round_cosine: ClassVar[bool] = True  # are Karras' times whole over a cosine schedule too?
    end_at_train: ClassVar[bool] = False  # is "sigma_min" the schedule's least sigma, or the last that was visited?

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction_type == "flow_prediction" and not self.use_flow_sigmas:
            raise ValueError(
                "prediction_type='flow_prediction' means x = (1 - sigma) x_0 + sigma eps: set use_flow_sigmas."
            )

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        if "mu" in custom and not self.use_dynamic_shifting:
            raise ValueError(f"{type(self).__name__}: mu= needs use_dynamic_shifting=True.")
        train, T = self.train_sigmas(), self.num_train_timesteps
        sigma = self.ramp(train[0], train[-1], n)
        visited = self.end_at_train  # whether the last sigma visited leaves something to go
        if sigma is not None:
            t, sigma = self._told(sigma, train)
        elif self.use_flow_sigmas:
            sigma = self._flow(n, custom)
            t = sigma * T
        else:
            t = np.asarray(custom["timesteps"], float) if "timesteps" in custom else self._times(n)
            sigma, visited = np.interp(t, np.arange(T), train), True
        ends_at_zero = self.final_sigmas_type == "zero"
        sigma = np.append(sigma, 0.0 if ends_at_zero else self.final_sigma() if visited else sigma[-1])
        # the network is told whole times; one that is whole but for rounding stays what it is
        return path.chain(np.trunc(t + 1e-6), *self._rotate(sigma))

    def _told(self, sigma: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The times of a ramp of sigmas, and the ramp."""
        t = spacing.sigma_to_t(sigma, train)
        karras = self.use_karras_sigmas or getattr(self, "use_lu_lambdas", False)
        return (t.round() if karras and (self.round_cosine or self.beta_schedule != "squaredcos_cap_v2") else t), sigma

    def _flow(self, n: int, custom: Mapping[str, Any]) -> np.ndarray:
        shift = math.exp(custom["mu"]) if "mu" in custom else self.flow_shift
        return spacing.shifted(1 - np.linspace(1, 1 / self.num_train_timesteps, n + 1)[:0:-1], shift)

    def _times(self, n: int) -> np.ndarray:
        # the log-SNR from which the run starts may be bounded, which cosine schedules need
        last = int((-np.log(self.train_sigmas()) >= self.lambda_min_clipped).sum())
        kind, T = self.timestep_spacing, self.num_train_timesteps
        return spacing.spaced_open(kind, self._bounded(n), T, last, self.steps_offset)

    def _rotate(self, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma of the sample whose noise-to-signal ratio (for flows: whose sigma) is given."""
        return (1 - sigma, sigma) if self.use_flow_sigmas else (1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma))

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        T = self.num_train_timesteps
        return self._rotate(np.arange(T) / T if self.use_flow_sigmas else self.train_sigmas())


@dataclass(frozen=True, kw_only=True)
class _DPMSolver(_Rotated):
    """Options of DPM-Solver in multistep, single-step and inverse form."""

    solver_order: int = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"
    variance_type: str | None = None
    end_at_train: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, tuple]] = {
        **_Rotated.choices,
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
        "solver_order": (1, 2, 3),
        "variance_type": (None, "learned", "learned_range"),
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

    def solver(self, grid: Grid, n: int) -> Step:
        final = self.euler_at_final or self.final_sigmas_type == "zero"
        orders = exponential.capped(len(grid.t), self.solver_order, self.lower_order_final, final)
        kind, heun, from_x0 = self.algorithm_type, self.solver_type == "heun", self.thresholding
        return exponential.dpm_multistep(grid, self.solver_order, kind, heun, orders, from_x0)


@dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepScheduler(_DPMSolver):
    """Exponential integrator of order 1 to 3 in log SNR (Lu et al., 2206.00927 and, for ++, 2211.01095).

    `algorithm_type` chooses the integrand (x_0 with "++", else eps) and the ODE or the SDE ("sde-").

    >>> from flaxdiff.schedulers import DPMSolverMultistepScheduler
    >>> DPMSolverMultistepScheduler(use_karras_sigmas=True).plan(4).timesteps
    array([999., 775., 301.,   0.], dtype=float32)
    """

    use_lu_lambdas: bool | None = False
    round_cosine: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class DPMSolverSinglestepScheduler(_DPMSolver):
    """DPM-Solver in single steps: each visits its inner points, so n evaluations make n / order steps (2206.00927).

    >>> from flaxdiff.schedulers import DPMSolverSinglestepScheduler
    >>> DPMSolverSinglestepScheduler(solver_order=3).order_list(7)
    [1, 2, 3, 1, 2, 3, 1]
    """

    lower_order_final: bool = False
    lacks: ClassVar[frozenset[str]] = _SPACING | _ZERO_SNR | {"euler_at_final"}
    choices: ClassVar[Mapping[str, tuple]] = {
        **_DPMSolver.choices,
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
    }

    def order_list(self, n: int) -> list[int]:
        """The order of the formula at each evaluation, 1 where a step begins; the last steps shrink to fit n."""
        order = self.solver_order
        orders = (list(range(1, order + 1)) * n)[:n]
        if n % order == 0 and order > 1 and (self.lower_order_final or self.final_sigmas_type == "zero"):
            orders[-1] = 1
        if self.final_sigmas_type == "zero":
            orders[-1] = 1
        return orders

    def solver(self, grid: Grid, n: int) -> Step:
        orders, heun = self.order_list(len(grid.t)), self.solver_type == "heun"
        return exponential.dpm_singlestep(grid, self.algorithm_type, heun, orders, self.thresholding)


@dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepInverseScheduler(_DPMSolver):
    """DPM-Solver from an image towards noise, as DiffEdit inverts (2210.11427); the ODE's forms only.

    >>> from flaxdiff.schedulers import DPMSolverMultistepInverseScheduler
    >>> DPMSolverMultistepInverseScheduler().plan(4).timesteps
    array([  0., 250., 500., 749.], dtype=float32)
    """

    final_sigmas_type: str = "sigma_min"
    ascends: ClassVar[bool] = True
    accepts: ClassVar[frozenset[str]] = frozenset()
    lacks: ClassVar[frozenset[str]] = _ZERO_SNR | {"final_sigmas_type", "use_dynamic_shifting", "time_shift_type"}
    choices: ClassVar[Mapping[str, tuple]] = {**_DPMSolver.choices, "algorithm_type": ("dpmsolver", "dpmsolver++")}

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        train, T = self.train_sigmas(), self.num_train_timesteps
        sigma = self.ramp(train[-1], train[0], n)  # ascending
        if sigma is not None:
            (t, sigma), end = self._told(sigma, train), sigma[-1]
        elif self.use_flow_sigmas:
            sigma = self._flow(n, custom)[::-1]
            t, end = sigma * T, sigma[-1]
        else:
            last = int((-np.log(train) >= self.lambda_min_clipped).sum())
            t = self._ascending(self._bounded(n), last)
            sigma, end = train[t.astype(int)], train[last - 1]
        return path.chain(np.trunc(t + 1e-6), *self._rotate(np.append(sigma, end)))

    def _ascending(self, n: int, last: int) -> np.ndarray:
        if self.timestep_spacing == "linspace":
            return np.linspace(0, last - 1, n + 1).round()[:-1]
        if self.timestep_spacing == "leading":
            return np.arange(n) * (last // (n + 1)) + float(self.steps_offset)
        return spacing.spaced_open("trailing", n, self.num_train_timesteps, last)[::-1]


@dataclass(frozen=True, kw_only=True)
class DEISMultistepScheduler(_Rotated):
    """Exact integration of the polynomial through the last eps, in log rho (Zhang and Chen, 2204.13902).

    A run over a ramp of sigmas or a flow ends at the last level that it visits, as diffusers' does.

    >>> from flaxdiff.schedulers import DEISMultistepScheduler
    >>> DEISMultistepScheduler(solver_order=3).plan(4).timesteps
    array([999., 749., 500., 250.], dtype=float32)
    """

    solver_order: int = 2
    algorithm_type: str = "deis"
    solver_type: str = "logrho"
    lacks: ClassVar[frozenset[str]] = _ZERO_SNR | {"final_sigmas_type", "lambda_min_clipped"}
    choices: ClassVar[Mapping[str, tuple]] = {
        **_Rotated.choices,
        "algorithm_type": ("deis",),
        "solver_type": ("logrho",),
        "solver_order": (1, 2, 3),
    }
    aliases: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"), "deis"),
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    }

    def solver(self, grid: Grid, n: int) -> Step:
        orders = exponential.capped(len(grid.t), self.solver_order, self.lower_order_final, False)
        return exponential.dpm_multistep(
            grid, self.solver_order, "dpmsolver", True, orders, self.thresholding, exact=True
        )


@dataclass(frozen=True, kw_only=True)
class UniPCMultistepScheduler(_Rotated):
    """Predictor UniP and corrector UniC of order 1 to 3 (Zhao et al., 2302.04867).

    `solver_type` is the paper's B(h): h ("bh1") or exp(h) - 1 ("bh2"). `disable_corrector` lists steps, from 0, whose
    result is not corrected. With `use_flow_sigmas`, `plan` also takes sigmas= before shifting, without the final zero.

    >>> from flaxdiff.schedulers import UniPCMultistepScheduler
    >>> s = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    >>> s.plan(3).sigma.round(4)
    array([1.    , 0.8573, 0.6007], dtype=float32)
    """

    solver_order: int = 2
    predict_x0: bool = True
    solver_type: str = "bh2"
    disable_corrector: Sequence[int] = ()
    solver_p: None = None
    final_sigmas_type: str = "zero"
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift_terminal: float | None = None
    lacks: ClassVar[frozenset[str]] = frozenset({"lambda_min_clipped"})
    accepts: ClassVar[frozenset[str]] = frozenset({"timesteps", "sigmas", "mu"})
    ends: ClassVar[frozenset[str]] = frozenset()
    choices: ClassVar[Mapping[str, tuple]] = {
        **_Rotated.choices,
        "time_shift_type": ("exponential", "linear"),
        "solver_type": ("bh1", "bh2"),
        "solver_order": (1, 2, 3),
        "solver_p": (None,),
    }
    aliases: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift_terminal is not None and not self.use_flow_sigmas:
            raise ValueError("shift_terminal stretches the sigmas of a flow: set use_flow_sigmas as well.")

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        if self.use_dynamic_shifting and "mu" not in custom:
            raise ValueError("UniPCMultistepScheduler: use_dynamic_shifting=True needs plan(mu=...), by image size.")
        if "sigmas" in custom and not self.use_flow_sigmas:
            raise ValueError("UniPCMultistepScheduler: sigmas= needs use_flow_sigmas=True; give timesteps=.")
        return super().grid(n, custom)

    def _told(self, sigma: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.use_flow_sigmas and self.use_karras_sigmas:
            sigma = sigma / (sigma + 1)
            return sigma * self.num_train_timesteps, sigma
        return super()._told(sigma, train)

    def _flow(self, n: int, custom: Mapping[str, Any]) -> np.ndarray:
        given = np.linspace(1, 1 / self.num_train_timesteps, n + 1)[:-1]
        shift = time_shift(self.time_shift_type, custom["mu"]) if "mu" in custom else self.flow_shift
        sigma = spacing.shifted(np.asarray(custom.get("sigmas", given), float), shift)
        sigma = spacing.stretched(sigma, self.shift_terminal)
        # a little signal keeps log SNR finite; the value is what float32 makes of one millionth
        return np.where(abs(sigma - 1) < 1e-6, float(np.float32(1 - 1e-6)), sigma)

    def solver(self, grid: Grid, n: int) -> Step:
        rows = len(grid.t)
        orders = np.full(rows, self.solver_order)
        if self.lower_order_final:
            orders = np.minimum(orders, np.arange(rows, 0, -1))
        return exponential.unipc(grid, orders, self.predict_x0, self.solver_type == "bh1", self.disable_corrector)


def time_shift(kind: str, mu: float) -> float:
    """The factor on the odds sigma / (1 - sigma) that mu stands for."""
    return math.exp(mu) if kind == "exponential" else mu


def tau_between_200_and_800(t: float) -> float:
    """SA-Solver's usual noise scale: 1 in the middle of the schedule."""
    return float(200 <= t <= 800)


@dataclass(frozen=True, kw_only=True)
class SASolverScheduler(_Rotated):
    """Stochastic Adams predictor and corrector in log SNR (Xue et al., 2309.05019), each of order 1 to 4.

    `tau_func` maps a training time to the noise's scale: 0 follows the ODE, 1 the diffusion SDE; by default 1 between
    times 200 and 800. It is a Python function and does not travel by file.

    >>> from flaxdiff.schedulers import SASolverScheduler
    >>> SASolverScheduler().plan(4).noisy
    array([False,  True,  True,  True])
    """

    predictor_order: int = 2
    corrector_order: int = 2
    tau_func: Callable[[float], float] | None = None
    algorithm_type: str = "data_prediction"
    variance_type: str | None = None
    lacks: ClassVar[frozenset[str]] = _ZERO_SNR | {"final_sigmas_type", "use_dynamic_shifting", "time_shift_type"}
    accepts: ClassVar[frozenset[str]] = frozenset({"timesteps"})
    choices: ClassVar[Mapping[str, tuple]] = {
        **_Rotated.choices,
        "algorithm_type": ("data_prediction", "noise_prediction"),
        "predictor_order": (1, 2, 3, 4),
        "corrector_order": (1, 2, 3, 4),
        "variance_type": (None, "learned", "learned_range"),
    }
    aliases: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "algorithm_type": {
            "deis": "noise_prediction",
            **dict.fromkeys(("dpmsolver", "sde-dpmsolver"), "noise_prediction"),
            **dict.fromkeys(("dpmsolver++", "sde-dpmsolver++"), "data_prediction"),
        }
    }

    def solver(self, grid: Grid, n: int) -> Step:
        left = np.arange(len(grid.t), 0, -1) if self.lower_order_final else np.full(len(grid.t), 9)
        predictor = np.minimum(self.predictor_order, left)
        corrector = np.minimum(self.corrector_order, left + 1)
        data = self.algorithm_type == "data_prediction"
        tau = self.tau_func or tau_between_200_and_800
        return exponential.sa_solver(grid, predictor, corrector, tau, data, self.thresholding)
