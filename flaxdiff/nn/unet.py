"""Residual blocks and the three shapes of stage (down, middle, up) that every convolutional network of the field
shares.

`UNet2DModel`, `UNet2DConditionModel` and both halves of `AutoencoderKL` are these, differing in whether a time
embedding comes in, which attention (if any) follows each residual block, and whether the down stages hand skips to
the up stages. Names are diffusers': `resnets.0.conv1`, `attentions.0`, `downsamplers.0.conv`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.core import note
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.freeu import reweighed
from flaxdiff.nn.layers import Conv, GroupNorm, Linear
from flaxdiff.nn.stack import remat

Each = Iterator[Any]  # what each block in turn reads beside its input: residual ones the time, attentions a context
NONE: Each = itertools.repeat(None)
MakeAttention = Callable[[int], nnx.Module] | None  # channels -> a module called with (x, context)


class ResnetBlock2D(nnx.Module):
    """x + conv(act(norm(conv(act(norm(x))) + time))), the shortcut projected when the channels change.

    Args:
      fan_in, fan_out: channels.
      temb: channels of the time embedding; None where there is none.
      groups, eps: of the normalisations.
      act_fn: name of the activation.
      scale_shift: the time embedding scales and shifts the second normalisation instead of being added before it.
      groups_out: of the second normalisation, where they are not those of the first.
      resample: "down" halves height and width on the way by means of four, "up" doubles them by repetition.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        temb: int | None,
        groups: int,
        eps: float,
        act_fn: str = "silu",
        scale_shift: bool = False,
        resample: str | None = None,
        groups_out: int | None = None,
    ):
        self.norm1, self.conv1 = GroupNorm(fan_in, groups, eps), Conv(fan_in, fan_out)
        self.time_emb_proj = None if temb is None else Linear(temb, fan_out * (1 + scale_shift))
        self.norm2, self.conv2 = GroupNorm(fan_out, groups_out or groups, eps), Conv(fan_out, fan_out)
        self.conv_shortcut = Conv(fan_in, fan_out, kernel=1, padding=0) if fan_in != fan_out else None
        self.act_fn, self.scale_shift, self.resample = act_fn, scale_shift, resample

    def time(self, temb: jax.Array) -> jax.Array:
        """What this block makes of an embedding of time [..., T]."""
        return self.time_emb_proj(ACTIVATIONS[self.act_fn](temb))

    def __call__(self, *parts: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """[B, H, W, in], in one or several parts side by side, and `time` of [B, T] -> [B, H, W, out]."""
        act, x = ACTIVATIONS[self.act_fn], jnp.concatenate(parts, -1)
        h = act(self.norm1(*parts))
        if self.resample == "down":
            x, h = _halved(x), _halved(h)
        h = self.conv1(h, doubled=self.resample == "up")
        x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2) if self.resample == "up" else x
        if time is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = jnp.split(time[:, None, None], 2, -1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time[:, None, None])
        h = self.conv2(act(h))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


def _halved(x: jax.Array) -> jax.Array:
    """The mean of each two by two pixels."""
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


