"""A folder of compiled programs: what it holds, what it was made under, and whether it still fits.

What a folder keeps of a run lies in one subfolder, named by a checksum of everything that the programs depend on
(`_conditions`): the traces as StableHLO (`jax.export`), the compiled programs as JAX's persistent compilation cache
keeps them, and `manifest.json`, which says what they are for and holds a checksum of each file. Nothing is unpickled;
but compiled programs are machine code: use folders that you trust. What does not match is compiled anew, with a note.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

import flaxdiff
from flaxdiff.checkpoint import files
from flaxdiff.pipelines.generate import Program

ROOT = Path(flaxdiff.__file__).parent
MANIFEST = "manifest.json"
FORMAT = 1
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # environment that compilers read
# the conditions that are not of the place but of what is run
RUN = ("pipeline", "final", "networks", "pictures", "arguments")
SETTINGS = (  # of JAX that a trace depends on
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
    "jax_debug_nans",
)


def kept(build: Callable[..., Any], program: Program, arguments: Any, folder: Path) -> Any:
    """What `build(program, arguments, subfolder)` compiles, from a folder, or written there."""
    try:
        conditions = _conditions(program, arguments)
        place = folder / _checksum(json.dumps(conditions).encode())
        if _intact(place, conditions):
            with _cache_in(place, write=False):
                return build(program, arguments, place)
        with files.staged(place) as stage, _cache_in(stage, write=True):
            parts = build(program, arguments, stage)
            files.write_json(stage / MANIFEST, {"conditions": conditions, "sha256": _checksums(stage)})
        return parts
    except (OSError, ImportError, TypeError, ValueError) as error:
        _note(f"Programs are compiled for this process only, and not kept in {folder}: {error}")
        return build(program, arguments)


def _intact(place: Path, conditions: Mapping[str, Any]) -> bool:
    """Whether a folder holds these programs, unchanged; says so if it holds others, and removes what is damaged."""
    if place.exists():
        if _manifest(place) == {"conditions": conditions, "sha256": _checksums(place)}:
            return True
        shutil.rmtree(place)
        _note(f"{place} is damaged: its files are not those of its {MANIFEST}. Its programs are compiled anew.")
    else:
        there = [_manifest(path.parent).get("conditions", {}) for path in place.parent.glob(f"*/{MANIFEST}")]
        same = [other for other in there if all(other.get(name) == conditions[name] for name in RUN)]
        if same:
            nearest = min((_differences(other, conditions) for other in same), key=len)
            _note(f"{place.parent} holds these programs for {'; '.join(nearest)}. They are compiled anew.")
    return False


def _manifest(place: Path) -> dict[str, Any]:
    """What a folder says of itself; nothing if it is not to be read."""
    try:
        found = files.read_json(place / MANIFEST)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found.get("conditions"), dict) else {}


def _note(text: str) -> None:
    warnings.warn(text, stacklevel=6)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    show = lambda value: value if len(str(value)) < 60 else f"{str(value)[:57]}…"
    return [f"{k} {show(there.get(k))} (here {show(v)})" for k, v in here.items() if there.get(k) != v]


def _checksums(folder: Path) -> dict[str, str]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@contextlib.contextmanager
def _cache_in(folder: Path, write: bool) -> Iterator[None]:
    """JAX's persistent compilation cache in this folder for a while; of one thread at a time."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_enable_compilation_cache": True,
        "jax_persistent_cache_min_compile_time_secs": 0.0 if write else math.inf,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_enable_xla_caches": "none",  # else the folder's name is part of the key
    }
    with _lock:
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            _configure(settings)
            yield
        finally:
            _configure(before)


_lock = threading.Lock()


def _configure(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def _conditions(program: Program, arguments: Any) -> dict[str, Any]:
    """Everything that traces and compiled programs depend on, as JSON.

    Raises:
      ValueError: the program holds functions that are not the library's: whether they changed cannot be known.
    """
    leaves, tree = jax.tree.flatten(arguments)
    devices, inputs = devices_of(arguments), arguments[-1]
    return {
        "format": FORMAT,
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "flaxdiff": f"{version('flaxdiff-jax')} {_sources()}",
        "platform": f"{devices[0].platform} {devices[0].client.platform_version}",
        "devices": f"{len(devices)} {devices[0].device_kind}, {platform.machine()} {_features()}",
        "flags": {name: os.environ.get(name, "") for name in FLAGS},
        "settings": {name: getattr(jax.config, name) for name in SETTINGS},
        "pipeline": [_named(part) for part in (*program.family, program.guidance, program.cache) if part is not None],
        "final": program.final,
        "networks": {name: f"{_named(spec.module)} {spec.config}" for name, spec in program.specs},
        "pictures": f"{len(inputs['index'])} of {inputs['size'].height} x {inputs['size'].width}",
        "arguments": _checksum(f"{tree} {leaves}".encode()),
    }


def devices_of(arguments: Any) -> list[jax.Device]:
    """Those that arguments lie on."""
    placed = {device for leaf in jax.tree.leaves(arguments) if leaf.sharding for device in leaf.sharding.device_set}
    return sorted(placed, key=lambda device: device.id) or jax.devices()[:1]


def _named(part: Any) -> str:
    """What a program is made of, in words: the library's functions and classes by name, plain data as it is.

    Raises:
      ValueError: it is something else.
    """
    if not callable(part):
        return json.dumps(part)
    name = f"{part.__module__}.{getattr(part, '__qualname__', part)}"
    found = functools.reduce(lambda at, step: getattr(at, step, None), name.split(".")[1:], flaxdiff)
    if name.split(".")[0] != "flaxdiff" or found is not part:
        raise ValueError(f"{name} is a function of your own, and whether it has changed cannot be known.")
    return name


@functools.cache
def _sources() -> str:
    """A checksum of the library's code, which changes more often than its version where it is being worked on."""
    return _checksum(*(path.read_bytes() for path in sorted(ROOT.rglob("*.py"))))


@functools.cache
def _features() -> str:
    """A checksum of what the processor can do: machine code for a better one does not run."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [platform.processor()]
    return _checksum(*sorted({line.encode() for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _checksum(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
