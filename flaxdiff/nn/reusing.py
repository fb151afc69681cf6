"""Attention that gives what it gave at another evaluation, while all around it is computed anew.

Whoever wants that sets `core.reusing` to a `Reuse`. The rows of blocks that a network runs ask it in their order;
within a block each attention hands what it would compute to `reused`.
"""

import contextvars
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from flaxdiff.core import setting_of
from flaxdiff.nn.skipping import Step


class Block(NamedTuple):
    """What the attentions of one block gave, in their order, if it is known, and what they give."""

    old: tuple[Any, ...] | None
    new: list[Any]


block: contextvars.ContextVar[tuple["Reuse", Block] | None] = contextvars.ContextVar("block", default=None)


class Reuse:
    """What attention gave at one evaluation; it is of the trace at hand.

    Args:
      same: kind of attention, "spatial" to the tokens themselves and "cross" to a context -> whether it gives what it
        gave, [].
      old: row by row, what the attentions of its blocks gave; None to compute all.
    """

    def __init__(self, same: Mapping[str, jax.Array], old: tuple[Any, ...] | None):
        self.same, self.old = same, old
        self.new: list[Any] = []  # row by row, what they give now

    @property
    def next(self) -> Any:
        """What the attentions of the next row gave."""
        return None if self.old is None else self.old[len(self.new)]

    def listed(self, wrap: Callable[[Callable], Callable], step: Step, x: Any, steps: list) -> Any:
        """x through a row of blocks, what each computes wrapped, as in `stack.remat`."""
        old, new, within = self.next, [], wrap(functools.partial(self.within, step))
        for i, of in enumerate(steps):
            x, found = within(x, of, None if old is None else old[i])
            new.append(found)
        self.new.append(tuple(new))
        return x

    def stacked(self, wrap: Callable[[Callable], Callable], step: Step, x: Any, steps: Any) -> Any:
        """The same, where `steps` has them stacked."""
        within = wrap(functools.partial(self.within, step))
        x, new = jax.lax.scan(lambda x, at: within(x, *at), x, (steps, self.next))
        self.new.append(new)
        return x

    def within(self, step: Step, x: Any, of: tuple[Any, Any], old: tuple[Any, ...] | None) -> tuple[Any, tuple]:
        """x through a block, and what its attentions give."""
        with setting_of(block, (self, Block(old, []))) as (_, here):
            return step(x, of), tuple(here.new)


def reused(kind: str, attend: Callable[[], Any]) -> Any:
    """What attention of some kind gives: computed, or in a block of whom somebody knows it what it gave."""
    if (known := block.get()) is None:
        return attend()
    reuse, (old, new) = known
    given = (
        attend() if old is None else jax.lax.cond(reuse.same[kind], lambda old: old, lambda _: attend(), old[len(new)])
    )
    new.append(given)
    return given
