"""InceptionV3 as it measures distances between sets of pictures: the network of FID and KID.

Its weights were trained in TensorFlow, whose average pooling does not count the border and whose last block takes the
largest neighbour instead; published ports to PyTorch, `pt_inception-2015-12-05`, agree on the names read here.

Reference: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2015.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdiff.core import Config, Model, param
from flaxdiff.nn.layers import Conv, ones, value, zeros

# A convolution is (name, channels, kernel[, stride]), and a branch some of them in a row, perhaps after a pooling; two
# in a tuple read the same and are put side by side.
STEM = (
    (("Conv2d_1a_3x3", 32, 3, 2), ("Conv2d_2a_3x3", 32, 3, 1, 0), ("Conv2d_2b_3x3", 64, 3), "max"),
    (("Conv2d_3b_1x1", 80, 1), ("Conv2d_4a_3x3", 192, 3, 1, 0), "max"),
)


def _a(pool: int) -> tuple:
    double = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
    five = (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5))
    return (("branch1x1", 64, 1),), five, double, ("average", ("branch_pool", pool, 1))


def _b() -> tuple:
    double = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2))
    return (("branch3x3", 384, 3, 2),), double, ("max",)


def _c(c: int) -> tuple:
    row, column = (1, 7), (7, 1)
    once = (("branch7x7_1", c, 1), ("branch7x7_2", c, row), ("branch7x7_3", 192, column))
    kernels = enumerate((1, column, row, column, row), 1)
    twice = tuple((f"branch7x7dbl_{i}", 192 if i == 5 else c, kernel) for i, kernel in kernels)
    return (("branch1x1", 192, 1),), once, twice, ("average", ("branch_pool", 192, 1))


def _d() -> tuple:
    kernels = enumerate((1, (1, 7), (7, 1)), 1)
    seven = (*((f"branch7x7x3_{i}", 192, kernel) for i, kernel in kernels), ("branch7x7x3_4", 192, 3, 2))
    return (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)), seven, ("max",)


def _e(pooling: str) -> tuple:
    both = lambda name: ((f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1)))
    three = (("branch3x3_1", 384, 1), both("branch3x3_2"))
    double = (("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), both("branch3x3dbl_3"))
    return (("branch1x1", 320, 1),), three, double, (pooling, ("branch_pool", 192, 1))


BLOCKS = {
    **{"Mixed_5b": _a(32), "Mixed_5c": _a(64), "Mixed_5d": _a(64)},
    **{"Mixed_6a": _b(), "Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192)},
    **{"Mixed_7a": _d(), "Mixed_7b": _e("average"), "Mixed_7c": _e("largest")},
}


def pool(x: jax.Array, kind: str) -> jax.Array:
    """Of 3 x 3 neighbours: "max" of every second, "largest" or "average" of each, which leave the border out."""
    if kind == "average":
        total = jax.lax.reduce_window(x, jnp.zeros((), x.dtype), jax.lax.add, (1, 3, 3, 1), (1,) * 4, "SAME")
        rows, columns = (np.convolve(np.ones(side), np.ones(3), "same") for side in x.shape[1:3])
        return total / np.outer(rows, columns)[..., None].astype(x.dtype)
    strides, padding = ((1, 2, 2, 1), "VALID") if kind == "max" else ((1,) * 4, "SAME")
    return jax.lax.reduce_window(x, jnp.array(-jnp.inf, x.dtype), jax.lax.max, (1, 3, 3, 1), strides, padding)


class BatchNorm(nnx.Module):
    """Channels normalised by the moments of the training data."""

    def __init__(self, channels: int):
        self.weight, self.running_var = param((channels,), "norm", ones), param((channels,), "norm", ones)
        self.bias, self.running_mean = param((channels,), "norm", zeros), param((channels,), "norm", zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        weight, bias, mean, variance = map(value, (self.weight, self.bias, self.running_mean, self.running_var))
        a = weight * jax.lax.rsqrt(variance + 0.001)
        return x * a + (bias - mean * a)


class BasicConv2d(nnx.Module):
    """Convolve, normalise, and drop what is below zero."""

    def __init__(
        self, fan_in: int, fan_out: int, kernel: int | tuple[int, int], stride: int = 1, pad: int | None = None
    ):
        sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        pads = [(side // 2 if stride == 1 else 0) if pad is None else pad for side in sides]
        self.conv = Conv(fan_in, fan_out, sides, stride, tuple((p, p) for p in pads), bias=False)
        self.bn = BatchNorm(fan_out)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.bn(self.conv(x)))


class Branches(nnx.Module):
    """What the branches of a block make of the same, side by side."""

    def __init__(self, channels: int, branches: tuple):
        self.branches, self.channels = branches, sum(self.build(channels, branch) for branch in branches)

    def build(self, channels: int, steps: tuple) -> int:
        """Give the convolutions of a branch their attributes; the channels that it ends with."""
        for step in steps:
            both = step if isinstance(step[0], tuple) else (step,)
            if isinstance(step, str):
                continue
            for name, *size in both:
                setattr(self, name, BasicConv2d(channels, *size))
            channels = sum(size for _, size, *_ in both)
        return channels

    def run(self, x: jax.Array, steps: tuple) -> jax.Array:
        """[B, H, W, C] through the steps of one branch."""
        for step in steps:
            if isinstance(step, str):
                x = pool(x, step)
            elif isinstance(step[0], tuple):
                x = jnp.concatenate([getattr(self, name)(x) for name, *_ in step], -1)
            else:
                x = getattr(self, step[0])(x)
        return x

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self.run(x, branch) for branch in self.branches], -1)


@dataclasses.dataclass(frozen=True)
class InceptionV3Config(Config):
    """Nothing to choose: there is one set of weights."""


class InceptionV3(Branches, Model):
    """Pictures -> 2,048 features of each, whose statistics FID and KID compare.

    >>> import flaxdiff
    >>> spec = InceptionV3.from_config({})
    >>> sum(leaf.size for leaf in flaxdiff.abstract(spec).values())
    21820000
    """

    config_class = InceptionV3Config
    library = None
    ignored = r"fc\.(weight|bias)|.*\.num_batches_tracked"

    def __init__(self, config: InceptionV3Config):
        channels = 3
        for steps in STEM:
            channels = self.build(channels, steps)
        for name, branches in BLOCKS.items():
            setattr(self, name, block := Branches(channels, branches))
            channels = block.channels

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[B, 299, 299, 3] as of `images.inception_pixels` -> [B, 2048]."""
        for steps in STEM:
            pixels = self.run(pixels, steps)
        for name in BLOCKS:
            pixels = getattr(self, name)(pixels)
        return pixels.mean((1, 2))