class Downsample2D(nnx.Module):
    """Halve height and width by a strided convolution; `padding` 0 means one row and column after the last."""

    def __init__(self, channels: int, padding: int, fan_out: int | None = None):
        self.conv = Conv(channels, fan_out or channels, stride=2, padding=padding or ((0, 1), (0, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Double height and width by repetition (or reach a given size), then convolve."""

    def __init__(self, channels: int):
        self.conv = Conv(channels, channels)

    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        h, w = x.shape[1:3]
        if size in (None, (2 * h, 2 * w)):
            return self.conv(x, doubled=True)
        # the nearest source of each row and column, as PyTorch finds it
        return self.conv(x[:, jnp.arange(size[0]) * h // size[0]][:, :, jnp.arange(size[1]) * w // size[1]])


class Stage(nnx.Module):
    """Residual blocks with an optional attention after each: the body of a down or an up stage.

    Args:
      fans: (in, out) channels of each residual block.
      resnet: (in, out) -> the residual block.
      attention: channels -> the attention, or None.
      down: padding of the downsampling at the end; None for none.
      up: whether upsampling follows.
      by_resnet: whether it is a residual block that resamples, and not a convolution.
    """

    def __init__(
        self,
        fans: list[tuple[int, int]],
        resnet: Callable[[int, int], ResnetBlock2D],
        attention: MakeAttention = None,
        down: int | None = None,
        up: bool = False,
        by_resnet: bool = False,
    ):
        width = fans[-1][1]
        self.resnets = nnx.List([resnet(*fan) for fan in fans])
        self.attentions = nnx.List([attention(width) for _ in fans]) if attention else None
        last = lambda way, plain: nnx.List([resnet(width, width, resample=way) if by_resnet else plain()])
        self.downsamplers = None if down is None else last("down", lambda: Downsample2D(width, down))
        self.upsamplers = last("up", lambda: Upsample2D(width)) if up else None

    @property
    def residual(self) -> tuple[ResnetBlock2D, ...]:
        """The residual blocks in the order of their use."""
        ends = (*(self.downsamplers or ()), *(self.upsamplers or ()))
        return (*self.resnets, *(block for block in ends if isinstance(block, ResnetBlock2D)))

    def down(
        self, x: jax.Array, times: Each = NONE, contexts: Each = NONE, more: jax.Array | None = None
    ) -> list[jax.Array]:
        """The outputs of every block in turn; the last is the stage's own.

        `more`, if any, is added to the last block's output where blocks attend, else to the stage's.
        """
        outputs = []
        for i in range(len(self.resnets)):
            x = self.block(i, (x,), times, contexts)
            outputs.append(x)
        if more is not None and self.attentions is not None:
            outputs[-1] = x = x + more
        if self.downsamplers is not None:
            outputs.append(_resampled(self.downsamplers[0], x, times))
        if more is not None and self.attentions is None:
            outputs[-1] += more
        return outputs

    def up(
        self,
        x: jax.Array,
        skips: list[jax.Array] | None = None,
        times: Each = NONE,
        contexts: Each = NONE,
        size: tuple[int, int] | None = None,
        weighed: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """x joined with the last skip before each block; the skips used are taken off the list.

        Where both are `weighed` anew, it is by these factors, as of nn/freeu.py.
        """
        for i in range(len(self.resnets)):
            note("up", x)
            parts = (x,) if skips is None else (x, skips.pop())
            x = self.block(i, parts if weighed is None else reweighed(*parts, *weighed), times, contexts)
        return x if self.upsamplers is None else _resampled(self.upsamplers[0], x, times, size)

    def block(self, i: int, parts: tuple[jax.Array, ...], times: Each, contexts: Each) -> jax.Array:
        """The i-th residual block of what lies side by side in `parts`, and its attention."""
        x = remat(self.resnets[i])(*parts, time=next(times))
        return x if self.attentions is None else self.attentions[i](x, next(contexts))


def _resampled(block: nnx.Module, x: jax.Array, times: Each, *size: Any) -> jax.Array:
    return block(x, time=next(times)) if isinstance(block, ResnetBlock2D) else block(x, *size)


def times(stages: Iterable[nnx.Module], temb: jax.Array) -> tuple[jax.Array, ...]:
    """What the residual blocks of the stages make of an embedding of time [..., T], in the order of their use."""
    return tuple(resnet.time(temb) for stage in stages for resnet in stage.residual)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(
        self,
        width: int,
        resnet: Callable[[int, int], ResnetBlock2D],
        attention: MakeAttention = None,
        fan_in: int | None = None,
    ):
        self.resnets = nnx.List([resnet(fan_in or width, width), resnet(width, width)])
        self.attentions = nnx.List([attention(width)]) if attention else None

    @property
    def residual(self) -> tuple[ResnetBlock2D, ...]:
        """The residual blocks in the order of their use."""
        return tuple(self.resnets)

    def __call__(self, x: jax.Array, times: Each = NONE, contexts: Each = NONE) -> jax.Array:
        x = remat(self.resnets[0])(x, time=next(times))
        x = x if self.attentions is None else self.attentions[0](x, next(contexts))
        return remat(self.resnets[1])(x, time=next(times))


def down_fans(channels: tuple[int, ...], layers: int) -> list[list[tuple[int, int]]]:
    """(in, out) channels of the residual blocks in each down stage.

    >>> down_fans((32, 64), 2)
    [[(32, 32), (32, 32)], [(32, 64), (64, 64)]]
    """
    before = (channels[0], *channels)
    return [[(before[i] if j == 0 else c, c) for j in range(layers)] for i, c in enumerate(channels)]


def up_fans(channels: tuple[int, ...], layers: int) -> list[list[tuple[int, int]]]:
    """(in, out) channels of the residual blocks in each up stage of a U-Net, skips included.

    >>> up_fans((32, 64), 1)
    [[(128, 64), (96, 64)], [(96, 32), (64, 32)]]
    """
    skips = [channels[0]]  # what the down stages leave behind, in order
    for i, c in enumerate(channels):
        skips += [c] * (layers + (i < len(channels) - 1))
    stages, x = [], channels[-1]
    for c in reversed(channels):
        fans = []
        for _ in range(layers + 1):
            fans.append((x + skips.pop(), c))
            x = c
        stages.append(fans)
    return stages


def check_stages(model: str, config: Any, down: tuple[str, ...], up: tuple[str, ...] | None) -> None:
    """Raise ValueError unless a configuration names one known block for each entry of block_out_channels.

    Args:
      down, up: the blocks that are known; None where there is no such half.
    """
    for key, kinds in (("down_block_types", down), *([] if up is None else [("up_block_types", up)])):
        types, n = getattr(config, key), len(config.block_out_channels)
        if unknown := sorted(set(types) - set(kinds)):
            raise ValueError(f"{model}: {key} holds {unknown}; supported are {list(kinds)}.")
        if len(types) != n:
            raise ValueError(f"{model}: {key} has {len(types)} entries and block_out_channels {n}; give one for each.")
