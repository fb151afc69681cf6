"""Qwen2_5_VLForConditionalGeneration: a language model that reads pictures among the words.

Patches of a picture attend within windows, and in a few layers to all others; four of them at a time become a token of
the text, in the place of one that says a picture is there. Places have three axes, of which a text moves along all.

Reference: Bai et al., Qwen2.5-VL Technical Report, 2025.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, param, part
from flaxdiff.models.decoder import GatedMLP
from flaxdiff.models.language_model import ForConditionalGeneration, LlamaModel, Qwen2Config
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import attention, split_heads
from flaxdiff.nn.layers import Linear, RMSNorm, uniform, value
from flaxdiff.nn.rope import Rope, frequencies, rotate, turns
from flaxdiff.nn.stack import run, stack


@dataclasses.dataclass(frozen=True)
class Qwen25VLVisionConfig(Config):
    """transformers' keys and defaults, as far as the network reads them."""

    depth: int = 32
    hidden_size: int = 3584
    hidden_act: str = "silu"
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def unit(self) -> int:
        """Pixels along a side of what becomes a token of the text."""
        return self.patch_size * self.spatial_merge_size

    @property
    def window(self) -> int:
        """Units along a side of a window."""
        return self.window_size // self.unit


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig(Qwen2Config):
    """transformers' keys and defaults, as far as the network reads them; those of the half for texts lie beside."""

    theta = 1_000_000.0

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int | None = 8
    rms_norm_eps: float = 1e-5
    max_window_layers: int = 80
    image_token_id: int = 151655
    vision_config: Any = None  # (key, value) pairs

    @property
    def vision(self) -> Qwen25VLVisionConfig:
        """The settings of the half for pictures."""
        return part(self, Qwen25VLVisionConfig, self.vision_config)


# --- pictures --------------------------------------------------------------------------------------------------------


