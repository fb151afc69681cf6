"""Structure and values, apart.

A network is written down as an `nnx.Module` and used as a `Spec`: its class and its frozen configuration, hashable,
free of arrays. The numbers live in a flat dictionary, `Params`, whose keys are the names in the PyTorch checkpoint.
Five functions join the two: `abstract` and `layout` describe the parameters, `init` draws them, `apply` computes.
Nothing else in the library splits or merges modules, so `jit`, `grad`, `vmap`, `pmap` and `eval_shape` work on
everything.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import re
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]  # name in the checkpoint -> array, or another kind of weight (see weights.py)

# How attention is computed, and what is computed again on the way back: settings that reach every layer without being
# handed along. `apply` sets them from the spec while it traces, so they are part of what is compiled.
attention_backend: contextvars.ContextVar[str] = contextvars.ContextVar("attention_backend", default="auto")
rematerialised: contextvars.ContextVar[str] = contextvars.ContextVar("rematerialised", default="none")
# Where attention notes what it looks at, while somebody watches; see nn/attention.py. And where other layers note what
# passes through them, by kind: "up", the inputs of the blocks of up stages; "cross", what attention to a text gives.
watched: contextvars.ContextVar[list | None] = contextvars.ContextVar("watched", default=None)
noted: contextvars.ContextVar[dict[str, list] | None] = contextvars.ContextVar("noted", default=None)
# What decides whether blocks are run at all, where somebody wants that; see nn/skipping.py.
skipping: contextvars.ContextVar[Any] = contextvars.ContextVar("skipping", default=None)
# What decides whether attention is computed or gives what it gave; see nn/reusing.py.
reusing: contextvars.ContextVar[Any] = contextvars.ContextVar("reusing", default=None)
OBSERVERS = watched, noted, skipping, reusing


@contextlib.contextmanager
def setting_of(variable: contextvars.ContextVar, value: Any) -> Iterator[Any]:
    """Within this context, a variable has a value."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def note(kind: str, value: Any) -> None:
    """Keep a value of the trace at hand for whoever has set `noted`."""
    if (notes := noted.get()) is not None and kind in notes:
        notes[kind].append(value)


class Spec(NamedTuple):
    """What to build, never what it weighs: a module class and its frozen configuration."""

    module: type["Model"]
    config: Hashable

    def replace(self, **changes: Any) -> "Spec":
        """The same architecture with some settings changed, e.g. `spec.replace(attention="sliced")`."""
        return self._replace(config=dataclasses.replace(self.config, **changes))


class Leaf(NamedTuple):
    """What is known of one parameter: its shape here, how a file lays it out, how to draw it, and how it is stacked.

    `kind` names the layout rule of the checkpoint converter. `stack` is the prefix of the repeated block that the
    parameter belongs to when all of its copies lie along the first axis, else None.
    """

    shape: tuple[int, ...]
    kind: str
    init: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    stack: str | None = None


def setting(default: Any) -> Any:
    """A configuration field that is ours: how to compute, not what; no `config.json` holds it."""
    return dataclasses.field(default=default, metadata={"setting": True})


@dataclasses.dataclass(frozen=True)
class Config:
    """What every model's configuration has beside its own fields."""

    scan_layers: bool = setting(True)  # equal blocks in a row: stacked parameters and one scan, or a loop
    attention: str = setting("auto")  # how attention is computed, see nn/attention.py
    remat: str = setting("none")  # what the way back computes again rather than keeps, see nn/stack.py


def only(default: Any, *others: Any) -> Any:
    """A configuration field of which just these values are implemented."""
    return dataclasses.field(default=default, metadata={"only": (default, *others)})


PACKING = "quantization_config"  # the key that says how numbers lie in the file, which says so itself


