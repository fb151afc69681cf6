"""Whole pipelines: a folder with `model_index.json` and one subfolder for each component, read and written.

The index names a class for each component. Names are looked up in the registry and nowhere else, so that no file can
have anything imported; components become specs and parameters, a scheduler, and tokenizers that load when first used.
"""

import inspect
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jax.sharding import Mesh
from PIL import Image

from flaxdiff import images, parallel, registry
from flaxdiff.checkpoint import files, hub, reading, writing
from flaxdiff.checkpoint.tensors import damaged
from flaxdiff.core import Model, Pairs, Params, Spec, frozen
from flaxdiff.models.blip2 import Blip2VisionConfig
from flaxdiff.models.clip_vision import CLIPVisionConfig
from flaxdiff.models.siglip import SiglipVisionConfig
from flaxdiff.schedulers import Scheduler

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

EMOJI = hub.SHIPPED["emoji"]
# passed over, but by a pipeline whose `reads` names them
SKIPPED = (
    "feature_extractor",
    "image_encoder",
    "depth_estimator",
    "processor",
    "clip_image_processor",
    "image_processor",
)
CHECKER = "safety_checker"
SEVERAL = {  # in folders name, name_1, …
    "MultiControlNetModel": "ControlNetModel",
    "SD3MultiControlNetModel": "SD3ControlNetModel",
    "FluxMultiControlNetModel": "FluxControlNetModel",
    "MultiAdapter": "T2IAdapter",
}
SCHEDULER, PROCESSOR = "scheduler_config.json", "preprocessor_config.json"
DEFAULTS = "_defaults"  # how the checkpoint likes to be sampled; PyTorch's diffusers skips what begins so
SORTS = ("model", "scheduler", "tokenizer")
TOKENIZER = ("*.json", "*.txt", "*.model")  # files of a tokenizer
FLAX = "Flax"  # diffusers' Flax classes, and transformers', had the names of PyTorch's after this


