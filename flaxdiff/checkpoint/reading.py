"""Loading: from a folder or a Hub repository to specs and parameters on the devices."""

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from flaxdiff import memory, parallel
from flaxdiff.checkpoint import convert, files, hub
from flaxdiff.checkpoint.tensors import Tensors, network_dtype
from flaxdiff.core import Model, Params, Spec, abstract

Shardings = Mapping[str, Sharding] | Callable[[dict[str, jax.ShapeDtypeStruct]], Mapping[str, Sharding]]


def load_model(
    cls: type[Model],
    repo: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    dtype: Any = None,
    variant: str | None = None,
    mesh: Mesh | None = None,
    rules: parallel.Rules = parallel.RULES,
    sharding: Shardings | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    **overrides: Any,
) -> tuple[Spec, Params]:
    """A model's spec and parameters, from a folder or a Hub repository in the layout of diffusers or transformers.

    The weights pass through memory one tensor at a time, are converted to `dtype` on the way, and go straight to the
    devices, each its own shards. A process reads no more than its own devices hold. Files are checked before anything
    is put on a device; a tensor's checksum, where the file has one, by processes that read all of it.

    Args:
      cls: the class of the model.
      repo: a folder, or the id of a Hub repository such as "owner/name".
      subfolder: where in it the model lies, e.g. "unet".
      dtype: of the parameters, and so of the computation; by default float32 on CPU and bfloat16 elsewhere. Or rules
        by path, e.g. `[("^vae|norm", "float32"), ("", "bfloat16")]`, where None is the default.
      variant: of the files, e.g. "fp16" for `diffusion_pytorch_model.fp16.safetensors`.
      mesh: the devices to load onto, of this process or of many; where on them each parameter lies, `rules` say.
      rules: (regex, choice), first match wins; see `parallel.shardings`.
      sharding: instead of those, parameter name -> sharding, or a function from the abstract parameters to that.
      revision, cache_dir, local_files_only, token: of the download, see `hub.fetch`.
      **overrides: settings to use instead of those in the file, such as `scan_layers=False` or `attention="sliced"`.

    Raises:
      FileNotFoundError: no such folder, repository, component or weights.
      ValueError: an unknown setting or dtype, a damaged file, or weights that do not fit the configuration (all
        missing, unexpected and misshapen names are listed).

    >>> import flaxdiff, tempfile
    >>> spec = flaxdiff.AutoencoderKL.from_config({"block_out_channels": [32]})
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     flaxdiff.checkpoint.save_model(folder, spec, params)
    ...     again, loaded = load_model(flaxdiff.AutoencoderKL, folder, dtype=jnp.bfloat16)
    >>> again == spec, loaded["encoder.conv_in.weight"].dtype
    (True, dtype(bfloat16))
    """
    download = dict(revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    sharding = by_rules(mesh, rules) if sharding is None else sharding
    found = find(cls, repo, subfolder, dtype, variant, sharding, download, overrides)
    return found.spec, found.load()


class Found(NamedTuple):
    """A model whose configuration has been read and whose weights have not."""

    spec: Spec
    shapes: dict[str, jax.ShapeDtypeStruct]  # of the parameters, with their places if those are given
    load: Callable[[], Params]


def find(
    cls: type[Model],
    repo: str | os.PathLike[str],
    subfolder: str | None,
    dtype: Any,
    variant: str | None,
    sharding: Shardings | None,
    download: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> Found:
    """A model on this machine, downloaded if need be; arguments as of `load_model`."""
    dtypes = dtypes_of(dtype)
    folder = fetch(repo, subfolder or "", cls.library, variant, download)
    spec = cls.from_config(files.read_json(folder / files.CONFIG) | settings(cls, overrides))
    weights = files.weight_file(folder, cls.library, variant)
    shapes = shapes_of(spec, dtypes, subfolder)
    places = sharding(shapes) if callable(sharding) else sharding
    laid = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=(places or {}).get(k)) for k, s in shapes.items()}
    load = lambda: place(spec, files.open_weights(weights), shapes, places, str(weights))
    return Found(spec, laid, load)


