"""Weights are values: the kinds of thing that `params[name]` may be, and the two contractions that know them.

A weight is an array, or a small record that stands for one: `LoRA` (a frozen base and a low-rank update beside it),
`Int8` or `Float8` (quantised, one scale per output). Layers never ask which; they call `dot` or `conv`. So an adapter
is put on by `params | {name: LoRA(...)}` and taken off again by dropping it: no surgery on modules and no second model.
Records are pytrees, so `jit`, `grad` and `scan` over stacked layers see through them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import parallel
from flaxdiff.nn import kernels, strips, winograd

HOST = jax.memory.Space.Host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
    """A weight and a low-rank update: W + down · diag(scale) · up.

    Several updates are one whose ranks lie side by side. Where a batch holds several branches of each image side by
    side, what is given for each image holds for each of its branches.

    With magnitudes m it is DoRA, m · (W + Δ) / ‖W₀ + Δ‖, the norm of each output's inputs. As PEFT has it, the norm is
    a constant to gradients, and sees of several updates its own alone: W₀ is the weight without any.

    Attributes:
      base: the weight [..., in, out] (or HWIO of a convolution); may itself be quantised, or under another update.
      down: [..., in, rank] (a convolution: HWI, rank).
      up: [..., rank, out] (a convolution: 1, 1, rank, out).
      scale: a scalar, one for each rank [rank], or for each image and rank [B, rank]; stacked layers have an axis
        before. An argument of the compiled program, free to change between calls.
      magnitude: [..., out] of DoRA, or None.

    >>> w = LoRA(jnp.eye(2), jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.float32(0.5))
    >>> dot(jnp.ones((1, 2)), w)
    Array([[2., 2.]], dtype=float32)

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021; Liu et al., DoRA: Weight-Decomposed
    Low-Rank Adaptation, 2024.
    """

    base: Any
    down: jax.Array
    up: jax.Array
    scale: jax.Array
    magnitude: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight held in 8 bits: q · scale, with one scale per output channel.

    Attributes:
      q: `stored`, the shape of the weight; no further from zero than `top`.
      scale: [..., out], in the dtype of the computation.
    """

    q: jax.Array
    scale: jax.Array

    stored: ClassVar[Any]
    top: ClassVar[float]


@jax.tree_util.register_dataclass
class Int8(Quantized):
    """A weight in integers.

    >>> w = quantize(jnp.array([[1.0, -2.0], [0.5, 4.0]]))
    >>> w.q.dtype, w.scale.shape
    (dtype('int8'), (2,))
    """

    stored, top = jnp.int8, 127.0


@jax.tree_util.register_dataclass
class Float8(Quantized):
    """A weight in 8-bit floating point, four bits of exponent and three of mantissa (e4m3).

    >>> quantize(jnp.array([[1.0, -2.0], [0.5, 4.0]]), Float8).q.dtype
    dtype(float8_e4m3fn)

    Reference: Micikevicius et al., FP8 Formats for Deep Learning, 2022.
    """

    stored, top = jnp.float8_e4m3fn, 448.0


Weight = jax.Array | LoRA | Quantized


def quantize(weight: jax.Array, kind: type[Quantized] = Int8) -> Quantized:
    """The 8-bit form of a linear [..., in, out] or convolution HWIO weight: symmetric, one scale per output channel."""
    inner = _inner(weight)
    peak = jnp.max(jnp.abs(weight), inner, keepdims=True)
    scale = jnp.where(peak > 0, peak / kind.top, 1)
    q = weight.astype(jnp.float32) / scale.astype(jnp.float32)
    q = jnp.round(q) if jnp.issubdtype(kind.stored, jnp.integer) else q
    return kind(q.astype(kind.stored), scale.squeeze(inner))


def _inner(weight: jax.Array) -> tuple[int, ...]:
    """The axes of a linear or convolution weight that are summed over for an output."""
    return (-4, -3, -2) if weight.ndim >= 4 else (-2,)


def without_updates(weight: Weight) -> Weight:
    """The weight without the updates that are on it."""
    return without_updates(weight.base) if isinstance(weight, LoRA) else weight


def norm(weight: LoRA) -> jax.Array:
    """‖W₀ + Δ‖ of each output [..., out] in float32, of the weight with this update alone."""
    alone = dense(LoRA(without_updates(weight), weight.down, weight.up, weight.scale)).astype(jnp.float32)
    return jnp.sqrt(jnp.sum(alone**2, _inner(alone)))


def _magnified(y: jax.Array, weight: LoRA, inner: tuple[int, ...] = ()) -> jax.Array:
    """y [..., out], which is of a weight without its magnitudes, with them; `inner` are axes that these have not."""
    if weight.magnitude is None:
        return y
    length = jax.lax.stop_gradient(norm(weight))
    gain = weight.magnitude.astype(jnp.float32) / jnp.where(length > 0, length, 1)
    return y * jnp.expand_dims(gain, inner).astype(y.dtype)


