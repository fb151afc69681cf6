"""What a plan found: a table, the same as data, and a verdict with what to change.

Times are bounds. A program cannot be faster than its arithmetic at the chip's peak, its memory traffic at full
bandwidth, or its transfers over all links at once; the largest of the three is the roofline. The compiler's own
estimate in cycles is given beside it.

Reference: Williams et al., Roofline: An Insightful Visual Performance Model for Multicore Architectures, 2009.
"""

import dataclasses
from typing import Any, NamedTuple

from flaxdiff.planning.chips import Chip
from flaxdiff.planning.hlo import Cost

KERNELS = 0.6  # of the peak: what Pallas kernels are taken to reach, for which the compiler has no estimate
LAYERS = 12  # rows of the table


class Memory(NamedTuple):
    """Bytes of one device while a program runs, weights included."""

    arguments: int
    temporary: int
    outputs: int  # beyond those that take the place of arguments
    code: int

    @property
    def peak(self) -> int:
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Part:
    """One compiled program of a run; figures per device.

    Attributes:
      name: what it does.
      times: how often it runs.
      memory: what it needs.
      cost: what a run of it costs; None where it does not fit, because then the compiler gives up.
      seconds: that compiling took.
      needed: bytes that the compiler says it needs, where it does not fit.
    """

    name: str
    times: int
    memory: Memory | None
    cost: Cost | None
    seconds: float
    needed: int | None = None

    @property
    def peak(self) -> int | None:
        """Bytes that it needs at once."""
        return self.memory.peak if self.memory else self.needed


