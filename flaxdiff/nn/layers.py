"""The layers that networks are made of: linear, convolution, normalisation, embedding table.

Each holds leaves named `weight` and `bias`, as PyTorch names them, declared by `core.param` with the kind that tells
the checkpoint converter how a file lays them out. Computation runs in the dtype of the weights; normalisation in
float32.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flaxdiff import weights
from flaxdiff.core import param

PRODUCTS = "products"  # the results of linear layers and convolutions, for those who keep them and not the rest


def value(variable: nnx.Param) -> weights.Weight:
    """The weight that a parameter holds, of whatever kind; one that lives on the host is copied to the device."""
    return weights.moved(variable.get_value(), jax.memory.Space.Device)


def uniform(fan_in: int):
    """U(-1/√fan_in, 1/√fan_in): PyTorch's initial distribution of linear and convolution layers."""
    return _Uniform(1 / math.sqrt(fan_in))


class _Uniform(float):  # hashable and equal by value, as the structure of a module must be
    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, minval=-float(self), maxval=float(self))


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """N(0, 0.02²), the initial distribution of embedding tables."""
    return 0.02 * jax.random.normal(key, shape)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """All ones, whatever the key."""
    return jnp.ones(shape)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """All zeros, whatever the key."""
    return jnp.zeros(shape)


class Linear(nnx.Module):
    """y = x W + b with W [in, out]."""

    def __init__(self, fan_in: int, fan_out: int, bias: bool = True):
        self.weight = param((fan_in, fan_out), "linear", uniform(fan_in))
        self.bias = param((fan_out,), "raw", uniform(fan_in)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = checkpoint_name(weights.dot(x, value(self.weight)), PRODUCTS)
        return y if self.bias is None else y + value(self.bias)


class Conv(nnx.Module):
    """A two-dimensional convolution of [B, H, W, C] with W [kh, kw, in, out]; `padding` as PyTorch counts it.

    With `groups`, each reads its own share of the channels, and W has as many less.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        kernel: int | tuple[int, int] = 3,
        stride: int = 1,
        padding: int | tuple[tuple[int, int], ...] = 1,
        bias: bool = True,
        groups: int = 1,
    ):
        rows, columns = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        fan_in //= groups
        self.weight = param((rows, columns, fan_in, fan_out), "conv", uniform(fan_in * rows * columns))
        self.bias = param((fan_out,), "raw", uniform(fan_in * rows * columns)) if bias else None
        self.stride, self.padding = stride, ((padding, padding),) * 2 if isinstance(padding, int) else padding

    def __call__(self, x: jax.Array, doubled: bool = False) -> jax.Array:
        """`doubled`: see `weights.conv`."""
        strides = (self.stride, self.stride)
        y = weights.conv(x, value(self.weight), strides=strides, padding=self.padding, doubled=doubled)
        y = checkpoint_name(y, PRODUCTS)
        return y if self.bias is None else y + value(self.bias)


class Enlarge(nnx.Module):
    """Each position becomes a square of its own: a transposed convolution whose stride is its size."""

    def __init__(self, channels: int, factor: int, bias: bool = True):
        self.weight = param((factor, factor, channels, channels), "conv", uniform(channels * factor**2))
        self.bias = param((channels,), "raw", uniform(channels * factor**2)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, factor · H, factor · W, C]."""
        (b, h, w, c), weight = x.shape, weights.dense(value(self.weight))
        y = jnp.einsum("bhwi,kloi->bhkwlo", x, weight).reshape(b, h * weight.shape[0], w * weight.shape[1], c)
        return y if self.bias is None else y + value(self.bias)


class GroupNorm(nnx.Module):
    """Normalise the channels of [B, ..., C] in groups, over all positions."""

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5):
        if channels % groups:
            raise ValueError(
                f"GroupNorm: {channels} channels do not divide into {groups} groups; change norm_num_groups."
            )
        self.weight, self.bias = param((channels,), "norm", ones), param((channels,), "norm", zeros)
        self.groups, self.eps = groups, eps

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """x, or parts of it that lie side by side; what is known of a part from elsewhere is not worked out again."""
        # Both moments in one pass over positions, then over the few channels of a group; x ← a x + b in another pass.
        hs = [part.astype(jnp.float32).reshape(part.shape[0], -1, part.shape[-1]) for part in parts]
        first = jnp.concatenate([h.mean(1) for h in hs], -1)
        second = jnp.concatenate([jnp.square(h).mean(1) for h in hs], -1)
        grouped = lambda moment: moment.reshape(moment.shape[0], self.groups, -1).mean(-1, keepdims=True)
        mean, variance = _moments(grouped(first), grouped(second))
        x = jnp.concatenate(parts, -1)
        per_channel = lambda moment: jnp.repeat(moment[..., 0], x.shape[-1] // self.groups, -1)[:, None]
        h = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
        return _scaled(self, h, per_channel(mean), per_channel(variance), x)


def _moments(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance from the means of x and x²."""
    return first, jnp.maximum(second - jnp.square(first), 0)


def _scaled(
    norm: nnx.Module, h: jax.Array, mean: jax.Array, variance: jax.Array, x: jax.Array, around: float = 0.0
) -> jax.Array:
    """(h - mean) / √(variance + eps), scaled and shifted where the norm does, in float32; then as x was."""
    given = lambda variable, other: other if variable is None else value(variable).astype(jnp.float32)
    weight, bias = given(norm.weight, 1.0), given(norm.bias, 0.0)
    a = (around + weight) * jax.lax.rsqrt(variance + norm.eps)
    return (h * a + (bias - mean * a)).reshape(x.shape).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalise the last axis; `affine`: then scale it, and with `bias` shift it."""

    def __init__(self, channels: int, eps: float = 1e-5, affine: bool = True, bias: bool = True):
        self.weight = param((channels,), "norm", ones) if affine else None
        self.bias = param((channels,), "norm", zeros) if affine and bias else None
        self.eps = eps

    @staticmethod
    def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of the last axis, in float32."""
        h = x.astype(jnp.float32)
        return _moments(h.mean(-1, keepdims=True), jnp.square(h).mean(-1, keepdims=True))

    def __call__(self, x: jax.Array, moments: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        """`moments`, where they are known already."""
        return _scaled(self, x.astype(jnp.float32), *(moments or self.moments(x)), x)


class RMSNorm(nnx.Module):
    """x / √(mean of x² over the last axis + eps); `affine`: then scaled, by `around` more than the weights say.

    Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """

    def __init__(self, channels: int, eps: float = 1e-6, affine: bool = True, around: float = 0.0):
        self.weight = param((channels,), "norm", zeros if around else ones) if affine else None
        self.bias, self.eps, self.around = None, eps, around

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x.astype(jnp.float32)
        return _scaled(self, h, jnp.zeros(()), jnp.square(h).mean(-1, keepdims=True), x, self.around)


class Embedding(nnx.Module):
    """A table of vectors, looked up by integer id."""

    def __init__(self, entries: int, width: int):
        self.weight = param((entries, width), "embedding", normal)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(value(self.weight), ids, axis=0)
