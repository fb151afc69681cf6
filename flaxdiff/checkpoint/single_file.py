"""Single files: whole pipelines and networks as the original code bases publish them, one `.safetensors` or `.ckpt`.

Such a file has no configuration: what there is to know follows from the names in it and the shapes behind them.
`original` says what each parameter is called there. Only the tokenizers are nowhere in the file: they come from a
repository of the same model in diffusers' layout, or from the caller.
"""

import itertools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flaxdiff import registry
from flaxdiff.checkpoint import convert, files, hub, original, pipelines, reading
from flaxdiff.checkpoint.tensors import Tensors
from flaxdiff.core import Model, Params, Spec, layout

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

Shapes = Mapping[str, tuple[int, ...]]  # name -> shape, within one network

DENOISER = "model.diffusion_model."
PREFIXES = (  # (what names begin with, component, class)
    (DENOISER, "unet", "UNet2DConditionModel"),
    ("first_stage_model.", "vae", "AutoencoderKL"),
    ("control_model.", "controlnet", "ControlNetModel"),
    ("cond_stage_model.transformer.", "text_encoder", "CLIPTextModel"),
    ("cond_stage_model.model.", "text_encoder", "CLIPTextModel"),
    ("conditioner.embedders.0.transformer.", "text_encoder", "CLIPTextModel"),
    ("conditioner.embedders.1.model.", "text_encoder_2", "CLIPTextModelWithProjection"),
    ("conditioner.embedders.0.model.", "text_encoder_2", "CLIPTextModelWithProjection"),
    ("text_encoders.clip_l.transformer.", "text_encoder", "CLIPTextModelWithProjection"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2", "CLIPTextModelWithProjection"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3", "T5EncoderModel"),
)
BARE = (  # (a name in a file of one network alone, component, class), the first that is there
    (r"joint_blocks\.0\.x_block\.attn\.qkv\.weight", "transformer", "SD3Transformer2DModel"),
    (r"(input_hint_block\.0|controlnet_cond_embedding\.conv_in)\.weight", "controlnet", "ControlNetModel"),
    (r"(input_blocks\.0\.0|down_blocks\.0\.resnets\.0\.conv1)\.weight", "unet", "UNet2DConditionModel"),
    (r"double_blocks\.0\.img_attn\.qkv\.weight", "transformer", "FluxTransformer2DModel"),
    (r"encoder\.(down\.0\.block|down_blocks\.0\.resnets)\.0\.conv1\.weight", "vae", "AutoencoderKL"),
    (r"Mixed_7c\.branch1x1\.conv\.weight", "inception", "InceptionV3"),
)
# What networks here leave out: numbers of places, the loss, OpenCLIP's own head and, in Stable Diffusion 2, last layer.
IGNORED = r".*position_ids|logit_scale|text_projection|transformer\.resblocks\.\d+\..*|loss\..*|model_ema\..*"


