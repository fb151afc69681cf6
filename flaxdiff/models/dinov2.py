"""Dinov2Model: an image encoder that has learned from pictures alone, with registers or without.

A transformer over the patches of a picture, with one token more for the whole; registers are further tokens that the
network may write to. What each layer adds is scaled, channel by channel. Pictures may have any size that the patches
divide: the table of positions is resampled.

Reference: Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, 2023; Darcet et al., Vision
Transformers Need Registers, 2023.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdiff import images, weights
from flaxdiff.core import Config, Model, only, param
from flaxdiff.models.bert import BertSelfAttention
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.layers import Conv, LayerNorm, Linear, normal, ones, value, zeros
from flaxdiff.nn.stack import stack, states


@dataclasses.dataclass(frozen=True)
class Dinov2Config(Config):
    """transformers' keys and defaults, as far as the network reads them."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = only(True)
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    num_register_tokens: int = 0

    @property
    def inner(self) -> int:
        """Channels inside a feed-forward; where one half gates the other there are two thirds, in eights."""
        n = self.hidden_size * self.mlp_ratio
        return (int(n * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else n


@dataclasses.dataclass(frozen=True)
class Dinov2WithRegistersConfig(Dinov2Config):
    """transformers' keys and defaults, as far as the network reads them."""

    patch_size: int = 16
    num_register_tokens: int = 4


class Dinov2Output(NamedTuple):
    """What the encoder has to say."""

    last_hidden_state: jax.Array  # [B, 1 + R + N, D], normalised: the whole, registers, patches
    pooler_output: jax.Array  # [B, D], that of the whole
    hidden_states: jax.Array  # [L + 1, B, 1 + R + N, D]: the embeddings, then each layer's output, not normalised


class Named(nnx.Module):
    """A layer under the name that checkpoints give it."""

    def __init__(self, **layers: nnx.Module):
        for name, layer in layers.items():
            setattr(self, name, layer)


class Dinov2Embeddings(nnx.Module):
    """Patches of a picture [B, H, W, C] with their positions, behind a token for the whole, and registers."""

    def __init__(self, c: Dinov2Config):
        width, side = c.hidden_size, c.image_size // c.patch_size
        self.cls_token = param((1, 1, width), "raw", normal)
        self.mask_token = param((1, width), "raw", zeros) if c.use_mask_token else None  # for its training
        registers = c.num_register_tokens
        self.register_tokens = param((1, registers, width), "raw", zeros) if registers else None
        self.patch_embeddings = Named(projection=Conv(c.num_channels, width, c.patch_size, c.patch_size, padding=0))
        self.position_embeddings = param((1, side**2 + 1, width), "raw", normal)
        self.side, self.patch = side, c.patch_size

    def __call__(self, pixels: jax.Array) -> jax.Array:
        if pixels.shape[1] % self.patch or pixels.shape[2] % self.patch:
            raise ValueError(
                f"Pictures of {pixels.shape[1]} x {pixels.shape[2]} pixels do not divide into patches of {self.patch}."
            )
        whole, places = value(self.cls_token), value(self.position_embeddings)
        x = self.patch_embeddings.projection(pixels.astype(weights.dtype(whole)))
        x = x + self._places(places[0, 1:], *x.shape[1:3])
        every = lambda tokens: jnp.broadcast_to(tokens, (len(x), *tokens.shape[1:]))
        first = [every(whole + places[:, :1])]
        first += [] if self.register_tokens is None else [every(value(self.register_tokens))]
        return jnp.concatenate([*first, x.reshape(len(x), -1, x.shape[-1])], 1)

    def _places(self, table: jax.Array, height: int, width: int) -> jax.Array:
        """The table for a grid of other sides, [H, W, D]."""
        grid = table.reshape(self.side, self.side, -1)
        if (height, width) == (self.side, self.side):
            return grid
        smooth = self.register_tokens is not None
        down, across = (images.cubic(self.side, n, smooth).astype(np.float32) for n in (height, width))
        return jnp.einsum("ih,hwc,jw->ijc", down, grid.astype(jnp.float32), across).astype(grid.dtype)


class Dinov2SwiGLUFFN(nnx.Module):
    """Expand, one half gating the other, contract."""

    def __init__(self, c: Dinov2Config):
        self.weights_in, self.weights_out = Linear(c.hidden_size, 2 * c.inner), Linear(c.inner, c.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, x = jnp.split(self.weights_in(x), 2, -1)
        return self.weights_out(jax.nn.silu(gate) * x)


class Dinov2MLP(nnx.Module):
    """Expand, activate, contract."""

    def __init__(self, c: Dinov2Config):
        self.fc1, self.fc2 = Linear(c.hidden_size, c.inner), Linear(c.inner, c.hidden_size)
        self.activation = c.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Dinov2Scale(nnx.Module):
    """A factor for each channel."""

    def __init__(self, width: int):
        self.lambda1 = param((width,), "raw", ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * value(self.lambda1)


class Dinov2Layer(nnx.Module):
    """Attention and feed-forward, each of what it reads normalised, scaled and added."""

    def __init__(self, c: Dinov2Config):
        width = c.hidden_size
        self.norm1, self.norm2 = (LayerNorm(width, c.layer_norm_eps) for _ in range(2))
        self.attention = Named(attention=BertSelfAttention(c), output=Named(dense=Linear(width, width)))
        self.layer_scale1, self.layer_scale2 = Dinov2Scale(width), Dinov2Scale(width)
        self.mlp = Dinov2SwiGLUFFN(c) if c.use_swiglu_ffn else Dinov2MLP(c)

    def __call__(self, x: jax.Array) -> jax.Array:
        said = self.attention.output.dense(self.attention.attention(self.norm1(x)))
        x = x + self.layer_scale1(said)
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Dinov2Encoder(nnx.Module):
    """The layers, under the name that the checkpoint gives them."""

    def __init__(self, c: Dinov2Config):
        self.layer = stack(lambda: Dinov2Layer(c), c.num_hidden_layers, c.scan_layers)


class Dinov2Model(Model):
    """A picture -> the states of all layers.

    >>> import flaxdiff
    >>> spec = Dinov2Model.from_config(
    ...     {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28})
    >>> out = flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), jnp.zeros((1, 28, 42, 3)))
    >>> out.last_hidden_state.shape, out.pooler_output.shape
    ((1, 7, 32), (1, 32))
    """

    config_class = Dinov2Config
    library, model_type = "transformers", "dinov2"
    renames = ((r"^dinov2(_with_registers)?\.", ""),)
    ignored = r"classifier\..*"

    def __init__(self, config: Dinov2Config):
        self.embeddings, self.encoder = Dinov2Embeddings(config), Dinov2Encoder(config)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixel_values: jax.Array) -> Dinov2Output:
        """Normalised pictures [B, H, W, 3]."""
        hidden = states(self.encoder.layer, self.embeddings(pixel_values))
        last = self.layernorm(hidden[-1])
        return Dinov2Output(last, last[:, 0], hidden)


class Dinov2WithRegistersModel(Dinov2Model):
    """The same with registers."""

    config_class, model_type = Dinov2WithRegistersConfig, "dinov2_with_registers"
