"""LoRA: small updates of a pipeline's weights, read from any of the usual files, put on, weighed, merged in, saved.

An `Adapter` is a value: for each component, parameter name -> `weights.LoRA` without a base. `read_lora` makes one of a
file; `set_adapters` returns parameters with any number of them on. Factors and scales are arguments of the compiled
program, so other weights, or another adapter of the same ranks in the same places, compile nothing. An update with
magnitudes is a DoRA; where they are NaN, they become the norms of what it is put on.

Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021; Yeh et al., Navigating Text-To-Image
Customization: From LyCORIS Fine-Tuning to Model Evaluation, 2023; Liu et al., DoRA: Weight-Decomposed Low-Rank
Adaptation, 2024.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import weights
from flaxdiff.adapters import formats
from flaxdiff.checkpoint import convert, files, hub, original, safetensors
from flaxdiff.checkpoint.tensors import Tensors
from flaxdiff.core import Leaf, Params, Spec, layout
from flaxdiff.weights import LoRA

# component -> parameter name -> an update without a base, or several upon one another (DoRA); scales [..., rank]
Adapter = dict[str, dict[str, LoRA]]
Weight = Any  # a number, one for each image [B], or a dictionary of them by component and block
ATTENTIONS = r"(unet|transformer)\..*attn.*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin")
SHOWN = 12


class Report(NamedTuple):
    """What a file holds that the pipeline has no place for."""

    unexpected: tuple[str, ...]  # keys
    misshapen: tuple[str, ...]  # lines


class Place(NamedTuple):
    """Where a module of a file belongs: a parameter, and which layer if it is stacked."""

    component: str
    parameter: str
    layer: int | None
    module: str  # as diffusers calls it
    part: str = ""  # of the module of a file, as `original.rows` has it


def load_lora(
    pipe: Any, params: Mapping[str, Params], source: str | os.PathLike[str], *, scale: Weight = 1.0, **options: Any
) -> dict[str, Params]:
    """Parameters with a LoRA on, beside those that are on already.

    Args:
      pipe: the pipeline, or component -> spec.
      params: component -> parameters.
      source, **options: as of `read_lora`.
      scale: as a weight of `set_adapters`.

    Raises:
      As `read_lora`.

    >>> import flaxdiff, tempfile
    >>> pipe, params = flaxdiff.load()
    >>> name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"
    >>> width = params["unet"][name].shape[0]
    >>> style = {"unet": {name: LoRA(None, jnp.ones((width, 2)), jnp.ones((2, width)), jnp.ones(2))}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     flaxdiff.save_lora(folder, pipe, style)
    ...     adapted = load_lora(pipe, params, folder, scale=0.5)
    >>> adapted["unet"][name].scale
    Array([0.5, 0.5], dtype=float32)
    """
    adapter, on = read_lora(pipe, source, **options), adapter_of(params)
    return set_adapters(params, [on, adapter] if on else [adapter], [1.0, scale] if on else [scale])


def read_lora(
    pipe: Any, source: str | os.PathLike[str], *, weight_name: str | None = None, strict: bool = True, **download: Any
) -> Adapter | tuple[Adapter, Report]:
    """Read a LoRA, LoHa or LoKr file of diffusers, PEFT, Kohya or LyCORIS.

    Args:
      pipe: the pipeline, or component -> spec.
      source: a file (safetensors, or a pickle, of which nothing is run), or a folder or Hub repository with one.
      weight_name: which file of a folder.
      strict: whether a key without a place in the pipeline is an error; if not, a `Report` comes back as well.
      **download: as of `hub.fetch`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: keys without a place, or of another shape (a LoRA for another model), all listed; or a damaged file.
    """
    path = hub.locate(source, NAMES if weight_name is None else (weight_name,), "adapter_config.json", **download)
    tensors = files.open_alone(path)
    adapter, report = assemble(dict(getattr(pipe, "specs", pipe)), tensors, formats.configured(path), str(path))
    if not strict:
        return adapter, report
    if any(report):
        raise ValueError(complaint(str(path), report))
    return adapter


def complaint(source: str, report: Report) -> str:
    """What to say of a file that does not fit."""
    lines = [*(f"± {line}" for line in report.misshapen), *(f"+ {key}" for key in report.unexpected)]
    counts = f"{len(report.unexpected)} unexpected, {len(report.misshapen)} misshapen"
    more = [f"  … and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    remedy = "It was made for another base model, or is no LoRA; strict=False leaves out what does not fit and says so."
    return "\n".join(
        [f"{source} does not fit this pipeline: {counts}.", *(f"  {s}" for s in lines[:SHOWN]), *more, remedy]
    )


def assemble(
    specs: Mapping[str, Spec], tensors: Tensors, config: Mapping[str, Any], source: str
) -> tuple[Adapter, Report]:
    """The updates that the tensors of a file are, and what did not fit; arguments as `read_lora` finds them."""
    found, unexpected = formats.modules(tensors)
    wanted, misshapen = places(specs), []
    pieces: dict[tuple[str, str], dict[int | None, formats.Factors]] = {}
    for name, keys in found.items():
        if name not in wanted:
            unexpected += keys.values()
        for place in wanted.get(name, ()):
            leaf = layout(specs[place.component])[place.parameter]
            shape = convert.shape_in_file(leaf)
            down = keys.get("down")
            alpha = formats.alpha(config, place.component, place.module, tensors[down].shape[0]) if down else None
            try:
                f = formats.factors(tensors, keys, alpha, place.part)
            except KeyError as missing:
                misshapen.append(f"{name} has no {missing.args[0]} beside {sorted(keys)}")
                break
            except ValueError as fault:
                misshapen.append(f"{name} has {fault}")
                break
            inside = int(np.prod(shape[1:]))
            if (f.up.shape[0], f.down.shape[1]) != (shape[0], inside):
                theirs, ours = f"[{f.up.shape[0]}, {f.down.shape[1]}]", f"[{shape[0]}, {inside}]"
                misshapen.append(f"{name} updates a weight of {theirs}, the model's is {ours}")
                break
            pieces.setdefault((place.component, place.parameter), {})[place.layer] = f
    adapter: Adapter = {}
    for (component, parameter), layers in pieces.items():
        adapter.setdefault(component, {})[parameter] = _update(layout(specs[component])[parameter], layers)
    return adapter, Report(tuple(unexpected), tuple(misshapen))


def init_lora(
    pipe: Any, key: jax.Array, rank: int = 4, targets: str = ATTENTIONS, *, use_dora: bool = False
) -> Adapter:
    """An adapter to train, that changes nothing yet: down is drawn from N(0, 1 / rank²), up is zero.

    Args:
      pipe: the pipeline, or component -> spec.
      key: a PRNG key.
      rank: of each update.
      targets: regex of the modules, whole names with the component in front; by default the attentions of the denoiser.
      use_dora: whether magnitudes are trained apart from directions; they are there once `set_adapters` has put it on.

    Raises:
      ValueError: no module has such a name.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.load()
    >>> adapter = init_lora(pipe, jax.random.key(0), rank=2)
    >>> adapter["unet"]["mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"].up.shape
    (2, 128)
    """
    specs, adapter = dict(getattr(pipe, "specs", pipe)), Adapter()
    for component, spec in specs.items():
        for name, leaf in layout(spec).items():
            modules = [f"{component}.{file.removesuffix('.weight')}" for file in convert.names_in_file(name, leaf)]
            if leaf.kind in ("linear", "conv") and all(re.fullmatch(targets, module) for module in modules):
                key, drawn = jax.random.split(key)
                stack, shape = leaf.shape[: bool(leaf.stack)], leaf.shape[bool(leaf.stack) :]
                down = jax.random.normal(drawn, (*stack, *shape[:-1], rank)) / rank
                up = jnp.zeros((*stack, *(1,) * (len(shape) - 2), rank, shape[-1]))
                magnitude = jnp.full((*stack, shape[-1]), jnp.nan) if use_dora else None
                adapter.setdefault(component, {})[name] = LoRA(None, down, up, jnp.ones((*stack, rank)), magnitude)
    if not adapter:
        raise ValueError(f"targets={targets!r} matches no module of {sorted(specs)}; they have names as in a file.")
    return adapter


def places(specs: Mapping[str, Spec]) -> dict[str, list[Place]]:
    """Every spelling of every module that a LoRA may update -> where it belongs, or each of its parts does."""
    found: dict[str, list[Place]] = {}
    for component, spec in specs.items():
        for parameter, leaf in layout(spec).items():
            if leaf.kind not in ("linear", "conv"):
                continue
            for i, name in enumerate(convert.names_in_file(parameter, leaf)):
                module = name.removesuffix(".weight")
                place = Place(component, parameter, i if leaf.stack else None, module)
                for spelling in formats.spellings(component, spec, module):
                    whole = original.whole(spelling)
                    if whole not in found or whole != spelling:
                        part = place._replace(part=spelling.removeprefix(whole))
                        found[whole] = [*found.get(whole, []), part]
    return found


def _update(leaf: Leaf, layers: Mapping[int | None, formats.Factors]) -> LoRA:
    """The factors of a parameter in our layout; layers of a stack without any get zeros."""
    rank = max(len(f.down) for f in layers.values())
    shape = convert.shape_in_file(leaf)

    def one(f: formats.Factors | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        down, up = np.zeros((rank, int(np.prod(shape[1:]))), np.float32), np.zeros((shape[0], rank), np.float32)
        if f is not None:
            down[: len(f.down)], up[:, : len(f.down)] = f.down, f.up
        down, up = down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank, *(1,) * (len(shape) - 2))
        axes = convert.axes(leaf.kind, len(shape))
        return down.transpose(axes), up.transpose(axes), np.full(rank, 0 if f is None else f.scale, np.float32)

    every = [layers[None]] if leaf.stack is None else [layers.get(i) for i in range(leaf.shape[0])]
    arrays = [np.stack(arrays) for arrays in zip(*map(one, every))]
    if any(f is not None and f.magnitude is not None for f in every):
        none = np.full(shape[0], np.nan, np.float32)
        arrays.append(np.stack([none if f is None or f.magnitude is None else f.magnitude.reshape(-1) for f in every]))
    return LoRA(None, *(jnp.asarray(a if leaf.stack else a[0]) for a in arrays))


# --- putting on, weighing, taking off ---------------------------------------------------------------------------------


def set_adapters(
    params: Mapping[str, Params],
    adapters: Sequence[Adapter] | Mapping[str, Adapter],
    adapter_weights: Weight | Sequence[Weight] | Mapping[str, Weight] = 1.0,
) -> dict[str, Params]:
    """Parameters with these adapters on and no others: W + Σ weight · scale · down · up.

    One with magnitudes multiplies what is on before it: y ← m / ‖W + Δ‖ · (y + x Δ) with its own Δ, as PEFT has it.

    Args:
      params: component -> parameters; adapters that are on them are taken off.
      adapters: one after the other, or by name.
      adapter_weights: one for all, or one for each: a number; one for each image of the batch, [B]; or a dictionary by
        component ({"unet": 0.7, "text_encoder": 0}) or by block of the U-Net, as diffusers has it ({"down": 0.5, "up":
        {"block_0": 1, "block_1": [0.2, 0.4, 0.6]}}; what is not named counts 1).

    Returns:
      New parameters of the same names. Other weights, or other adapters of the same ranks in the same places, are other
      values: a compiled program serves them all.

    Raises:
      ValueError: an adapter for another pipeline, another number of weights than adapters, or names that differ.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.load()
    >>> name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"
    >>> width = params["unet"][name].shape[0]
    >>> style = {"unet": {name: LoRA(None, jnp.ones((width, 4)), jnp.ones((4, width)), jnp.ones(4))}}
    >>> adapted = set_adapters(params, {"style": style, "again": style}, {"style": 0.25, "again": 0.5})
    >>> adapted["unet"][name].down.shape[-1]
    8
    """
    if isinstance(adapters, Mapping):
        given = adapter_weights if isinstance(adapter_weights, Mapping) else dict.fromkeys(adapters, adapter_weights)
        if set(given) != set(adapters):
            raise ValueError(f"Weights are given for {sorted(given)}, adapters for {sorted(adapters)}; name the same.")
        adapters, adapter_weights = list(adapters.values()), [given[name] for name in adapters]
    elif not isinstance(adapter_weights, list | tuple):
        adapter_weights = [adapter_weights] * len(adapters)
    if len(adapters) != len(adapter_weights):
        raise ValueError(f"{len(adapters)} adapters and {len(adapter_weights)} weights; give one for each.")
    adapted = unload_lora(params)
    for component in dict.fromkeys(c for adapter in adapters for c in adapter):
        if component not in params:
            raise ValueError(f"An adapter is for {component!r}, and the pipeline has {sorted(params)}.")
        for name in dict.fromkeys(n for adapter in adapters for n in adapter.get(component, {})):
            if name not in params[component]:
                raise ValueError(f"An adapter is for {component}'s {name}, which is not there; read it with this pipe.")
            parts = [
                _weighed(update, _weight(weight, component, name), name)
                for adapter, weight in zip(adapters, adapter_weights)
                if name in adapter.get(component, {})
                for update in _updates(adapter[component][name])
            ]
            adapted[component][name] = _beside(f"{component}'s {name}", adapted[component][name], parts)
    return adapted


def _updates(lora: LoRA) -> list[LoRA]:
    """The updates that lie upon one another, without a base, the first that is put on first."""
    before = _updates(lora.base) if isinstance(lora.base, LoRA) else []
    return [*before, dataclasses.replace(lora, base=None)]


def _weight(weight: Weight, component: str, name: str) -> Weight:
    """The weight of one parameter."""
    if isinstance(weight, Mapping) and not {"down", "mid", "up"} & set(weight):
        weight = weight.get(component, 1.0)
    if not isinstance(weight, Mapping):
        return weight
    block = re.match(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(?:attentions|resnets)\.(\d+)", name)
    if component != "unet" or block is None:
        return 1.0
    where, i, j = block.groups()
    weight = weight.get(where, 1.0)
    if isinstance(weight, Mapping):
        weight = weight.get(f"block_{i}", 1.0)
    if isinstance(weight, list | tuple):
        if len(weight) > 1 and int(j) >= len(weight):
            raise ValueError(f"{len(weight)} weights for block {i} of {where!r}, which has more: {name}.")
        weight = weight[int(j) if len(weight) > 1 else 0]
    return weight


# layers that see steps before images
TIMES = r"(time_emb_proj|time_embedding|add_embedding|time_text_embed|adaln_single|norm\w*\.linear)\b"


def _weighed(lora: LoRA, weight: Weight, name: str) -> LoRA:
    """An update with its scales [..., rank] times a weight, or [..., B, rank] with one for each image."""
    weight = jnp.asarray(weight, jnp.float32)
    if weight.ndim > 1:
        raise ValueError(f"The weight of an adapter is one number or one for each image, not {list(weight.shape)}.")
    if weight.ndim and re.search(TIMES, name):
        raise ValueError(f"{name} is worked out for all images at once; its adapter cannot weigh differently in each.")
    if weight.ndim and lora.magnitude is not None:
        raise ValueError(f"{name} has magnitudes (DoRA), and a norm for all images at once; give it one weight.")
    scale = lora.scale * weight if not weight.ndim else lora.scale[..., None, :] * weight[:, None]
    return dataclasses.replace(lora, scale=scale)


def _beside(name: str, base: Any, parts: Sequence[LoRA]) -> LoRA:
    """A weight with several updates, their ranks side by side; one with magnitudes lies upon those before it."""
    whole = jax.eval_shape(weights.dense, base).shape
    for part in parts:
        if (shape := (*part.down.shape[:-1], part.up.shape[-1])) != whole:
            raise ValueError(
                f"An adapter updates {name} of {list(shape)}, and it is {list(whole)}: another base model."
            )
    for dora, together in itertools.groupby(parts, lambda part: part.magnitude is not None):
        for group in ([part] for part in together) if dora else [list(together)]:
            base = _upon(base, group)
    return base


def _upon(base: Any, parts: Sequence[LoRA]) -> LoRA:
    """A weight with updates of which none has magnitudes, or with one that has."""
    dtype = weights.dtype(base)
    shape = np.broadcast_shapes(*(part.scale.shape[:-1] for part in _aligned(parts)))
    scales = [jnp.broadcast_to(part.scale, (*shape, part.scale.shape[-1])) for part in _aligned(parts)]
    down = jnp.concatenate([part.down for part in parts], -1).astype(dtype)
    up = jnp.concatenate([part.up for part in parts], -2).astype(dtype)
    lora, magnitude = LoRA(base, down, up, jnp.concatenate(scales, -1)), parts[0].magnitude
    if magnitude is None:
        return lora
    return dataclasses.replace(lora, magnitude=jnp.where(jnp.isnan(magnitude), weights.norm(lora), magnitude))


def _aligned(parts: Sequence[LoRA]) -> list[LoRA]:
    """Updates whose scales have an axis of images if any has."""
    rank = max(part.scale.ndim for part in parts)
    widen = lambda s: s if s.ndim == rank else s[..., None, :]
    return [dataclasses.replace(part, scale=widen(part.scale)) for part in parts]


def adapter_of(params: Mapping[str, Params]) -> Adapter:
    """What is on the parameters, as one adapter: to save it, or to put it elsewhere."""
    found: Adapter = {}
    for component, own in params.items():
        on = {name: _whole(weight) for name, weight in own.items() if isinstance(weight, LoRA)}
        if on:
            found[component] = on
    return found


def _whole(lora: LoRA) -> LoRA:
    """Updates without the weight that they are on, and a scale for each rank."""
    stack = lora.down.ndim - 2 if lora.down.ndim < 4 else 0
    scale = jnp.asarray(lora.scale)
    if scale.ndim == stack:
        scale = jnp.broadcast_to(scale[..., None], (*scale.shape, lora.down.shape[-1]))
    base = _whole(lora.base) if isinstance(lora.base, LoRA) else None
    return dataclasses.replace(lora, base=base, scale=scale)


def unload_lora(params: Mapping[str, Params]) -> dict[str, Params]:
    """Parameters without the adapters that are on them."""
    off = weights.without_updates
    return {component: {name: off(weight) for name, weight in own.items()} for component, own in params.items()}


def fuse_lora(params: Mapping[str, Params]) -> dict[str, Params]:
    """Parameters with the adapters that are on them merged into the weights: as fast, and as large, as without any.

    Raises:
      ValueError: an adapter weighs differently in each image.
    """
    merge = lambda weight: weights.dense(weight) if isinstance(weight, LoRA) else weight
    return {component: {name: merge(weight) for name, weight in own.items()} for component, own in params.items()}


def unfuse_lora(fused: Mapping[str, Params], adapter: Adapter) -> dict[str, Params]:
    """Fused parameters less an adapter, which is `adapter_of` those that were fused; exact up to rounding.

    Raises:
      ValueError: the adapter is a DoRA, of which the norms are lost.
    """
    for component, own in adapter.items():
        for name, lora in own.items():
            if any(update.magnitude is not None for update in _updates(lora)):
                raise ValueError(
                    f"{component}'s {name} has magnitudes (DoRA), and fused weights do not tell the norms that were "
                    "there; keep the parameters from before."
                )
    return fuse_lora(set_adapters(fused, [adapter], [-1.0]))


def save_lora(folder: str | os.PathLike[str], pipe: Any, adapter: Adapter) -> None:
    """Write an adapter as `pytorch_lora_weights.safetensors`, as PyTorch's diffusers and PEFT read it.

    Args:
      folder: where to write; made if it is not there.
      pipe: the pipeline, or component -> spec.
      adapter: from `read_lora`, `merge_adapters` or `adapter_of`; its scales are multiplied into the factors.

    Raises:
      ValueError: it weighs differently in each image, or is of several of which one has magnitudes (DoRA).
    """
    arrays: dict[str, np.ndarray] = {}
    for component, own in adapter.items():
        spec = dict(getattr(pipe, "specs", pipe))[component]
        for name, lora in own.items():
            leaf = layout(spec)[name]
            if lora.base is not None:
                raise ValueError(
                    f"{name} has several updates with DoRA among them, which no file has; save each alone."
                )
            layers = jax.device_get(lora if leaf.stack else jax.tree.map(lambda a: a[None], lora))
            if layers.scale.ndim != 2:
                raise ValueError(f"{name} has scales {list(lora.scale.shape)}: save an adapter of one weight.")
            for i, file_name in enumerate(convert.names_in_file(name, leaf)):
                magnitude = None if layers.magnitude is None else layers.magnitude[i]
                if magnitude is not None and np.isnan(magnitude).any():
                    magnitude = None  # put on, it has that of the weight
                if magnitude is None and not np.any(layers.scale[i]):
                    continue  # a layer that it leaves alone
                module = f"{component}.{file_name.removesuffix('.weight')}"
                back = np.argsort(convert.axes(leaf.kind, layers.down.ndim - 1))
                up = np.swapaxes(np.swapaxes(layers.up[i], -1, -2) * layers.scale[i], -1, -2)
                for role, array in (("A", layers.down[i]), ("B", up)):
                    arrays[f"{module}.lora_{role}.weight"] = np.ascontiguousarray(array.transpose(back))
                if magnitude is not None:
                    flat = leaf.kind == "linear"
                    arrays[f"{module}.lora_magnitude_vector"] = magnitude if flat else magnitude.reshape(1, -1, 1, 1)
    with files.staged(Path(folder)) as stage:
        shapes = {key: (array.shape, array.dtype) for key, array in arrays.items()}
        safetensors.write(stage / NAMES[0], shapes, arrays.values())