def by_rules(mesh: Mesh | None, rules: parallel.Rules) -> Shardings | None:
    """Where on a mesh, if there is one, the rules put parameters; what they leave whole is said once."""

    def places(shapes: Params) -> dict[str, Sharding]:
        for note in parallel.notes(shapes, mesh, rules):
            parallel.tell(note)
        return parallel.shardings(shapes, mesh, rules)

    return None if mesh is None else places


def settings(cls: type[Model], overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that a caller gives instead of the file's: each must be one that the model has."""
    fields = [field.name for field in dataclasses.fields(cls.config_class)]
    for key in overrides:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 3)
            raise ValueError(
                f"{cls.__name__} has no setting {key!r}; " + (f"did you mean {near}?" if near else f"it has {fields}.")
            )
    return overrides


def fetch(
    repo: str | os.PathLike[str], subfolder: str, library: str, variant: str | None, download: Mapping[str, Any]
) -> Path:
    """The folder of one model, with its configuration and, if there are any, weights of one format."""
    prefix = f"{subfolder}/" if subfolder else ""
    for format in files.STEMS[library]:
        wanted = [prefix + pattern for pattern in (files.CONFIG, *files.patterns(library, format, variant))]
        root = hub.fetch(repo, wanted, **download)
        folder = root / subfolder
        if folder.is_dir() and any((w := files.parse(path.name)) and w.format == format for path in folder.iterdir()):
            break
    if not (folder / files.CONFIG).is_file():
        inside = sorted(path.parent.name for path in root.glob(f"*/{files.CONFIG}"))
        hint = f"give subfolder= one of {inside}" if inside else "give the folder or repository of a model"
        raise FileNotFoundError(f"{repo}{subfolder and f', subfolder {subfolder!r},'} has no {files.CONFIG}; {hint}.")
    return folder


def dtypes_of(dtype: Any) -> memory.Rules:
    """A dtype, or rules by path, with the default where there is None. Raises ValueError for one not supported."""
    default = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return [(path, network_dtype(default if to is None else to)) for path, to in memory.rules_of(dtype)]


def shapes_of(spec: Spec, dtypes: memory.Rules, subfolder: str | None) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters in the dtypes of their paths, which begin with the subfolder."""
    cast = functools.partial(memory.cast, rules=dtypes)
    if not subfolder:
        return jax.eval_shape(cast, abstract(spec))
    return jax.eval_shape(cast, {subfolder: abstract(spec)})[subfolder]


def place(
    spec: Spec,
    tensors: Tensors,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    sharding: Shardings | None,
    source: str,
) -> Params:
    """Put the tensors of a checkpoint on the devices as parameters of these shapes; arguments as of `load_model`."""
    places = convert.match(spec, tensors, source)
    shardings = sharding(shapes) if callable(sharding) else sharding
    if shardings is not None and (without := [name for name in shapes if name not in shardings]):
        raise ValueError(
            f"sharding says nothing of {files.listed(without)}; give one for each of the {len(shapes)} parameters."
        )
    params: Params = {}
    last = None
    for name, at in places.items():
        params[name] = _put(name, at, shapes[name], shardings and shardings[name])
        jax.block_until_ready(last)  # one array is on its way while the next is read, never more
        last = params[name]
    return params


def _put(name: str, at: convert.Place, shape: jax.ShapeDtypeStruct, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(convert.read(name, at, shape.dtype))
    if sharding.is_fully_addressable:  # so that this process reads all of it
        for tensor in at.tensors:
            tensor.check()
    parts: dict[str, np.ndarray] = {}  # devices that hold the same part share it

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in parts:
            parts[str(index)] = convert.read(name, at, shape.dtype, index)
        return parts[str(index)]

    return jax.make_array_from_callback(shape.shape, sharding, part)
