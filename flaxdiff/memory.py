"""What parameters take, and where: dtypes, 8-bit kinds and places by path.

Each function takes parameters, of one model or by component, and rules: pairs (regex, choice) of which the first that
is found in a parameter's path ("unet.conv_in.weight") wins, or one choice for all. `None` leaves a parameter as it is.
What a *program* takes is a matter of its spec: `remat`, `forward_chunking`, `slicing`, `tiling`; what compiling it took
is given back by `returned`.
"""

import ctypes
import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from flaxdiff import weights
from flaxdiff.core import Params
from flaxdiff.parallel import Rules, first_match

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

KINDS = {"int8": weights.Int8, "fp8": weights.Float8}
PLACES = {"device": jax.memory.Space.Device, "host": jax.memory.Space.Host}

_VECTORS = r"norm|^(?!.*\.weight$)"
_OTHER = rf"{_VECTORS}|_embedding\.weight$"  # neither a linear layer's weight nor a convolution's
_ENDS = r"embedding|conv_in|conv_out|quant_conv"  # first and last layers: small, and what errs there is seen


def rules_of(choice: Any) -> Rules:
    """Rules as they are, or one choice for all as a rule.

    >>> rules_of("host")
    [('', 'host')]
    """
    return choice if isinstance(choice, list | tuple) else [("", choice)]


def _by_path(change: Callable[[Any, Any], Any], params: Mapping[str, Any], rules: Rules, prefix: str = "") -> Any:
    """Every weight as `change(weight, choice)`, where the choice of its path is not None."""
    changed = {}
    for name, weight in params.items():
        if isinstance(weight, Mapping):
            changed[name] = _by_path(change, weight, rules, f"{prefix}{name}.")
        else:
            choice = first_match(rules, prefix + name)
            changed[name] = weight if choice is None else change(weight, choice)
    return changed


def _one_of(known: Mapping[str, Any], choice: Any) -> Any:
    if choice not in known:
        raise ValueError(f"{choice!r} is not known; use one of {[*known, None]}.")
    return known[choice]


def cast(params: Params, rules: Any) -> Params:
    """Parameters in other dtypes; what is held in 8 bits stays so, and computes in the new dtype.

    Within a network all but the normalisations should have one dtype, that it computes in.

    Args:
      params: of a model, or by component.
      rules: a dtype, or (regex, dtype or None) by path.

    >>> params = {"vae": {"conv_in.weight": jnp.ones(2)}, "unet": {"conv_in.weight": jnp.ones(2)}}
    >>> cast(params, [("^vae", None), ("", jnp.bfloat16)])["unet"]["conv_in.weight"].dtype
    dtype(bfloat16)
    """
    wide = lambda a: jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize > 1
    change = lambda weight, dtype: jax.tree.map(lambda a: a.astype(dtype) if wide(a) else a, weight)
    return _by_path(change, params, rules_of(rules))


def quantize(params: Params, rules: Any = "int8") -> Params:
    """Weights of linear layers and convolutions in 8 bits, a scale beside each output channel; the rest as it is.

    They stay so in memory, and are widened where they are multiplied. Under an adapter its base is quantised.

    Args:
      params: of a model, or by component; shapes under `jax.eval_shape`.
      rules: "int8" or "fp8" for all but the layers at either end; or (regex, "int8", "fp8" or None) by path.

    Raises:
      ValueError: an unknown kind.

    >>> quantize({"conv_in.weight": jnp.ones((2, 2)), "fc1.weight": jnp.ones((2, 2))})["fc1.weight"].q.dtype
    dtype('int8')
    """
    rules = [(_ENDS, None), ("", rules)] if isinstance(rules, str) else rules

    def change(weight: weights.Weight, kind: str) -> weights.Weight:
        match weight:
            case weights.LoRA(base):
                return dataclasses.replace(weight, base=change(base, kind))
            case weights.Quantized():
                return weight
            case _:
                return weights.quantize(weight, _one_of(KINDS, kind))

    return _by_path(change, params, [(_OTHER, None), *rules])


