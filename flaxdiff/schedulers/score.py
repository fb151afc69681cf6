"""Schedulers of score-based models: the SDEs of Song et al. and Karras' sampler for variance-exploding networks.

Two are tables. The third, for the variance-exploding SDE, corrects each level by Langevin steps whose size depends on
the network's output; it has its own plan and step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import path, solvers
from .base import Scheduler
from .path import Grid, Prediction
from .tables import Run, begin, draw


class ScorePlan(NamedTuple):
    """One row an evaluation, [n]; `steps` of them."""

    timesteps: Any  # the sigma that the network is told
    correct: Any  # bool: a Langevin step at this level; otherwise on to the next
    diffusion: Any  # sqrt(sigma^2 - sigma_to^2)
    snr: Any  # [] size of a Langevin step
    init_noise_sigma: Any
    steps: Any


@dataclass(frozen=True, kw_only=True)
class ScoreSdeVeScheduler(Scheduler):
    """Predictor-corrector sampling of the variance-exploding SDE (Song et al., 2011.13456); the network gives scores.

    A correction's step size comes from the mean norms over the batch, as in the paper's code. `snr` is the option that
    sets it, not the function that other schedulers have under that name.

    >>> import jax
    >>> from flaxdiff.schedulers import ScoreSdeVeScheduler
    >>> s = ScoreSdeVeScheduler(correct_steps=2)
    >>> plan = s.plan(10)
    >>> noise = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    >>> state = s.init(plan, noise * plan.init_noise_sigma, jax.random.key(1))
    >>> for _ in range(int(plan.steps)):                        # two corrections and a prediction at each of ten levels
    ...     state = s.step(state, -state.model_input / (1 + state.timestep**2))
    >>> bool(jax.numpy.isfinite(state.sample).all())
    True
    """

    num_train_timesteps: int = 2000
    snr: float = 0.15
    sigma_min: float = 0.01
    sigma_max: float = 1348.0
    sampling_eps: float = 1e-5
    correct_steps: int = 1

    def plan(self, num_inference_steps: int | None = None) -> ScorePlan:
        """The rows of one run of so many levels."""
        n, each = self._steps(num_inference_steps, {}), self.correct_steps + 1
        told = self.sigma_min * (self.sigma_max / self.sigma_min) ** np.linspace(1, self.sampling_eps, n)
        sigma = np.append(0.0, np.exp(np.linspace(np.log(self.sigma_min), np.log(self.sigma_max), n)))
        diffusion = np.sqrt(sigma[1:] ** 2 - sigma[:-1] ** 2)[::-1]
        correct = np.arange(n * each) % each < self.correct_steps
        columns = [told.repeat(each), correct, diffusion.repeat(each), self.snr, self.sigma_max]
        kinds = (np.float32, bool, np.float32, np.float32, np.float32)
        return ScorePlan(*map(np.asarray, columns, kinds), np.int32(n * each))

    def init(self, plan: ScorePlan, latents: jax.Array, key: jax.Array) -> Run:
        """The state before the first evaluation; `latents` are unit noise times `plan.init_noise_sigma`."""
        return begin(plan, jnp.asarray(latents, jnp.float32), key)

    def step(self, state: Run, model_output: jax.Array, noise: jax.Array | None = None) -> Run:
        """Advance by one evaluation, a correction or a prediction; the last prediction adds no noise."""
        p, i, x = state.plan, state.index, state.sample
        z = draw(state.key, i)(x) if noise is None else jnp.asarray(noise, x.dtype)
        score = jnp.asarray(model_output, jnp.float32)
        norm = lambda a: jnp.sqrt((a**2).sum(tuple(range(1, a.ndim)))).mean()
        size = jnp.where(p.correct[i], 2 * (p.snr * norm(z) / norm(score)) ** 2, p.diffusion[i] ** 2)
        std = jnp.where(p.correct[i], jnp.sqrt(2 * size), jnp.where(i + 1 < p.steps, p.diffusion[i], 0.0))
        return state._replace(sample=x + size * score + std * z, index=i + 1)

    def level(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """alpha = 1 and sigma at indices into num_train_timesteps levels."""
        t = jnp.asarray(timesteps, jnp.float32) / (self.num_train_timesteps - 1)
        return jnp.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t


@dataclass(frozen=True, kw_only=True)
class ScoreSdeVpScheduler(Scheduler):
    """Euler-Maruyama along the variance-preserving SDE in continuous time (Song et al., 2011.13456).

    >>> from flaxdiff.schedulers import ScoreSdeVpScheduler
    >>> ScoreSdeVpScheduler().plan(3).noisy
    array([ True,  True, False])
    """

    num_train_timesteps: int = 2000
    beta_min: float = 0.1
    beta_max: float = 20.0
    sampling_eps: float = 1e-3
    accepts: ClassVar[frozenset[str]] = frozenset()

    def level(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        t = jnp.asarray(timesteps, jnp.float32)
        log_alpha = -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        return jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        t = np.linspace(1, self.sampling_eps, n)
        log_alpha = -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
        return path.chain(t, np.append(alpha, 1.0), np.append(sigma, 0.0))

    def prediction(self, grid: Grid) -> Prediction:
        return path.prediction("epsilon", grid.alpha, grid.sigma)

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        beta = (self.beta_min + grid.t * (self.beta_max - self.beta_min)) / n

        def step(i, k, slots, p, z):
            mean = (1 + beta[i] / 2) * slots[0] - beta[i] / grid.sigma[i] * p.out
            return (mean + (i + 1 < n) * np.sqrt(beta[i]) * z,)

        return step


@dataclass(frozen=True, kw_only=True)
class KarrasVeScheduler(Scheduler):
    """Heun's method with churn for variance-exploding networks (Karras et al., 2206.00364, algorithm 2).

    The network is asked after noise was added, and gives -eps. The squares of the sigmas are evenly spaced in log, as
    in the paper; diffusers takes those squares for the sigmas themselves.

    >>> from flaxdiff.schedulers import KarrasVeScheduler
    >>> KarrasVeScheduler(s_churn=0).plan(3).timesteps.round(2)
    array([1.00e+02, 1.41e+00, 1.41e+00, 2.00e-02, 2.00e-02], dtype=float32)
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0
    s_noise: float = 1.007
    s_churn: float = 80.0
    s_min: float = 0.05
    s_max: float = 50.0
    order: ClassVar[int] = 2
    accepts: ClassVar[frozenset[str]] = frozenset()
    lacks: ClassVar[frozenset[str]] = frozenset({"num_train_timesteps"})

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        sigma = np.geomspace(self.sigma_max, self.sigma_min, n)
        churned = (self.s_min <= sigma) & (sigma <= self.s_max)
        hat = sigma * (1 + np.where(churned, min(self.s_churn / n, 2**0.5 - 1), 0.0))
        at = np.stack([hat, np.append(sigma[1:], 0.0)], 1).ravel()[:-1]
        to = np.stack([np.append(sigma[1:], 0.0), np.append(hat[1:], 0.0)], 1).ravel()[:-1]
        return Grid(at, np.ones_like(at), at, np.ones_like(at), to)

    def prediction(self, grid: Grid) -> Prediction:
        return Prediction(np.ones_like(grid.sigma), grid.sigma, 0 * grid.sigma, -np.ones_like(grid.sigma))

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        def step(i, k, slots, p, z):
            x, x_hat, d = slots[:3]
            if i % 2 == 0:
                return x + (grid.sigma_to[i] - grid.sigma[i]) * p.eps, x, p.eps
            # the better step, then noise up to the next row's level
            x = x_hat + (grid.sigma[i] - grid.sigma[i - 1]) * (d + p.eps) / 2
            return x + self.s_noise * np.sqrt(grid.sigma_to[i] ** 2 - grid.sigma[i] ** 2) * z, x_hat, d

        return step

    def columns(self, grid: Grid) -> dict[str, Any]:
        noise = self.s_noise * math.sqrt(grid.sigma[0] ** 2 - self.sigma_max**2)
        return {"init_noise_sigma": math.hypot(self.sigma_max, noise)}

    def level(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        sigma = jnp.asarray(timesteps, jnp.float32)
        return jnp.ones_like(sigma), sigma
