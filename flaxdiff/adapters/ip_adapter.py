"""Pictures as prompts: IP-Adapters, one or several at once, for every pipeline whose U-Net attends to a text.

An adapter is a component of its own, `ip_adapter`, `ip_adapter_1`, …; the U-Net's parameters stay as they are. What it
makes of its pictures, keys and values for each attention, is worked out once beside the text's. Each attention adds
what its queries find there, times a weight: the scale of that transformer, and where there are masks, of that position.

Reference: Ye et al., IP-Adapter, 2023; scales by layer: Wang et al., InstantStyle, 2024.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flaxdiff import images as pictures
from flaxdiff import weights
from flaxdiff.adapters import lora
from flaxdiff.adapters.control import named
from flaxdiff.checkpoint import hub, pickles, reading, safetensors
from flaxdiff.checkpoint.tensors import Tensors
from flaxdiff.core import Params, Spec, abstract
from flaxdiff.models.clip_vision import CLIPVisionModelWithProjection
from flaxdiff.models.flux_transformer_2d import FluxConfig
from flaxdiff.models.ip_adapter import HEAD, IPAdapter, SD3IPAdapter
from flaxdiff.models.siglip import SiglipVisionModel
from flaxdiff.models.transformer_sd3 import SD3Config
from flaxdiff.nn.attention import KeysValues
from flaxdiff.pipelines.generate import Inputs, Networks, Size, denoiser

KIND = "ip_adapter"
JOINT = FluxConfig, SD3Config  # networks where text and picture attend to each other, block by block
XLABS = (  # their names for Flux
    (r"^ip_adapter_proj_model\.", "image_proj."),
    (r"^double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_(k|v)_proj\.", r"ip_adapter.\1.to_\2_ip."),
)


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Where a U-Net attends: diffusers' name, the channels, how many blocks, and how often the latent was halved."""

    name: str
    width: int
    depth: int
    halvings: int


def transformers(config: Any) -> list[Transformer]:
    """Those of a U-Net in the order of their use: down, middle, up; where a text attends too, its blocks."""
    if isinstance(config, JOINT):
        return [Transformer(f"transformer_blocks.{i}", config.width, 1, 0) for i in range(config.num_layers)]
    widths, depths = config.block_out_channels, config.per_stage("transformer_layers_per_block")
    last = len(widths) - 1

    def stages(way: str, kinds: Sequence[str], layers: int, order: Sequence[int]) -> list[Transformer]:
        return [
            Transformer(f"{way}_blocks.{i}.attentions.{j}", widths[at], depths[at], at)
            for i, (kind, at) in enumerate(zip(kinds, order))
            for j in range(layers if kind.startswith("Cross") else 0)
        ]

    down = stages("down", config.down_block_types, config.layers_per_block, range(last + 1))
    up = stages("up", config.up_block_types, config.layers_per_block + 1, range(last, -1, -1))
    return [*down, Transformer("mid_block.attentions.0", widths[last], depths[last], last), *up]


def filed(config: Any) -> list[Transformer]:
    """The same in the order of the files: down, up, middle."""
    return sorted(transformers(config), key=lambda t: ("tran", "down", "up_b", "mid_").index(t.name[:4]))


# --- loading ---------------------------------------------------------------------------------------------------------


