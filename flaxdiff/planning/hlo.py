"""What the compiler made of a program: arithmetic, memory traffic, communication and cycles, read from its text.

XLA's own totals count the body of a loop once; here it counts as often as it runs. Cycles are the compiler's estimate
of each fused operation (TPU only); transfers between chips, prefetches and Pallas kernels have none. What a layer costs
is found through the source locations that the program keeps.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "while", "conditional", "call"}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Products of queries, keys and values in jax's attention kernels, which do not say what they do.
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}

_INSTRUCTION = re.compile(r"\s*(ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*)")
_ARRAY = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
_FRAME = re.compile(r'^(\d+) (?:"(.*)"|\{(.*)\})$')


class Array(NamedTuple):
    """One array of a shape."""

    dims: tuple[int, ...]
    bytes: float
    hbm: bool  # in the large memory, not on the core


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    arrays: list[Array]  # one, or those of a tuple
    op: str
    operands: list[str]
    line: str
    root: bool

    @property
    def called(self) -> list[str]:
        """The computations that it calls."""
        return [name for group in _CALLED.findall(self.line) for name in re.findall(r"%([\w.\-]+)", group)]


@dataclasses.dataclass
class Cost:
    """What a program costs one device.

    Attributes:
      flops: of matrix products, convolutions and Pallas kernels that say what they do, as compiled: with what the
        compiler computes twice to cut a picture into tiles, without products with padding.
      kernel_flops: the part of them in Pallas kernels, for which the compiler estimates no cycles.
      kernel_bytes: what Pallas kernels say that they move.
      bytes: read from and written to HBM.
      cycles: the compiler's estimate.
      layers: layer -> cycles.
      collectives: kind -> [how many, bytes of their results or, of a reduction, operands].
      unknown_loops: loops whose number of turns is not written down; they count once.
      unknown_kernels: runs of Pallas kernels of which nothing is known; they count for nothing.
    """

    flops: float = 0.0
    kernel_flops: float = 0.0
    kernel_bytes: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0
    layers: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    unknown_kernels: float = 0.0


@functools.cache
def arrays(shape: str) -> list[Array]:
    """The arrays of a shape as the program writes it.

    >>> arrays("(bf16[2,3]{1,0:T(8,128)S(1)}, f32[])")
    [Array(dims=(2, 3), bytes=12, hbm=False), Array(dims=(), bytes=4, hbm=True)]
    """
    found = []
    for kind, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(d) for d in dims.split(",") if d)
        bits = re.search(r"\d+", kind)
        width = BYTES.get(kind) or (int(bits[0]) / 8 if bits else 0)
        found.append(Array(sizes, math.prod(sizes) * width, "S(" not in layout))
    return found


class Program:
    """The text of a compiled module, taken apart."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        tables: dict[str, dict[int, str]] = {}
        rows: list[Instruction] = []
        table: dict[int, str] = {}
        for line in text.split("\n"):
            if line.startswith(("%", "ENTRY")):
                name = re.search(r"%([\w.\-]+)", line)[1]
                self.entry = name if line.startswith("ENTRY") else self.entry
                rows = self.computations[name] = []
            elif found := _INSTRUCTION.match(line):
                names = re.findall(r"%([\w.\-]+)", found[5].split(")")[0])
                rows.append(Instruction(found[2], arrays(found[3]), found[4], names, found[5], bool(found[1])))
            elif line in ("FunctionNames", "FileLocations", "StackFrames"):
                table = tables[line] = {}
            elif entry := _FRAME.match(line):
                table[int(entry[1])] = entry[2] if entry[2] is not None else entry[3]
            elif rows and line[:1] in '"}':  # an attribute that runs over several lines
                rows[-1] = rows[-1]._replace(line=rows[-1].line + line)
        self.tables = tables
        self.defined = {c: {i.name: i for i in rows} for c, rows in self.computations.items()}

    def cost(self) -> Cost:
        """What one run of the program costs a device."""
        total, seen = Cost(), set()
        self._walk(self.entry, 1, total, seen)
        return total

    def _walk(self, computation: str, times: float, total: Cost, seen: set) -> None:
        known = self.defined[computation]
        for i in self.computations[computation]:
            if i.op == "while":
                turns = self._turns(i)
                total.unknown_loops += turns is None
                self._walk(re.search(r"body=%([\w.\-]+)", i.line)[1], times * (turns or 1), total, seen)
            elif i.op in ("conditional", "call"):
                for name in i.called:  # of a condition, all branches: more than will run
                    self._walk(name, times, total, seen)
            if i.op in FREE:
                continue
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', i.line):
                total.cycles += times * int(cycles[1])
                layer = self.layer(i)
                total.layers[layer] = total.layers.get(layer, 0) + times * int(cycles[1])
            total.bytes += times * self._traffic(i, known)
            for inner, scope in self._inside(i, known):
                self._arithmetic(inner, scope, times, total)
                self._communication(inner, scope, times, total, set() if inner is i else seen)

    def _inside(self, i: Instruction, known: dict) -> Iterator[tuple[Instruction, dict]]:
        """An instruction and those that are fused into it, each with its surroundings."""
        yield i, known
        if i.op in ("fusion", "async-start", "custom-call"):
            for name in i.called:
                for inner in self.computations[name]:
                    yield from self._inside(inner, self.defined[name])

    def _turns(self, loop: Instruction) -> int | None:
        """How often a loop runs: as the compiler says, or the bound that its counter is compared with."""
        if told := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(told[1])
        rows = self.defined[re.search(r"condition=%([\w.\-]+)", loop.line)[1]]
        test = next(i for i in rows.values() if i.root)
        bounds = [rows[name] for name in test.operands if name in rows and rows[name].op == "constant"]
        if "direction=LT" not in test.line and test.op != "fusion" or len(bounds) != 1:
            return None
        return int(re.match(r"(\d+)\)", bounds[0].line)[1])

    # --- what an instruction costs -----------------------------------------------------------------------------------

    def _arithmetic(self, i: Instruction, known: dict, times: float, total: Cost) -> None:
        if i.op in ("convolution", "dot"):
            left, right = (known[name].arrays[0].dims for name in i.operands[:2])
            count = convolution if i.op == "convolution" else dot
            total.flops += times * count(i.line, left, right, i.arrays[0].dims)
        elif 'custom_call_target="tpu_custom_call"' in i.line:
            told = re.search(r'"cost_estimate":\{"flops":"?(\d+).*?"bytes_accessed":"?(\d+)', i.line)
            attention = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", i.line + i.name)
            count = 0.0
            if told:
                count = float(told[1])
                total.kernel_bytes += times * float(told[2])
            elif attention:  # queries and keys are the first arrays [..., positions, D] of floats
                shapes = [known[name].arrays[0] for name in i.operands]
                q, k = [a.dims for a in shapes if len(a.dims) > 2 and a.bytes > math.prod(a.dims)][:2]
                count = PRODUCTS[attention[1]] * 2.0 * math.prod(q) * k[-2]
            else:
                total.unknown_kernels += times
            total.flops += times * count
            total.kernel_flops += times * count

    def _communication(self, i: Instruction, known: dict, times: float, total: Cost, seen: set) -> None:
        kind = i.op.removesuffix("-start")
        channel = re.search(r"channel_id=(\d+)", i.line)
        # One transfer may be spread over many fusions. Outside of them, all those of a shard_map share a channel.
        if kind not in COLLECTIVES or (channel and channel[1] in seen):
            return
        seen.add(channel and channel[1])
        # The compiler writes the reduction of which each device keeps a part as two instructions.
        if kind == "all-reduce" and any(row.op == "dynamic-slice" and row.root for row in known.values()):
            kind = "reduce-scatter"
        ends = [array for name in i.operands for array in known[name].arrays] if "reduce" in kind else i.arrays
        row = total.collectives.setdefault(kind, [0, 0])
        row[0] += times
        row[1] += times * (max if i.op.endswith("-start") else sum)(array.bytes for array in ends)

    def _traffic(self, i: Instruction, known: dict) -> float:
        """Bytes between HBM and the core: operands read and results written, of a slice only what it takes."""
        if i.op.endswith("-done"):
            return 0
        hbm = lambda arrays: sum(array.bytes for array in arrays if array.hbm)
        if i.op in ("dynamic-slice", "slice", "gather"):
            return 2 * hbm(i.arrays)
        if i.op.endswith("-start"):  # its result holds both ends
            return min(array.bytes for array in i.arrays[:2]) * sum(array.hbm for array in i.arrays[:2])
        written = hbm(i.arrays)
        read = [hbm(known[name].arrays) if name in known else 0 for name in i.operands]
        if i.op == "fusion":
            inside = i.called[0]
            read = [min(whole, self._used(name, inside)) for whole, name in zip(read, self._parameters(inside))]
            root = next(row for row in self.computations[inside] if row.root)
            if root.op == "dynamic-update-slice":  # in place
                written = min(written, self.defined[inside][root.operands[1]].arrays[0].bytes)
        elif i.op == "dynamic-update-slice":
            written, read = read[1], read[1:]
        return written + sum(read)

    def _used(self, name: str, computation: str) -> float:
        """Bytes that a fused computation reads of a value: all, unless it only takes slices, or writes into it."""
        total = 0.0
        for row in self.computations[computation]:
            if name not in row.operands:
                continue
            if row.op in ("dynamic-slice", "slice"):
                total += row.arrays[0].bytes
            elif row.op == "bitcast":
                total += self._used(row.name, computation)
            elif row.op == "fusion":
                inside = row.called[0]
                total += self._used(self._parameters(inside)[row.operands.index(name)], inside)
            elif row.op != "dynamic-update-slice" or row.operands[0] != name:
                return math.inf
        return total

    def _parameters(self, computation: str) -> list[str]:
        """The names of a computation's parameters, in order."""
        rows = [row for row in self.computations[computation] if row.op == "parameter"]
        return [row.name for row in sorted(rows, key=lambda row: int(row.line.split(")")[0]))]

    def layer(self, i: Instruction) -> str:
        """Whose arithmetic an instruction is: the two innermost classes or functions, e.g. "Attention › Linear"."""
        number = re.search(r"stack_frame_id=(\d+)", i.line)
        names = self._frames(int(number[1])) if number else ()
        back = " (backward)" if "transpose(" in i.line else ""
        return (" › ".join(names[-2:]) or "other") + back

    def _frames(self, number: int) -> list[str]:
        """The functions that led to an instruction, outermost first, methods under the name of their class."""
        field = lambda text, key: int(re.search(rf"{key}=(\d+)", text)[1])
        names: list[str] = []
        frames = self.tables.get("StackFrames", {})
        while number in frames:
            location = self.tables["FileLocations"][field(frames[number], "file_location_id")]
            name = self.tables["FunctionNames"][field(location, "function_name_id")].split(".<locals>")[0].split(".")[0]
            if name not in names[-1:]:
                names.append(name)
            number = field(frames[number], "parent_frame_id") - 1  # written one too high, so that none is 1
        names = names[: names.index(ROOT)] if ROOT in names else names
        return [name for name in reversed(names) if name not in PLUMBING]