def windowed(x: np.ndarray | jax.Array, unit: int, window: int) -> np.ndarray | jax.Array:
    """What lies on a grid [B, H, W, …] by windows, units and the points of one: [B, windows, window², unit², …].

    The grid ends with whole windows.

    >>> windowed(np.arange(16).reshape(1, 4, 4), 2, 2)[0, 0].tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    """
    b, h, w, *rest = x.shape
    side = unit * window
    x = x.reshape(b, h // side, window, unit, w // side, window, unit, *rest)
    x = x.transpose(0, 1, 4, 2, 5, 3, 6, *range(7, x.ndim))
    return x.reshape(b, -1, window**2, unit**2, *rest)


class FilmPatches(nnx.Module):
    """Patches of pictures, as of a film that stands still: [..., P, P, C] -> [..., D]."""

    def __init__(self, c: Qwen25VLVisionConfig):
        shape = (c.hidden_size, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
        self.proj = Kernel(shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = weights.dense(value(self.proj.weight))
        return jnp.einsum("...hwc,dcthw->...d", x.astype(kernel.dtype), kernel)


class Kernel(nnx.Module):
    """The weight of a convolution, laid out as in its file."""

    def __init__(self, shape: tuple[int, ...]):
        self.weight = param(shape, "raw", uniform(int(np.prod(shape[1:]))))


class VisionAttention(nnx.Module):
    """Attention of patches within their windows, or to all of a picture."""

    def __init__(self, c: Qwen25VLVisionConfig):
        self.qkv, self.proj = Linear(c.hidden_size, 3 * c.hidden_size), Linear(c.hidden_size, c.hidden_size)
        self.heads, self.window = c.num_heads, (c.window * c.spatial_merge_size) ** 2

    def __call__(self, x: jax.Array, full: jax.Array, turn: Rope, there: np.ndarray) -> jax.Array:
        """[B, N, D], of which those that are `there` [N] may be seen."""
        q, k, v = (split_heads(a, self.heads) for a in jnp.split(self.qkv(x), 3, -1))
        q, k = rotate(q, turn, halves=True), rotate(k, turn, halves=True)

        def near(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            apart = [a.reshape(-1, self.window, *a.shape[2:]) for a in (q, k, v)]
            mask = np.tile(there.reshape(-1, self.window), (len(x), 1))[:, None, None]
            return attention(*apart, mask=None if there.all() else jnp.asarray(mask)).reshape(q.shape)

        everywhere = lambda q, k, v: attention(q, k, v, mask=None if there.all() else jnp.asarray(there))
        return self.proj(jax.lax.cond(full, everywhere, near, q, k, v).reshape(x.shape))


class VisionBlock(nnx.Module):
    """Attention and feed-forward, each added to what it reads normalised."""

    def __init__(self, c: Qwen25VLVisionConfig):
        self.norm1, self.norm2 = RMSNorm(c.hidden_size), RMSNorm(c.hidden_size)
        self.attn = VisionAttention(c)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, c.hidden_act, bias=True)

    def __call__(self, x: jax.Array, full: jax.Array, turn: Rope, there: np.ndarray) -> jax.Array:
        x = x + self.attn(self.norm1(x), full, turn, there)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """The patches of a unit, normalised, as one token: [..., U, D] -> [..., E]."""

    def __init__(self, c: Qwen25VLVisionConfig):
        width = c.hidden_size * c.spatial_merge_size**2
        self.ln_q = RMSNorm(c.hidden_size)
        self.mlp = nnx.List([Linear(width, width), None, Linear(width, c.out_hidden_size)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.ln_q(x).reshape(*x.shape[:-2], -1)
        return self.mlp[2](ACTIVATIONS["gelu"](self.mlp[0](x)))


class VisionTransformer(nnx.Module):
    """Pictures [B, H, W, C] -> tokens of the text [B, H W / unit², E], row after row."""

    def __init__(self, c: Qwen25VLVisionConfig):
        self.patch_embed, self.merger = FilmPatches(c), PatchMerger(c)
        self.blocks = stack(lambda: VisionBlock(c), c.depth, c.scan_layers)
        self.config = c

    def __call__(self, pixels: jax.Array) -> jax.Array:
        c, (b, height, width) = self.config, pixels.shape[:3]
        if height % c.unit or width % c.unit:
            raise ValueError(f"Pictures of {height} x {width} pixels; give multiples of {c.unit}.")
        h, w, side = height // c.patch_size, width // c.patch_size, c.window * c.spatial_merge_size
        fill = ((0, -h % side), (0, -w % side))  # up to whole windows
        order = lambda a: windowed(a, c.spatial_merge_size, c.window)
        x = pixels.reshape(b, h, c.patch_size, w, c.patch_size, -1).swapaxes(2, 3)
        x = self.patch_embed(order(jnp.pad(x, ((0, 0), *fill, *((0, 0),) * 3))))
        shape, x = x.shape, x.reshape(b, -1, x.shape[-1])

        on_grid = lambda a: order(np.pad(a, fill)[None]).reshape(-1)
        places = np.stack([on_grid(a) for a in np.indices((h, w))])[:, None]
        there = on_grid(np.ones((h, w), bool))
        head = c.hidden_size // c.num_heads
        omega, _ = frequencies(head // 2, {"rope_theta": 10_000.0})
        turn = turns(places, np.tile(omega, 2), head, sections=(head // 4,) * 2)
        full = jnp.asarray(np.isin(np.arange(c.depth), c.fullatt_block_indexes))
        x = run(self.blocks, x, full, turn, there)

        units = (h // c.spatial_merge_size, w // c.spatial_merge_size)
        number = np.arange(1, 1 + np.prod(units)).reshape(units)  # of each unit, row after row; 0 where there is none
        number = np.pad(number, [(0, -n % c.window) for n in units])[None]
        number = windowed(number, 1, c.window).reshape(-1)
        tokens = self.merger(x.reshape(shape)).reshape(b, len(number), -1)
        return tokens[:, np.argsort(number)[-units[0] * units[1] :]]


# --- pictures among words --------------------------------------------------------------------------------------------


def positions(
    ids: np.ndarray, mask: np.ndarray, grids: Sequence[tuple[int, int]], image_token_id: int = 151655
) -> np.ndarray:
    """Where tokens stand in time, row and column, on the host: int32 [3, B, N].

    Args:
      ids, mask: int [B, N] and bool [B, N], texts in which pictures have a token for each unit.
      grids: rows and columns of units of each picture, in the order in which they stand in the texts.
      image_token_id: the token that says so.

    >>> positions(np.array([[5, 9, 9, 6]]), np.ones((1, 4), bool), [(1, 2)], image_token_id=9)[:, 0].tolist()
    [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    """
    found, left = np.zeros((3, *ids.shape), np.int32), iter(grids)
    for row, (words, seen) in enumerate(zip(ids, mask)):
        where, at, i = np.flatnonzero(seen), 0, 0
        while i < len(where):
            if words[where[i]] == image_token_id:
                h, w = next(left)
                place, step = np.stack([np.zeros((h, w), int), *np.indices((h, w))]).reshape(3, -1), max(h, w)
            else:
                place, step = np.zeros((3, 1), int), 1
            n = place.shape[1]
            found[:, row, where[i : i + n]] = at + place
            at, i = at + step, i + n
    return found


class Qwen2_5_VLForConditionalGeneration(ForConditionalGeneration):
    """Qwen 2.5 VL, without what would tell the next token.

    >>> import flaxdiff
    >>> vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32)
    >>> spec = Qwen2_5_VLForConditionalGeneration.from_config(dict(
    ...     vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    ...     num_key_value_heads=2, image_token_id=9, vision_config=vision))
    >>> params, ids = flaxdiff.init(spec, jax.random.key(0)), jnp.array([[5, 9, 9, 6]])
    >>> tokens = flaxdiff.apply(spec, params, jnp.zeros((1, 28, 56, 3)), method="look")
    >>> tokens.shape, flaxdiff.apply(spec, params, ids, pictures=tokens).last_hidden_state.shape
    ((1, 2, 32), (1, 4, 32))
    """

    config_class, model_type, half = Qwen25VLConfig, "qwen2_5_vl", "qwen2_5_vl_text"
    whole = ("image_token_id", "vision_config")
    renames = (*ForConditionalGeneration.renames, (r"^model\.visual\.", "visual."))
    ignored = LlamaModel.ignored

    def __init__(self, config: Qwen25VLConfig):
        super().__init__(config)
        self.visual = VisionTransformer(config.vision)

    def look(self, pixels: jax.Array) -> jax.Array:
        """Normalised pictures [B, H, W, 3] as tokens of a text, [B, M, D]."""
        return self.visual(pixels)
