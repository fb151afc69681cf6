"""What hinders a block of a network on purpose, for guidance by comparison: a value for each image and block.

  identity    1: the self-attention sees only its own position
  blur        deviation of a Gaussian over the positions of the queries; infinite for their mean, 0 for none
  skip        1: the block is left out
  reference   how much the self-attention looks at the first image's positions as well; `FIRST` at that image

See `guidance.perturbed`. In the same way blocks are told of objects, see nn/grounding.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FIRST = -1.0  # of the first image, in the place of how much it is looked at


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


def beside_first(k: jax.Array, v: jax.Array, weigh: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values [B, N, ...] with those of the first image behind them, and the bias [B, 1, 1, 2 N] of both.

    >>> k = jnp.arange(4.0).reshape(4, 1)  # two images, of two branches each
    >>> both, _, bias = beside_first(k, k, jnp.array([FIRST, FIRST, 1.0, 0.0]))
    >>> both[3].tolist(), bias[2].ravel().tolist()
    ([3.0, 1.0], [0.0, 0.0])
    """
    branches = jnp.maximum((weigh < 0).sum(), 1)  # an image's lie side by side
    first = jnp.arange(len(k)) % branches
    both = lambda a: jnp.concatenate([a, a[first]], 1)
    bias = jnp.stack([jnp.zeros(len(k)), jnp.log(jnp.maximum(weigh, 1e-30))], 1)  # a weight of nothing
    return both(k), both(v), jnp.repeat(bias, k.shape[1], 1)[:, None, None]


def alone(flags: jax.Array, texts: int, n: int) -> jax.Array:
    """Who sees whom where text and picture attend jointly and the picture's n tokens are to see none but themselves.

    Flags [B] of the kind "identity" -> bool [B, 1, M + n, M + n], the M tokens of the text first, who see all.

    >>> alone(jnp.array([1.0]), 1, 2)[0, 0].astype(int)
    Array([[1, 1, 1],
           [1, 1, 0],
           [1, 0, 1]], dtype=int32)
    """
    seen = jnp.pad(jnp.eye(n, dtype=bool), ((texts, 0), (texts, 0)), constant_values=True)
    return seen | (flags == 0)[:, None, None, None]


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
