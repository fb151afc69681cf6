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

    def listed(self, one: Callable[[Any, Any], Any], x: Any, steps: list) -> Any:
        """x through a row of blocks, each by `one(x, step)`."""
        for step in steps:
            x = self.lead(one, x, step) if self.out is None else self.unless(self.out, one, x, step)
        return x

    def stacked(self, one: Callable[[Any, Any], Any], x: Any, steps: Any) -> Any:
        """The same, where `steps` has them stacked."""
        ran = jnp.zeros(jax.tree.leaves(steps)[0].shape[0], bool)
        if (
            self.out is None
        ):  # the scan passes over the first block, so that the others need not be cut out of the stack
            ran, x = ran.at[0].set(True), self.lead(one, x, jax.tree.map(lambda a: a[0], steps))
        gated = lambda x, at: (self.unless(at[0] | self.out, one, x, at[1]), None)
        return jax.lax.scan(gated, x, (ran, steps))[0]

    def lead(self, one: Callable[[Any, Any], Any], x: Any, step: Any) -> Any:
        """x through the first block, and the decision."""
        after = one(x, step)
        self.before, self.first = picture(x), picture(after)
        self.out = self.similar(self.first - self.before)
        return after

    def unless(self, out: jax.Array, one: Callable[[Any, Any], Any], x: Any, step: Any) -> Any:
        """x through a block that may be left out."""
        return jax.lax.cond(out, lambda x, step: x, one, x, step)

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