def load_ip_adapter(
    pipe: Any,
    params: Mapping[str, Params],
    source: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    subfolder: str = "",
    image_encoder_folder: str | None = "image_encoder",
    image_encoder_pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
    shortcut: bool = False,
    **download: Any,
) -> tuple[Any, dict[str, Params]]:
    """A pipeline and its parameters with an IP-Adapter more. To take it off, keep those from before.

    Args:
      pipe, params: to begin with; they stay as they are.
      source: a file (safetensors, or a pickle, of which nothing is run), or a folder or Hub repository with one.
      weight_name, subfolder: which file of a folder.
      image_encoder_folder: of the folder or repository (beside the file, or a path from its root); None to do without:
        then calls need `ip_adapter_image_embeds`. A pipeline that has an image encoder keeps it.
      image_encoder_pretrained_model_name_or_path: another folder or repository that has it, or a whole CLIP.
      shortcut: for version 2 of FaceID Plus.
      **download: as of `hub.fetch`.

    Raises:
      FileNotFoundError: there is no such file, or no image encoder where one is asked for.
      ValueError: it is no IP-Adapter, or one for another U-Net.
    """
    names = (
        os.path.join(subfolder, weight_name or "ip_adapter.safetensors"),
        os.path.join(subfolder, "ip-adapter.bin"),
    )
    check_offered(pipe.denoiser)
    path = hub.locate(source, names[: 2 - bool(weight_name)], **download)
    specs, params = dict(pipe.specs), dict(params)
    tensors, config = _read(path), pipe.denoiser.config
    updates = {k: t for k, t in tensors.items() if "_lora." in k}
    tensors = {k: t for k, t in tensors.items() if k not in updates}
    spec, own = _spec(tensors, config, shortcut, str(path)), params[denoiser(specs)]
    dtype = weights.dtype(next(iter(own.values())))
    count = len(named(specs, KIND))
    name = f"{KIND}_{count}" if count else KIND
    params[name] = reading.place(spec, tensors, abstract(spec, dtype), None, str(path))
    specs[name] = spec
    if "image_encoder" not in specs and not spec.config.kind.startswith("face"):
        where, folder = image_encoder_pretrained_model_name_or_path, image_encoder_folder
        if where is None and folder is not None:
            where = path.parent if os.path.isfile(source) else source
            folder = folder if "/" in folder else os.path.join(subfolder, folder)
            download = {**download, "subfolder": folder}
        if where is not None:
            encoder = SiglipVisionModel if isinstance(config, SD3Config) else CLIPVisionModelWithProjection
            found = encoder.from_pretrained(where, dtype=dtype, **download)
            specs["image_encoder"], params["image_encoder"] = found
    if updates:  # FaceID comes with a LoRA of the U-Net
        blocks = [
            f"{t.name}.transformer_blocks.{i}.attn{n}" for t in filed(config) for i in range(t.depth) for n in (1, 2)
        ]
        key = lambda k: re.sub(r"ip_adapter\.(\d+)\.", lambda m: f"unet.{blocks[int(m[1])]}.processor.", k)
        adapter, report = lora.assemble(specs, {key(k): t for k, t in updates.items()}, {}, str(path))
        if any(report):
            raise ValueError(lora.complaint(str(path), report))
        on = lora.adapter_of(params)
        params = lora.set_adapters(params, [on, adapter] if on else [adapter], [1.0, 1.0] if on else [1.0])
    return dataclasses.replace(pipe, specs=tuple(specs.items())), params


def _read(path: Any) -> Tensors:
    """The tensors of a file under flat names."""
    if path.suffix == ".safetensors":
        tensors = safetensors.read(path)
    else:
        nested = pickles.contents(path)
        parts = {k: v for k, v in nested.items() if isinstance(v, dict)} if isinstance(nested, dict) else {}
        tensors = {f"{part}.{name}": t for part, names in parts.items() for name, t in names.items()}
    for pattern, new in XLABS:
        tensors = {re.sub(pattern, new, k): t for k, t in tensors.items()}
    tensors = {k: t for k, t in tensors.items() if k.split(".")[0] in ("image_proj", "ip_adapter")}
    if len({k.split(".")[0] for k in tensors}) < 2:
        raise ValueError(f"{path} is no IP-Adapter: it lacks the tensors image_proj.… and ip_adapter.… of one.")
    return tensors


