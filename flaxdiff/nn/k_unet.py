"""The stages of Katherine Crowson's U-Net, that of the latent upscaler: `KDownBlock2D` and its kin.

They differ from those of `unet.py` in three ways. Time scales and shifts every normalisation, those of attentions too.
An attention follows a residual block directly, without a feed-forward. Size changes by a fixed blur, and a stage on the
way up is joined with the last features of its counterpart alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import Attention, KeysValues
from flaxdiff.nn.layers import Conv, LayerNorm, Linear
from flaxdiff.nn.unet import Each

GROUP = 32  # channels that are normalised together
BLUR = np.float32([1, 3, 3, 1]) / 8


class AdaGroupNorm(nnx.Module):
    """Normalise in groups, then scale and shift by what a linear layer makes of time."""

    def __init__(self, temb: int, channels: int, groups: int, eps: float = 1e-5):
        self.linear, self.groups, self.eps = Linear(temb, 2 * channels), groups, eps

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """[B, H, W, C], and `linear` of time [B, 2 C]."""
        h = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        mean, variance = (moment(h, (1, 2, 4), keepdims=True) for moment in (jnp.mean, jnp.var))
        h = ((h - mean) * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape).astype(x.dtype)
        scale, shift = jnp.split(time[:, None, None], 2, -1)
        return h * (1 + scale) + shift


class ResnetBlockCondNorm2D(nnx.Module):
    """conv(act(norm(conv(act(norm(x)))))) + x, projected where the channels change.

    Args:
      fans: channels of x, between the convolutions, and of the result.
      temb, eps, act_fn: of time, of the normalisations, and of the activation.
      groups: of the second normalisation, where its channels do not say.
    """

    def __init__(self, fans: tuple[int, int, int], temb: int, eps: float, act_fn: str, groups: int | None = None):
        a, b, c = fans
        if a % GROUP or b % GROUP:
            raise ValueError(f"Stages of K-blocks have multiples of {GROUP} channels, not {a} and {b}.")
        self.norm1, self.conv1 = AdaGroupNorm(temb, a, a // GROUP, eps), Conv(a, b)
        self.norm2, self.conv2 = AdaGroupNorm(temb, b, groups or b // GROUP, eps), Conv(b, c)
        self.conv_shortcut = Conv(a, c, kernel=1, padding=0, bias=False) if a != c else None
        self.act_fn = act_fn

    def time(self, temb: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the normalisations make of an embedding of time [..., T]."""
        return self.norm1.linear(temb), self.norm2.linear(temb)

    def __call__(self, x: jax.Array, time: tuple[jax.Array, jax.Array]) -> jax.Array:
        act = ACTIVATIONS[self.act_fn]
        h = self.conv1(act(self.norm1(x, time[0])))
        h = self.conv2(act(self.norm2(h, time[1])))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class CrossAttention(Attention):
    """Attention to a context that is normalised first."""

    def __init__(self, width: int, heads: int, head_dim: int, context: int):
        super().__init__(width, heads, head_dim, context, bias=True)
        self.norm_cross = LayerNorm(context)

    def keys_values(self, context: jax.Array) -> KeysValues:
        return super().keys_values(self.norm_cross(context))