class Model(nnx.Module):
    """The base of every network: how a `config.json` becomes a `Spec`, and back."""

    config_class: ClassVar[type[Config]]
    library: ClassVar[str | None] = "diffusers"  # whose layout the checkpoint has, or "transformers"; None: no folder
    package: ClassVar[str | None] = None  # where an index says that the class is from, if not from the library
    renames: ClassVar[tuple[tuple[str, str], ...]] = ()  # (regex, replacement): names in older files -> today's
    ignored: ClassVar[str] = r"(?!)"  # regex of names in older files that carry no weight
    model_type: ClassVar[str | None] = None  # how a configuration of transformers names the architecture

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Spec:
        """The spec that a `config.json` describes.

        Args:
          config: the dictionary, with diffusers' keys; what is left out takes diffusers' default. Keys that begin with
            an underscore are notes of the writer. Settings of ours, such as `scan_layers`, may be among them.

        Raises:
          ValueError: a key that the model does not have (unless it is switched off), or a value not implemented.

        >>> import flaxdiff
        >>> spec = flaxdiff.UNet2DConditionModel.from_config({"cross_attention_dim": 768})
        >>> spec.config.block_out_channels
        (320, 640, 1280, 1280)
        """
        fields = {f.name: f for f in dataclasses.fields(cls.config_class)}
        known = {k: frozen(v) for k, v in config.items() if k in fields}
        if cls.library == "diffusers":  # transformers writes dozens of generic keys that no network reads
            for key, value in config.items():
                if key not in (*fields, PACKING) and not key.startswith("_") and value not in (None, False, [], {}):
                    near = difflib.get_close_matches(key, fields, 3)
                    hint = (
                        f"did you mean {' or '.join(near)}?"
                        if near
                        else "remove it, or see whether it has another name."
                    )
                    raise ValueError(f"{cls.__name__} has no option {key!r} (given: {value!r}); {hint}")
        for key, value in known.items():
            allowed = fields[key].metadata.get("only")
            if allowed is not None and value not in allowed:
                raise ValueError(f"{cls.__name__}: {key}={value!r} is not supported; use one of {list(allowed)}.")
        return Spec(cls, cls.config_class(**known))

    @classmethod
    def from_pretrained(cls, repo: str, **options: Any) -> tuple[Spec, Params]:
        """Load a spec and its parameters from a folder or a Hub repository; see `checkpoint.load_model`."""
        from flaxdiff import checkpoint

        return checkpoint.load_model(cls, repo, **options)

    @classmethod
    def from_single_file(cls, source: str, **options: Any) -> tuple[Spec, Params]:
        """Load a spec and its parameters from a file with the original names; see `single_file.load_model`."""
        from flaxdiff.checkpoint import single_file

        return single_file.load_model(cls, source, **options)

    @classmethod
    def to_config(cls, config: Config) -> dict[str, Any]:
        """The `config.json` of this configuration: the keys, and what class it is for."""
        fields = [f.name for f in dataclasses.fields(config) if "setting" not in f.metadata]
        keys = {name: getattr(config, name) for name in fields}
        if cls.model_type is None:
            return {"_class_name": cls.__name__, **keys}
        return {"architectures": [cls.__name__], "model_type": cls.model_type, **keys}

    def __init__(self, config: Any): ...


ModelMixin = FromOriginalModelMixin = Model  # what diffusers calls the two halves of it


def frozen(value: Any) -> Any:
    """JSON as a hashable value."""
    if isinstance(value, list | tuple):
        return tuple(map(frozen, value))
    if isinstance(value, Mapping):
        return Pairs(sorted((k, frozen(v)) for k, v in value.items()))
    return value


class Pairs(tuple):
    """What `frozen` makes of an object: its keys and values."""


def thawed(value: Any) -> Any:
    """What `frozen` makes of JSON, as JSON again.

    >>> thawed(frozen({"a": {"b": [1]}}))
    {'a': {'b': [1]}}
    """
    if isinstance(value, Pairs):
        return {k: thawed(v) for k, v in value}
    return list(map(thawed, value)) if isinstance(value, tuple) else value


def part(whole: Config, made: type[Config], pairs: Any) -> Any:
    """The configuration of a part of a model: what `pairs` say of it, and the settings of the whole."""
    fields = {f.name for f in dataclasses.fields(made)}
    settings = {f.name: getattr(whole, f.name) for f in dataclasses.fields(Config)}
    return made(**settings | {k: v for k, v in dict(pairs or ()).items() if k in fields})


# --- parameters inside a module -------------------------------------------------------------------------------------


def param(
    shape: tuple[int, ...],
    kind: str,
    init: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    called: str | None = None,
) -> nnx.Param:
    """Declare a parameter: a shape and a way to draw it, no memory.

    It is `called` after its place among the modules; another name is for what a checkpoint keeps elsewhere.
    """
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), kind=kind, init=init, block=0, called=called)


def stacked(block: nnx.Module, n: int) -> nnx.Module:
    """Give every parameter of `block` a leading axis of `n`: n equal blocks in one, to be run by `jax.lax.scan`."""
    for path, variable in nnx.to_flat_state(nnx.state(block)):
        variable.set_value(jax.ShapeDtypeStruct((n, *variable.get_value().shape), jnp.float32))
        variable.set_metadata("block", len(path))  # how much of the name lies inside the block
    return block


class _Structure(NamedTuple):
    graph: Any
    tree: Any
    leaves: dict[str, Leaf]  # in the tree's order


@functools.cache
def _structure(spec: Spec) -> _Structure:
    graph, state = nnx.split(spec.module(spec.config))
    leaves = {}
    for path, variable in nnx.to_flat_state(state):
        meta = variable.get_metadata()
        prefix = ".".join(map(str, path[: len(path) - meta["block"]])) if meta["block"] else None
        name = meta["called"] or ".".join(map(str, path))
        leaves[name] = Leaf(variable.get_value().shape, meta["kind"], meta["init"], prefix)
    tree = jax.tree.structure(nnx.to_pure_dict(state))
    return _Structure(graph, tree, leaves)


def layout(spec: Spec) -> dict[str, Leaf]:
    """What is known of each parameter, by name, in the order of the module."""
    return _structure(spec).leaves