class Kind(NamedTuple):
    """A family of single files, told by its text encoders."""

    pipeline: str
    prefixes: frozenset[str]  # of the text encoders
    tokenizers: str  # the repository that has them
    scheduler: tuple[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = {}
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    denoiser: str = "unet"


_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_EULER = ("EulerDiscreteScheduler", {**_BETAS, "timestep_spacing": "leading"})
_DDIM = {**_BETAS, "prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False}
KINDS = (
    Kind(
        "StableDiffusionPipeline",
        frozenset({"cond_stage_model.transformer."}),
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ("PNDMScheduler", {**_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False}),
    ),
    Kind(
        "StableDiffusionPipeline",
        frozenset({"cond_stage_model.model."}),
        "stabilityai/stable-diffusion-2-1",
        ("DDIMScheduler", _DDIM),
    ),
    Kind(
        "StableDiffusionXLPipeline",
        frozenset({"conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."}),
        "stabilityai/stable-diffusion-xl-base-1.0",
        _EULER,
        {"force_zeros_for_empty_prompt": True},
        0.13025,
    ),
    Kind(
        "StableDiffusionXLImg2ImgPipeline",
        frozenset({"conditioner.embedders.0.model."}),
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        _EULER,
        {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
        0.13025,
    ),
    *(
        Kind(
            "StableDiffusion3Pipeline",
            frozenset(f"text_encoders.{name}.transformer." for name in encoders),
            "stabilityai/stable-diffusion-3-medium-diffusers",
            ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
            {},
            1.5305,
            0.0609,
            "transformer",
        )
        for encoders in (("clip_l", "clip_g", "t5xxl"), ("clip_l", "clip_g"))
    ),
)


# --- the configuration behind names and shapes ------------------------------------------------------------------------


def _count(shapes: Shapes, name: str) -> int:
    """How many of name.format(0), name.format(1), … there are."""
    return next(i for i in itertools.count() if name.format(i) not in shapes)


def _first(shapes: Shapes, ending: str) -> tuple[int, ...]:
    return next(shape for name, shape in shapes.items() if name.endswith(ending))


def _encoder(shapes: Shapes) -> dict[str, Any]:
    """What U-Net and ControlNet have in common: stages of blocks, each closed by a convolution that halves the size."""
    stages: list[list[tuple[int, int]]] = [[]]  # (channels, transformer blocks)
    for i in range(1, _blocks(shapes, "input_blocks")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            stages.append([])
        else:
            depth = _count(shapes, f"input_blocks.{i}.1.transformer_blocks.{{}}.attn1.to_q.weight")
            stages[-1].append((shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0], depth))
    widths, depths = ([stage[0][k] for stage in stages] for k in (0, 1))
    linear = len(_first(shapes, "proj_in.weight")) == 2
    config = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": len(stages[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "cross_attention_dim": _first(shapes, "attn2.to_k.weight")[1],
        "use_linear_projection": linear,
        # Version 1 has eight heads everywhere; those that project linearly have heads of 64.
        "attention_head_dim": [width // 64 for width in widths] if linear else 8,
    }
    middle = _count(shapes, "middle_block.1.transformer_blocks.{}.attn1.to_q.weight")
    depths = [depth or (middle if i == len(depths) - 1 else 1) for i, depth in enumerate(depths)]
    config["transformer_layers_per_block"] = depths[0] if len(set(depths)) == 1 else depths
    if "label_emb.0.0.weight" in shapes:
        told = shapes["label_emb.0.0.weight"][1]
        config |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": told}
        config["addition_time_embed_dim"] = 256
    elif "label_emb.weight" in shapes:
        config["num_class_embeds"] = shapes["label_emb.weight"][0]
    return config


def _blocks(shapes: Shapes, name: str) -> int:
    return 1 + max(int(match[1]) for n in shapes if (match := re.match(rf"{name}\.(\d+)\.", n)))


def _unet(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    config = _encoder(shapes)
    up = [block.replace("Down", "Up") for block in reversed(config["down_block_types"])]
    return config | {"up_block_types": up, "out_channels": shapes["out.2.weight"][0]}


def _controlnet(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    hints = _blocks(shapes, "input_hint_block")
    channels = [shapes[f"input_hint_block.{i}.weight"][0] for i in range(0, hints - 2, 4)]
    return _encoder(shapes) | {"conditioning_embedding_out_channels": channels}


def _autoencoder(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    depth, stages = _count(shapes, "encoder.down.0.block.{}.conv1.weight"), _blocks(shapes, r"encoder\.down")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(stages)],
        "layers_per_block": depth,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "scaling_factor": kind.scaling_factor if kind else 0.18215,
        "shift_factor": kind.shift_factor if kind else None,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _sd3(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    layers = _count(shapes, "joint_blocks.{}.x_block.attn.qkv.weight")
    width = shapes["x_embedder.proj.weight"][0]
    head = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", (64,))[0]
    words, pooled = shapes["context_embedder.weight"], shapes["y_embedder.mlp.0.weight"][1]
    return {
        "patch_size": (patch := shapes["x_embedder.proj.weight"][-1]),
        "in_channels": shapes["x_embedder.proj.weight"][1],
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": words[1],
        "caption_projection_dim": words[0],
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": round(shapes["pos_embed"][1] ** 0.5),
        "dual_attention_layers": [i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes],
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
    }


def _t5(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    entries, width = shapes["shared.weight"]
    first = "encoder.block.0.layer.{}."
    inner, heads = first.format(0) + "SelfAttention.q.weight", "SelfAttention.relative_attention_bias.weight"
    buckets, heads = shapes[first.format(0) + heads]
    return {
        "vocab_size": entries,
        "d_model": width,
        "d_kv": shapes[inner][0] // heads,
        "d_ff": shapes[first.format(1) + "DenseReluDense.wi_0.weight"][0],
        "num_layers": _count(shapes, "encoder.block.{}.layer.0.layer_norm.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def _text_encoder(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    if "token_embedding.weight" not in shapes:  # transformers' own names
        root = "text_model.embeddings."
        layers, act = _count(shapes, "text_model.encoder.layers.{}.mlp.fc1.weight"), "quick_gelu"
        inner = shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0]
        places, projection = shapes[f"{root}position_embedding.weight"][0], None
        if "text_projection.weight" in shapes:
            projection, act = shapes["text_projection.weight"][0], "quick_gelu" if inner < 4096 else "gelu"
    else:
        root = ""
        layers, act = _count(shapes, "transformer.resblocks.{}.mlp.c_fc.weight"), "gelu"
        inner, places = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0], shapes["positional_embedding"][0]
        projection = shapes.get("text_projection", (0, None))[1]
        if kind is not None and kind.pipeline == "StableDiffusionPipeline":
            layers -= 1  # version 2 reads the last layer but one, and leaves the last in the file
    entries, width = shapes[f"{root}token_embedding.weight"]
    return {
        "vocab_size": entries,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": places,
        "projection_dim": projection or width,
        "hidden_act": act,
        "bos_token_id": entries - 2,
        "eos_token_id": entries - 1,
    }


def _flux(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    (width, channels), head = shapes["img_in.weight"], shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    return {
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": _count(shapes, "double_blocks.{}.img_attn.qkv.weight"),
        "num_single_layers": _count(shapes, "single_blocks.{}.linear1.weight"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }


CONFIGS: dict[str, Callable[[Shapes, Kind | None], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "ControlNetModel": _controlnet,
    "AutoencoderKL": _autoencoder,
    "FluxTransformer2DModel": _flux,
    "CLIPTextModel": _text_encoder,
    "CLIPTextModelWithProjection": _text_encoder,
    "SD3Transformer2DModel": _sd3,
    "T5EncoderModel": _t5,
    "InceptionV3": lambda shapes, kind: {},
}


# --- from a file to networks ------------------------------------------------------------------------------------------


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
