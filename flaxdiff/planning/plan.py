"""The plan itself: which programs a run consists of, compiled for a described slice from configurations alone.

A sampling run is three programs, the parts of `pipelines/generate.py`: encode the prompts once, evaluate the network
and the scheduler's row at each step (all branches of the guidance), decode once. A training run is the step of
`training/state.py`. Nothing is allocated: parameters and inputs are shapes that say where they lie.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxdiff import parallel, registry
from flaxdiff.checkpoint import files, hub
from flaxdiff.checkpoint.pipelines import SORTS, read_by, read_index
from flaxdiff.core import abstract
from flaxdiff.pipelines.generate import autoencoder, denoiser
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks import blank_inputs
from flaxdiff.planning import chips, hlo
from flaxdiff.planning.report import Memory, Part, Report, quantity
from flaxdiff.published import COMPONENTS, MODELS

DTYPES = ("bfloat16", "float32")
TRIED = ("dp", "fsdp", "tp", "dp+fsdp", "fsdp+tp")  # presets to recommend from
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def plan(
    model: str | os.PathLike[str] | DiffusionPipeline,
    topology: str,
    *,
    preset: str = "fsdp",
    batch: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    train: bool = False,
    dtype: str = "bfloat16",
    remat: str = "none",
) -> Report:
    """Compile a run ahead of time for TPUs that need not exist, and say whether it fits and what bounds its speed.

    Args:
      model: a shipped one ("emoji", "emoji-flow"), one of `published.MODELS` ("sdxl", "flux-dev", …), a folder in
        diffusers' layout, of which only configurations are read, or a pipeline.
      topology: the slice, e.g. "v5e:2x4".
      preset: how weights and batch are split, see `parallel.preset`.
      batch: pictures in all; by default one for each part that the batch is split into.
      height, width: in pixels; by default what the model was trained on.
      steps: of the scheduler; by default the model's own. Not for training.
      train: a training step of the denoiser instead: AdamW and the moving average in float32, the network in `dtype`.
      dtype: that networks compute in, "bfloat16" or "float32".
      remat: what a training step computes again on the way back, "none", "dots" or "full": see nn/stack.py.

    Raises:
      ValueError: an unknown model, topology, preset or dtype, a mesh that the slice does not hold, a batch or a size
        that does not divide, a program that the compiler refuses.
      ImportError: libtpu is not installed.

    >>> plan("sdxl", "v5e:2x4", batch=12)
    Traceback (most recent call last):
    ValueError: A batch of 12 does not divide among 8 parts (mesh of fsdp 8); use a multiple of 8, e.g. 8.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}.")
    if train and steps is not None:
        raise ValueError(f"steps={steps} is for sampling; leave it out to plan a training step.")
    if remat != "none" and not train:
        raise ValueError(f"remat={remat!r} is for training; leave it out to plan a sampling run.")
    pipe = model if isinstance(model, DiffusionPipeline) else pipeline(model)
    pipe = pipe.replace(**{name: spec.replace(remat=remat) for name, spec in pipe.specs}) if train else pipe
    place = chips.describe(topology)
    mesh = parallel.make_mesh(preset, place.devices)
    axes = parallel.batch_axes(mesh)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    batch = shards if batch is None else batch
    if batch < 1 or batch % shards:
        sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        near = max(batch // shards, 1) * shards
        raise ValueError(
            f"A batch of {batch} does not divide among {shards} parts (mesh of {sizes}); use a multiple of {shards}, "
            f"e.g. {near}."
        )
    run = _Run(pipe, mesh, jnp.dtype(dtype), batch, height, width, steps)
    programs = [training(run)] if train else list(sampling(run))
    with jax.set_mesh(mesh):
        parts = tuple(compiled(program) for program in programs)

    state = programs[0].arguments[0]
    size = run.inputs()["size"]
    name = type(pipe).__name__ if isinstance(model, DiffusionPipeline) else model
    what = f"{name}, {'a training step on' if train else 'sampling'} {batch} pictures of {size.height} × {size.width}"
    what += f" in {dtype} on {topology}, {preset}" + (f", remat {remat}" if remat != "none" else "")
    where = (place.chip, place.chips, len(place.devices), dict(mesh.shape))
    report = Report(what, *where, batch, weight(state, mesh), parts, tuple(_notes(run, parts)))
    return report if report.fits else advised(report, state, shards)


def _notes(run: "_Run", parts: tuple[Part, ...]) -> Iterator[str]:
    """What was not done as the rules wish, and what could not be read."""
    yield from parallel.notes(run.params(), run.mesh)
    if loops := sum(part.cost.unknown_loops for part in parts if part.cost):
        yield f"Loops that do not say how often they run, and count once: {loops}."
    if kernels := sum(part.cost.unknown_kernels for part in parts if part.cost):
        yield f"Runs of Pallas kernels that do not say what they do, and count for nothing: {kernels:.0f}."


# --- what there is to run --------------------------------------------------------------------------------------------


def pipeline(model: str | os.PathLike[str]) -> DiffusionPipeline:
    """A pipeline of this model's networks, from configurations alone: its scheduler and tokenizers stand in.

    >>> [name for name, _ in pipeline("sdxl").specs]
    ['vae', 'text_encoder', 'text_encoder_2', 'unet']
    """
    if str(model) in MODELS:
        class_name, components, settings = MODELS[str(model)]
        configs = {name: COMPONENTS[title] for name, title in components.items()}
    else:
        folder = hub.local(model)
        if not folder.is_dir():
            known = [*hub.SHIPPED, *MODELS]
            near = difflib.get_close_matches(str(model), known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"There is no model or folder {str(model)!r}; {hint}Known are {', '.join(known)}, or give a folder "
                "with model_index.json and the config.json of each network."
            )
        class_name, named, settings = read_index(folder)
        named = read_by(registry.find(class_name, "pipeline"), named)
        networks = {name: kind for name, kind in named.items() if registry.sort_of(kind, *SORTS) == "model"}
        if lacking := [name for name in networks if not (folder / name / files.CONFIG).is_file()]:
            raise ValueError(f"{folder} names {files.listed(lacking)} but has no {lacking[0]}/{files.CONFIG}; add it.")
        configs = {name: (kind, files.read_json(folder / name / files.CONFIG)) for name, kind in networks.items()}

    if registry.find(class_name, "pipeline").before:
        raise ValueError(f"{class_name} runs several loops one after the other, and a plan is of one; plan its parts.")
    specs = tuple((name, registry.find(kind, "model").from_config(config)) for name, (kind, config) in configs.items())
    blank = lambda own: lambda texts, length=None: np.zeros((len(texts), length or own), np.int32)
    return registry.find(class_name, "pipeline")(
        specs=specs,
        scheduler=registry.find("DDIMScheduler")(),
        tokenizers=tuple(
            (name.replace("text_encoder", "tokenizer"), blank(getattr(spec.config, "max_position_embeddings", 512)))
            for name, spec in specs
            if name.startswith("text_encoder")
        ),
        settings=tuple(settings.items()),
    )


class _Run(NamedTuple):
    """What is asked for, and its arguments as shapes that lie on the mesh."""

    pipe: DiffusionPipeline
    mesh: Mesh
    dtype: Any
    batch: int
    height: int | None
    width: int | None
    steps: int | None

    @property
    def split(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(parallel.batch_axes(self.mesh)))

    @property
    def everywhere(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def inputs(self, **options: Any) -> dict[str, Any]:
        """Those of blank prompts and pictures."""
        size = {"height": self.height, "width": self.width}
        return blank_inputs(self.pipe, self.batch, num_inference_steps=self.steps, **size, **options)

    def params(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Parameters of every network, where the rules put them."""
        shapes = {name: abstract(spec, self.dtype) for name, spec in self.pipe.specs}
        return laid(shapes, parallel.shardings(shapes, self.mesh))

    def rows(self, a: Any) -> NamedSharding:
        """Where an array [rows of the plan, B or 1, …] lies."""
        axes = parallel.batch_axes(self.mesh) if a.shape[1] % self.batch == 0 else None
        return NamedSharding(self.mesh, PartitionSpec(None, axes))

    def placed(self, tree: Any) -> Any:
        """Inputs, conditions or a state of sampling, split along the batch."""
        return laid(tree, parallel.by_kind(lambda a: self.everywhere, lambda a: self.split, tree))


class Program(NamedTuple):
    """A function, its arguments as shapes that lie on the mesh, and where its results go."""

    name: str
    times: int
    function: Callable
    arguments: tuple[Any, ...]
    results: Any
    donated: tuple[int, ...] = ()


def laid(tree: Any, where: Any) -> Any:
    """Shapes with shardings."""
    return jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=place), tree, where)


def places(tree: Any) -> Any:
    """The shardings of shapes."""
    return jax.tree.map(lambda a: a.sharding, tree)


def sampling(run: _Run) -> Iterator[Program]:
    """The programs of a sampling run, in order."""
    program, params, inputs = run.pipe.program, run.params(), run.inputs()
    steps = int(inputs["plan"].steps)
    key = laid(jax.eval_shape(lambda: jax.random.key(0)), run.everywhere)
    inputs = run.placed(inputs)
    conditions, state = map(run.placed, jax.eval_shape(program.begin, params, key, inputs))
    conditions = conditions._replace(times=laid(conditions.times, jax.tree.map(run.rows, conditions.times)))
    slots = laid(state.sampler.slots, NamedSharding(run.mesh, PartitionSpec(None, parallel.batch_axes(run.mesh))))
    state = state._replace(sampler=state.sampler._replace(slots=slots))

    yield Program("encode", 1, program.begin, (params, key, inputs), places((conditions, state)))
    yield Program("step", steps, program.step, (params, conditions, state), places(state), (2,))
    latents = laid(jax.ShapeDtypeStruct(slots.shape[1:], slots.dtype), run.split)
    yield Program("decode", 1, program.decode, (params, latents), run.split)


def training(run: _Run) -> Program:
    """A training step of the denoiser on latents and prompts, which the text encoders read anew at every step."""
    from flaxdiff.training import diffusion, losses, noising, optimizers, state

    specs, inputs = dict(run.pipe.specs), run.inputs(guidance_scale=1.0)
    latents = (run.batch, *run.pipe.family.latent_shape(specs, inputs["size"]))
    told = {name: value for name, value in inputs.items() if name not in diffusion.OF_RUN}
    batch = run.placed({"latents": jax.ShapeDtypeStruct(latents, jnp.float32), "conditions": told})

    tx = optimizers.adam(1e-4, 100_000)
    loss = losses.denoising(diffusion.predict(run.pipe), noising.path_of(run.pipe.scheduler))
    own = denoiser(specs)
    shapes = {name: abstract(spec, jnp.float32 if name == own else run.dtype) for name, spec in specs.items()}
    shapes.pop(autoencoder(specs), None)
    create = functools.partial(state.create, tx=tx, trainable=rf"{own}\..*")
    start = jax.eval_shape(create, shapes)
    start = laid(start, parallel.shardings(start, run.mesh))
    key = laid(jax.eval_shape(lambda: jax.random.key(0)), run.everywhere)
    function = functools.partial(state.train_step, diffusion.encoded(run.pipe, loss), tx, dtype=run.dtype)
    return Program("training step", 1, function, (start, batch, key), (places(start), None), (0,))


# --- compiling -------------------------------------------------------------------------------------------------------


def compiled(program: Program) -> Part:
    """Compile a program and read what the compiler says of it; a program too large for the chip is no error."""
    clock = time.perf_counter()
    function = jax.jit(
        program.function, out_shardings=program.results, donate_argnums=program.donated, keep_unused=True
    )
    lowered = function.lower(*program.arguments)
    try:
        with unkept():
            made = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = re.findall(r"([\d.]+)([KMGT])\b", str(error).split("\n")[0])  # what is needed and what there is
        if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
            told = str(error).split("\n")[0]
            raise ValueError(f"The TPU compiler refuses the program {program.name!r}: {told}") from error
        needed = max(round(float(size) * _UNITS[unit]) for size, unit in sizes)
        return Part(program.name, program.times, None, None, time.perf_counter() - clock, needed)
    seconds = time.perf_counter() - clock
    said = made.memory_analysis()
    memory = Memory(
        said.argument_size_in_bytes,
        said.temp_size_in_bytes,
        said.output_size_in_bytes - said.alias_size_in_bytes,
        said.generated_code_size_in_bytes,
    )
    return Part(program.name, program.times, memory, hlo.Program(made.as_text()).cost(), seconds)


@contextlib.contextmanager
def unkept() -> Iterator[None]:
    """Nothing goes to the persistent compilation cache: programs for chips that are not there cannot be read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def weight(tree: Any, mesh: Mesh, rules: parallel.Rules = parallel.RULES) -> int:
    """Bytes of parameters, or of a training state, on one device of a mesh.

    >>> mesh = parallel.make_mesh({"fsdp": 1}, jax.devices()[:1])
    >>> weight({"conv.weight": jnp.zeros((3, 3, 8, 8))}, mesh)
    2304
    """
    size = lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(size, tree, parallel.shardings(tree, mesh, rules))))


# --- advice ----------------------------------------------------------------------------------------------------------


def advised(report: Report, state: Any, shards: int) -> Report:
    """The report with what to change: what would fit by weights computed anew and working memory in proportion."""
    worst = max(report.parts, key=lambda part: part.peak or 0)
    working = max(worst.peak - report.weights, 0)
    each = working * shards / report.batch  # of one picture
    room = lambda weights, pictures: weights + pictures * each <= 0.95 * report.hbm

    advice = []
    for preset in TRIED:
        mesh = jax.sharding.AbstractMesh(*zip(*((v, k) for k, v in parallel.preset(preset, report.devices).items())))
        weights = weight(state, mesh)
        parts = math.prod(mesh.shape[axis] for axis in parallel.batch_axes(mesh))
        if dict(mesh.shape) != report.mesh and report.batch % parts == 0 and room(weights, report.batch / parts):
            need = quantity(weights + report.batch / parts * each, "B")
            advice.append(f"--preset {preset}: about {need}, {quantity(weights, 'B')} of it weights.")
    fewer = next((n for n in range(report.batch // shards - 1, 0, -1) if room(report.weights, n)), None)
    if fewer:
        need = quantity(report.weights + fewer * each, "B")
        advice.append(f"--batch {fewer * shards}: about {need}.")
    if not advice:
        room_left = 0.95 * report.hbm - each
        whole = report.weights * report.devices
        advice.append(
            f"A larger slice: with --preset fsdp and one picture a device, from {math.ceil(whole / room_left)} devices."
            if room_left > 0
            else f"Smaller pictures, or a chip with more memory: one picture works in {quantity(each, 'B')}."
        )
    return dataclasses.replace(report, advice=tuple(advice))
