"""Custom Diffusion: a few weights of the cross-attentions learned anew, and a word (see `textual_inversion`).

The new weights take the place of the old, so this is a matter of names alone.

Reference: Kumari et al., Multi-Concept Customization of Text-to-Image Diffusion, 2023.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxdiff.checkpoint import convert, files, hub, safetensors
from flaxdiff.core import Params, layout

NAMES = ("pytorch_custom_diffusion_weights.safetensors", "pytorch_custom_diffusion_weights.bin")


def load_custom_diffusion(
    pipe: Any,
    params: Mapping[str, Params],
    source: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    **download,
) -> dict[str, Params]:
    """Parameters with the attention weights of a Custom Diffusion file in place of the U-Net's own.

    Args:
      pipe, params: of the base model.
      source: a file, or a folder or Hub repository with one; its word is loaded by `load_textual_inversion`.
      weight_name: which file of a folder.
      **download: as of `hub.fetch`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds other things, or weights of other shapes.
    """
    path = hub.locate(source, NAMES if weight_name is None else (weight_name,), **download)
    tensors = files.open_alone(path)
    rename = lambda key: re.sub(r"\.processor\.(to_\w+?)_custom_diffusion\.", r".\1.", key)
    found = {rename(key): tensor for key, tensor in tensors.items()}
    own, fits = dict(params["unet"]), set()
    for name, leaf in layout(pipe.unet).items():
        shape = convert.shape_in_file(leaf)
        for i, file_name in enumerate(convert.names_in_file(name, leaf)):
            if file_name in found and "attn2" in name and found[file_name].shape == shape:
                one = leaf._replace(shape=own[name].shape[1:], stack=None) if leaf.stack else leaf
                place = convert.Place(one, (file_name,), (found[file_name],))
                new = jnp.asarray(convert.read(name, place, np.dtype(own[name].dtype)))
                own[name] = own[name].at[i].set(new) if leaf.stack else new
                fits.add(file_name)
    fits |= {name for name, tensor in found.items() if 0 in tensor.shape}  # of attentions that are as they were
    if wrong := [f"{key} {list(tensor.shape)}" for key, tensor in found.items() if key not in fits]:
        raise ValueError(
            f"{path} does not fit as Custom Diffusion of this U-Net: {wrong[:6]}; it was learned with another model, "
            "or is another kind of file."
        )
    return {**params, "unet": own}


def save_custom_diffusion(folder: str | os.PathLike[str], pipe: Any, params: Mapping[str, Params], names: str) -> None:
    """Write attention weights as `pytorch_custom_diffusion_weights.safetensors`, as PyTorch's diffusers reads them.

    It asks for an entry of every attention: those that nothing is written of have an empty one.

    Args:
      folder: where to write; made if it is not there.
      pipe, params: the model that was trained.
      names: regex of the U-Net's parameters that are written.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in layout(pipe.unet).items():
        if not re.fullmatch(names, name):
            places = [
                re.fullmatch(r"(.*\.attn\d)\.to_k\.weight", file_name)
                for file_name in convert.names_in_file(name, leaf)
            ]
            arrays |= {f"{place[1]}.processor": np.zeros(0, np.float32) for place in places if place}
            continue
        own = np.asarray(params["unet"][name])
        for file_name, one in zip(convert.names_in_file(name, leaf), own if leaf.stack else own[None], strict=True):
            key = re.sub(r"\.(to_\w+?)\.", r".processor.\1_custom_diffusion.", file_name, count=1)
            back = np.argsort(convert.axes(leaf.kind, one.ndim))
            arrays[key] = np.ascontiguousarray(one.transpose(back) if one.ndim > 1 else one)
    with files.staged(Path(folder)) as stage:
        shapes = {key: (array.shape, array.dtype) for key, array in arrays.items()}
        safetensors.write(stage / NAMES[0], shapes, arrays.values())
