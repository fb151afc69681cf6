"""Solvers as plain arithmetic: one function a family, in the symbols of its paper.

A solver takes the grid of levels (and its options) and returns `step(i, k, slots, p, z) -> slots`: i is the row of the
grid, k counts the evaluations made so far in this run (so k == 0 is the first, also when a run starts in the middle),
`slots` is what is carried along, slots[0] being the sample; p holds the prediction as p.x0 (clipped if the scheduler
clips), p.eps and p.out (the network's own output); z is unit noise. Nothing here sees an image: `tables.tabulate` calls
step once a row on the vectors of a basis, so `if` is an ordinary branch and the result is a table of numbers.

A solver of your own is such a function:

>>> def euler(g):
...     def step(i, k, slots, p, z):
...         dx_dsigma = p.eps
...         return (slots[0] + (g.sigma_to[i] - g.sigma[i]) * dx_dsigma,)
...     return step
"""

from collections.abc import Callable, Sequence

import numpy as np

from .path import Grid, prediction
from .tables import Pred

Vector = np.ndarray
Step = Callable[[int, int, Sequence[Vector], Pred, Vector], Sequence[Vector]]


def posterior_std(g: Grid, eta: float = 1.0) -> np.ndarray:
    """Standard deviation of q(x_to | x, x_0), eta times (2010.02502, equation 16; at alpha = 1 Euler ancestral's)."""
    remaining = g.sigma**2 - (g.alpha / g.alpha_to * g.sigma_to) ** 2
    return eta * g.sigma_to / g.sigma * np.sqrt(np.maximum(remaining, 0))


def ddim(g: Grid, std: np.ndarray, noise_std: np.ndarray | None = None, from_x0: bool = False) -> Step:
    """x_to = alpha_to x_0 + sqrt(sigma_to^2 - std^2) eps + noise_std z: DDIM, DDPM, Euler and Euler ancestral.

    `from_x0` derives eps from the clipped x_0 (what DDPM's posterior mean means, and Glide's DDIM) instead of taking
    the network's; `noise_std` departs from `std` where DDPM's variance does.
    """
    noise_std = std if noise_std is None else noise_std

    def step(i, k, slots, p, z):
        x = slots[0]
        eps = (x - g.alpha[i] * p.x0) / g.sigma[i] if from_x0 else p.eps
        direction = np.sqrt(max(g.sigma_to[i] ** 2 - std[i] ** 2, 0))
        return (g.alpha_to[i] * p.x0 + direction * eps + noise_std[i] * z,)

    return step


def euler(g: Grid, kind: str, churn: float = 0.0, low: float = 0.0, high: float = np.inf, s_noise: float = 1.0) -> Step:
    """Euler's method in sigma, with Karras' churn (2206.00364, algorithm 2): noise up to sigma_hat, then step down.

    The network is asked before the noise is added, as the community's samplers do, not after as in the paper.
    """
    gamma = np.where((low <= g.sigma) & (g.sigma <= high), min(churn / len(g.t), 2**0.5 - 1), 0.0)
    x0_sample = prediction(kind, g.alpha, g.sigma).x0_sample

    def step(i, k, slots, p, z):
        x, sigma = slots[0], g.sigma[i]
        sigma_hat = sigma * (1 + gamma[i])
        x_hat = x + s_noise * np.sqrt(sigma_hat**2 - sigma**2) * z
        d = p.eps if kind == "epsilon" else (x_hat - p.x0 - x0_sample[i] * (x_hat - x)) / sigma_hat
        return (x_hat + (g.sigma_to[i] - sigma_hat) * d,)

    return step


