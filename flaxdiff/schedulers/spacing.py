"""Which times and noise levels a run visits, on the host in float64.

Two ways to choose: by time (leading, trailing, linspace over the training steps) or by noise level sigma (Karras,
exponential, beta and log-SNR-uniform ramps between two ends). `sigma_to_t` goes back from a sigma to a training time.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray

SPACINGS = ("leading", "trailing", "linspace")


def spaced(kind: str, n: int, train: int, offset: int = 0) -> Array:
    """n descending times among 0 … train - 1 (Lin et al., 2305.08891, table 2); those of linspace are not rounded."""
    if kind == "linspace":
        return np.linspace(0, train - 1, n)[::-1]
    if kind == "leading":
        return np.arange(n)[::-1] * (train // n) + float(offset)
    return np.round(train - np.arange(n) * (train / n)) - 1


def spaced_open(kind: str, n: int, train: int, last: int, offset: int = 0) -> Array:
    """As `spaced`, but of n + 1 times the final one is left to the solver's end point; `last` caps the start."""
    if kind == "linspace":
        return np.linspace(0, last - 1, n + 1).round()[:0:-1]
    if kind == "leading":
        return np.arange(1, n + 1)[::-1] * (last // (n + 1)) + float(offset)
    t = np.round(last - np.arange(n) * (train / n)) - 1
    return t[t >= 0]


def karras(low: float, high: float, n: int, rho: float = 7.0) -> Array:
    """Sigmas evenly spaced in sigma^(1/rho) (Karras et al., 2206.00364, equation 5)."""
    ramp = np.linspace(0, 1, n)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def exponential(low: float, high: float, n: int) -> Array:
    """Sigmas evenly spaced in log sigma, which is evenly in log SNR (Lu et al., 2206.00927)."""
    return np.exp(np.linspace(np.log(high), np.log(low), n))


def beta(low: float, high: float, n: int, a: float = 0.6, b: float = 0.6) -> Array:
    """Sigmas at evenly spaced quantiles of a Beta(a, b) distribution (Lee et al., 2407.12173)."""
    from scipy.special import betaincinv  # 0.3 s to import

    return low + betaincinv(a, b, 1 - np.linspace(0, 1, n)) * (high - low)


def shifted(sigma: Array, shift: float) -> Array:
    """Flow times moved towards noise: odds sigma / (1 - sigma) times `shift` (2403.03206, equation 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def stretched(sigma: Array, terminal: float | None) -> Array:
    """Flow times stretched about 1 so that the last of them is `terminal`, if one is given; a lone 1 stays."""
    return 1 - (1 - sigma) * (1 - terminal) / (1 - sigma[-1]) if terminal and sigma[-1] < 1 else sigma


# The flag of a scheduler's config -> the ramp that it asks for.
RAMPS: dict[str, Callable[[float, float, int], Array]] = {
    "use_karras_sigmas": karras,
    "use_exponential_sigmas": exponential,
    "use_beta_sigmas": beta,
    "use_lu_lambdas": exponential,
}


def sigma_to_t(sigma: Array, train_sigmas: Array) -> Array:
    """The (fractional) training time at which the schedule reaches sigma, linear in log sigma, clamped to its ends."""
    return np.interp(np.log(np.maximum(sigma, 1e-10)), np.log(train_sigmas), np.arange(len(train_sigmas)))


def strength_window(n: int, strength: float, order: int, rows: int) -> int:
    """First evaluation of an image-to-image run that keeps `strength` of its n steps, `order` evaluations each."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must lie in (0, 1]: 1 starts from pure noise.")
    begin = max(n - min(int(n * strength), n), 0) * order
    if begin >= rows:
        raise ValueError(f"strength={strength} leaves none of {n} steps: raise it to at least {1 / n:g}, or the steps.")
    return begin


def cutoff(train: int, fraction: float, name: str) -> int:
    """The training time below which a share `fraction` of the denoising lies behind."""
    if not 0 < fraction < 1:
        raise ValueError(f"{name}={fraction} must lie strictly between 0 and 1: it is a share of the denoising.")
    return int(round(train - fraction * train))