def dense(weight: Weight) -> jax.Array:
    """The array that a weight stands for: updates merged in, quantised values expanded."""
    match weight:
        case LoRA(base, down, up, scale):
            whole = dense(base)
            down, up, scale = (a.astype(jnp.float32) for a in (down, up, scale))  # adapters may be finer than the base
            stack = max(down.ndim - 2, 0) if down.ndim < 4 else 0
            if scale.ndim > stack + 1:
                raise ValueError(f"A LoRA with a scale for each image, {list(scale.shape)}, is not one weight.")
            down *= scale.reshape(scale.shape[:stack] + (1,) * (down.ndim - stack - 1) + (scale.shape[stack:] or (1,)))
            update = jnp.matmul(down, up) if down.ndim < 4 else jnp.einsum("hwir,xyro->hwio", down, up)
            return _magnified(whole.astype(jnp.float32) + update, weight, _inner(whole)).astype(whole.dtype)
        case Quantized(q, scale):
            return q.astype(scale.dtype) * jnp.expand_dims(scale, range(scale.ndim - 1, q.ndim - 1))
        case _:
            return weight


def dtype(weight: Weight) -> jnp.dtype:
    """The dtype that the weight computes in."""
    match weight:
        case LoRA(base):
            return dtype(base)
        case Quantized(_, scale):
            return scale.dtype
        case _:
            return weight.dtype


def moved(weight: Weight, space: jax.memory.Space) -> Weight:
    """The weight in the memory of the device or of the host, divided among devices as before."""

    def put(a: jax.Array | jax.ShapeDtypeStruct) -> jax.Array | jax.ShapeDtypeStruct:
        if on_host(a) == (space == HOST):
            return a
        if isinstance(a, jax.ShapeDtypeStruct):
            return a.update(sharding=a.sharding.with_memory_kind("pinned_host" if space == HOST else "device"))
        return jax.device_put(a, space)

    return jax.tree.map(put, weight)


def on_host(a: Any) -> bool:
    """Whether an array, or the place of an abstract one, is in the memory of the host."""
    if isinstance(a, jax.ShapeDtypeStruct):
        return getattr(a.sharding, "memory_kind", None) == "pinned_host"
    return jax.typeof(a).memory_space == HOST


def dot(x: jax.Array, weight: Weight) -> jax.Array:
    """x · W for a linear weight [in, out] of any kind."""
    match weight:
        case LoRA(base, down, up, scale):
            return _magnified(dot(x, base) + _scaled(x @ down.astype(x.dtype), scale) @ up.astype(x.dtype), weight)
        case Quantized(q, scale):
            # libtpu 0.0.42 dies of such a product where it fuses it into the next one, of queries and keys
            return jax.lax.optimization_barrier(x @ q.astype(x.dtype)) * scale
        case _:
            return x @ weight


def conv(
    x: jax.Array,
    weight: Weight,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0)),
    doubled: bool = False,
) -> jax.Array:
    """Convolve channels-last x with an HWIO weight of any kind.

    Args:
      x: [B, H, W, in].
      weight: [kh, kw, in, out], where `in` is a share of the channels for as many groups of outputs.
      strides, padding: of the window, rows and columns.
      doubled: whether x counts as twice as high and wide, each pixel repeated; for a 3 x 3 window that keeps the size.
    """
    options = {"strides": strides, "padding": padding, "doubled": doubled}
    match weight:
        case LoRA(base, down, up, scale):
            low = conv(x, down.astype(x.dtype), **options)
            return _magnified(conv(x, base, **options) + dot(_scaled(low, scale), up[0, 0].astype(x.dtype)), weight)
        case Quantized(q, scale):
            return conv(x, q.astype(x.dtype), **options) * scale
        case _ if doubled:
            return _doubled(x, parallel.gathered(weight))
        case _ if weight.shape[:2] == strides == (1, 1) and not np.any(padding):
            return dot(x, weight[0, 0])
        case _:
            return _convolve(x, parallel.gathered(weight), strides, padding)


