"""Programs ahead of time: the parts of a run compiled before they are needed; in a folder they are `keeping.py`'s."""

import os
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.sharding import Sharding

from flaxdiff import memory, weights
from flaxdiff.core import Params
from flaxdiff.pipelines.generate import Inputs, Program, for_decoder
from flaxdiff.pipelines.keeping import devices_of, kept


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
    program: Program | None = None
    earlier: tuple["Executables", ...] = ()  # those of the loops before

    def generate(self, params: Mapping[str, Params], key: jax.Array, inputs: Inputs) -> jax.Array:
        """Pictures [B, H, W, C], float32 in [0, 1]: as `pipe.generate`, but nothing is traced or compiled.

        Raises:
          ValueError: the arguments have other shapes, dtypes, devices or structure than those compiled for.
        """
        parts = iter(self.earlier)
        run = lambda program, *arguments: next(parts).generate(*arguments)
        inputs = self.program.prepared(run, params, self.program.keys(key, inputs["index"]), inputs)
        if self.signature != signature((params, key, inputs)):
            raise ValueError(
                "These programs were compiled for arguments of other shapes, dtypes or structure; call pipe.compile "
                "with these parameters and inputs first, or pipe.generate, which compiles as it needs."
            )
        conditions, state = self.begin(params, key, inputs)
        looped = memory.fetched(params, self.program.family.loop)
        for _ in range(int(inputs["plan"].steps)):
            state = self.step(looped, conditions, state)
        del looped
        return self.decode(params, state.sampler.sample, for_decoder(inputs))


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
    params, key, inputs = jax.tree.map(_shape, arguments)
    earlier = []

    def run(program: Program, params: Any, key: Any, inputs: Any) -> Any:
        """Compile a loop that comes before, and say what shape its result has."""
        earlier.append(compiled(program, (params, key, inputs), folder))
        shape = program.family.latent_shape(dict(program.specs), inputs["size"])
        latents = jax.ShapeDtypeStruct((len(inputs["index"]), *shape), jnp.float32)
        return jax.eval_shape(program.decode, params, latents, for_decoder(inputs))

    keys = jax.eval_shape(program.keys, key, inputs["index"])
    shapes = params, key, program.prepared(run, params, keys, inputs)
    known = program, signature(shapes)
    if folder is not None or known not in _ready:
        parts = _built(program, shapes) if folder is None else kept(_built, program, shapes, Path(folder).expanduser())
        _ready[known] = Executables(**parts, signature=known[1], program=program, earlier=tuple(earlier))
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
        latents, places = jax.eval_shape(lambda state: state.sampler.sample, state), {}
        if len(devices_of(arguments)) > 1:  # the next parts take their arguments from where this one leaves them
            conditions, state = begun = _laid(begun, jobs["begin"].result().output_shardings)
            places = {"out_shardings": [s.sharding for s in jax.tree.leaves(state)]}
            latents = _laid(latents, [state.sampler.place])
        looped = memory.fetched(arguments[0], program.family.loop)  # as a call does
        jobs["step"] = start("step", program.step, looped, conditions, state, **places)
        decoding = arguments[0], latents, for_decoder(arguments[2])
        jobs["decode"] = start("decode", program.decode, *decoding)
        results = {"begin": begun, "step": state, "decode": jax.eval_shape(program.decode, *decoding)}
        parts = {name: Part(job.result(), jax.tree.structure(results[name])) for name, job in jobs.items()}
    memory.returned()
    return parts


def _laid(shapes: Any, places: list[Sharding]) -> Any:
    """Shapes with their places, given in the order of the leaves."""
    leaves, tree = jax.tree.flatten(shapes)
    laid = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for s, place in zip(leaves, places, strict=True)]
    return jax.tree.unflatten(tree, laid)


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