def offload(params: Params, rules: Any = "host") -> Params:
    """Parameters put into the memory of the host, or of the device.

    A program that is handed weights on the host copies each to its device where it is used: of layers that are
    scanned, one layer at a time. A call of a pipeline keeps on the device, for as long as it loops, what it loops over.
    Vectors (biases, normalisations, scales) are never moved: they are small, and a TPU cannot fetch one layer's.

    Args:
      params: of a model, or by component; sharded or not.
      rules: "host" or "device", (regex, one of these or None) by path, or component -> one of these, as `residency`
        returns.

    Raises:
      ValueError: an unknown place.

    >>> params = offload({"unet": {"conv_in.weight": jnp.ones(2)}}, {"unet": "host"})
    >>> params["unet"]["conv_in.weight"].sharding.memory_kind
    'pinned_host'
    """
    if isinstance(rules, Mapping):
        rules = [(rf"^{re.escape(name)}\.", place) for name, place in rules.items()] + [("", None)]

    def change(weight: weights.Weight, place: str) -> weights.Weight:
        rank = max(a.ndim for a in jax.tree.leaves(weight))
        space = _one_of(PLACES, place)
        return jax.tree.map(lambda a: weights.moved(a, space) if a.ndim == rank else a, weight)

    return _by_path(change, params, [(_VECTORS, None), *rules_of(rules)])


def fetched(params: Mapping[str, Params], names: str) -> dict[str, Params]:
    """Component -> parameters, those of the components that the regex names on the device."""
    return offload(params, [(rf"^({names})", "device"), ("", None)])


def residency(pipe: "DiffusionPipeline", params: Mapping[str, Params], budget: int) -> dict[str, str]:
    """Which components stay on the device between calls, and which lie on the host and come for their stage.

    A call has three stages: the prompts are encoded, the denoiser loops, the latents are decoded and what they show is
    checked; where other loops come first, so have they. What a stage needs must fit beside what stays. Of the choices
    that do, the one that moves the fewest bytes.

    Args:
      pipe: the pipeline.
      params: component -> parameters, or their shapes.
      budget: bytes of a device for weights. What programs need to work in comes on top; `flaxdiff plan` tells.

    Returns:
      Component -> "device" or "host", for `offload`.

    Raises:
      ValueError: a stage alone does not fit.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.load()
    >>> sorted(residency(pipe, params, budget=40_000_000).items())
    [('text_encoder', 'host'), ('unet', 'device'), ('vae', 'host')]
    """
    names = [name for name, _ in pipe.specs]
    last = [name for name, spec in pipe.specs if name == "safety_checker" or spec == pipe.autoencoder]  # after a loop
    size = {name: sum(map(_bytes, jax.tree.leaves(params[name]))) for name in names}
    total = lambda chosen: sum(size[name] for name in set(chosen))
    loops = [(loop.program.family.loop, loop.components) for loop in pipe.program.before]
    elsewhere = {name for _, components in loops for _, name in components}
    loops.append((pipe.family.loop, tuple((name, name) for name in names if name not in elsewhere)))
    stage = lambda own, loop: 2 if own in last else int(re.match(loop, own) is not None)
    stages = [[name for own, name in part if stage(own, loop) == i] for loop, part in loops for i in range(3)]
    least = max(map(total, stages))
    if least > budget:
        raise ValueError(
            f"One stage's weights take {least:,} bytes, the budget is {budget:,}; quantize them, split them over more "
            "devices, or offload layers by rules."
        )
    choices = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
    fitting = (stay for stay in choices if max(total([*stay, *stage]) for stage in stages) <= budget)
    stay = max(fitting, key=total)
    return {name: "device" if name in stay else "host" for name in names}


def returned() -> None:
    """Give back to the system what compiling took: half a gigabyte for Stable Diffusion, that glibc keeps otherwise."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def _bytes(leaf: Any) -> int:
    """Of an array, on one of the devices that it is split over."""
    place = getattr(leaf, "sharding", None)
    return math.prod(place.shard_shape(leaf.shape) if place else leaf.shape) * leaf.dtype.itemsize
