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

from .path import Grid, Prediction
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


def churn(g: Grid, s_churn: float, s_tmin: float, s_tmax: float) -> np.ndarray:
    """gamma, by which Karras' churn raises sigma before each step (2206.00364, algorithm 2)."""
    return np.where((s_tmin <= g.sigma) & (g.sigma <= s_tmax), min(s_churn / len(g.t), 2**0.5 - 1), 0.0)


def euler(g: Grid, gamma: np.ndarray, s_noise: float, predict: Prediction) -> Step:
    """Euler's method in sigma, with Karras' churn: noise up to sigma_hat, then step down.

    The network is asked before the noise is added, as the community's samplers do, not after as in the paper; `predict`
    reads its output with the noisier sample.
    """

    def step(i, k, slots, p, z):
        sigma_hat = g.sigma[i] * (1 + gamma[i])
        x_hat = slots[0] + s_noise * np.sqrt(sigma_hat**2 - g.sigma[i] ** 2) * z
        d = (x_hat - predict.x0_sample[i] * x_hat - predict.x0_output[i] * p.out) / sigma_hat
        return (x_hat + (g.sigma_to[i] - sigma_hat) * d,)

    return step


def two_stage(g: Grid, down: np.ndarray, up: np.ndarray, data: bool = True, brownian: bool = False) -> Step:
    """Midpoint methods in sigma: DPM-2 and its ancestral form, DPM++ 2S ancestral, DPM++ SDE (samples x_0 + sigma eps).

    Even rows go from their level to `down[i]` by the prediction made there; odd rows repeat that step from its start
    with the prediction made at the midpoint, all the way to `down[i]`. Then noise `up[i]` comes back. `data` keeps x_0
    over the step (x_to = x_0 + sigma_to / sigma (x - x_0)), otherwise dx / dsigma. `brownian`: the noise of an odd row
    is a Brownian motion's over the whole step, whose first half the even row has drawn.
    """

    def step(i, k, slots, p, z):
        x, origin, z_first = slots[:3]
        if i % 2 == 0:
            kept = z if brownian and i + 1 < len(g.t) else 0 * z
            return down[i] / g.sigma[i] * (x - p.x0) + p.x0 + up[i] * z, x, kept
        sigma, middle, end = g.sigma[i - 1], g.sigma[i], g.sigma_to[i]
        if brownian:
            z = (np.sqrt(sigma - middle) * z_first + np.sqrt(middle - end) * z) / np.sqrt(sigma - end)
        if data:
            mean = down[i] / sigma * (origin - p.x0) + p.x0
        else:
            mean = origin + (down[i] - sigma) * (x - p.x0) / middle
        return mean + up[i] * z, origin

    return step


def heun(g: Grid, gamma: np.ndarray, s_noise: float = 1.0) -> Step:
    """Heun's method in sigma (2206.00364, algorithms 1 and 2): Euler, then again with the mean slope.

    d = (x - x_0) / sigma is dx / dsigma for samples x_0 + sigma eps and for flows (1 - sigma) x_0 + sigma eps alike.
    """

    def step(i, k, slots, p, z):
        x = slots[0]
        if i % 2 == 0:
            sigma_hat = g.sigma[i] * (1 + gamma[i])
            x_hat = x + s_noise * np.sqrt(sigma_hat**2 - g.sigma[i] ** 2) * z
            d = (x - p.x0) / sigma_hat
            return x_hat + (g.sigma_to[i] - sigma_hat) * d, x_hat, d
        x_hat, d = slots[1:3]
        sigma_hat = g.sigma[i - 1] * (1 + gamma[i - 1])
        return x_hat + (g.sigma[i] - sigma_hat) * (d + (x - p.x0) / g.sigma[i]) / 2, x_hat, d

    return step


def lagrange_integrals(nodes: np.ndarray, low: float, high: float, weight: Callable = np.ones_like) -> np.ndarray:
    """The integral from low to high of weight(s) times each Lagrange polynomial through the nodes (Gauss-Legendre)."""
    points, masses = np.polynomial.legendre.leggauss(24)
    s = low + (high - low) * (points + 1) / 2
    basis = [np.prod([(s - b) / (a - b) for b in nodes if b != a], axis=0) for a in nodes]
    return np.array([(high - low) / 2 * (masses * weight(s) * line).sum() for line in basis])


def lms(g: Grid, order: int) -> Step:
    """Adams-Bashforth in sigma on uneven steps: the last slopes' interpolation polynomial, integrated exactly."""

    def step(i, k, slots, p, z):
        slopes = (p.eps, *slots[1:4])[: min(k + 1, order)]
        nodes = g.sigma[i - np.arange(len(slopes))]
        weights = lagrange_integrals(nodes, g.sigma[i], g.sigma_to[i])
        return slots[0] + sum(w * d for w, d in zip(weights, slopes)), p.eps, *slots[1:3]

    return step


def dpm_fast(g: Grid, stages: np.ndarray) -> Step:
    """DPM-Solver-fast (2206.00927, appendix D.3): single steps of order 3, then 2 or 1, in the evaluations there are.

    stages[i] is (order, stage) of row i; g.sigma_to[i] is where that whole step ends.
    """

    def step(i, k, slots, p, z):
        x, origin, first = slots[:3]
        order, stage = stages[i]
        if stage == 0:
            origin, first = x, p.eps
        start, end = g.sigma[i - stage], g.sigma_to[i]
        h = np.log(start / end)
        if stage < order - 1:  # to the next point inside the step, a stage / order of it in log sigma
            r = (stage + 1) / order
            middle = start * np.exp(-r * h)
            x = origin - middle * np.expm1(r * h) * first
            if stage:
                x = x - middle * r / (stage / order) * (np.expm1(r * h) / (r * h) - 1) * (p.eps - first)
            return x, origin, first
        x = origin - end * np.expm1(h) * first
        phi = {1: 0.0, 2: np.expm1(h), 3: 1.5 * (np.expm1(h) / h - 1)}[int(order)]
        return x - end * phi * (p.eps - first), origin, first

    return step


def consistency(g: Grid, skip: np.ndarray, out: np.ndarray) -> Step:
    """x_to = alpha_to f + sigma_to z with the consistency function f = skip x + out x_0 (2303.01469)."""

    def step(i, k, slots, p, z):
        return (g.alpha_to[i] * (skip[i] * slots[0] + out[i] * p.x0) + g.sigma_to[i] * z,)

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


def ipndm(g: Grid) -> Step:
    """Linear multistep on eps without a warm-up, of order up to 4 as history allows; it may start at sigma = 1."""

    def step(i, k, slots, p, z):
        history = (p.eps, *slots[1:4])
        eps = sum(w * e for w, e in zip(ADAMS[min(k, 3)], history))
        x0 = (slots[0] - g.sigma[i] * eps) / max(g.alpha[i], 1e-8)
        return g.alpha_to[i] * x0 + g.sigma_to[i] * eps, *history[:3]

    return step
