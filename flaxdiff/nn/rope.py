"""Rotary position embedding: queries and keys turned by angles that grow with the place, so that their product depends
on how far apart two tokens are.

Reference: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flaxdiff.nn.kernels import LANES, as_plain, by_heads, divisible

Rope = tuple[jax.Array, jax.Array]  # cosines and sines [N, D], in float32


def rope(places: jax.Array, widths: Sequence[int], theta: float = 10_000.0) -> Rope:
    """The cosine and sine for each channel of a head, neighbours in pairs.

    Args:
      places: where each token is along each axis, [N, axes].
      widths: how many channels tell of each axis; their sum is D.
      theta: the slowest pair of an axis turns by nearly 1/theta from one place to the next.

    >>> cos, sin = rope(jnp.zeros((5, 2)), (4, 8))
    >>> cos.shape, float(sin.max())
    ((5, 12), 0.0)
    """
    omega = [np.repeat(theta ** (-np.arange(0, w, 2) / w), 2).astype(np.float32) for w in widths]
    parts = [jnp.asarray(places)[:, i, None].astype(jnp.float32) * w for i, w in enumerate(omega)]
    angle = jnp.concatenate(parts, -1)
    return jnp.cos(angle), jnp.sin(angle)


def frequencies(width: int, said: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """The angle by which each pair of channels turns from one place to the next, and a factor of cosines and sines.

    Args:
      width: channels that turn.
      said: transformers' `rope_parameters`: `rope_theta`, `rope_type`, and what scales angles for longer texts.

    Raises:
      ValueError: an unknown `rope_type`.

    >>> frequencies(4, {"rope_theta": 100.0})[0]
    array([1. , 0.1], dtype=float32)

    Reference: Peng et al., YaRN: Efficient Context Window Extension of Large Language Models, 2023.
    """
    theta, kind = said["rope_theta"], said.get("rope_type", "default")
    omega, factor = theta ** (-np.arange(0, width, 2) / width), said.get("factor", 1.0)
    share, scale = np.zeros(len(omega)), 1.0  # how much of each angle stays as it is
    known = ("default", "mrope", "dynamic", "linear", "llama3", "yarn")
    if kind not in known:
        raise ValueError(f"rope_type={kind!r} is not known; use one of {list(known)}.")
    if kind in ("default", "mrope", "dynamic"):  # the last changes what is longer than the network was trained for
        return omega.astype(np.float32), scale
    if kind == "llama3":  # slow ones are divided by the factor, fast ones are not
        low, high = said["low_freq_factor"], said["high_freq_factor"]
        turned = said["original_max_position_embeddings"] * omega / (2 * math.pi)
        share = np.clip((turned - low) / (high - low), 0, 1)
    if kind == "yarn":
        longest = said["original_max_position_embeddings"]
        at = lambda turned: width * math.log(longest / (turned * 2 * math.pi)) / (2 * math.log(theta))
        low, high = at(said.get("beta_fast") or 32), at(said.get("beta_slow") or 1)
        low, high = (math.floor(low), math.ceil(high)) if said.get("truncate", True) else (low, high)
        low, high = max(low, 0), min(high, width - 1)
        share = 1 - np.clip((np.arange(len(omega)) - low) / max(high - low, 1e-3), 0, 1)
        larger = lambda by: 0.1 * (by or 0) * math.log(factor) + 1 if factor > 1 else 1.0
        both = said.get("mscale") and said.get("mscale_all_dim")
        plain = larger(said["mscale"]) / larger(said["mscale_all_dim"]) if both else larger(1)
        scale = plain if said.get("attention_factor") is None else said["attention_factor"]
    return (omega * (share + (1 - share) / factor)).astype(np.float32), scale


def turns(
    places: jax.Array,
    omega: np.ndarray,
    width: int,
    halves: bool = True,
    sections: Sequence[int] | None = None,
    factor: float = 1.0,
) -> Rope:
    """The cosines and sines of a head [..., N, D], those of channels that do not turn being 1 and 0.

    Args:
      places: where each token stands, [N] or [B, N]; or along three axes, [3, B, N].
      omega: as of `frequencies`, [D / 2]; fewer, where neighbours make the pairs.
      width: channels of a head, D.
      halves: as of `rotate`.
      sections: how many pairs of channels each axis has.
      factor: of both.

    >>> cos, sin = turns(jnp.arange(5), np.ones(2, np.float32), 6, halves=False)
    >>> cos.shape, sin[0].max(), cos[:, 4:].min()
    ((5, 6), Array(0., dtype=float32), Array(1., dtype=float32))
    """
    if halves and 2 * len(omega) != width:
        raise ValueError(f"Heads of {width} channels turn by halves as a whole, not {2 * len(omega)} of them.")
    places = jnp.asarray(places, jnp.float32)
    if places.ndim == 3:
        axes = np.repeat(np.arange(len(sections)) % 3, sections)
        places = jnp.moveaxis(places[axes], 0, -1)
    else:
        places = places[..., None]
    angle = places * omega
    both = lambda a: jnp.concatenate([a, a], -1) if halves else jnp.repeat(a, 2, -1)
    still = [(0, 0)] * (angle.ndim - 1) + [(0, width - 2 * len(omega))]
    cos, sin = (factor * both(wave(angle)) for wave in (jnp.cos, jnp.sin))
    return jnp.pad(cos, still, constant_values=1.0), jnp.pad(sin, still)


def rotate(x: jax.Array, turn: Rope | None, halves: bool = False) -> jax.Array:
    """Queries or keys [B, N, H, D] turned; unchanged without a turn.

    A channel turns with its neighbour; `halves`: with the one half a head further.
    """
    if turn is None:
        return x
    cos, sin = (a[..., None, :] for a in turn)
    # (x₀, x₁) -> (-x₁, x₀): as a product, for a TPU moves nothing along the channels as fast as its matrix unit
    pair, every = np.array([[0, 1], [-1, 0]]), np.eye(x.shape[-1] // 2)
    swap = np.kron(pair, every) if halves else np.kron(every, pair)
    h = x.astype(jnp.float32)
    across = jnp.einsum("bnhd,de->bnhe", x, swap.astype(x.dtype), preferred_element_type=jnp.float32)
    return (h * cos + across * sin).astype(x.dtype)


# --- in one pass on a TPU --------------------------------------------------------------------------------------------


def normalised(x: jax.Array, weight: jax.Array, turn: Rope | None = None, eps: float = 1e-6) -> jax.Array:
    """Queries or keys [B, N, H, D] normalised by their root mean square, scaled by a weight [D], and turned.

    XLA moves them some seven times for that, in float32; a kernel reads and writes them once on a TPU. What turns there
    has heads of LANES channels, and they come to lie one behind the other, see nn/flash.py.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> normalised(x, jnp.full(4, 2.0), rope(jnp.zeros((3, 1)), (4,)))[0, 0, 0].round(3)
    Array([2., 2., 2., 2.], dtype=float32)
    """
    either = as_plain(functools.partial(_anywhere, eps), functools.partial(_plainly, eps))
    return either(x, weight, *(turn or ()))


def rms(x: jax.Array, weight: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / √(mean of x² over the last axis + eps), scaled by a weight [D]; in float32, then as x was."""
    h = x.astype(jnp.float32)
    return (h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps) * weight.astype(jnp.float32)).astype(x.dtype)


