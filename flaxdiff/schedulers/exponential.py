"""Solvers in log SNR: exponential integrators, which treat the linear part of the diffusion ODE or SDE exactly.

With lambda = log(alpha / sigma), h its step and m the predictions (of x_0, "data", or of eps), the solution is
  data:  x_to = sigma_to / sigma x - alpha_to int exp(-u) m,   eps:  x_to = alpha_to / alpha x - sigma_to int exp(u) m,
and the solvers differ in the polynomial that stands for m. Same conventions as in `solvers`.
"""

from collections.abc import Callable, Sequence
from math import factorial

import numpy as np

from .path import Grid
from .solvers import Step, lagrange_integrals


class Interval:
    """The exact part of a step from one level to another: `mean` and `std` given the polynomial's coefficients."""

    def __init__(self, kind: str, start: tuple[float, float], end: tuple[float, float], h: float) -> None:
        """`kind` as DPM-Solver's algorithm_type; `start` and `end` are (alpha, sigma); h is the step in lambda."""
        data, sde = kind.endswith("++"), kind.startswith("sde")
        (alpha, sigma), (alpha_to, sigma_to) = start, end
        self.u = (-2 * h if sde else -h) if data else h
        self.phi = np.expm1(self.u)  # the integral of exp against 1
        if data:  # decays with sigma
            self.decay, self.gain = sigma_to / sigma * (np.exp(-h) if sde else 1.0), alpha_to
            self.std = sigma_to * np.sqrt(-np.expm1(-2 * h)) if sde else 0.0
        else:  # decays with alpha
            self.decay, self.gain = alpha_to / alpha, (2 if sde else 1) * sigma_to
            self.std = sigma_to * np.sqrt(np.expm1(2 * h)) if sde else 0.0

    def integrals(self, order: int, heun: bool, exact: bool = False) -> tuple[float, float, float]:
        """exp against 1, r and r^2 with r in [0, 1], as far as the order asks.

        Order 2 takes the middle's value for the line's integral unless `heun`. The coefficient that DPM-Solver gives to
        the parabola is half the integral; `exact` makes it whole.
        """
        line = 0.0 if order < 2 else self.phi / self.u - 1 if heun or order > 2 else self.phi / 2
        parabola = (self.phi - self.u) / self.u**2 - 0.5 if order > 2 else 0.0
        return self.phi, line, parabola * (2 if exact else 1)


def capped(rows: int, order: int, lower_order_final: bool, euler_at_final: bool) -> np.ndarray:
    """The highest order of each step: lower towards the end of runs under 15 steps, 1 at the end if asked for."""
    few = lower_order_final and rows < 15
    orders = np.full(rows, order)
    if rows > 1 and few:
        orders[-2] = min(order, 2)
    if few or euler_at_final:
        orders[-1] = 1
    return orders


def distinct(levels: np.ndarray) -> int:
    """How many values at the head differ each from the one before: long runs round neighbouring times to the same."""
    return 1 + int(np.cumprod(np.diff(levels) != 0).sum())


def dpm_multistep(
    g: Grid, order: int, kind: str, heun: bool, orders: Sequence[int], from_x0: bool = False, exact: bool = False
) -> Step:
    """DPM-Solver (2206.00927), DPM-Solver++ (2211.01095), ODE and SDE; with `exact`, on eps, DEIS (2204.13902).

    The polynomial goes through the last predictions. `orders[i]` caps the order at row i, besides what the history
    allows; `from_x0` takes eps from the clipped x_0.
    """
    data = kind.endswith("++")
    lam, lam_to = g.lam, g.lam_to

    def step(i, k, slots, p, z):
        x, m1, m2 = slots[:3]
        m0 = p.x0 if data else (x - g.alpha[i] * p.x0) / g.sigma[i] if from_x0 else p.eps
        h = lam_to[i] - lam[i]
        if h == 0:
            return x, m0, m1
        # history: differences of the predictions over steps in lambda
        use = min(order, orders[i], k + 1)
        h0 = lam[i] - lam[i - 1] if use > 1 else 0.0
        h1 = lam[i - 1] - lam[i - 2] if use > 2 else 0.0
        use = 1 if h0 == 0 else 2 if h1 == 0 else use
        d0, d1, d2 = m0, 0 * m0, 0 * m0
        if use > 1:
            d1 = (m0 - m1) * h / h0
        if use > 2:
            d11 = (m1 - m2) * h / h1
            d1, d2 = d1 + h0 / (h0 + h1) * (d1 - d11), h / (h0 + h1) * (d1 - d11)
        v = Interval(kind, (g.alpha[i], g.sigma[i]), (g.alpha_to[i], g.sigma_to[i]), h)
        phi0, phi1, phi2 = v.integrals(use, heun, exact)
        return v.decay * x - v.gain * (phi0 * d0 + phi1 * d1 + phi2 * d2) + v.std * z, m0, m1

    return step


