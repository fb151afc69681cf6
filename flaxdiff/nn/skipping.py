"""Blocks that are left out where the first one says that they would add what they added before.

Whoever wants that sets `core.skipping` to a `Skip`. The first row of blocks that runs asks it after the first block; if
the answer is yes, no other block is run, in this row nor in those that follow, and `settled`, which a network calls
behind its last block, adds in their place what they added when they last ran.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flaxdiff.core import note, skipping

Memory = tuple[jax.Array, jax.Array]  # what the first block added to the picture's tokens, and the others: [B, N, D]


class Skip:
    """What is known of the blocks of one evaluation; it is of the trace at hand.

    Args:
      threshold: the difference between what the first block adds and what it added, as a share of the latter, up to
        which the others are left out.
      memory: of the evaluation at which they last ran; None to run them in any case.
    """

    def __init__(self, threshold: jax.Array | float, memory: Memory | None):
        self.threshold, self.memory = threshold, memory
        self.out: jax.Array | None = None  # the decision, once the first block has run
        self.before = self.first = None  # the picture's tokens before and behind that

    def run(self, one: Callable[[Any, Any], Any], x: Any, steps: Any) -> Any:
        """x through a row of blocks, which `steps` has stacked, each by `one(x, step)`."""
        ran = jnp.zeros(jax.tree.leaves(steps)[0].shape[0], bool)
        if (
            self.out is None
        ):  # the scan passes over the first block, so that the others need not be cut out of the stack
            ran, before = ran.at[0].set(True), x
            x = one(x, jax.tree.map(lambda a: a[0], steps))
            self.before, self.first = picture(before), picture(x)
            self.out = self.similar(self.first - self.before)

        def unless(x: Any, at: tuple[jax.Array, Any]) -> tuple[Any, None]:
            return jax.lax.cond(at[0] | self.out, lambda x, step: x, one, x, at[1]), None

        return jax.lax.scan(unless, x, (ran, steps))[0]

    def similar(self, added: jax.Array) -> jax.Array:
        """Whether the first block adds what it added."""
        if self.memory is None:
            return jnp.bool_(False)
        last = self.memory[0]
        return jnp.abs(added - last).mean() <= jnp.asarray(self.threshold, added.dtype) * jnp.abs(last).mean()


def picture(x: Any) -> jax.Array:
    """The picture's tokens, where those of a text may go with them."""
    return x[-1] if isinstance(x, tuple) else x


def settled(x: jax.Array) -> jax.Array:
    """The picture's tokens behind the last block, whether it was run or not: [B, N, D]."""
    if (skip := skipping.get()) is None:
        return x
    memory = skip.first - skip.before, x - skip.first
    if skip.memory is not None:
        memory = jax.tree.map(lambda old, new: jnp.where(skip.out, old, new), skip.memory, memory)
    note("skipped", memory)
    return skip.first + memory[1]
