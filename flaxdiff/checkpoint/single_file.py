"""Single files: whole pipelines and networks as the original code bases publish them, one `.safetensors` or `.ckpt`.

Such a file has no configuration: what there is to know follows from the names in it and the shapes behind them, see
kinds.py.
`original` says what each parameter is called there. Only the tokenizers are nowhere in the file: they come from a
repository of the same model in diffusers' layout, or from the caller.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flaxdiff import registry
from flaxdiff.checkpoint import convert, files, hub, original, pipelines, reading
from flaxdiff.checkpoint.kinds import BARE, CONFIGS, DENOISER, IGNORED, KINDS, PREFIXES, Kind
from flaxdiff.checkpoint.tensors import Tensors
from flaxdiff.core import Model, Params, Spec, layout

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline


class Part(NamedTuple):
    """One network of a file."""

    class_name: str
    tensors: Tensors


def open_file(path: Path) -> tuple[dict[str, Part], Kind | None]:
    """The networks in a file, by component, and what its text encoders say of it, if there are any.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or holds no network that is known.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}; give a .safetensors, .gguf or .ckpt; folders: from_pretrained."
        )
    tensors = files.open_alone(path)
    found, prefixes = {}, set()
    for prefix, component, class_name in PREFIXES:
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if own and prefix == DENOISER:
            component, class_name = _bare(own) or (component, class_name)
        if own:
            found[component] = Part(class_name, own)
            prefixes |= {prefix} if component.startswith("text") else set()
    if not found and (bare := _bare(tensors)):
        found[bare[0]] = Part(bare[1], tensors)
    if not found:
        known = [prefix for prefix, *_ in PREFIXES]
        raise ValueError(
            f"{path} is a single file of no model that is known here: its names are {sorted(tensors)[:4]} …, those of "
            f"Stable Diffusion begin with {known}. A LoRA is loaded by load_lora, a word by load_textual_inversion."
        )
    return found, next((kind for kind in KINDS if kind.prefixes == prefixes), None)


def _bare(tensors: Tensors) -> tuple[str, str] | None:
    """The component and the class of the one network that these are, if it is known."""
    there = lambda name: any(re.fullmatch(name, key) for key in tensors)
    return next(((component, class_name) for name, component, class_name in BARE if there(name)), None)


