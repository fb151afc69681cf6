"""Control LoRAs of Black Forest Labs: Flux made to see a control image, by updates of all its layers.

They have what other LoRAs have not: a way in that is twice as wide, whose new half is zero before the update; updates
of biases; and norms in the place of the model's.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxdiff.adapters import lora
from flaxdiff.checkpoint import convert, hub, original, safetensors
from flaxdiff.checkpoint.tensors import Tensors
from flaxdiff.core import Params, layout

NAMES = ("flux1-canny-dev-lora.safetensors", "flux1-depth-dev-lora.safetensors", *lora.NAMES[:1])
WAY_IN, BIAS, SCALE = "img_in.lora_A.weight", ".lora_B.bias", ".scale"


def load_control_lora(
    pipe: Any,
    params: Mapping[str, Params],
    source: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    weight_name: str | None = None,
    **download: Any,
) -> tuple[Any, dict[str, Params]]:
    """A pipeline whose transformer takes a control image, and its parameters; others may be put on afterwards.

    Args:
      pipe: a pipeline of Flux, for instance `FluxControlPipeline` with the parts of FLUX.1 dev.
      params: component -> parameters, without a LoRA on the transformer.
      source: the file, or a folder or Hub repository that has it.
      scale: how much of it to put on, one number.
      weight_name: which file of a folder.
      **download: as of `hub.fetch`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is none of these, was made for another model, or the transformer has a LoRA on.
    """
    path = hub.locate(source, NAMES if weight_name is None else (weight_name,), **download)
    tensors = safetensors.read(path)
    if WAY_IN not in tensors:
        raise ValueError(f"{path} has no {WAY_IN}, so it is no control LoRA of Flux; use load_lora for others.")
    own, config, wide = dict(params["transformer"]), pipe.transformer.config, tensors[WAY_IN].shape[1]
    if lora.adapter_of({"transformer": own}):
        raise ValueError("The transformer has a LoRA on; take it off, put the control LoRA on, and then the other.")
    channels = {"in_channels": wide, "out_channels": config.out_channels or config.in_channels}
    pipe = pipe.replace(transformer=pipe.transformer.replace(**channels))
    own["x_embedder.weight"] = jnp.pad(own["x_embedder.weight"], ((0, wide - config.in_channels), (0, 0)))

    for name, leaf in layout(pipe.transformer).items():
        if leaf.kind in ("norm", "raw"):
            old = original.names(pipe.transformer, convert.names_in_file(name, leaf)).values()
            layers = own[name] if leaf.stack else own[name][None]
            made = jnp.stack([_vector(tensors, file, base, scale) for file, base in zip(old, layers, strict=True)])
            own[name] = made if leaf.stack else made[0]

    factors = {key: tensor for key, tensor in tensors.items() if not key.endswith((BIAS, SCALE))}
    adapter, report = lora.assemble({"transformer": pipe.transformer}, factors, {}, str(path))
    if any(report):
        raise ValueError(lora.complaint(str(path), report))
    on = lora.set_adapters({"transformer": own}, [adapter], scale)
    return pipe, {**params, **on}


def _vector(tensors: Tensors, name: str, base: Any, scale: float) -> Any:
    """A norm or a bias of an original name: what the file has in its place, or adds to it."""
    added = original.find(tensors, name.replace(".bias", BIAS))
    if added is None:
        return base
    with added.view() as numbers:
        numbers = jnp.asarray(np.asarray(numbers, np.float32))
    return (numbers if name.endswith(SCALE) else base + scale * numbers).astype(base.dtype)