def dpm_singlestep(g: Grid, kind: str, heun: bool, orders: Sequence[int], from_x0: bool = False) -> Step:
    """DPM-Solver and DPM-Solver++, single step: orders[i] = 1 starts a step, 2 and 3 redo it from its start."""
    data = kind.endswith("++")
    lam, lam_to = g.lam, g.lam_to

    def step(i, k, slots, p, z):
        x, origin, m1, m2 = slots[:4]
        m0 = p.x0 if data else (x - g.alpha[i] * p.x0) / g.sigma[i] if from_x0 else p.eps
        order = min(orders[i], k + 1)
        if order == 1:
            origin = x
        s = i - order + 1  # the row where this step began
        h = lam_to[i] - lam[s]
        if h == 0:
            return origin, origin, m0, m1
        d0, d1, d2 = (m0, m1, m2)[order - 1], 0 * m0, 0 * m0
        if order > 1:
            r0 = (lam[i] - lam[s]) / h
            d1 = (m0 - d0) / r0
        if order > 2 and heun:
            r1 = (lam[i - 1] - lam[s]) / h
            d11 = (m1 - d0) / r1
            d1, d2 = (r0 * d11 - r1 * d1) / (r0 - r1), 2 * (d1 - d11) / (r0 - r1)
        v = Interval(kind, (g.alpha[s], g.sigma[s]), (g.alpha_to[i], g.sigma_to[i]), h)
        phi0, phi1, phi2 = v.integrals(order, heun)
        return v.decay * origin - v.gain * (phi0 * d0 + phi1 * d1 + phi2 * d2) + v.std * z, origin, m0, m1

    return step


def unipc(g: Grid, orders: Sequence[int], data: bool, bh1: bool, uncorrected: Sequence[int] = ()) -> Step:
    """UniPC (2302.04867): the predictor UniP and, with the prediction made where it leads, the corrector UniC.

    `orders[i]` caps the order of the step at row i, `uncorrected` names the rows whose step is not corrected. The
    polynomial's coefficients solve a Vandermonde system. Slots: x, the corrected x before it and three predictions.
    """
    lam, lam_to = g.lam, g.lam_to
    order = lambda i, k: min(orders[i], k + 1)

    def across(i, x, use, m0, older, newest=None):
        """From row i to where it leads, through m0 made at row i, the older ones and, to correct, the newest there."""
        h = lam_to[i] - lam[i]
        if data:
            u, ratio, gain, other = -h, g.sigma_to[i] / g.sigma[i], g.alpha_to[i], g.alpha[i]
        else:
            u, ratio, gain, other = h, g.alpha_to[i] / g.alpha[i], g.sigma_to[i], g.sigma[i]
        x = ratio * x - (ratio * other - gain) * m0  # gain expm1(u), also at zero noise
        if h == 0 or np.isinf(h):
            return x
        # b_j: moments of exp against r^(j - 1), divided by B(h)
        bh = u if bh1 else np.expm1(u)
        phi, b = np.expm1(u) / u - 1, []
        for j in range(1, use + 1):
            b.append(phi * factorial(j) / bh)
            phi = phi / u - 1 / factorial(j + 1)
        # levels that coincide give no slope: the history ends there
        levels = lam[i - np.arange(use)]
        r = ((levels - lam[i]) / h)[1 : distinct(levels)]
        slopes = [(m - m0) / rj for m, rj in zip(older, r)]
        if newest is not None:
            r, slopes = np.append(r, 1.0), [*slopes, newest - m0]
        if not len(r):
            return x
        # with one unknown the leading order suffices: a half
        weights = np.linalg.solve(np.vander(r, increasing=True).T, b[: len(r)]) if len(r) > 1 else [0.5]
        return x - gain * bh * sum(w * d for w, d in zip(weights, slopes))

    def step(i, k, slots, p, z):
        x, last, m1, m2, m3 = slots
        m0 = p.x0 if data else p.eps
        if k and i - 1 not in uncorrected:
            x = across(i - 1, last, order(i - 1, k - 1), m1, (m2, m3), m0)
        return across(i, x, order(i, k), m0, (m1, m2)), x, m0, m1, m2

    return step