def _plainly(eps: float, x: jax.Array, weight: jax.Array, *turn: jax.Array) -> jax.Array:
    return rotate(rms(x, weight, eps), turn or None)


def _block(eps: float, x, weight, *rest) -> None:
    """Some heads of some tokens, [1, tokens, heads · D] -> the same; or, turned, [1, heads, tokens, D]."""
    (*turn, out), d = rest, weight.shape[-1]
    for i in range(x.shape[-1] // d):
        here = 0, slice(None), slice(i * d, (i + 1) * d)
        h = x[here].astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps) * weight[...]
        if turn:
            cos, sin = turn
            even = jax.lax.broadcasted_iota(jnp.int32, cos.shape, 1) % 2 == 0
            h = h * cos[...] + jnp.where(even, -pltpu.roll(h, d - 1, 1), pltpu.roll(h, 1, 1)) * sin[...]
        out[(0, i) if turn else here] = h.astype(out.dtype)


def _by_kernel(eps: float, interpret: bool, x: jax.Array, weight: jax.Array, *turn: jax.Array) -> jax.Array:
    b, n, heads, d = x.shape
    grid, of_tokens, of_heads = by_heads(b, n, heads, d)
    of_places = pl.BlockSpec((of_tokens.block_shape[1], d), lambda b, i, h: (i, 0))
    made = pl.pallas_call(
        functools.partial(_block, eps),
        jax.ShapeDtypeStruct((b, heads, n, d) if turn else (b, n, heads * d), x.dtype),
        grid=grid,
        in_specs=[of_tokens, pl.BlockSpec((1, d), lambda b, i, h: (0, 0)), *[of_places] * len(turn)],
        out_specs=of_heads if turn else of_tokens,
        cost_estimate=pl.CostEstimate(flops=8 * x.size, bytes_accessed=2 * x.nbytes, transcendentals=b * n * heads),
        interpret=interpret,
    )(x.reshape(b, n, heads * d), weight.astype(jnp.float32)[None], *turn)
    return made.swapaxes(1, 2) if turn else made.reshape(x.shape)


def _where_best(eps: float, x: jax.Array, weight: jax.Array, *turn: jax.Array) -> jax.Array:
    plainly = functools.partial(_plainly, eps)
    if turn and (x.shape[-1] != LANES or x.shape[1] % 8):
        return plainly(x, weight, *turn)
    kernel = functools.partial(_by_kernel, eps, False)
    return jax.lax.platform_dependent(x, weight, *turn, tpu=kernel, default=plainly)


def _anywhere(eps: float, *arrays: jax.Array) -> jax.Array:
    takes = ["b t h d", "d", "t d", "t d"][: len(arrays)]
    return divisible(functools.partial(_where_best, eps), takes, "b t h d")(*arrays)