ROOT = "compiled"  # the planner's function that compiles: what called it is of no interest
# Functions between a layer and what it computes, which say nothing of where the time goes.
PLUMBING = {
    "Networks",
    "Program",
    "predict",
    "stateless",
    "training",
    "<module>",
    "<lambda>",
    "apply",
    "run",
    "states",
    "dot",
    "conv",
    "value",
    "_affine",
    "_plain",
    "Stage",
    "MidBlock",
}


def convolution(line: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> float:
    """FLOPs of a convolution, products with padding left out.

    >>> convolution("window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", (1, 4, 2), (3, 2, 5), (1, 4, 5))
    200.0
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    lhs, rhs, result = (dict(zip(labels[n], dims)) for n, dims in ((1, left), (2, right), (3, out)))
    spatial = sorted(label for label in result if label.isdigit())
    window = re.search(r"window=\{([^}]*)\}", line)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    read = lambda key, d, default: options[key].split("x")[d] if key in options else default
    count = 1.0
    for d, label in enumerate(spatial):
        low = int(read("pad", d, "0_0").split("_")[0])
        stride, holes, step = (int(read(key, d, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        at = np.arange(result[label])[:, None] * stride + np.arange(rhs[label]) * step - low
        count *= int(((at >= 0) & (at % holes == 0) & (at // holes < lhs[label])).sum())
    return 2 * count * result["b"] * result["f"] * rhs["i"]


def dot(line: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> float:
    """FLOPs of a matrix product.

    >>> dot("lhs_contracting_dims={1}, rhs_contracting_dims={0}", (2, 3), (3, 4), (2, 4))
    48.0
    """
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
    return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in summed[1].split(",") if d)