def dpm_multistep(g: Grid, order: int, kind: str, heun: bool, orders: Sequence[int], from_x0: bool = False) -> Step:
    """DPM-Solver (2206.00927) and DPM-Solver++ (2211.01095), multistep, their ODE and SDE forms.

    With h the step in lambda = log(alpha / sigma), the exact solution integrates exp(u) against a polynomial through
    the last predictions m (of x_0 for ++, else of eps), where u = h for eps, -h for x_0, doubled for the SDE of x_0.
    `orders[i]` caps the order at row i, besides what the history allows; `from_x0` takes eps from the clipped x_0.
    """
    data, sde = kind.endswith("++"), kind.startswith("sde")
    lam, lam_to = g.lam, g.lam_to

    def step(i, k, slots, p, z):
        x, m1, m2 = slots[:3]
        x0_eps = (x - g.alpha[i] * p.x0) / g.sigma[i] if from_x0 else p.eps
        m0 = p.x0 if data else x0_eps
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
        # the integrals of exp against 1, and for use > 1 against the line and the parabola
        u = (-2 * h if sde else -h) if data else h
        phi0 = np.expm1(u)
        phi1 = phi2 = 0.0
        if use > 1:
            phi1 = phi0 / u - 1 if heun or use > 2 else phi0 / 2
            phi2 = (phi0 - u) / u**2 - 0.5
        integral = phi0 * d0 + phi1 * d1 + phi2 * d2
        # data prediction decays with sigma, noise prediction with alpha
        if data:
            decay = g.sigma_to[i] / g.sigma[i] * (np.exp(-h) if sde else 1.0)
            mean = decay * x - g.alpha_to[i] * integral
            std = g.sigma_to[i] * np.sqrt(-np.expm1(-2 * h)) if sde else 0.0
        else:
            mean = g.alpha_to[i] / g.alpha[i] * x - (2 if sde else 1) * g.sigma_to[i] * integral
            std = g.sigma_to[i] * np.sqrt(np.expm1(2 * h)) if sde else 0.0
        return mean + std * z, m0, m1

    return step


ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(transfer: Callable[[int, int], tuple[float, float]], t: np.ndarray, ratio: int, warm_up: np.ndarray) -> Step:
    """Pseudo numerical methods on manifolds (2202.09778): Runge-Kutta over the times `warm_up`, then linear multistep.

    `transfer(t, t_to)` gives (a, b) of x_to = a x + b out, the paper's formula 9. Without Runge-Kutta the second
    evaluation repeats the first step with the mean of two outputs (PLMS). Outputs, not eps, are kept.
    """

    def runge_kutta(i, k, slots, out):
        x, aux, e1, e2, e3 = slots
        start, stage = int(warm_up[k // 4 * 4]), k % 4
        to = int(t[i]) - (0 if k % 2 else ratio // 2)
        a, b = transfer(start, to)
        if stage == 0:
            return a * x + b * out, x, out, e1, e2
        if stage == 1:
            return a * aux + b * out, aux, e1, e2, e3
        if stage == 2:
            # from here the origin is no longer needed: aux becomes the end of the step but for the last output
            half_a, half_b = transfer(start, int(t[i - 1]))
            second = (x - half_a * aux) / half_b
            full_a, full_b = transfer(start, int(t[min(i + 1, len(t) - 1)]))
            return a * aux + b * out, full_a * aux + full_b * (e1 / 6 + second / 3 + out / 3), e1, e2, e3
        return aux + b * out / 6, aux, e1, e2, e3

    def multistep(i, k, slots, out):
        x, first, e1, e2, e3 = slots
        if k == 1 and not len(warm_up):
            a, b = transfer(int(t[i]) + ratio, int(t[i]))
            return a * first + b * (out + e1) / 2, first, e1, e2, e3
        known = 3 if len(warm_up) else min(max(k - 1, 0), 3)
        weights = ADAMS[known]
        a, b = transfer(int(t[i]), int(t[i]) - ratio)
        mean = sum(w * e for w, e in zip(weights, (out, e1, e2, e3)))
        return a * x + b * mean, x, out, e1, e2

    def step(i, k, slots, p, z):
        return (runge_kutta if k < len(warm_up) else multistep)(i, k, slots, p.out)

    return step