def spec_of(part: Part, kind: Kind | None, config: Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> Spec:
    """The spec of a network: from its configuration where that is given, else from names and shapes.

    Raises:
      ValueError: the names are not those of the class.
    """
    model = registry.find(part.class_name, "model")
    if config is None:
        try:
            config = CONFIGS[part.class_name]({n: t.shape for n, t in part.tensors.items()}, kind)
        except (KeyError, StopIteration, IndexError, ValueError, ZeroDivisionError) as missing:
            raise ValueError(
                f"The configuration of {part.class_name} does not follow from the names in the file (looked for "
                f"{missing}); give config=, a folder or repository of the same model in diffusers' layout."
            ) from missing
    return model.from_config({**config, **reading.settings(model, overrides)})


def place(spec: Spec, part: Part, shapes: Mapping[str, Any], source: str) -> Params:
    """The parameters of a network, of these shapes and dtypes, whichever names the file has."""
    wanted = [name for own, leaf in layout(spec).items() for name in convert.names_in_file(own, leaf)]
    old = original.names(spec, wanted)
    if spec.module.library == "transformers" and "token_embedding.weight" not in part.tensors:
        old = dict(zip(wanted, wanted))
    elif not any(name in part.tensors for name in set(old.values()) - set(wanted)):
        old = dict(zip(wanted, wanted))  # diffusers' names already
    found = {name: tensor for name in wanted if (tensor := original.find(part.tensors, old[name])) is not None}
    used = {original.whole(name) for name in old.values()}
    rest = {n: t for n, t in part.tensors.items() if n not in used and not re.fullmatch(IGNORED, n)}
    return reading.place(spec, {**found, **rest}, shapes, None, source)


def load_model(
    cls: type[Model],
    source: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    subfolder: str = "",
    dtype: Any = None,
    **overrides: Any,
) -> tuple[Spec, Params]:
    """A network and its parameters from a single file: of its own, or one in which it lies beside others.

    Args:
      cls: the class of the network.
      source: the file.
      config: a `config.json`'s dictionary, or a folder or repository that has one; by default what follows from the
        file.
      subfolder: where in that folder.
      dtype: as of `checkpoint.load_model`.
      **overrides: settings to use instead, such as `scaling_factor=0.13025` of an autoencoder that comes alone.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged or unknown, or has no such network; or weights do not fit.
    """
    path = Path(source).expanduser()
    parts, kind = open_file(path)
    part = next((part for part in parts.values() if part.class_name == cls.__name__), None)
    if part is None:
        there = sorted(part.class_name for part in parts.values())
        raise ValueError(f"{path} has no {cls.__name__}; it has {', '.join(there)}.")
    if config is not None and not isinstance(config, Mapping):
        name = f"{subfolder}/{files.CONFIG}" if subfolder else files.CONFIG
        config = files.read_json(hub.locate(config, (name,)))
    spec = spec_of(part, kind, config, overrides)
    return spec, place(spec, part, reading.shapes_of(spec, reading.dtypes_of(dtype), None), str(path))


def load_pipeline(
    cls: type["DiffusionPipeline"],
    source: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    **changes: Any,
) -> tuple["DiffusionPipeline", dict[str, Params]]:
    """A pipeline and its parameters from a single file.

    Args:
      cls: the class of the pipeline; for `DiffusionPipeline` itself, the class that the file is for.
      source: the file.
      config: a folder or repository of the same model in diffusers' layout, for configurations, scheduler and
        tokenizers; by default all but the tokenizers follow from the file, and these come from the published model.
      dtype: of the parameters, or rules by path, as of `checkpoint.load_pipeline`.
      revision, cache_dir, local_files_only, token: of that repository, as of `hub.fetch`.
      **changes: components to use instead, `vae=(spec, params)`, `scheduler=…`, `tokenizer=…`, or more of them, such
        as `controlnet=(spec, params)`; other names are settings of every network, such as `attention="sliced"`.

    Raises:
      FileNotFoundError: there is no such file, or no tokenizer.
      ValueError: it is damaged or unknown, for another class of pipeline, or weights do not fit.
    """
    path = Path(source).expanduser()
    parts, kind = open_file(path)
    if kind is None or kind.denoiser not in parts:
        there = sorted(part.class_name for part in parts.values())
        raise ValueError(f"{path} holds {there}, which is no whole pipeline; load it by from_single_file of its class.")
    _check_class(cls, kind, path)
    if config is None and "label_emb.weight" in parts[kind.denoiser].tensors:
        raise ValueError(f"{path} is an upscaler, whose schedules do not follow from it; give config=, a folder.")
    cls = cls.resolve(kind.pipeline, changes)
    asked = pipelines.asked_for(cls, changes)

    download = dict(revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    texts = [name for name, part in parts.items() if name.startswith("text") and changes.get(name, part) is not None]
    names = [name.replace("text_encoder", "tokenizer") for name in texts]
    names += [name for name in changes if name.startswith("tokenizer") and changes[name] and name not in names]
    more = "scheduler", "controlnet", pipelines.CHECKER, "text_encoder_3", "tokenizer_3"
    given = {name: changes.pop(name) for name in list(changes) if name in (*parts, *names, *more)}
    wanted = [f"{name}/{file}" for name in names if name not in given for file in pipelines.TOKENIZER]
    kinds = {name: "T5TokenizerFast" if name.endswith("_3") else "CLIPTokenizer" for name in names}
    components, settings = kinds, dict(kind.settings)
    if config is not None:
        wanted += [files.PIPELINE, f"*/{files.CONFIG}", f"*/{pipelines.SCHEDULER}"]
    root = hub.fetch(config or kind.tokenizers, wanted, **download) if wanted else None
    if config is not None:
        _, components, settings = pipelines.read_index(root)
        for name in [name for name in components if name.endswith("_scheduler")]:  # no sampler: the upscaler's second
            settings[name] = pipelines.read_scheduler(root / name, components[name])
    dtypes, specs, params = reading.dtypes_of(dtype), {}, {}
    for name, part in parts.items():
        if name not in given:
            known = None if config is None else files.read_json(root / name / files.CONFIG)
            specs[name] = spec_of(part, kind, known, changes)
            params[name] = place(specs[name], part, reading.shapes_of(specs[name], dtypes, name), str(path))
    for name in set(given) - set(names) - {"scheduler"}:
        if given[name] is not None:
            specs[name], params[name] = given[name]
    if "scheduler" in given:
        scheduler = given["scheduler"]
    elif config is not None:
        scheduler = pipelines.read_scheduler(root / "scheduler", components["scheduler"])
    else:
        name, options = kind.scheduler
        scheduler = registry.find(name, "scheduler").from_config(options)
    read = lambda name: given.get(name) or pipelines.read_tokenizer(root / name, components[name])
    pipe = cls(
        specs=tuple(specs.items()),
        scheduler=scheduler,
        tokenizers=tuple((name, read(name)) for name in sorted(names)),
        settings=tuple(settings.items()),
    )
    return pipe.by_default(**asked), params


def _check_class(cls: type["DiffusionPipeline"], kind: Kind, path: Path) -> None:
    """Whether the file is for such a pipeline: the families tell themselves by name. Raises ValueError."""
    other = any((kin in cls.__name__) != (kin in kind.pipeline) for kin in ("XL", "Diffusion3"))
    if hasattr(cls, "family") and (other or not re.search(cls.family.loop, kind.denoiser)):
        raise ValueError(f"{path} is for {kind.pipeline} and its kin, not for {cls.__name__}.")