@dataclasses.dataclass(frozen=True)
class Bound:
    """How fast a program can be at most, in seconds: see the module's paragraph."""

    arithmetic: float
    memory: float
    links: float
    compiler: float | None

    @property
    def seconds(self) -> float:
        return max(self.arithmetic, self.memory, self.links)

    @property
    def by(self) -> str:
        return max(("arithmetic", "memory", "links"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation that the roofline allows: the share of the peak that is arithmetic."""
        return self.arithmetic / self.seconds if self.seconds else 0.0


def bound(cost: Cost, chip: Chip) -> Bound:
    """The bounds of a program on one device of a chip.

    >>> from flaxdiff.planning.chips import CHIPS
    >>> bound(Cost(flops=197e12, bytes=0.819e12 / 2), CHIPS["v5e"]).mfu
    1.0
    """
    share = 1 / chip.devices
    moved = sum((2 if kind == "all-reduce" else 1) * size for kind, (_, size) in cost.collectives.items())
    kernels = cost.kernel_flops / (KERNELS * chip.flops * share) + cost.kernel_bytes / (chip.bandwidth * share)
    return Bound(
        cost.flops / (chip.flops * share),
        cost.bytes / (chip.bandwidth * share),
        moved / (chip.link * share),
        None if chip.clock is None else cost.cycles / chip.clock + kernels,
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """What `plan` returns; print it for the table.

    Attributes:
      what: the run in words.
      chip: of the slice.
      chips, devices: how many.
      mesh: axis -> size.
      batch: pictures.
      weights: bytes of the parameters (of a training step: of its whole state) on one device.
      parts: the programs of a run.
      notes: what was not done as the rules wish.
      advice: what to change, where it does not fit.
    """

    what: str
    chip: Chip
    chips: int
    devices: int
    mesh: dict[str, int]
    batch: int
    weights: int
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    @property
    def hbm(self) -> int:
        """Memory of one device."""
        return self.chip.hbm // self.chip.devices

    @property
    def fits(self) -> bool:
        """Whether every part fits."""
        return all(part.memory is not None and part.peak <= self.hbm for part in self.parts)

    def seconds(self, which: str = "seconds") -> float | None:
        """A whole run by the roofline, or by another of `Bound`'s figures; None where one is missing."""
        times = [part.cost and getattr(bound(part.cost, self.chip), which) for part in self.parts]
        return None if None in times else sum(time * part.times for time, part in zip(times, self.parts))

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data: bytes, FLOPs, seconds, per device."""
        data = dataclasses.asdict(self) | {"chip": self.chip.name, "hbm": self.hbm, "fits": self.fits}
        for part, row in zip(self.parts, data["parts"]):
            row |= {"memory": part.memory and part.memory._asdict(), "peak": part.peak}
            if part.cost:
                limits = bound(part.cost, self.chip)
                intensity = part.cost.flops / max(part.cost.bytes, 1)
                row["roofline"] = dataclasses.asdict(limits) | {
                    "seconds": limits.seconds, "by": limits.by, "mfu": limits.mfu, "intensity": intensity
                }  # fmt: skip
        for key, which in (("seconds", "seconds"), ("compiler_seconds", "compiler")):
            whole = self.seconds(which)
            data[key], data[f"{key}_per_image"] = whole, whole and whole / self.batch
        return data

    def __str__(self) -> str:
        return "\n".join(_table(self))


# --- the table -------------------------------------------------------------------------------------------------------


def quantity(value: float | None, unit: str) -> str:
    """A number with a prefix that keeps it short.

    >>> quantity(13.1e12, "FLOP"), quantity(0.0154, "s"), quantity(None, "s")
    ('13.1 TFLOP', '15.4 ms', '-')
    """
    if value is None:
        return "-"
    steps = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: "", 1e-3: "m", 1e-6: "µ", 1e-9: "n"}
    size = next((size for size in steps if abs(value) >= size), 1)
    return f"{value / size:.3g} {steps[size]}{unit}"


def _rows(report: Report) -> list[list[str]]:
    """The table's lines of one figure for each part."""
    chip, parts = report.chip, report.parts
    memory = lambda name: [quantity(part.memory and getattr(part.memory, name), "B") for part in parts]
    costs = lambda figure: ["-" if part.cost is None else figure(part.cost) for part in parts]
    intense = lambda cost: cost.flops / max(cost.bytes, 1)
    kind = lambda cost: "arithmetic" if intense(cost) >= chip.flops / chip.bandwidth else "memory"
    limits = lambda figure: costs(lambda cost: figure(bound(cost, chip)))
    return [
        ["", *(part.name + (f" × {part.times}" if part.times > 1 else "") for part in parts)],
        ["weights and inputs", *memory("arguments")],
        ["working memory", *memory("temporary")],
        ["results", *memory("outputs")],
        ["code", *memory("code")],
        [f"in all, of {quantity(report.hbm, 'B')}", *(quantity(part.peak, "B") for part in parts)],
        ["arithmetic", *costs(lambda cost: quantity(cost.flops, "FLOP"))],
        ["memory traffic", *costs(lambda cost: quantity(cost.bytes, "B"))],
        ["FLOP per byte", *costs(lambda cost: f"{intense(cost):,.0f}")],
        ["bound in the chip", *costs(kind)],
        ["compiler's cycles", *costs(lambda cost: quantity(cost.cycles, ""))],
        ["compiler's time", *limits(lambda limit: quantity(limit.compiler, "s"))],
        ["roofline", *limits(lambda limit: quantity(limit.seconds, "s"))],
        ["bound in all", *limits(lambda limit: limit.by)],
        ["MFU at most", *limits(lambda limit: f"{limit.mfu:.0%}")],
        ["compiled in", *(f"{part.seconds:.0f} s" for part in parts)],
    ]


def _table(report: Report) -> list[str]:
    chip, rows = report.chip, _rows(report)
    axes = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    each = "chip" if chip.devices == 1 else f"device ({chip.devices} a chip)"
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [report.what, f"{report.chips} chips, mesh of {axes}; figures per {each}", ""]
    lines += [rows[0][0].ljust(widths[0]) + "".join("  " + v.rjust(w) for v, w in zip(rows[0][1:], widths[1:]))]
    lines += [
        row[0].ljust(widths[0]) + "".join("  " + v.rjust(w) for v, w in zip(row[1:], widths[1:])) for row in rows[1:]
    ]

    for part in report.parts:
        if part.cost and part.cost.collectives:
            kinds = sorted(part.cost.collectives.items(), key=lambda item: -item[1][1])
            lines += ["", f"transfers, {part.name}"]
            lines += [f"  {kind:20} {count:6.0f} ×  {quantity(size, 'B'):>9}" for kind, (count, size) in kinds]
    main = max(report.parts, key=lambda part: part.times * part.cost.cycles if part.cost else 0)
    if main.cost:
        lines += ["", f"the compiler's cycles by layer, {main.name}"]
        for layer, cycles in sorted(main.cost.layers.items(), key=lambda item: -item[1])[:LAYERS]:
            lines.append(f"  {layer:44} {quantity(cycles, ''):>8}  {cycles / main.cost.cycles:4.0%}")
    return lines + ["", *_verdict(report)]


def _verdict(report: Report) -> list[str]:
    chip, lines = report.chip, []
    whole, compiler = report.seconds(), report.seconds("compiler")
    if whole is not None:
        image = quantity(whole / report.batch, "s")
        beside = "" if compiler is None else f"; by the compiler's cycles {quantity(compiler / report.batch, 's')}"
        lines.append(f"At best {quantity(whole, 's')} in all, {image} an image{beside}.")
        lines.append(
            f"The chip does {chip.flops / chip.bandwidth:.0f} FLOP in the time of a byte; what does fewer is bound by "
            "its memory."
        )
    lines += report.notes
    worst = max(report.parts, key=lambda part: part.peak or 0)
    lines.append(
        f"It fits: {quantity(worst.peak, 'B')} of {quantity(report.hbm, 'B')} at the most, in {worst.name}."
        if report.fits
        else f"It does not fit: {worst.name} needs {quantity(worst.peak, 'B')} of {quantity(report.hbm, 'B')}."
    )
    return lines + list(report.advice)
