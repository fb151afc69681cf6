"""Programs ahead of time: the parts of a run compiled before they are needed, and kept in a folder.

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
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import export
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec, Sharding

import flaxdiff
from flaxdiff import memory, weights
from flaxdiff.checkpoint import files
from flaxdiff.core import Params
from flaxdiff.pipelines.generate import Inputs, Program

ROOT = Path(flaxdiff.__file__).parent
MANIFEST = "manifest.json"
FORMAT = 1
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # environment that compilers read
RUN = ("pipeline", "networks", "pictures", "arguments")  # the conditions that are not of the place but of what is run
SETTINGS = (  # of JAX that a trace depends on
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
    "jax_debug_nans",
)


class Part(NamedTuple):
    """A compiled part of a run; takes and returns what the method of `Program` does."""

    compiled: jax.stages.Compiled  # leaves -> leaves
    result: Any  # the tree of what it returns

    def __call__(self, *arguments: Any) -> Any:
        return jax.tree.unflatten(self.result, self.compiled(*jax.tree.leaves(arguments)))


class Executables(NamedTuple):
    """The compiled parts of a run, for arguments of one signature."""

    begin: Callable
    step: Callable
    decode: Callable
    signature: Hashable = None
    loop: str = r"(?!)"  # regex of networks whose weights `step` takes on the device

    def generate(self, params: Mapping[str, Params], key: jax.Array, inputs: Inputs) -> jax.Array:
        """Pictures [B, H, W, C], float32 in [0, 1]: as `pipe.generate`, but nothing is traced or compiled.

        Raises:
          ValueError: the arguments have other shapes, dtypes, devices or structure than those compiled for.
        """
        if self.signature != signature((params, key, inputs)):
            raise ValueError(
                "These programs were compiled for arguments of other shapes, dtypes or structure; call pipe.compile "
                "with these parameters and inputs first, or pipe.generate, which compiles as it needs."
            )
        conditions, state = self.begin(params, key, inputs)
        looped = memory.fetched(params, self.loop)
        for _ in range(int(inputs["plan"].steps)):
            state = self.step(looped, conditions, state)
        del looped
        return self.decode(params, state.sampler.sample)


_ready: dict[Hashable, Executables] = {}  # (program, signature) -> what a call finds, as it would in jit's own cache


def keep_compiled() -> Path | None:
    """Keep compiled programs in the user's cache folder, unless JAX has been told where to keep them, or not to.

    Returns:
      Where they are kept, if on this machine.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flaxdiff" / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # a home that cannot be written: JAX would warn at each program
            return None
        jax.config.update("jax_compilation_cache_dir", str(folder))
    folder = jax.config.jax_compilation_cache_dir
    return None if "://" in folder else Path(folder)


def find(program: Program, *arguments: Any) -> Executables | None:
    """What was compiled for these (params, key, inputs), if anything."""
    return _ready.get((program, signature(arguments))) if _ready else None


def compiled(program: Program, arguments: tuple[Any, Any, Any], folder: str | os.PathLike[str] | None) -> Executables:
    """The executables for (params, key, inputs), given as arrays or shapes; see `DiffusionPipeline.compile`."""
    known = program, signature(arguments)
    if folder is not None or known not in _ready:
        shapes = jax.tree.map(_shape, arguments)
        parts = _built(program, shapes) if folder is None else _kept(program, shapes, Path(folder).expanduser())
        _ready[known] = Executables(**parts, signature=known[1], loop=program.family.loop)
    return _ready[known]


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """What a program is compiled for: the shape and dtype of an argument, and its place if that was chosen."""
    seen = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    chosen = getattr(leaf, "committed", True) or weights.on_host(leaf)
    place = leaf.sharding if chosen and hasattr(leaf, "sharding") else None
    return jax.ShapeDtypeStruct(seen.shape, seen.dtype, sharding=place)


def signature(arguments: Any) -> Hashable:
    """All that must agree for a compiled program to fit."""
    leaves, tree = jax.tree.flatten(arguments)
    return tree, tuple((s.shape, s.dtype, s.sharding) for s in map(_shape, leaves))


# --- compiling --------------------------------------------------------------------------------------------------------