def sa_solver(
    g: Grid,
    predictor: Sequence[int],
    corrector: Sequence[int],
    tau: Callable[[float], float],
    data: bool,
    from_x0: bool = False,
) -> Step:
    """SA-Solver (2309.05019): stochastic Adams-Bashforth predictor and Adams-Moulton corrector, noise scaled by tau(t).

    `predictor[i]` and `corrector[i]` cap the orders at row i. A correction redoes the last step, noise included; all of
    it that does not need the new prediction is summed in slot 1 beforehand, which leaves three slots for history.
    """
    lam, lam_to = g.lam, g.lam_to

    def weights(i: int, nodes: np.ndarray, adams_moulton: bool) -> np.ndarray:
        """Coefficients of the predictions made at lambda = nodes, for the step at row i, up to a repeated one."""
        nodes = nodes[: distinct(nodes)]
        h, c = lam_to[i] - lam[i], 1 + tau(g.t[i]) ** 2
        rate, gain = (-c, c * g.alpha_to[i]) if data else (1.0, -c * g.sigma_to[i])
        w = gain * lagrange_integrals(lam_to[i] - nodes, 0.0, h, lambda u: np.exp(rate * u))
        if data and len(nodes) == 2:  # the paper's order 2 replaces the line's moment by its leading order
            excess = h**2 / 2 - (h * c + np.expm1(-c * h)) / c**2
            w += gain * excess / (h if adams_moulton else lam[i] - nodes[1]) * np.array([1, -1])
        return w

    def carried(i, x, z):
        """What the step at row i makes of the sample and the noise."""
        t = tau(g.t[i])
        h = lam_to[i] - lam[i]
        if data:
            ratio, std = np.exp(-(t**2) * h) * g.sigma_to[i] / g.sigma[i], np.sqrt(-np.expm1(-2 * t**2 * h))
        else:
            ratio, std = g.alpha_to[i] / g.alpha[i], t * np.sqrt(np.expm1(2 * h))
        return ratio * x + g.sigma_to[i] * std * z

    def step(i, k, slots, p, z):
        x, base, m1, m2, m3 = slots
        m0 = p.x0 if data else (x - g.alpha[i] * p.x0) / g.sigma[i] if from_x0 else p.eps
        moulton = lambda i, k: weights(i, np.append(lam_to[i], lam[i - np.arange(min(corrector[i], k + 2) - 1)]), True)
        if k:
            x = base + moulton(i - 1, k - 1)[0] * m0
        history = (m0, m1, m2, m3)
        start = carried(i, x, z)
        if lam_to[i] == lam[i]:
            return start, x, *history[:3]
        bashforth = weights(i, lam[i - np.arange(min(predictor[i], k + 1))], False)
        base = start + sum(w * m for w, m in zip(moulton(i, k)[1:], history))
        return start + sum(w * m for w, m in zip(bashforth, history)), base, *history[:3]

    return step