def _spec(tensors: Tensors, config: Any, shortcut: bool, source: str) -> Spec:
    """What a file's projection is, for the attentions of a U-Net."""
    shape = lambda name: tensors[f"image_proj.{name}"].shape
    there = lambda name: f"image_proj.{name}" in tensors
    resampler = lambda at: dict(
        heads=shape(f"{at}layers.0.0.to_q.weight")[0] // HEAD, depth=sum(k.endswith("to_q.weight") for k in tensors)
    )
    timed = there("time_embedding.linear_1.weight")
    if timed and isinstance(config, SD3Config):
        (hidden, read), (tokens, width) = shape("proj_in.weight"), (shape("latents")[1], shape("proj_out.weight")[0])
        found = dict(image_dim=read, hidden_dim=hidden, tokens=tokens, width=width, **resampler(""))
        found |= dict(time_dim=shape("time_embedding.linear_1.weight")[1], blocks=config.num_layers)
        check_width(width, config.width, source)
        return SD3IPAdapter.from_config(found | {"head_dim": config.attention_head_dim})
    if timed or isinstance(config, SD3Config):
        raise ValueError(f"{source} was not made for this kind of network; that of Stable Diffusion 3 reads the time.")
    if there("proj.weight"):
        width = shape("norm.weight")[0]
        found = dict(kind="base", image_dim=shape("proj.weight")[1], tokens=shape("proj.weight")[0] // width)
    elif there("proj.3.weight"):
        width, (hidden, read) = shape("proj.3.weight")[0], shape("proj.0.weight")
        found = dict(kind="full", image_dim=read, hidden_dim=hidden)
    elif there("proj.0.weight") and there("norm.weight"):
        width, (hidden, read) = shape("norm.weight")[0], shape("proj.0.weight")
        found = dict(kind="faceid", image_dim=read, hidden_dim=hidden, tokens=shape("proj.2.weight")[0] // width)
        if there("perceiver_resampler.proj_in.weight"):
            at = "perceiver_resampler."
            found |= dict(
                kind="faceid_plus", patch_dim=shape(f"{at}proj_in.weight")[1], shortcut=shortcut, **resampler(at)
            )
    elif there("latents"):
        (hidden, read), width = shape("proj_in.weight"), shape("proj_out.weight")[0]
        found = dict(kind="plus", image_dim=read, hidden_dim=hidden, tokens=shape("latents")[1], **resampler(""))
    else:
        raise ValueError(f"{source} is an IP-Adapter of an unknown form; its projection has {sorted(tensors)[:6]}.")
    flux = isinstance(config, FluxConfig)
    own = config.joint_attention_dim if flux else config.cross_attention_dim
    check_width(width, own, source)
    found |= {"cross_attention_dim": width, "attentions": [(t.width, t.depth) for t in filed(config)]}
    return IPAdapter.from_config(found | {"bias": flux, "every": flux})


def check_width(width: int, own: int, source: str) -> None:
    """Raise ValueError for a file that gives tokens of other channels than the network attends to."""
    if width != own:
        raise ValueError(
            f"{source} is an IP-Adapter for a network that attends to {width} channels, and this one attends to {own}: "
            "it was made for another base model."
        )


def check_offered(spec: Spec) -> None:
    """Raise ValueError for a network that no IP-Adapter here is for."""
    config = spec.config
    if isinstance(config, SD3Config) and config.dual_attention_layers:
        raise ValueError(
            "This transformer has a second attention in some blocks (dual_attention_layers), which no "
            "IP-Adapter was made for; leave it out."
        )
    if not isinstance(config, JOINT) and not hasattr(config, "block_out_channels"):
        raise ValueError(
            f"IP-Adapters are for U-Nets, Stable Diffusion 3 and Flux, not for {spec.module.__name__}; leave them out."
        )


# --- on the host -----------------------------------------------------------------------------------------------------


def prepare(
    pipe: Any,
    size: Size,
    guided: bool,
    ip_adapter_image: Any = None,
    ip_adapter_image_embeds: Sequence[Any] | None = None,
    ip_adapter_clip_embeds: Sequence[Any] | None = None,
    ip_adapter_scale: Any = 1.0,
    ip_adapter_masks: Sequence[Any] | None = None,
    negative_ip_adapter_image: Any = None,
    negative_ip_adapter_image_embeds: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """What the IP-Adapters see, and how much each counts where.

    Args:
      ip_adapter_image: Pillow pictures, or arrays [H, W, 3] in [0, 1]; of several adapters, a list with the picture of
        each, or with a list of its pictures.
      ip_adapter_image_embeds: in their place, one array for each adapter: [B, I, D] (or [B, I, N, D]) for I pictures,
        with guidance the negative ones first, then the positive, [2 B, I, D], but for Flux; for Stable Diffusion 3
        the patches of one, [2 B, N, D].
      ip_adapter_clip_embeds: for FaceID Plus, the patches beside the embeddings of faces, likewise.
      ip_adapter_scale: how much each adapter counts: a number; for transformers also a list with one for each block;
        for U-Nets also by transformer, such as
        `{"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}}`, where what is not named counts for
        nothing; of several adapters a list of such; with masks also a list of numbers, one for each picture.
      ip_adapter_masks: for each adapter the masks of its pictures: Pillow pictures, or an array [I, H, W]; a picture
        counts where its mask is at least half white.
      negative_ip_adapter_image, negative_ip_adapter_image_embeds: for Flux what is to be avoided, likewise; by default
        black pictures.

    Raises:
      ValueError: no adapter or no picture, not as many as there are adapters, no image encoder.
    """
    names, specs = named(dict(pipe.specs), KIND), dict(pipe.specs)
    given = {"ip_adapter_image": ip_adapter_image, "ip_adapter_image_embeds": ip_adapter_image_embeds}
    if not names:
        if any(v is not None for v in given.values()):
            check_offered(pipe.denoiser)
            raise ValueError(f"{type(pipe).__name__} has no IP-Adapter; put one on with flaxdiff.load_ip_adapter.")
        return {}
    if sum(v is not None for v in given.values()) != 1:
        raise ValueError("The pipeline has an IP-Adapter: give either ip_adapter_image= or ip_adapter_image_embeds=.")
    arrays: dict[str, Any] = {}
    config = pipe.denoiser.config
    alone = isinstance(config, FluxConfig)  # where what is to be avoided is given by itself
    avoided = negative_ip_adapter_image, negative_ip_adapter_image_embeds
    if not alone and any(v is not None for v in avoided):
        raise ValueError("negative_ip_adapter_image is for Flux; leave it out.")
    if alone and guided and all(v is None for v in avoided):  # black pictures, as many as there are
        if ip_adapter_image is not None:
            counts = [len(_list(own)) for own in _each("ip_adapter_image", ip_adapter_image, names)]
        else:
            counts = [np.shape(own)[1] for own in _each("embeds", ip_adapter_image_embeds, names)]
        negative_ip_adapter_image = [[np.zeros((1, 1, 3), np.float32)] * count for count in counts]
    read = pictures.square_pixels if isinstance(config, SD3Config) else pictures.clip_pixels
    for prefix, shown in (("", ip_adapter_image), ("negative_", negative_ip_adapter_image if guided else None)):
        if shown is not None and "image_encoder" not in specs:
            option = f"{prefix}ip_adapter_image"
            raise ValueError(f"There is no image encoder to read {option}; give {option}_embeds=.")
        for name, own in zip(names, _each("ip_adapter_image", shown, names) if shown is not None else ()):
            pixels = [read(p, specs["image_encoder"].config.image_size) for p in _list(own)]
            arrays[f"{prefix}{name}_image"] = np.concatenate(pixels)[None]
    for key, embeds in (("embeds", ip_adapter_image_embeds), ("patches", ip_adapter_clip_embeds)):
        for name, own in zip(names, _each(key, embeds, names) if embeds is not None else ()):
            if own is not None:
                halves = np.split(np.asarray(own), 2) if guided and not alone else [np.asarray(own)]
                arrays |= dict(zip((f"negative_{name}_{key}", f"{name}_{key}")[-len(halves) :], halves))
    if negative_ip_adapter_image_embeds is not None and guided:
        embeds = _each("negative_ip_adapter_image_embeds", negative_ip_adapter_image_embeds, names)
        arrays |= {f"negative_{name}_embeds": np.asarray(own) for name, own in zip(names, embeds)}
    for name in names:
        faces = specs[name].config.kind
        if faces.startswith("faceid") and f"{name}_embeds" not in arrays:
            raise ValueError(f"{name} reads embeddings of faces; give ip_adapter_image_embeds= in place of pictures.")
        if faces == "faceid_plus" and f"{name}_patches" not in arrays:
            raise ValueError(f"{name} reads patches beside faces; give ip_adapter_clip_embeds=.")
    scale = ip_adapter_scale
    by_block = isinstance(config, JOINT) and len(names) == 1  # whose lists are of numbers, one for each block
    scales = _each("ip_adapter_scale", scale, names, every=by_block or not isinstance(scale, list))
    if ip_adapter_masks is not None and isinstance(config, JOINT):
        raise ValueError(f"{type(pipe).__name__} sees whole pictures; leave ip_adapter_masks out.")
    masks = _each("ip_adapter_masks", ip_adapter_masks, names, every=ip_adapter_masks is None)
    for name, scale, mask in zip(names, scales, masks):
        shown = arrays.get(f"{name}_embeds", arrays.get(f"{name}_image")).shape[1]
        other = arrays.get(f"negative_{name}_embeds", arrays.get(f"negative_{name}_image"))
        if other is not None and other.shape[1] != shown:
            raise ValueError(f"{name} sees {shown} pictures, and {other.shape[1]} to be avoided; give as many.")
        of_pictures = [scale] if isinstance(config, JOINT) else _list(scale)
        arrays[f"{name}_scale"] = np.stack([by_layer(config, s) for s in of_pictures])[None]
        if mask is not None:
            arrays[f"{name}_masks"] = np.stack([_mask(m, size) for m in mask])[None]
            if arrays[f"{name}_masks"].shape[1] != shown:
                raise ValueError(f"{name} has {len(mask)} masks for {shown} pictures; give one for each.")
    return arrays


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _each(option: str, value: Any, names: Sequence[str], every: bool = False) -> list[Any]:
    """What is given for each adapter: a value for all, or a list with one for each."""
    values = [value] * len(names) if every else _list(value)
    if len(values) != len(names):
        raise ValueError(
            f"{option} holds {len(values)} entries for {len(names)} IP-Adapters; give a list with one of each."
        )
    return values


def _mask(mask: Any, size: Size) -> np.ndarray:
    if isinstance(mask, Image.Image):
        mask = (
            np.asarray(mask.convert("L").resize((size.width, size.height), Image.Resampling.LANCZOS), np.float32) / 255
        )
    return np.float32(np.asarray(mask) >= 0.5)


def by_layer(config: Any, scale: Any) -> np.ndarray:
    """A scale for each transformer of a U-Net in the order of its use, or for each block of Flux.

    Raises:
      ValueError: a block that the U-Net has not, or not as many numbers as there are transformers.
    """
    found = transformers(config)
    if isinstance(scale, list | tuple):
        if len(scale) != len(found):
            raise ValueError(f"The network has {len(found)} blocks that see pictures; {len(scale)} scales were given.")
        return np.asarray(scale, np.float32)
    if not isinstance(scale, Mapping):
        return np.full(len(found), scale, np.float32)
    if isinstance(config, JOINT):
        raise ValueError("A transformer has no down, mid and up; give one number, or a list with one for each block.")
    scales: dict[str, float] = {}
    for way in ("down", "up"):
        blocks: dict[str, list[str]] = {}
        for t in found:
            if t.name.startswith(way):
                blocks.setdefault(f"block_{t.name.split('.')[1]}", []).append(t.name)
        given = scale.get(way, {})
        given = given if isinstance(given, Mapping) else dict.fromkeys(blocks, given)
        if unknown := sorted(set(given) - set(blocks)):
            raise ValueError(f"The U-Net has no transformers in {way} {unknown}; it has some in {sorted(blocks)}.")
        for block, value in given.items():
            each = _list(value) * (len(blocks[block]) if len(_list(value)) == 1 else 1)
            if len(each) != len(blocks[block]):
                raise ValueError(f"{way} {block} has {len(blocks[block])} transformers; {len(each)} scales were given.")
            scales |= dict(zip(blocks[block], each))
    if unknown := sorted(set(scale) - {"down", "mid", "up"}):
        raise ValueError(f"A scale by transformer names down, mid and up, not {unknown}.")
    scales["mid_block.attentions.0"] = _list(scale.get("mid", 0.0))[0]
    return np.float32([scales.get(t.name, 0.0) for t in found])


# --- on the device ---------------------------------------------------------------------------------------------------


def encode(
    networks: Networks, inputs: Inputs, branch: str, text: tuple[KeysValues, ...], latent: tuple[int, ...]
) -> tuple[tuple[Any, ...], ...]:
    """The text's keys and values with those of pictures behind them: (k, v, (k, v, weight), …) for each transformer.

    Args:
      branch: "negative" sees empty pictures.
      text: what the network makes of the text.
      latent: (height, width, …) of the latents.
    """
    names = [name for name in named(networks.specs, KIND) if f"{name}_scale" in inputs]
    for name in names:
        c = networks.config(denoiser(networks.specs))
        order = [t.name for t in filed(c)]
        filed_pairs = networks(name, *_seen(networks, inputs, name, branch))
        pairs = [filed_pairs[order.index(t.name)] for t in transformers(c)]
        scale = jnp.asarray(inputs[f"{name}_scale"])  # [B, 1 or I, transformers]
        parts = []
        for i, (t, (k, v)) in enumerate(zip(transformers(c), pairs)):
            weight = scale[:, :, i, None]  # [B, I, positions]
            if f"{name}_masks" in inputs:
                rows, columns = (-(-side // 2**t.halvings) for side in latent[:2])
                weight = weight * shrunk(jnp.asarray(inputs[f"{name}_masks"]), rows * columns)
            else:  # the tokens of all pictures side by side
                k, v = (a.swapaxes(1, 2).reshape(len(a), 1, t.depth, -1, a.shape[-1]) for a in (k, v))
            weight = jnp.broadcast_to(weight[:, :, None], (*k.shape[:3], weight.shape[-1])).astype(k.dtype)
            parts.append(tuple((k[:, n], v[:, n], weight[:, n]) for n in range(k.shape[1])))
        text = tuple((*one, *more) for one, more in zip(text, parts, strict=True))
    return text


def seen(networks: Networks, inputs: Inputs, branch: str) -> dict[str, dict[str, jax.Array]]:
    """What the IP-Adapters of Stable Diffusion 3 read in a branch: of each the patches [B, N, D], and its scales.

    Those of a picture to be avoided are zeros.
    """
    found = {}
    for name in (name for name in named(networks.specs, KIND) if f"{name}_scale" in inputs):
        if f"{name}_image" in inputs:
            pixels = jnp.asarray(inputs[f"{name}_image"])
            flat = pixels.reshape(-1, *pixels.shape[2:])
            patches = networks("image_encoder", flat).hidden_states[-2]
            patches = patches.reshape(len(pixels), -1, patches.shape[-1])
            patches = patches * 0 if branch == "negative" else patches
        else:
            patches = jnp.asarray(inputs[f"{'negative_' if branch == 'negative' else ''}{name}_embeds"])
        found[name] = {"patches": patches, "scale": jnp.asarray(inputs[f"{name}_scale"])[:, 0]}
    return found


def _seen(networks: Networks, inputs: Inputs, name: str, branch: str) -> tuple[jax.Array, ...]:
    """What an adapter's projection reads in a branch."""
    prefix = "negative_" if branch == "negative" else ""
    if found := [inputs[k] for k in (f"{prefix}{name}_embeds", f"{prefix}{name}_patches") if k in inputs]:
        return tuple(map(jnp.asarray, found))
    blind = prefix and f"{prefix}{name}_image" not in inputs  # nothing, in the place of what is to be avoided
    pixels = jnp.asarray(inputs[f"{'' if blind else prefix}{name}_image"])
    flat = pixels.reshape(-1, *pixels.shape[2:])
    whole = networks.config(name).kind == "base"
    out = networks("image_encoder", flat * 0 if blind and not whole else flat)
    seen = out.image_embeds if whole else out.hidden_states[-2]
    return ((seen * 0 if blind and whole else seen).reshape(*pixels.shape[:2], *seen.shape[1:]),)


def shrunk(masks: jax.Array, positions: int) -> jax.Array:
    """Masks [B, I, H, W] over so many positions of an attention, [B, I, N], interpolated by cubics as PyTorch does."""
    height, width = masks.shape[2:]
    rows = int(math.sqrt(positions * height / width))
    rows += positions % rows != 0
    columns = positions // rows
    down, across = (pictures.cubic(*sides).astype(np.float32) for sides in ((height, rows), (width, columns)))
    small = jnp.einsum("rh,bihw,cw->birc", down, masks, across)
    small = small.reshape(*masks.shape[:2], -1)[..., :positions]
    return jnp.pad(small, ((0, 0), (0, 0), (0, positions - small.shape[-1])))
