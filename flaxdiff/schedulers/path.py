"""The noising path x_t = alpha x_0 + sigma eps, on the host in float64.

Here a training schedule (betas) becomes signal and noise levels, and what a network was trained to predict becomes two
linear maps from (x_t, network output) to x_0 and to eps. Everything downstream of this file sees levels only.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Grid(NamedTuple):
    """The noise levels of a run: evaluation i is made at level i and leads to level `to` i (arrays of length n).

    `t` is the time that the network is told, `alpha` and `sigma` the level at which it is asked, `alpha_to` and
    `sigma_to` the level that the solver's step from there aims at.
    """

    t: Array
    alpha: Array
    sigma: Array
    alpha_to: Array
    sigma_to: Array

    @property
    def lam(self) -> Array:
        """Half the log signal-to-noise ratio at each evaluation, log(alpha / sigma)."""
        return _log_ratio(self.alpha, self.sigma)

    @property
    def lam_to(self) -> Array:
        """Half the log signal-to-noise ratio where each step leads; infinite at zero noise."""
        return _log_ratio(self.alpha_to, self.sigma_to)


def _log_ratio(alpha: Array, sigma: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(alpha) - np.log(sigma)


def chain(t: Array, alpha: Array, sigma: Array) -> Grid:
    """The usual grid, each step leading to the next level: levels are [n + 1] long, times [n]."""
    return Grid(np.asarray(t, float), alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])


# --- betas -----------------------------------------------------------------------------------------------------------


def _cosine_bar(t: float) -> float:
    return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2


def _laplace_bar(t: float) -> float:
    snr = np.exp(-0.5 * np.copysign(1, 0.5 - t) * np.log(1 - 2 * abs(0.5 - t) + 1e-6))
    return np.sqrt(snr / (1 + snr))


def _exp_bar(t: float) -> float:
    return np.exp(-12.0 * t)


def _from_bar(alpha_bar: Callable[[float], float]) -> Callable[[int, float, float], Array]:
    """Betas whose cumulative product follows `alpha_bar` on [0, 1], each capped at 0.999."""

    def betas(n: int, start: float, end: float) -> Array:
        bar = np.array([alpha_bar(i / n) for i in range(n + 1)])
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)

    return betas


BETAS: dict[str, Callable[[int, float, float], Array]] = {
    "linear": lambda n, start, end: np.linspace(start, end, n),
    "scaled_linear": lambda n, start, end: np.linspace(start**0.5, end**0.5, n) ** 2,
    "sigmoid": lambda n, start, end: (end - start) / (1 + np.exp(-np.linspace(-6, 6, n))) + start,
    "squaredcos_cap_v2": _from_bar(_cosine_bar),
    "laplace": _from_bar(_laplace_bar),
    "exp": _from_bar(_exp_bar),
}


def zero_terminal_snr(power: Array) -> Array:
    """Shift and scale alpha so that the last step is pure noise (Lin et al., 2305.08891, algorithm 1)."""
    alpha = np.sqrt(power)
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


@functools.lru_cache(maxsize=64)
def alphas_cumprod(
    n: int, start: float, end: float, schedule: str, trained: tuple[float, ...] | None = None, zero_snr: bool = False
) -> Array:
    """Signal power alpha(t)^2 for t = 0 … n - 1, read-only; `trained` betas win over a named schedule.

    `zero_snr` makes the last step pure noise.
    """
    betas = BETAS[schedule](n, start, end) if trained is None else np.asarray(trained, float)
    if len(betas) != n:
        raise ValueError(f"trained_betas holds {len(betas)} values and num_train_timesteps is {n}: make them agree.")
    power = np.cumprod(1 - betas)
    if zero_snr:
        power = zero_terminal_snr(power)
    power.flags.writeable = False
    return power


# --- predictions -----------------------------------------------------------------------------------------------------

# What the network predicts, as output = p x_0 + q eps.
TARGETS: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "epsilon": lambda alpha, sigma: (0 * alpha, 1 + 0 * alpha),
    "sample": lambda alpha, sigma: (1 + 0 * alpha, 0 * alpha),
    "v_prediction": lambda alpha, sigma: (-sigma / np.hypot(alpha, sigma), alpha / np.hypot(alpha, sigma)),
    "flow_prediction": lambda alpha, sigma: (-1 + 0 * alpha, 1 + 0 * alpha),
}


class Prediction(NamedTuple):
    """Coefficients [n] of x_0 = x0_sample x + x0_output y and eps = eps_sample x + eps_output y, y being the output."""

    x0_sample: Array
    x0_output: Array
    eps_sample: Array
    eps_output: Array


def prediction(kind: str, alpha: Array, sigma: Array) -> Prediction:
    """Solve x = alpha x_0 + sigma eps, y = p x_0 + q eps for x_0 and eps, at every level.

    Raises ValueError where the two equations coincide, as for epsilon at zero signal.
    """
    p, q = TARGETS[kind](alpha, sigma)
    det = q * alpha - p * sigma
    if np.any(det == 0):
        i = int(np.argmin(np.abs(det)))
        raise ValueError(
            f"prediction_type={kind!r} says nothing of x_0 at alpha={alpha[i]:g}, sigma={sigma[i]:g} (row {i}): "
            "with rescale_betas_zero_snr use 'v_prediction', or a spacing that leaves out the last training time."
        )
    return Prediction(q / det, -sigma / det, -p / det, alpha / det)