def load_pipeline(
    cls: type["DiffusionPipeline"],
    repo: str | os.PathLike[str],
    *,
    dtype: Any = None,
    variant: str | None = None,
    mesh: Mesh | None = None,
    rules: parallel.Rules = parallel.RULES,
    sharding: reading.Shardings | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    compile: Mapping[str, Any] | None = None,
    add_watermarker: bool = False,
    **changes: Any,
) -> tuple["DiffusionPipeline", dict[str, Params]]:
    """A pipeline and its parameters, from a folder or a Hub repository in diffusers' layout.

    Args:
      cls: the class of the pipeline; for `DiffusionPipeline` itself, the class that the folder names.
      repo, dtype, variant, mesh, rules, revision, cache_dir, local_files_only, token: as of `load_model`. Components
        without files of the variant load their plain ones, as long as one component has it.
      sharding: instead of a mesh and rules, a function from the abstract parameters of a component to a sharding for
        each.
      compile: arguments of `DiffusionPipeline.compile`, e.g. `dict(height=512, batch=4)`, to do that while the weights
        are read.
      add_watermarker: whether calls put Stable Diffusion XL's watermark into pictures, see `invisible_watermark`.
      **changes: components to use instead of those in the folder, `vae=(spec, params)`, `scheduler=…`, or None for one
        to do without; strengths of the class's guidance, which calls have by default; other names are settings of every
        network, such as `attention="sliced"`.

    Raises:
      FileNotFoundError: no such folder, repository, component or weights.
      ImportError: a watermark is asked for, and the package for it is not installed.
      ValueError: the index names an unknown class, a file is damaged, or weights do not fit.
    """
    from flaxdiff.pipelines import afterwards

    if add_watermarker:
        afterwards.encoder()
    download = dict(revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    root = hub.fetch(repo, [files.PIPELINE], **download)
    class_name, components, settings = read_index(root)
    cls = cls.resolve(class_name, changes)
    components, asked = read_by(cls, components), asked_for(cls, changes)
    if not Path(repo).expanduser().is_dir():
        download["revision"] = root.name  # the commit: all components come from the same one

    looped = [name for loop in cls.before for _, name in loop.components]
    components |= {name: kind_of(changes[name]) for name in looped if changes.get(name) and name not in components}
    if absent := [name for name in looped if name not in components]:
        raise ValueError(f"{cls.__name__} needs {', '.join(absent)}, which {repo} does not have; give them by name.")
    given = {name: changes.pop(name) for name in (*components, *SKIPPED, CHECKER) if name in changes}
    if given.get(CHECKER) is not None:
        components[CHECKER] = "StableDiffusionSafetyChecker"
    components = {name: named for name, named in components.items() if name not in given or given[name] is not None}
    for name, class_of in cls.steers.items():  # the folder of what is to be steered may not know of them
        if name in changes or name in given:
            several = given.pop(name, None) or changes.pop(name)
            named = {
                f"{name}_{i}" if i else name: part
                for i, part in enumerate(several if isinstance(several, list) else [several])
            }
            given, components = given | named, components | dict.fromkeys(named, class_of)
    sorts = {name: registry.sort_of(named, *SORTS) for name, named in components.items()}
    of = lambda sort: [name for name in components if sorts[name] == sort and name not in given]
    models = {name: registry.find(components[name], "model") for name in of("model")}
    chosen = _variants(repo, models, variant, download)
    small = [f"{name}/{SCHEDULER}" for name in of("scheduler")]
    root = hub.fetch(repo, small + [f"{name}/{file}" for name in of("tokenizer") for file in TOKENIZER], **download)

    parts = {name: read_tokenizer(root / name, components[name]) for name in of("tokenizer")}
    parts |= {name: read_scheduler(root / name, components[name]) for name in of("scheduler")}
    sharding = reading.by_rules(mesh, rules) if sharding is None else sharding
    found = {
        name: reading.find(model, repo, name, dtype, chosen[name], sharding, download, changes)
        for name, model in models.items()
    }
    parts |= {name: (model.spec, model.shapes) for name, model in found.items()}
    parts |= {name: part for name, part in given.items() if part is not None and name in components}
    _check(parts, sorts, cls.sampler)

    networks = {name: parts[name] for name in components if name in parts and sorts[name] == "model"}
    read, params = ({name: part[i] for name, part in networks.items()} for i in (0, 1))
    specs, shapes = cls.separate(read, params)
    schedulers = {name: part for name, part in parts.items() if sorts[name] == "scheduler"}
    scheduler = schedulers.pop(cls.sampler) if cls.sampler else None
    settings |= schedulers  # a second one, such as the upscaler's for what it is given, is not for the last loop
    pipe = cls(
        specs=tuple(specs.items()),
        scheduler=scheduler,
        tokenizers=tuple((name, parts[name]) for name in components if name in parts and sorts[name] == "tokenizer"),
        settings=tuple(settings.items()),
        watermark=afterwards.invisible_watermark if add_watermarker else None,
    ).by_default(**asked)
    with ThreadPoolExecutor(1) as pool:
        job = None if compile is None else pool.submit(pipe.compile, shapes, **compile)
        params |= {name: model.load() for name, model in found.items()}
        if job is not None:
            job.result()
    return pipe, cls.separate(read, params)[1]


def _check(parts: Mapping[str, Any], sorts: Mapping[str, str], sampler: str | None) -> None:
    """Whether there is what a pipeline is made of. Raises ValueError."""
    for name, part in parts.items():
        if sorts[name] == "model" and not (isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], Spec)):
            raise ValueError(
                f"{name}= is a {type(part).__name__}; give (spec, params), as {name}=….from_pretrained returns."
            )
    if sampler and sampler not in parts:
        raise ValueError(
            f"A pipeline needs a scheduler, and there is none; take a complete folder, or give {sampler}=."
        )


def kind_of(part: Any) -> str:
    """The name of a component's class: of (spec, params), a scheduler or a tokenizer."""
    if isinstance(part, tuple) and part and isinstance(part[0], Spec):
        return part[0].module.__name__
    return getattr(part, "class_name", type(part).__name__)


def read_by(cls: type["DiffusionPipeline"], components: Mapping[str, str]) -> dict[str, str]:
    """The components that a pipeline has a use for, by the names that their classes have today."""
    used = {name: named for name, named in components.items() if name not in SKIPPED or name in cls.reads}
    return {name: cls.formerly.get(named, named) for name, named in used.items()}


def asked_for(cls: type["DiffusionPipeline"], changes: dict[str, Any]) -> dict[str, Any]:
    """The strengths of guidance among what is asked for, taken out of it, and `enable_pag`, which has been heard."""
    changes.pop("enable_pag", None)
    return {name: changes.pop(name) for name in inspect.signature(cls.guides).parameters if name in changes}