def _scaled(low: jax.Array, scale: jax.Array) -> jax.Array:
    """low [B, ..., rank] times a scalar, [rank], or [images, rank] where each image has some rows side by side."""
    scale = scale.astype(low.dtype)
    if scale.ndim < 2:
        return low * scale
    if low.shape[0] % scale.shape[0]:
        raise ValueError(f"A LoRA has scales for {scale.shape[0]} images, and the batch is {low.shape[0]}.")
    scale = jnp.repeat(scale, low.shape[0] // scale.shape[0], 0)
    return low * scale.reshape(len(scale), *(1,) * (low.ndim - 2), -1)


ON_CHIP = 2**26  # bytes of float32 that a TPU keeps beside its matrix unit


def _by_strips(x: jax.Array, weight: jax.Array, windows: Callable, plain: Callable) -> jax.Array:
    """What a plain function gives of both, on a TPU by these windows of the weight, a few rows at a time."""
    kernel = kernels.as_plain(lambda x, weight: strips.convolved(x, windows(weight)), plain)
    best = lambda x, weight: jax.lax.platform_dependent(x, weight, tpu=kernel, default=plain)
    return kernels.divisible(best, ["b y x i", "k l i o"], "b y x o")(x, weight)


def _convolve(x: jax.Array, weight: jax.Array, strides: tuple[int, int], padding: Sequence) -> jax.Array:
    """XLA's convolution, or matrix products where a platform is slow at it.

    A TPU first cuts so small a batch into pieces; a CPU reads the whole window again for every few pixels, and takes a
    window's gradient for a convolution with one as large as the picture.
    """
    dims = ("NHWC", "HWIO", "NHWC")
    groups = x.shape[-1] // weight.shape[2]
    plain = lambda x, weight: jax.lax.conv_general_dilated(
        x, weight, strides, padding, dimension_numbers=dims, feature_group_count=groups
    )
    if groups > 1:
        return plain(x, weight)
    products = lambda gather: lambda x, weight: _products(x, weight, strides, padding, gather)
    kh, kw, channels, features = weight.shape
    pixels, better = math.prod(x.shape[:3]) // math.prod(strides), {}
    same = strides == (1, 1) and all(sum(zeros) == size - 1 for zeros, size in zip(padding, (kh, kw)))
    if weight.shape[:2] == (3, 3) and same and np.all(np.array(padding) == 1) and strips.fit(x, features):
        return _by_strips(x, weight, lambda weight: [[weight]], plain)
    few, wide = x.shape[0] < strips.SEVERAL, min(channels, features) >= kernels.LANES
    if strides == (1, 1) and few and wide and pixels * features * 4 <= ON_CHIP:
        better["tpu"] = products(0)
    if same and winograd.fit(x, weight):
        better["cpu"] = lambda x, weight: winograd.convolved(x, weight, tuple(padding))
    elif kh * kw * features >= 8 * pixels:
        better["cpu"] = products(2)
    elif min(channels, features) >= winograd.WIDE:
        better["cpu"] = kernels.as_plain(plain, products(0 if strides == (1, 1) else 2))
    return jax.lax.platform_dependent(x, weight, **better, default=plain) if better else plain(x, weight)


def _products(x: jax.Array, weight: jax.Array, strides: tuple[int, int], padding: Sequence, gather: int) -> jax.Array:
    """A convolution as the sum over the window's taps of a shifted image times a matrix, accumulated in float32.

    Args:
      gather: along how many axes of the window, columns first, taps lie side by side in one longer product: fewer sums
        to read and write again for more copies of the image. Strides other than 1 want all of them gathered.
    """
    x, (kh, kw, _, features) = jnp.pad(x, ((0, 0), *padding, (0, 0))), weight.shape
    h, w = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    for axis, k, size, stride in ((2, kw, w, strides[1]), (1, kh, h, strides[0]))[:gather]:
        x = jnp.concatenate([jax.lax.slice_in_dim(x, i, i + size, stride, axis) for i in range(k)], -1)
    kh, kw = ((kh, kw), (kh, 1), (1, 1))[gather]
    weight = weight.reshape(kh, kw, -1, features)
    tap = lambda i, j: jnp.matmul(x[:, i : i + h, j : j + w], weight[i, j], preferred_element_type=jnp.float32)
    # one after the other: a TPU's compiler would keep all products of large pictures to add them up at the end
    add = lambda sums, product: jax.lax.optimization_barrier(sums) + product
    return functools.reduce(add, (tap(i, j) for i in range(kh) for j in range(kw))).astype(x.dtype)


def _doubled(x: jax.Array, weight: jax.Array) -> jax.Array:
    """A 3 x 3 convolution of x with each pixel repeated, without repeating any.

    An even row of the result sees the pixel above by the window's first row and its own by the sum of the other two; an
    odd row its own by the first two and the one below by the last. Likewise columns.
    """
    h, w = x.shape[1:3]

    def phases(window: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        first, second, third = jnp.split(window, 3, axis)
        return jnp.concatenate([first, second + third], axis), jnp.concatenate([first + second, third], axis)

    windows = lambda weight: [phases(row, 1) for row in phases(weight, 0)]

    def apart(x: jax.Array, weight: jax.Array) -> jax.Array:
        rows = []
        for i, row in enumerate(windows(weight)):
            columns = [_convolve(x, window, (1, 1), ((1 - i, i), (1 - j, j))) for j, window in enumerate(row)]
            rows.append(jnp.concatenate(columns, -1).reshape(len(x), h, 2 * w, -1))
        return jnp.stack(rows, 2).reshape(len(x), 2 * h, 2 * w, -1)

    return _by_strips(x, weight, windows, apart) if strips.fit(x, weight.shape[-1], 2) else apart(x, weight)