class KAttentionBlock(nnx.Module):
    """Attention to itself, where it has that, and to the context."""

    def __init__(self, width: int, head_dim: int, context: int, temb: int, to_itself: bool):
        norm, heads = lambda: AdaGroupNorm(temb, width, max(1, width // GROUP)), width // head_dim
        self.norm1 = norm() if to_itself else None
        self.attn1 = Attention(width, heads, head_dim, bias=True) if to_itself else None
        self.norm2, self.attn2 = norm(), CrossAttention(width, heads, head_dim, context)

    def time(self, temb: jax.Array) -> tuple[jax.Array, ...]:
        """What the normalisations make of an embedding of time [..., T]."""
        return tuple(norm.linear(temb) for norm in (self.norm1, self.norm2) if norm is not None)

    def keys_values(self, context: jax.Array) -> KeysValues:
        """What queries meet of a context [B, M, D]."""
        return self.attn2.keys_values(context)

    def __call__(self, x: jax.Array, context: KeysValues, time: tuple[jax.Array, ...]) -> jax.Array:
        tokens = lambda h: h.reshape(h.shape[0], -1, h.shape[-1])
        if self.attn1 is not None:
            x = x + self.attn1(tokens(self.norm1(x, time[0]))).reshape(x.shape)
        return x + self.attn2(tokens(self.norm2(x, time[-1])), context).reshape(x.shape)


def blurred(x: jax.Array, up: bool) -> jax.Array:
    """[B, H, W, C] at half the size, or twice, by a filter of four taps each way; edges are mirrored.

    >>> blurred(jnp.ones((1, 4, 4, 2)), up=True).shape, float(blurred(jnp.ones((1, 4, 4, 1)), up=False).mean())
    ((1, 8, 8, 2), 1.0)
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    kernel = np.outer(BLUR, BLUR)[..., None, None] * (4 if up else 1)
    weight = jnp.broadcast_to(jnp.asarray(kernel, x.dtype), (4, 4, 1, x.shape[-1]))
    strides, dilation = ((1, 1), (2, 2)) if up else ((2, 2), (1, 1))
    dims = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": x.shape[-1]}
    return jax.lax.conv_general_dilated(x, weight, strides, ((0, 0), (0, 0)), lhs_dilation=dilation, **dims)


class KStage(nnx.Module):
    """Residual blocks with an attention after each: a down or an up stage, called as those of `unet.py`.

    Args:
      fans: channels of each residual block, see there.
      attend: (widths, head_dim, context, to_itself) of the attentions; None where there are none.
      temb, eps, act_fn, groups: as of the residual blocks.
      resample: "down" or "up" at the end; None at the lowest and the highest resolution.
    """

    def __init__(
        self,
        fans: list[tuple[int, int, int]],
        attend: tuple[list[int], int, int, bool] | None,
        temb: int,
        eps: float,
        act_fn: str,
        resample: str | None,
        groups: int | None = None,
    ):
        self.resnets = nnx.List([ResnetBlockCondNorm2D(fan, temb, eps, act_fn, groups) for fan in fans])
        if attend is None:
            self.attentions = None
        else:
            widths, *each, to_itself = attend
            self.attentions = nnx.List([KAttentionBlock(width, *each, temb, to_itself) for width in widths])
        self.resample, self.joins = resample, fans[0][0] != fans[0][1] or attend is None

    @property
    def residual(self) -> tuple[nnx.Module, ...]:
        """All that reads the time, in the order of its use."""
        if self.attentions is None:
            return tuple(self.resnets)
        return tuple(block for pair in zip(self.resnets, self.attentions) for block in pair)

    def down(self, x: jax.Array, times: Each, contexts: Each, more: jax.Array | None = None) -> list[jax.Array]:
        """The outputs of every block in turn; the last is the stage's own. `more`, if any, is added to that."""
        outputs = []
        for i in range(len(self.resnets)):
            x = self.block(i, x, times, contexts)
            outputs.append(x)
        if self.resample:
            outputs.append(blurred(x, up=False))
        if more is not None:
            outputs[-1] += more
        return outputs

    def up(
        self, x: jax.Array, skips: list[jax.Array], times: Each, contexts: Each, size: tuple[int, int] | None = None
    ) -> jax.Array:
        """x joined with the last features of the same resolution; those of its counterpart are taken off the list."""
        if self.joins:
            skips.pop()  # at the next resolution
            x = jnp.concatenate([x, skips[-1]], -1)
        del skips[-len(self.resnets) :]
        for i in range(len(self.resnets)):
            x = self.block(i, x, times, contexts)
        return blurred(x, up=True) if self.resample else x

    def block(self, i: int, x: jax.Array, times: Each, contexts: Each) -> jax.Array:
        """The i-th residual block, and its attention."""
        x = self.resnets[i](x, next(times))
        return x if self.attentions is None else self.attentions[i](x, next(contexts), next(times))


def k_down(i: int, kind: str, width: tuple[int, ...], layers: int, head_dim: int, context: int, **of_blocks) -> KStage:
    """The down stage of resolution i; `of_blocks` as of `KStage`."""
    before, own, last = width[max(i - 1, 0)], width[i], i == len(width) - 1
    fans = [(before if j == 0 else own, own, own) for j in range(layers)]
    attend = ([own] * layers, head_dim, context, last) if "Attn" in kind else None
    return KStage(fans, attend, resample=None if last else "down", **of_blocks)


def k_up(
    i: int, kind: str, width: tuple[int, ...], layers: int, head_dim: int, context: int, temb: int, **of_blocks
) -> KStage:
    """The i-th up stage; `of_blocks` as of `KStage`."""
    own, after, last = width[-1 - i], width[-1 - min(i + 1, len(width) - 1)], i == len(width) - 1
    first = "Attn" in kind and own == after == temb
    fans = [(own if first or j else 2 * own, own, own) for j in range(layers)]
    of_blocks |= {"temb": temb, "resample": None if last else "up"}
    if "Attn" not in kind:
        fans[-1] = (fans[-1][0], after, after)
        return KStage(fans, None, groups=own // GROUP, **of_blocks)
    fans[-1] = (fans[-1][0], own, after)
    return KStage(fans, ([own] * (layers - 1) + [after], head_dim, context, first), **of_blocks)