def read_index(folder: Path) -> tuple[str, dict[str, str], dict[str, Any]]:
    """What a folder's `model_index.json` says: the pipeline's class, component -> class, and the other settings.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not an index.
    """
    path = folder / files.PIPELINE
    if not path.is_file():
        hint = (
            "it holds one model: use the model's own class" if (folder / files.CONFIG).is_file() else "check the name"
        )
        raise FileNotFoundError(f"{folder} has no {files.PIPELINE} and so no pipeline; {hint}.")
    index = files.read_json(path)
    components, settings = {}, {}
    if DEFAULTS in index:
        if not isinstance(index[DEFAULTS], dict):
            raise damaged(path, f"its {DEFAULTS} is no object")
        settings["defaults"] = frozen(index[DEFAULTS])
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not name.isidentifier():
            raise ValueError(
                f"{path} names a component {name!r}, which cannot be a subfolder; do not trust this folder."
            )
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str | None) for v in value):
            if value[1] in SEVERAL:
                there = [name, *sorted(path.name for path in folder.glob(f"{name}_*") if path.is_dir())]
                components |= dict.fromkeys(there, SEVERAL[value[1]])
            elif value[1] is not None:  # [null, null]: the pipeline can do without
                components[name] = value[1].removeprefix(FLAX)
        else:
            settings[name] = frozen(value)
    return str(index.get("_class_name")).removeprefix(FLAX), components, settings


def _variants(
    repo: str | os.PathLike[str], models: Mapping[str, type[Model]], variant: str | None, download: Mapping[str, Any]
) -> dict[str, str | None]:
    """The variant to load of each model: the one asked for where there are files of it."""
    if variant is None:
        return dict.fromkeys(models)
    there = set()
    for name, model in models.items():
        folder = reading.fetch(repo, name, model.library, variant, download)
        there |= {name for path in folder.iterdir() if (w := files.parse(path.name)) and w.variant == variant}
    if not there:
        raise FileNotFoundError(f"{repo} has no files of variant {variant!r}; leave variant out for the plain ones.")
    return {name: variant if name in there else None for name in models}


def read_scheduler(folder: Path, class_name: str) -> Any:
    """The scheduler in a folder."""
    if not (folder / SCHEDULER).is_file():
        raise FileNotFoundError(f"{folder} has no {SCHEDULER}; give scheduler=, or a complete folder.")
    return registry.find(class_name, "scheduler").from_config(files.read_json(folder / SCHEDULER))


def read_tokenizer(folder: Path, class_name: str) -> Any:
    """The tokenizer in a folder; it is loaded when it is first used."""
    from flaxdiff.pipelines.text import Tokenizer

    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder.parent} has no subfolder {folder.name!r} with the tokenizer; it is incomplete."
        )
    return Tokenizer(str(folder), class_name)


def save_pipeline(
    folder: str | os.PathLike[str],
    pipe: "DiffusionPipeline",
    params: Mapping[str, Params],
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
) -> None:
    """Write a pipeline in diffusers' layout; PyTorch's diffusers loads it. Arguments and care as of `save_model`.

    An IP-Adapter has no place in that layout: it stays in its own file, to be put on again.

    Raises:
      ValueError: the parameters of a component are missing, or are not those of its spec.
    """
    if absent := [name for name, _ in pipe.specs if name not in params]:
        raise ValueError(f"params lacks {files.listed(absent)}; give the parameters of every component by its name.")
    settings = dict(pipe.settings)
    defaults = {DEFAULTS: dict(settings.pop("defaults"))} if "defaults" in settings else {}
    schedulers = {name: value for name, value in settings.items() if isinstance(value, Scheduler)}
    schedulers |= {pipe.sampler: pipe.scheduler} if pipe.sampler else {}
    plain = {k: dict(v) if isinstance(v, Pairs) else v for k, v in settings.items() if k not in schedulers}
    index: dict[str, Any] = {"_class_name": type(pipe).__name__, **defaults, **plain}
    with files.staged(Path(folder)) as stage:
        for name, spec in pipe.specs:
            if spec.module.library is None:
                continue
            index[name] = [spec.module.package or spec.module.library, spec.module.__name__]
            (stage / name).mkdir()
            options = {"dtype": dtype, "max_shard_size": max_shard_size, "variant": variant}
            writing.write_model(stage / name, spec, params[name], **options)
        for several, one in SEVERAL.items():
            for name in [n for n, part in index.items() if part == ["diffusers", one] and f"{n}_1" in index]:
                index[name][1] = several
                index = {n: part for n, part in index.items() if not n.startswith(f"{name}_")}
        seeing = [getattr(spec.config, "vision", spec.config) for _, spec in pipe.specs]
        for config in [c for c in seeing if type(c) in PROCESSORS][:1]:
            made = PROCESSORS[type(config)]
            index[pipe.processor] = [made.package, made.class_name]
            (stage / pipe.processor).mkdir()
            files.write_json(stage / pipe.processor / PROCESSOR, made.config(config.image_size))
        for name, tokenizer in pipe.tokenizers:
            index[name] = ["transformers", tokenizer.class_name]
            tokenizer.save(stage / name)
        for name, scheduler in schedulers.items():
            index[name] = ["diffusers", type(scheduler).__name__]
            scheduler.save_config(stage / name)
        files.write_json(stage / files.PIPELINE, index)


