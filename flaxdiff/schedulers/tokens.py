"""Schedulers of discrete tokens: VQ-Diffusion's mask-and-replace chain and aMUSEd's parallel unmasking.

Not tables: a step draws tokens from the network's class probabilities. Plans are still numbers made on the host and
steps pure functions; classes are the last axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .base import Scheduler
from .spacing import strength_window
from .tables import Run, begin, padded


def _gumbel(state: Run, purpose: int, shape: tuple[int, ...]) -> jax.Array:
    """Gumbel noise [B, *shape] of this evaluation."""
    one = lambda key: jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, state.index), purpose), shape)
    return jax.vmap(one)(state.key)


class VQDiffusionPlan(NamedTuple):
    """Rows [n] of log probabilities: a token stays (a), becomes any one other (b), becomes the mask (c)."""

    timesteps: Any
    now: Any  # [n, 3] of one step of the chain, at t
    upto: Any  # [n, 3] of all steps up to t
    before: Any  # [n, 3] of all steps before t
    steps: Any

    def start(self, latents: jax.Array, keys: jax.Array) -> Run:
        """The state before the first evaluation; `latents` are tokens [B, N], usually all masked."""
        return begin(self, jnp.asarray(latents, jnp.int32), keys)

    def posterior(self, state: Run, log_p_x0: jax.Array) -> jax.Array:
        """log p(x_{t-1} | x_t), [B, N, K], of tokens and mask, given log p(x_0), [B, N, K - 1] (equation 11)."""
        i, x, mask = state.index, state.sample, log_p_x0.shape[-1]
        log_onehot = jnp.log(jnp.maximum(jax.nn.one_hot(x, mask + 1, dtype=jnp.float32), 1e-30))

        def to_x(logs):  # log q(x_t | from each class)
            a, b, c = logs[i]
            return jnp.where((x == mask)[..., None], c, jnp.logaddexp(log_onehot[..., :-1] + a, b))

        q = log_p_x0 - to_x(self.upto)
        total = jax.nn.logsumexp(q, -1, keepdims=True)
        a, b, c = self.before[i]
        q = jnp.logaddexp(q - total + a, b)
        q = jnp.concatenate([q, jnp.full((*x.shape, 1), c)], -1)
        return q + total + jnp.concatenate([to_x(self.now), log_onehot[..., -1:]], -1)

    def advance(self, state: Run, model_output: jax.Array, noise: jax.Array | None) -> Run:
        """Draw the next tokens.

        Args:
          model_output: [B, N, K - 1] log probabilities of x_0.
          noise: [B, N, K] Gumbel noise to use.
        """
        out = jnp.asarray(model_output, jnp.float32)
        g = _gumbel(state, 0, (out.shape[1], out.shape[2] + 1)) if noise is None else noise
        last = jnp.pad(out, ((0, 0), (0, 0), (0, 1)), constant_values=-jnp.inf)  # at t = 0 x_0 itself, never the mask
        log_p = jnp.where(state.timestep == 0, last, self.posterior(state, out))
        return state._replace(sample=(log_p + g).argmax(-1).astype(jnp.int32), index=state.index + 1)


@dataclass(frozen=True, kw_only=True)
class VQDiffusionScheduler(Scheduler):
    """Discrete diffusion that masks or replaces tokens (Gu et al., 2111.14822); the last class is the mask.

    >>> import jax
    >>> from flaxdiff.schedulers import VQDiffusionScheduler
    >>> s = VQDiffusionScheduler(num_vec_classes=5)
    >>> state = s.init(s.plan(10), jax.numpy.full((1, 6), 4), jax.random.key(0))
    >>> for _ in range(10):
    ...     state = s.step(state, jax.nn.log_softmax(jax.numpy.eye(4)[jax.numpy.zeros((1, 6), int)] * 50))
    >>> state.sample
    Array([[0, 0, 0, 0, 0, 0]], dtype=int32)
    """

    num_vec_classes: int
    num_train_timesteps: int = 100
    alpha_cum_start: float = 0.99999
    alpha_cum_end: float = 0.000009
    gamma_cum_start: float = 0.000009
    gamma_cum_end: float = 0.99999

    def plan(self, num_inference_steps: int | None = None) -> VQDiffusionPlan:
        """The chain's last n steps, from n - 1 to 0. Raises ValueError where the chain's probabilities exceed 1."""
        n, T = self._steps(num_inference_steps, {}), self.num_train_timesteps
        if n > T:
            raise ValueError(f"VQDiffusionScheduler: num_inference_steps={n} exceeds num_train_timesteps={T}.")
        stay = np.append(1.0, np.linspace(self.alpha_cum_start, self.alpha_cum_end, T))
        unmasked = np.append(1.0, 1 - np.linspace(self.gamma_cum_start, self.gamma_cum_end, T))
        t = np.arange(n)[::-1]

        def logs(a, c):
            if (a + c > 1).any():
                raise ValueError(
                    f"VQDiffusionScheduler: alpha_cum_end={self.alpha_cum_end} and gamma_cum_end={self.gamma_cum_end} "
                    "leave a token a negative probability of becoming another: make one of them smaller."
                )
            return np.log(np.stack([a, (1 - a - c) / (self.num_vec_classes - 1), c], 1)).astype(np.float32)

        now = logs(stay[t + 1] / stay[t], 1 - unmasked[t + 1] / unmasked[t])
        upto = logs(stay[t + 1], 1 - unmasked[t + 1])
        before = np.append(upto[1:], np.zeros((1, 3), np.float32), 0)  # not used at t = 0
        return VQDiffusionPlan(t.astype(np.int32), now, upto, before, np.int32(n))


class AmusedPlan(NamedTuple):
    """Rows [n]: time, the share of tokens that stays masked after it, and how much chance decides which."""

    timesteps: Any
    mask_ratio: Any
    temperature: Any
    masked: Any  # [] the share that is masked before the first row
    mask_token_id: Any  # []
    steps: Any

    def pad(self, rows: int) -> AmusedPlan:
        """The same plan in a table of `rows` rows."""
        return padded(self, rows)

    def mask(self, tokens: jax.Array, keys: jax.Array) -> jax.Array:
        """Tokens [B, ...] of images, masked as before the first row, for a run from there; one key for each image."""
        hidden = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]) < self.masked)(keys)
        return jnp.where(hidden, self.mask_token_id, tokens)

    def start(self, latents: jax.Array, keys: jax.Array) -> Run:
        """The state before the first evaluation; `latents` are tokens [B, N] or [B, h, w], usually all masked."""
        return begin(self, jnp.asarray(latents, jnp.int32), keys)

    def advance(self, state: Run, model_output: jax.Array, noise: tuple[jax.Array, jax.Array] | None) -> Run:
        """Draw every masked token, then mask the least sure of them again.

        Args:
          model_output: [B, N, K] or [B, h, w, K] logits.
          noise: Gumbel noise to use, [B, N, K] for the tokens and [B, N] for the choice among them.
        """
        i, x = state.index, state.sample.reshape(len(state.sample), -1)
        logits = jnp.asarray(model_output, jnp.float32).reshape(*x.shape, -1)
        log_p, masked, shape = jax.nn.log_softmax(logits), x == self.mask_token_id, logits.shape[1:]
        g_token, g_mask = (_gumbel(state, 0, shape), _gumbel(state, 1, shape[:1])) if noise is None else noise
        drawn = jnp.where(masked, (log_p + g_token).argmax(-1).astype(jnp.int32), x)

        sure = jnp.take_along_axis(log_p, jnp.minimum(drawn, shape[1] - 1)[..., None], -1)[..., 0]
        sure = jnp.where(masked, jnp.maximum(sure, jnp.log(1e-20)), jnp.inf) + self.temperature[i] * g_mask
        count = jnp.floor(shape[0] * self.mask_ratio[i]).astype(jnp.int32)
        count = jnp.maximum(jnp.minimum(masked.sum(-1, keepdims=True) - 1, count), 1)
        again = sure < jnp.take_along_axis(jnp.sort(sure, -1), count, -1)
        x = jnp.where(again & (self.timesteps[i] > 0), self.mask_token_id, drawn)
        return state._replace(sample=x.reshape(state.sample.shape), index=i + 1)


@dataclass(frozen=True, kw_only=True)
class AmusedScheduler(Scheduler):
    """Parallel decoding of masked tokens, the surest first (Chang et al., 2202.04200; aMUSEd, 2401.01808).

    >>> import jax
    >>> from flaxdiff.schedulers import AmusedScheduler
    >>> s = AmusedScheduler(mask_token_id=9)
    >>> state = s.init(s.plan(3), jax.numpy.full((1, 8), 9), jax.random.key(0))
    >>> left = []
    >>> for _ in range(3):
    ...     state = s.step(state, jax.numpy.zeros((1, 8, 9)))
    ...     left.append(int((state.sample == 9).sum()))
    >>> left
    [6, 3, 0]
    """

    mask_token_id: int
    masking_schedule: str = "cosine"
    accepts: ClassVar[frozenset[str]] = frozenset()
    lacks: ClassVar[frozenset[str]] = frozenset({"num_train_timesteps"})
    choices: ClassVar[dict[str, tuple]] = {"masking_schedule": ("cosine", "linear")}

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        temperature: float | tuple[float, float] = (2.0, 0.0),
        strength: float = 1.0,
        starting_mask_ratio: float = 1.0,
        **custom: Any,
    ) -> AmusedPlan:
        """The rows of one run.

        Args:
          temperature: how much chance decides which tokens stay masked, at first and at last; one number: down to 0.01.
          strength: keep this share of the rows, the last ones; what came before the first says how much is masked.
          starting_mask_ratio: the share of tokens masked at first, where it is an image that the run completes.
          **custom: schedules of one's own, of which there is none.
        """
        n = self._steps(num_inference_steps, {k: v for k, v in custom.items() if v is not None})
        high, low = temperature if isinstance(temperature, (tuple, list)) else (temperature, 0.01)
        first = strength_window(n, strength, self.order, n)
        # float32 as in PyTorch: it decides where a share is a whole number of tokens
        done = np.arange(n + 1, dtype=np.float32) / np.float32(n)
        cosine = np.cos(np.float64(done * np.float32(np.pi / 2)))
        ratio = np.float32(cosine if self.masking_schedule == "cosine" else 1 - done)[first:]
        t, heat = np.arange(n, dtype=np.int32)[::-1], np.linspace(high, low, n)
        rows = (np.float32(starting_mask_ratio) * ratio[1:], heat[first:], ratio[0])
        return AmusedPlan(t[first:], *map(np.float32, rows), np.int32(self.mask_token_id), np.int32(n - first))
