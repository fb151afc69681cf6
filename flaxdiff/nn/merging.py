"""Token merging: of tokens that are much alike, attention sees one for all.

The top left token of each two by two is a target; of the others, those that are most like some target are averaged into
it, and what attention says of the target is said of them all. How many is fixed, which ones is a value.

Reference: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, 2023.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Map = Callable[[jax.Array], jax.Array]


def merging(x: jax.Array, sides: tuple[int, int], ratio: float) -> tuple[Map, Map]:
    """How to merge tokens [B, H W, C] that lie as x does, and how to spread the result over all again.

    Args:
      ratio: the share of the tokens that goes; a quarter stays at least.

    >>> x = jnp.arange(16.0).reshape(1, 16, 1) + 1
    >>> merge, spread = merging(x, (4, 4), 0.5)
    >>> merge(x).shape, spread(merge(x)).shape
    ((1, 8, 1), (1, 16, 1))
    """
    height, width = sides
    grid = np.arange(height * width).reshape(sides)
    target = grid[: height // 2 * 2 : 2, : width // 2 * 2 : 2].ravel()
    source = np.setdiff1d(grid, target)
    gone = min(int(grid.size * ratio), len(source))
    unit = x / jnp.maximum(jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True), 1e-12).astype(x.dtype)
    alike = jnp.einsum("bnc,bmc->bnm", unit[:, source], unit[:, target], preferred_element_type=jnp.float32)
    nearest = alike.argmax(-1)
    order = jnp.argsort(-alike.max(-1), axis=-1)
    taken, kept = order[:, :gone], order[:, gone:]
    into = jnp.take_along_axis(nearest, taken, 1)
    pick = lambda a, index: jnp.take_along_axis(a, index[..., None], 1)
    add = jax.vmap(lambda targets, index, rows: targets.at[index].add(rows))

    def merge(a: jax.Array) -> jax.Array:
        sources, targets = a[:, source], a[:, target].astype(jnp.float32)
        many = add(jnp.ones(targets.shape[:2]), into, jnp.ones(into.shape))
        mean = add(targets, into, pick(sources, taken).astype(jnp.float32)) / many[..., None]
        return jnp.concatenate([pick(sources, kept), mean.astype(a.dtype)], 1)

    def spread(a: jax.Array) -> jax.Array:
        others, targets = a[:, : len(source) - gone], a[:, len(source) - gone :]
        put = jax.vmap(lambda all, index, rows: all.at[index].set(rows))
        sources = jnp.zeros((len(a), len(source), a.shape[-1]), a.dtype)
        sources = put(put(sources, kept, others), taken, pick(targets, into))
        whole = jnp.zeros((len(a), grid.size, a.shape[-1]), a.dtype)
        return whole.at[:, source].set(sources).at[:, target].set(targets)

    return merge, spread
