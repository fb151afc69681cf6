"""Equal blocks in a row: built once with stacked parameters and run by `jax.lax.scan`, or a list and a loop.

The choice is `scan_layers` of the configuration. A scan compiles one block whatever the depth; checkpoints load into
either form, because the converter knows from the layout which parameters are stacked. What a block computes may be
kept for the gradient or computed again: `remat` of the configuration says which.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.core import noted, rematerialised, reusing, skipping, stacked, watched
from flaxdiff.nn.layers import PRODUCTS

Blocks = nnx.Module | nnx.List | list  # the last in passing, of blocks that lie elsewhere

# `remat` of a configuration: what a block keeps for the way back, beside its input
KEPT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCTS),  # of linear layers and convolutions
}


def remat(block: Callable) -> Callable:
    """A block whose gradient computes again what the configuration's `remat` does not keep; "none" keeps everything.

    Raises:
      ValueError: an unknown `remat`.
    """
    name = rematerialised.get()
    if name == "none":
        return block
    if name not in KEPT:
        raise ValueError(f"remat={name!r} is not known; use one of {['none', *KEPT]}.")
    return jax.checkpoint(block, policy=KEPT[name])


def stack(make: Callable[[], nnx.Module], depth: int, scan: bool) -> Blocks:
    """`depth` blocks; a single one is not worth a scan."""
    return stacked(make(), depth) if scan and depth > 1 else nnx.List([make() for _ in range(depth)])


class Runs(nnx.Module):
    """Blocks in a row that are not all alike: each run of equal ones is a stack, under the numbers of its blocks.

    Args:
      kinds: what each block is.
      make: kind -> a block.
      scan: whether equal ones are stacked.
    """

    def __init__(self, kinds: Sequence[Hashable], make: Callable[[Any], nnx.Module], scan: bool):
        runs, at = [], 0
        for kind, equal in itertools.groupby(kinds):
            n = len(list(equal))
            runs.append([f"{at}-{at + n - 1}"] if scan and n > 1 else [str(i) for i in range(at, at + n)])
            for name in runs[-1]:
                setattr(self, name, stacked(make(kind), n) if "-" in name else make(kind))
            at += n
        self.names = tuple(map(tuple, runs))

    def __iter__(self) -> Iterator[Blocks]:
        """The runs in their order."""
        for names in self.names:
            blocks = [getattr(self, name) for name in names]
            yield blocks[0] if "-" in names[0] else blocks


def depth(blocks: Blocks) -> int:
    """How many blocks there are."""
    return len(blocks) if isinstance(blocks, nnx.List | list) else len(jax.tree.leaves(nnx.state(blocks))[0])


def run(blocks: Blocks, x: jax.Array, each: Any, *args: Any) -> jax.Array:
    """x through every block: x ← block(x, each[i], *args), where the arrays of `each` have an entry a block.

    Blocks that have a method `modulated`, of the same arguments, which says what their attention reads of the
    picture's tokens, may be left out, and with them those of the rows that follow: see nn/skipping.py.

    Raises:
      ValueError: blocks may be left out, or their attention, that a rule of guidance watches.
    """
    step = lambda x, of: of[0](x, of[1], *args)
    one = remat(step)
    listed = isinstance(blocks, nnx.List | list)
    nth = lambda i: jax.tree.map(lambda a: a[i], (each if listed else (blocks, each)))
    skip, reuse = skipping.get(), reusing.get()
    if watched.get() is not None and (skip is not None or reuse is not None):
        raise ValueError("The cache leaves out what a rule of guidance watches; use one of them.")
    steps = [(block, nth(i)) for i, block in enumerate(blocks)] if listed else (blocks, each)
    leads = hasattr(steps[0][0] if listed else blocks, "modulated")
    if skip is not None and (leads or skip.out is not None):
        modulated = lambda x, of: of[0].modulated(x, of[1], *args)
        return (skip.listed if listed else skip.stacked)(one, modulated, x, steps)
    if reuse is not None:
        return (reuse.listed if listed else reuse.stacked)(remat, step, x, steps)
    # what is seen of a block may not stay in a scan
    spied = watched.get() is not None or "cross" in (noted.get() or ())
    if not listed and not spied:
        return jax.lax.scan(lambda x, of: (one(x, of), None), x, steps)[0]
    for of in steps if listed else map(nth, range(depth(blocks))):
        x = one(x, of)
    return x


def over(blocks: Blocks, function: Callable[..., Any], *each: Any) -> Any:
    """What a function makes of every block, and of its entry in arrays that have one a block, stacked: [depth, ...]."""
    if isinstance(blocks, nnx.List | list):
        made = [function(block, *jax.tree.map(lambda a, i=i: a[i], each)) for i, block in enumerate(blocks)]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *made)
    return jax.vmap(function)(blocks, *each)


def states(blocks: Blocks, x: Any, *args: Any, each: Any = None) -> Any:
    """As `run`, but returns x before the first block and after each, [depth + 1, *x.shape]; also of several arrays.

    Blocks read their entry of `each` where there is one.
    """
    one = remat(lambda block, x, extra: block(x, *(() if each is None else (extra,)), *args))
    if isinstance(blocks, nnx.List | list):
        xs = [x]
        for i, block in enumerate(blocks):
            xs.append(one(block, xs[-1], jax.tree.map(lambda a, i=i: a[i], each)))
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *xs)
    ys = jax.lax.scan(lambda x, step: (one(step[0], x, step[1]),) * 2, x, (blocks, each))[1]
    return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), x, ys)
