"""Equal blocks in a row: built once with stacked parameters and run by `jax.lax.scan`, or a list and a loop.

The choice is `scan_layers` of the configuration. A scan compiles one block whatever the depth; checkpoints load into
either form, because the converter knows from the layout which parameters are stacked.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.core import stacked

Blocks = nnx.Module | nnx.List


def stack(make: Callable[[], nnx.Module], depth: int, scan: bool) -> Blocks:
    """`depth` blocks; a single one is not worth a scan."""
    return stacked(make(), depth) if scan and depth > 1 else nnx.List([make() for _ in range(depth)])


def run(blocks: Blocks, x: jax.Array, each: Any) -> jax.Array:
    """x through every block: x ← block(x, each[i]), where the arrays of `each` have an entry a block."""
    if isinstance(blocks, nnx.List):
        for i, block in enumerate(blocks):
            x = block(x, jax.tree.map(lambda a, i=i: a[i], each))
        return x
    return jax.lax.scan(lambda x, step: (step[0](x, step[1]), None), x, (blocks, each))[0]


def over(blocks: Blocks, function: Callable[[nnx.Module], Any]) -> Any:
    """What a function makes of every block, stacked: [depth, ...]."""
    if isinstance(blocks, nnx.List):
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(function, blocks))
    return jax.vmap(function)(blocks)


def states(blocks: Blocks, x: jax.Array, *args: Any) -> jax.Array:
    """As `run`, but returns x before the first block and after each: [depth + 1, *x.shape]."""
    if isinstance(blocks, nnx.List):
        xs = [x]
        for block in blocks:
            xs.append(block(xs[-1], *args))
        return jnp.stack(xs)
    ys = jax.lax.scan(lambda x, block: (block(x, *args),) * 2, x, blocks)[1]
    return jnp.concatenate([x[None], ys])
