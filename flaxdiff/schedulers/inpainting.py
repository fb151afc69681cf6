"""RePaint: inpainting with any unconditional network, by going back up to a noisier level now and then.

Not a table: each step mixes in the known part of an image by a mask. Everything else is as in `tables`: a plan of
numbers made on the host, which starts and advances a `Run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import tables
from .discrete import _Discrete
from .tables import Run, begin, draw, padded


class RePaintPlan(NamedTuple):
    """One row an evaluation, float32 [n]; `steps` of them."""

    timesteps: Any
    alpha: Any  # the level of the evaluation: x = alpha x_0 + sigma eps
    sigma: Any
    alpha_to: Any  # the level that it leads to
    sigma_to: Any
    std: Any  # DDIM's noise
    keep: Any  # then x <- keep x + sqrt(1 - keep^2) noise: back up to the next row's level; 1 where the next is below
    clip: Any  # [] bound on |x_0|
    init_noise_sigma: Any
    steps: Any

    def pad(self, rows: int) -> RePaintPlan:
        """The same plan in tables of `rows` rows."""
        return padded(self, rows)

    def start(self, latents: jax.Array, keys: jax.Array) -> Run:
        """The state before the first evaluation, of which nothing is known."""
        x = jnp.asarray(latents, jnp.float32)
        return begin(self, x, keys).knowing(x, jnp.zeros_like(x))

    def advance(self, state: Run, model_output: jax.Array, noise: tuple[jax.Array, jax.Array] | None) -> Run:
        """The state after this evaluation and, where the plan says so, back up.

        Args:
          model_output: [B, ...] the noise that the network sees.
          noise: the two unit noises to use.
        """
        i, x, (image, mask) = state.index, state.sample, state.given
        z, z_up = (draw(state.key, 2 * i)(x), draw(state.key, 2 * i + 1)(x)) if noise is None else noise
        eps = jnp.asarray(model_output, jnp.float32)
        x0 = jnp.clip((x - self.sigma[i] * eps) / self.alpha[i], -self.clip, self.clip)
        direction = jnp.sqrt(jnp.maximum(self.sigma_to[i] ** 2 - self.std[i] ** 2, 0))
        unknown = self.alpha_to[i] * x0 + direction * eps + self.std[i] * z
        known = self.alpha_to[i] * image + self.sigma_to[i] * z
        x = mask * known + (1 - mask) * unknown
        x = self.keep[i] * x + jnp.sqrt(1 - self.keep[i] ** 2) * z_up
        return state._replace(sample=x, index=i + 1)


@dataclass(frozen=True, kw_only=True)
class RePaintScheduler(_Discrete):
    """DDIM in the unknown part and noised copies of the known one, resampled by jumps (Lugmayr et al., 2201.09865).

    >>> import jax
    >>> from flaxdiff.schedulers import RePaintScheduler
    >>> s = RePaintScheduler()
    >>> plan = s.plan(20, jump_length=5, jump_n_sample=2)
    >>> plan.timesteps[:8]
    array([950., 900., 850., 800., 750., 700., 650., 600.], dtype=float32)
    >>> image = jax.numpy.ones((1, 8, 8, 3)); mask = image.at[:, 2:6].set(0)
    >>> state = s.init(plan, jax.random.normal(jax.random.key(0), image.shape), jax.random.key(1), image, mask)
    >>> for _ in range(int(plan.steps)):
    ...     state = s.step(state, 0.1 * state.model_input)       # a network would also see state.timestep
    >>> bool((state.sample[:, 0] == 1).all())                    # the known part ends as it is
    True
    """

    eta: float = 0.0
    clip_sample: bool = True
    swaps: ClassVar[bool] = False
    lacks: ClassVar[frozenset[str]] = frozenset({"prediction_type", "timestep_spacing", "steps_offset"})

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        jump_length: int = 10,
        jump_n_sample: int = 10,
        eta: float | None = None,
        **custom: Any,
    ) -> RePaintPlan:
        """The rows of one run.

        Args:
          num_inference_steps: levels to visit, at most num_train_timesteps.
          jump_length: how many of them a jump goes back up.
          jump_n_sample: how often each stretch between jumps is gone through.
          eta: how noisy, between 0 (DDIM) and 1 (DDPM); by default the scheduler's own.
        """
        if jump_length < 1 or jump_n_sample < 1:
            raise ValueError(f"jump_length={jump_length} and jump_n_sample={jump_n_sample} must be positive.")
        custom = {k: v for k, v in custom.items() if v is not None}
        n = self._bounded(self._steps(num_inference_steps, custom))
        ratio, power = self.num_train_timesteps // n, self.alphas_cumprod()
        t = np.array(visits(n, jump_length, jump_n_sample))
        down = np.flatnonzero(np.append(True, np.diff(t) < 0))  # evaluations; other entries only add noise
        t, up = t[down] * ratio, t[np.append(down[1:], len(t)) - 1] * ratio
        # an evaluation at t leads to t - ratio, noise from there on starts with the beta of t
        before = lambda t: np.where(t > 0, power[np.maximum(t - 1, 0)], 1.0)
        at, to = power[t], np.where(t < ratio, 1.0, power[np.maximum(t - ratio, 0)])
        std = (self.eta if eta is None else eta) * np.sqrt((1 - to) / (1 - at) * (1 - at / to))
        clip = 1.0 if self.clip_sample else np.inf
        columns = (t, np.sqrt(at), np.sqrt(1 - at), np.sqrt(to), np.sqrt(1 - to), std, np.sqrt(before(up) / before(t)))
        return RePaintPlan(*(np.asarray(c, np.float32) for c in (*columns, clip, 1.0)), np.int32(len(t)))

    def init(self, plan: RePaintPlan, latents: jax.Array, key: jax.Array, image: jax.Array, mask: jax.Array) -> Run:
        """The state before the first evaluation: unit noise, the image to complete and where (1) it is known."""
        return tables.init(plan, latents, key).knowing(image, mask)


def visits(n: int, length: int, samples: int) -> list[int]:
    """The levels that a run passes, from n - 1 to 0, with `samples - 1` jumps back up by `length` at every length-th.

    >>> visits(4, 1, 2)
    [3, 2, 3, 2, 1, 2, 1, 0, 1, 0]
    """
    left = dict.fromkeys(range(0, n - length, length), samples - 1)
    passed, t = [], n
    while t > 0:
        t -= 1
        passed.append(t)
        if left.get(t, 0):
            left[t] -= 1
            passed += range(t + 1, t + length + 1)
            t += length
    return passed