def _built(program: Program, arguments: Any, folder: Path | None = None) -> dict[str, Part]:
    """Every part compiled, side by side; traces are read from `folder`, or written there if they are not in it."""
    with ThreadPoolExecutor(3) as pool:  # one is compiled while the next is traced

        def start(name: str, function: Callable, *given: Any, **places: Any) -> Future:
            leaves, tree = jax.tree.flatten(given)
            flat = _flat(function, tree)
            if folder is not None:
                flat = _traced(jax.jit(flat, **places), leaves, folder / f"{name}.stablehlo")
            return pool.submit(jax.jit(flat, **places).lower(*leaves).compile)

        jobs = {"begin": start("begin", program.begin, *arguments)}
        conditions, state = begun = jax.eval_shape(program.begin, *arguments)
        latents, places = jax.eval_shape(lambda slots: slots[0], state.sampler.slots), {}
        if len(_devices(arguments)) > 1:  # the next parts take their arguments from where this one leaves them
            conditions, state = begun = _laid(begun, jobs["begin"].result().output_shardings)
            places, slots = (
                {"out_shardings": [s.sharding for s in jax.tree.leaves(state)]},
                state.sampler.slots.sharding,
            )
            latents = _laid(latents, [NamedSharding(slots.mesh, PartitionSpec(*slots.spec[1:]))])
        looped = memory.fetched(arguments[0], program.family.loop)  # as a call does
        jobs["step"] = start("step", program.step, looped, conditions, state, **places)
        jobs["decode"] = start("decode", program.decode, arguments[0], latents)
        results = {"begin": begun, "step": state, "decode": 0}
        return {name: Part(job.result(), jax.tree.structure(results[name])) for name, job in jobs.items()}


def _laid(shapes: Any, places: list[Sharding]) -> Any:
    """Shapes with their places, given in the order of the leaves."""
    leaves, tree = jax.tree.flatten(shapes)
    laid = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for s, place in zip(leaves, places, strict=True)]
    return jax.tree.unflatten(tree, laid)


def _devices(arguments: Any) -> list[jax.Device]:
    """Those that arguments lie on."""
    placed = {device for leaf in jax.tree.leaves(arguments) if leaf.sharding for device in leaf.sharding.device_set}
    return sorted(placed, key=lambda device: device.id) or jax.devices()[:1]


def _flat(function: Callable, tree: Any) -> Callable:
    """A function of trees as one of leaves, so that what is exported holds arrays and nothing of ours."""
    return lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))


def _traced(function: Callable, leaves: list[jax.ShapeDtypeStruct], path: Path) -> Callable:
    """The function as its trace in a file, which is written if it is not there."""
    if path.exists():
        return export.deserialize(bytearray(path.read_bytes())).call
    exported = export.export(function)(*leaves)
    path.write_bytes(exported.serialize())
    return exported.call


# --- keeping ----------------------------------------------------------------------------------------------------------


def _kept(program: Program, arguments: Any, folder: Path) -> dict[str, Part]:
    """The parts from a folder, or compiled and written there."""
    try:
        conditions = _conditions(program, arguments)
        place = folder / _checksum(json.dumps(conditions).encode())
        if _intact(place, conditions):
            with _cache_in(place, write=False):
                return _built(program, arguments, place)
        with files.staged(place) as stage, _cache_in(stage, write=True):
            parts = _built(program, arguments, stage)
            files.write_json(stage / MANIFEST, {"conditions": conditions, "sha256": _checksums(stage)})
        return parts
    except (OSError, ImportError, TypeError, ValueError) as error:
        _note(f"Programs are compiled for this process only, and not kept in {folder}: {error}")
        return _built(program, arguments)


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
    devices, inputs = _devices(arguments), arguments[-1]
    return {
        "format": FORMAT,
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "flaxdiff": f"{version('flaxdiff-jax')} {_sources()}",
        "platform": f"{devices[0].platform} {devices[0].client.platform_version}",
        "devices": f"{len(devices)} {devices[0].device_kind}, {platform.machine()} {_features()}",
        "flags": {name: os.environ.get(name, "") for name in FLAGS},
        "settings": {name: getattr(jax.config, name) for name in SETTINGS},
        "pipeline": [_named(part) for part in (*program.family, program.guidance) if part is not None],
        "networks": {name: f"{_named(spec.module)} {spec.config}" for name, spec in program.specs},
        "pictures": f"{len(inputs['index'])} of {inputs['size'].height} x {inputs['size'].width}",
        "arguments": _checksum(f"{tree} {leaves}".encode()),
    }


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
