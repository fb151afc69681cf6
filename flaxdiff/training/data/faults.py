"""Examples that are of no use: what is wrong with them, and the report of how many there were.

A file that is damaged must neither end a run nor vanish in silence. Whatever reads an example raises `BadExample` with
the reason; whoever asked takes another by a fixed rule and hands on a `Fault`; a `Report` counts faults by reason and
keeps the first names of each.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

NAMES = 5  # that a report shows for each reason


class BadExample(ValueError):
    """An example that cannot be used; the message is the reason, the same words for the same kind of fault."""


class Fault(NamedTuple):
    """One example that was left out, and why."""

    name: str
    reason: str


@dataclasses.dataclass
class Report:
    """How many examples were left out, by reason.

    Attributes:
      counts: reason -> how often an example was passed over for it.
      names: reason -> the first examples that were.

    >>> report = Report.of([Fault("a.jpg", "a missing file"), Fault("b.jpg", "a missing file")])
    >>> print(report)
    2 x a missing file: a.jpg, b.jpg
    """

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    names: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, faults: Iterable[Fault]) -> "Report":
        """The report of some faults."""
        report = cls()
        report.add(faults)
        return report

    def add(self, faults: Iterable[Fault]) -> list[Fault]:
        """Count faults; those whose reason had not come up before are returned."""
        new = []
        for name, reason in faults:
            new += [Fault(name, reason)] if reason not in self.counts else []
            self.counts[reason] = self.counts.get(reason, 0) + 1
            first = self.names.setdefault(reason, [])
            if name not in first and len(first) <= NAMES:
                first.append(name)
        return new

    def __str__(self) -> str:
        first = lambda names: ", ".join(names[:NAMES]) + (", …" if len(names) > NAMES else "")
        lines = [f"{n} x {reason}: {first(self.names[reason])}" for reason, n in self.counts.items()]
        return "\n".join(lines) or "no example was left out"
