"""Blocks that are left out where there is reason to think that they would add what they added before.

Whoever wants that sets `core.skipping` to a `Skip`. The first row of blocks that runs asks it, before its first block
or behind it; if the answer is yes, no further block is run, in this row nor in those that follow, and `settled`, which
a network calls behind its last block, adds in their place what they added when they last ran.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flaxdiff.core import note, skipping

Step = Callable[[Any, tuple[Any, Any]], Any]  # (x, (block, its entry of what each is told)) -> x


class Skip:
    """What is known of the blocks of one evaluation; it is of the trace at hand.

    Args:
      decide: clue -> (whether the blocks are left out, [], what is to be remembered of that). The clue is what the
        first block adds to the picture's tokens [B, N, D] where it leads, else what its attention is to read of them.
      added: what the blocks added to the picture's tokens when they last ran; None to run them in any case.
      leads: whether the first block is run in any case.
    """

    def __init__(
        self,
        decide: Callable[[jax.Array], tuple[jax.Array, Any]],
        added: jax.Array | None,
        leads: bool = False,
    ):
        self.decide, self.added, self.leads = decide, added, leads
        self.out: jax.Array | None = None  # the decision, once it is made
        self.memory: Any = None  # what is to be remembered of it
        self.start: jax.Array | None = None  # the picture's tokens before the blocks that may be left out

    def listed(self, step: Step, modulated: Step, x: Any, steps: list) -> Any:
        """x through a row of blocks."""
        if self.out is None:
            x = self.begin(step, modulated, x, steps[0])
            steps = steps[self.leads :]
        for of in steps:
            x = self.unless(self.out, step, x, of)
        return x

    def stacked(self, step: Step, modulated: Step, x: Any, steps: Any) -> Any:
        """The same, where `steps` has them stacked."""
        ran = jnp.zeros(jax.tree.leaves(steps)[0].shape[0], bool)
        if self.out is None:
            x = self.begin(step, modulated, x, jax.tree.map(lambda a: a[0], steps))
            ran = ran.at[0].set(self.leads)  # passed over, so that the others need not be cut out of the stack
        gated = lambda x, at: (self.unless(at[0] | self.out, step, x, at[1]), None)
        return jax.lax.scan(gated, x, (ran, steps))[0]

    def begin(self, step: Step, modulated: Step, x: Any, of: tuple[Any, Any]) -> Any:
        """x, or what the first block makes of it if that leads, and the decision."""
        before, x = x, step(x, of) if self.leads else x
        self.start = picture(x)
        clue = self.start - picture(before) if self.leads else modulated(before, of)
        self.out, self.memory = self.decide(clue)
        return x

    def unless(self, out: jax.Array, step: Step, x: Any, of: tuple[Any, Any]) -> Any:
        """x through a block that may be left out."""
        return jax.lax.cond(out, lambda x, of: x, step, x, of)


def picture(x: Any) -> jax.Array:
    """The picture's tokens, where those of a text may go with them."""
    return x[-1] if isinstance(x, tuple) else x


def settled(x: jax.Array) -> jax.Array:
    """The picture's tokens behind the last block, whether it was run or not: [B, N, D]."""
    if (skip := skipping.get()) is None or skip.start is None:
        return x
    added = x - skip.start if skip.added is None else jnp.where(skip.out, skip.added, x - skip.start)
    note("skipped", (skip.memory, added))
    return skip.start + added
