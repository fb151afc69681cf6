"""TPU chips by their public figures, and slices of them described to the compiler.

Figures are those of the system architecture pages of Cloud TPU's documentation. The compiler comes with the package
`libtpu` and needs no TPU: a topology such as "v5e:2x4" gives devices to compile for that are nowhere.
"""

import contextlib
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """One chip.

    Attributes:
      name: in libtpu.
      flops: peak FLOP/s in bfloat16.
      hbm: memory in bytes.
      bandwidth: of the memory, bytes/s.
      link: bytes/s that the chip can send to its neighbours, all links together.
      clock: Hz, to read the compiler's cycles as time; None where it is not published.
      sides: how many numbers a topology has.
      pod: the most chips in a slice.
      devices: that the compiler sees in a chip; each has its share of the figures.
      config: libtpu's name of the configuration in which the cores of a chip are `devices`.
    """

    name: str
    flops: float
    hbm: int
    bandwidth: float
    link: float
    clock: float | None
    sides: int
    pod: int
    devices: int = 1
    config: str | None = None


CHIPS = {
    "v4": Chip("v4", 275e12, 32 << 30, 1.228e12, 300e9, 1.05e9, 3, 4096, config="megacore"),
    "v5e": Chip("v5e", 197e12, 16 << 30, 0.819e12, 200e9, 1.5e9, 2, 256),
    "v5p": Chip("v5p", 459e12, 95 << 30, 2.765e12, 600e9, 1.75e9, 3, 8960),
    "v6e": Chip("v6e", 918e12, 32 << 30, 1.638e12, 400e9, None, 2, 256),
    "v7x": Chip("tpu7x", 2307e12, 192 << 30, 7.38e12, 600e9, None, 3, 9216, devices=2),
}

# what JAX calls a device -> the chip that it is, or is a part of
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
}


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOP/s in bfloat16 of some devices together; None where they are of no known kind.

    >>> import types
    >>> peak_flops([types.SimpleNamespace(device_kind="TPU v5 lite")] * 4)
    788000000000000.0
    """
    chip = CHIPS.get(KINDS.get(devices[0].device_kind, ""))
    return chip and len(devices) * chip.flops / chip.devices


# What libtpu would ask a machine with TPUs, and the lock by which it would keep other processes off them.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}


class Slice(NamedTuple):
    """Chips that work together."""

    name: str
    chip: Chip
    chips: int
    devices: list[Any]  # as jax has them, to compile for


def describe(topology: str) -> Slice:
    """The devices of a slice that need not exist.

    Args:
      topology: kind of chip and shape of the slice: "v5e:2x4", "v4:2x2x1".

    Raises:
      ValueError: an unknown chip, or a shape that no slice of it has.
      ImportError: libtpu is not installed.

    >>> len(describe("v5e:2x4").devices)
    8
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"Topology {topology!r}: no chip is called {kind!r}; {hint}There are {', '.join(CHIPS)}.")
    chip = CHIPS[kind]
    example = f"{kind}:{'2x4' if chip.sides == 2 else '2x2x1'}"
    if not re.fullmatch("x".join([r"[1-9]\d{0,4}"] * chip.sides), shape):
        raise ValueError(f"Topology {topology!r}: a slice of {kind} has {chip.sides} sides; write it as {example}.")
    sides = [int(side) for side in shape.split("x")]
    if math.prod(sides) > chip.pod:
        raise ValueError(f"Topology {topology!r} has {math.prod(sides)} chips; a pod of {kind} has {chip.pod}.")

    # A host holds four chips where the shape allows, else fewer; the compiler asks for whole hosts.
    bounds = [2 if side % 2 == 0 else 1 for side in sides[:2]] + [1]
    options = {"chips_per_host_bounds": bounds} | ({"chip_config_name": chip.config} if chip.config else {})
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ImportError(
            "Planning compiles with the TPU compiler, and libtpu is not installed: pip install '.[tpu]' "
            "(on Linux; no TPU is needed)."
        )
    import jax
    from jax.experimental import topologies

    try:
        with _environment(_ALONE):
            described = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip.name}:{shape}", **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"Topology {topology!r}: libtpu cannot describe it ({error}); try e.g. {example}.") from error
    return Slice(topology, chip, math.prod(sides), list(described.devices))


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Environment variables, where not set already, for as long as the context lasts."""
    added = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]
