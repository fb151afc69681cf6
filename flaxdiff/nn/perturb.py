"""What hinders a block of a network on purpose, for guidance by comparison: a value for each image and block.

  identity    1: the self-attention sees only its own position
  blur        deviation of a Gaussian over the positions of the queries; infinite for their mean, 0 for none
  skip        1: the block is left out

See `guidance.perturbed`. In the same way blocks are told of objects, see nn/grounding.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Perturbed(NamedTuple):
    """A block's context, and what hinders the block."""

    context: Any
    kinds: Mapping[str, jax.Array]  # kind -> [B], or [B, depth] for a stack of blocks


class Given(NamedTuple):
    """In the place of a context: what attention to it gave at another time, [B, N, C], or [B, depth, N, C]."""

    output: jax.Array


def perturbed(contexts: tuple[Any, ...], kinds: Mapping[str, tuple[jax.Array, ...]] | None) -> tuple[Any, ...]:
    """The contexts of each stack of blocks with what hinders its blocks, if anything does."""
    if not kinds:
        return contexts
    return tuple(Perturbed(c, {k: flags[i] for k, flags in kinds.items()}) for i, c in enumerate(contexts))


def rows(flags: jax.Array, like: jax.Array) -> jax.Array:
    """Flags [B] in the shape that selects among arrays [B, ...]."""
    return flags.reshape(flags.shape + (1,) * (like.ndim - 1))


def blurred(q: jax.Array, sigma: jax.Array, sides: tuple[int, int], reach: float | None = None) -> jax.Array:
    """Tokens [B, H W, ...] under a Gaussian of deviation sigma [B] over the H rows and W columns.

    It reaches so far, by default 3 sigma, but not beyond half a side, and mirrors at the edges.

    >>> q = jnp.arange(9.0).reshape(1, 9, 1)
    >>> blurred(q, jnp.array([jnp.inf]), (3, 3)).ravel()[:2]
    Array([4., 4.], dtype=float32)
    """
    down, across = (_gaussian(sigma, side, reach) for side in sides)
    h = jnp.einsum("bih,bhwc,bjw->bijc", down, q.astype(jnp.float32).reshape(q.shape[0], *sides, -1), across)
    return jnp.where(rows(sigma, q) > 0, h.reshape(q.shape).astype(q.dtype), q)


def _gaussian(sigma: jax.Array, side: int, reach: float | None) -> jax.Array:
    """[B, side, side]: what each position takes from each."""
    taps = np.arange(-(side // 2), side // 2 + 1.0, dtype=np.float32)
    source = side - 1 - np.abs(side - 1 - np.abs(np.arange(side)[:, None] + taps.astype(int)))
    width = jnp.maximum(sigma, 1e-3)[:, None]
    reach = jnp.ceil(6 * width) // 2 if reach is None else reach
    weight = jnp.where(np.abs(taps) <= reach, jnp.exp(-jnp.square(taps / width) / 2), 0)
    weight /= weight.sum(-1, keepdims=True)
    spread = jnp.zeros((len(sigma), side, side)).at[:, np.arange(side)[:, None], source].add(weight[:, None])
    return jnp.where(jnp.isinf(sigma)[:, None, None], 1 / side, spread)