def names_in_file(name: str, leaf: Leaf) -> tuple[str, ...]:
    """What a file calls a parameter: one name, or one for each layer of a stack, which may be some layers of a row.

    >>> names_in_file("blocks.fc.weight", Leaf((2, 4, 3), "linear", None, "blocks"))
    ('blocks.0.fc.weight', 'blocks.1.fc.weight')
    >>> names_in_file("blocks.7-8.fc.weight", Leaf((2, 4, 3), "linear", None, "blocks.7-8"))
    ('blocks.7.fc.weight', 'blocks.8.fc.weight')
    """
    if leaf.stack is None:
        return (name,)
    run = re.fullmatch(r"(.+)\.(\d+)-\d+", leaf.stack)
    row, first = (run[1], int(run[2])) if run else (leaf.stack, 0)
    return tuple(f"{row}.{i}{name[len(leaf.stack) :]}" for i in range(first, first + leaf.shape[0]))


def continued(spec: Spec, params: Params, ours: Spec, drawn: Params) -> Params:
    """The parameters of a network that begins as another, which may have more blocks or fewer, stacked or not.

    Args:
      spec, params: of the other.
      ours, drawn: of the network; what the other has by the same name in a file, and of the same shape, is exchanged.

    >>> import flaxdiff, jax
    >>> tiny = lambda depth: flaxdiff.CLIPTextModel.from_config(dict(
    ...     hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=depth, vocab_size=9))
    >>> params, drawn = (init(tiny(n), jax.random.key(n)) for n in (2, 1))
    >>> mine = continued(tiny(2), params, tiny(1), drawn)
    >>> one, two = (next(a for name, a in p.items() if "q_proj.weight" in name) for p in (mine, params))
    >>> one.shape, two.shape, bool((one == two[0]).all())
    ((8, 8), (2, 8, 8), True)
    """
    of = lambda spec: ((name, leaf, names_in_file(name, leaf)) for name, leaf in layout(spec).items())
    places = {file: (name, i if leaf.stack else ...) for name, leaf, files in of(spec) for i, file in enumerate(files)}

    def own(file: str, new: jax.Array) -> jax.Array:
        name, i = places.get(file, ("", ...))
        old = params[name][i] if name else new
        return old if old.shape == new.shape else new

    made = {}
    for name, leaf, files in of(ours):
        if leaf.stack:
            made[name] = jnp.stack([own(*pair) for pair in zip(files, drawn[name], strict=True)])
        else:
            made[name] = own(name, drawn[name])
    return made


def abstract(spec: Spec, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a model's parameters; costs no memory at any size.

    >>> import flaxdiff
    >>> shapes = flaxdiff.abstract(flaxdiff.UNet2DConditionModel.from_config({"cross_attention_dim": 768}))
    >>> shapes["conv_in.weight"].shape, sum(s.size for s in shapes.values())
    ((3, 3, 4, 320), 859520964)
    """
    return {name: jax.ShapeDtypeStruct(leaf.shape, dtype) for name, leaf in layout(spec).items()}


def init(spec: Spec, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Draw a model's parameters.

    Each parameter's key is `key` folded with the checksum of its name, so that a value depends on nothing but the key
    and the name: not on the order of layers, nor on how many devices draw it.

    Args:
      spec: what to build.
      key: a PRNG key.
      dtype: the dtype of the parameters, and so of the computation.

    >>> import flaxdiff, jax
    >>> spec = flaxdiff.AutoencoderKL.from_config({"block_out_channels": [32]})
    >>> flaxdiff.init(spec, jax.random.key(0))["encoder.conv_in.weight"].shape
    (3, 3, 3, 32)
    """

    def draw(name: str, leaf: Leaf) -> jax.Array:
        k = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if leaf.stack is None:
            return leaf.init(k, leaf.shape).astype(dtype)
        keys = jax.random.split(k, leaf.shape[0])
        return jax.vmap(lambda k: leaf.init(k, leaf.shape[1:]))(keys).astype(dtype)

    return {name: draw(name, leaf) for name, leaf in layout(spec).items()}


def apply(spec: Spec, params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
    """Run a model: a pure function of the parameters and the inputs.

    Args:
      spec: what to run.
      params: one weight for each name in `abstract(spec)`; an array or another kind of weight (`LoRA`, `Int8`).
      *args, **kwargs: handed to the module's method.
      method: which method, e.g. "encode" or "decode" of an autoencoder.

    Raises:
      ValueError: a parameter is missing.

    >>> import flaxdiff, jax, jax.numpy as jnp
    >>> spec = flaxdiff.AutoencoderKL.from_config({"block_out_channels": [32]})
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> flaxdiff.apply(spec, params, jnp.zeros((1, 4, 4, 4)), method="decode").shape
    (1, 4, 4, 3)
    """
    graph, tree, leaves = _structure(spec)
    missing = [name for name in leaves if name not in params]
    if missing:
        raise ValueError(
            f"{spec.module.__name__}: {len(missing)} of {len(leaves)} parameters are missing, e.g. {missing[:3]}; "
            "params must hold every name in flaxdiff.abstract(spec)."
        )
    module = nnx.merge(graph, jax.tree.unflatten(tree, [params[name] for name in leaves]))

    def run() -> Any:
        attention_backend.set(spec.config.attention)
        rematerialised.set(spec.config.remat)
        return getattr(module, method)(*args, **kwargs)

    return contextvars.copy_context().run(run)  # the settings end with the call