class Processor(NamedTuple):
    """How PyTorch's pipelines are to prepare pictures for an image encoder, which read it from their folder."""

    package: str
    class_name: str
    square: bool  # whether they are squeezed, as by `images.square_pixels`, or cut, as by `images.clip_pixels`
    mean: Sequence[float] = (0.5,) * 3
    std: Sequence[float] = (0.5,) * 3

    def config(self, side: int) -> dict[str, Any]:
        """As transformers writes it down."""
        whole = {"height": side, "width": side}
        return {
            "image_processor_type": self.class_name,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": whole if self.square else {"shortest_edge": side},
            "resample": Image.Resampling.BICUBIC.value,
            "do_center_crop": not self.square,
            "crop_size": whole,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.mean,
            "image_std": self.std,
        }


# by the configuration of what reads pictures
PROCESSORS = {
    CLIPVisionConfig: Processor("transformers", "CLIPImageProcessor", False, images.CLIP_MEAN, images.CLIP_STD),
    Blip2VisionConfig: Processor("blip_diffusion", "BlipImageProcessor", True, images.CLIP_MEAN, images.CLIP_STD),
    SiglipVisionConfig: Processor("transformers", "SiglipImageProcessor", True),
}


# --- the two verbs ----------------------------------------------------------------------------------------------------


def load(repo: str | os.PathLike[str] | None = None, **options: Any) -> tuple["DiffusionPipeline", dict[str, Params]]:
    """Load a pipeline, of the class that it names, and its parameters.

    Args:
      repo: a folder, the id of a Hub repository, or one of the text-to-emoji models inside this package: "emoji", a
        small Stable Diffusion, which is the default, and "emoji-flow", a transformer that matches flows.
      **options: see `load_pipeline`.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.load()
    >>> sorted(params)
    ['text_encoder', 'unet', 'vae']
    """
    return load_pipeline(registry.find("DiffusionPipeline"), EMOJI if repo is None else repo, **options)


def save(
    folder: str | os.PathLike[str], what: "DiffusionPipeline | Spec", params: Mapping[str, Any], **options: Any
) -> None:
    """Write a pipeline, or a single model, in the layout of diffusers; see `save_pipeline` and `save_model`.

    >>> import flaxdiff, jax, tempfile
    >>> spec = flaxdiff.AutoencoderKL.from_config({"block_out_channels": [32]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     flaxdiff.save(folder, spec, flaxdiff.init(spec, jax.random.key(0)))
    ...     flaxdiff.AutoencoderKL.from_pretrained(folder)[0] == spec
    True
    """
    write = writing.save_model if isinstance(what, Spec) else save_pipeline
    write(folder, what, params, **options)


def push_to_hub(
    repo: str,
    what: "DiffusionPipeline | Spec",
    params: Mapping[str, Any],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload with flaxdiff",
    **options: Any,
) -> str:
    """Write a pipeline, or a single model, to a Hub repository.

    Args:
      repo: its id, "owner/name"; made if it is not there, and then `private` or not.
      what, params, **options: as of `save`.
      token: by default the one of `hf auth login`.
      create_pr: propose the change rather than make it.
      commit_message: what the commit says.

    Returns:
      The address of the commit.

    Raises:
      ValueError: `repo` is no id, or the Hub refuses: not logged in, no right to write, no network.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "upload", what, params, **options)
        return hub.upload(repo, Path(folder) / "upload", private, token, create_pr, commit_message)
