"""ControlNetModel: a copy of the U-Net's first half that reads a picture as well, and what it adds to the U-Net.

The picture (edges, depth, a pose) goes through a few convolutions to the size of the latent and is added to it. Each
block's output passes a convolution that began at zero, and is added to the same block's output in the U-Net.

Reference: Zhang et al., Adding Conditional Control to Text-to-Image Diffusion Models, 2023.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import core
from flaxdiff.core import Params, Spec, only, param
from flaxdiff.models.unet_2d_condition import EncoderConfig, UNetEncoder
from flaxdiff.nn.attention import KeysValues
from flaxdiff.nn.layers import Conv, zeros


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """diffusers' keys and defaults."""

    conditioning_channels: int = 3
    controlnet_conditioning_channel_order: str = only("rgb", "bgr")
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    global_pool_conditions: bool = False
    class_embed_type: str | None = only(None)
    num_class_embeds: int | None = only(None)
    time_cond_proj_dim: int | None = only(None)


class ControlNetOutput(NamedTuple):
    """What is added to the U-Net."""

    down_block_res_samples: tuple[jax.Array, ...]  # [B, h, w, C] each, in the order of the skips
    mid_block_res_sample: jax.Array


class ZeroConv(Conv):
    """A convolution that begins at zero."""

    def __init__(self, fan_in: int, fan_out: int, **options: Any):
        super().__init__(fan_in, fan_out, **options)
        self.weight = param(self.weight.get_value().shape, "conv", zeros)
        self.bias = param((fan_out,), "raw", zeros)


class ControlNetConditioningEmbedding(nnx.Module):
    """A picture [B, H, W, C], halved by every other convolution -> [B, h, w, width]."""

    def __init__(self, width: int, channels: int, widths: tuple[int, ...]):
        self.conv_in = Conv(channels, widths[0])
        pairs = zip(widths, widths[1:])
        self.blocks = nnx.List([conv for a, b in pairs for conv in (Conv(a, a), Conv(a, b, stride=2))])
        self.conv_out = ZeroConv(widths[-1], width)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in (self.conv_in, *self.blocks):
            x = nnx.silu(conv(x))
        return self.conv_out(x)


class ControlNetModel(UNetEncoder):
    """What a picture adds to the U-Net's blocks.

    >>> import flaxdiff
    >>> tiny = dict(block_out_channels=[32, 64], down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    ...             cross_attention_dim=16)
    >>> spec = ControlNetModel.from_config(tiny)
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> x, text, edges = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 5, 16)), jnp.zeros((1, 64, 64, 3))
    >>> flaxdiff.apply(spec, params, x, 10, text, edges).mid_block_res_sample.shape
    (1, 4, 4, 64)
    """

    config_class = ControlNetConfig

    @classmethod
    def to_config(cls, config: ControlNetConfig) -> dict[str, Any]:
        """As of every model, without the settings that diffusers' class does not have."""
        absent = ("time_embedding_dim", "time_cond_proj_dim")
        return {k: v for k, v in super().to_config(config).items() if k not in absent or v is not None}

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        c, width = config, config.block_out_channels
        picture = c.conditioning_channels, c.conditioning_embedding_out_channels
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(width[0], *picture)
        zero = lambda channels: ZeroConv(channels, channels, kernel=1, padding=0)
        skips = [c for i, c in enumerate(width) for _ in range(config.layers_per_block + (i < len(width) - 1))]
        self.controlnet_down_blocks = nnx.List([zero(c) for c in (width[0], *skips)])
        self.controlnet_mid_block = zero(width[-1])

    @staticmethod
    def from_unet(spec: Spec, params: Params, key: jax.Array, **changes: Any) -> tuple[Spec, Params]:
        """A ControlNet to train, that begins as a copy of a U-Net and adds nothing.

        Args:
          spec, params: of the U-Net.
          key: a PRNG key, for what reads the picture.
          **changes: settings of the ControlNet, such as `conditioning_channels`.

        >>> import flaxdiff
        >>> pipe, params = flaxdiff.load()
        >>> spec, mine = ControlNetModel.from_unet(pipe.unet, params["unet"], jax.random.key(0))
        >>> bool((mine["conv_in.weight"] == params["unet"]["conv_in.weight"]).all())
        True
        """
        shared = {f.name: getattr(spec.config, f.name) for f in dataclasses.fields(EncoderConfig)}
        ours = ControlNetModel.from_config(shared | changes)
        drawn = core.init(ours, key, params["conv_in.bias"].dtype)
        return ours, {name: params.get(name, new) for name, new in drawn.items()}

    def __call__(
        self,
        sample: jax.Array,
        timestep: jax.Array | float | tuple[jax.Array, ...],
        encoder_hidden_states: jax.Array | tuple[KeysValues, ...],
        controlnet_cond: jax.Array,
        conditioning_scale: jax.Array | float = 1.0,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
        guess_mode: bool = False,
    ) -> ControlNetOutput:
        """Run the network.

        Args:
          sample, timestep, encoder_hidden_states, added_cond_kwargs: as of the U-Net.
          controlnet_cond: the picture in [0, 1], [B, H, W, C], as large as the latent's picture.
          conditioning_scale: of all that is added.
          guess_mode: less to the finer skips, see `strengths`.
        """
        condition = self.condition(controlnet_cond)
        scales = conditioning_scale * self.strengths(jnp.asarray(guess_mode))
        scales = jnp.broadcast_to(scales, (len(sample), len(scales)))
        return self.residuals(sample, timestep, encoder_hidden_states, condition, scales, added_cond_kwargs)

    def condition(self, picture: jax.Array) -> jax.Array:
        """What is added to the latent of a picture [B, H, W, C] in [0, 1]: the same at every time."""
        picture = picture[..., ::-1] if self.config.controlnet_conditioning_channel_order == "bgr" else picture
        return self.controlnet_cond_embedding(picture.astype(self.conv_in.weight.get_value().dtype))

    def strengths(self, guess_mode: jax.Array) -> jax.Array:
        """How much of each residual to add, the middle last; in guess mode from a tenth to all, evenly by logarithm."""
        n = len(self.controlnet_down_blocks) + 1
        rising = jnp.ones(n) if self.config.global_pool_conditions else jnp.logspace(-1, 0, n)
        return jnp.where(guess_mode, rising, 1)

    def residuals(
        self,
        sample: jax.Array,
        timestep: jax.Array | float | tuple[jax.Array, ...],
        encoder_hidden_states: jax.Array | tuple[KeysValues, ...],
        condition: jax.Array,
        scales: jax.Array,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
    ) -> ControlNetOutput:
        """What is added, given the picture's `condition` [B, h, w, C] and the scale of each residual [B, skips + 1]."""
        x, times, contexts = self.entered(sample, timestep, encoder_hidden_states, added_cond_kwargs)
        outputs = [x + condition]
        for block in self.down_blocks:
            outputs += block.down(outputs[-1], times, contexts)
        outputs.append(self.mid_block(outputs[-1], times, contexts))
        zero = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        outputs = [
            conv(x) * scales[:, i, None, None, None].astype(x.dtype) for i, (conv, x) in enumerate(zip(zero, outputs))
        ]
        if self.config.global_pool_conditions:
            outputs = [x.mean((1, 2), keepdims=True) for x in outputs]
        return ControlNetOutput(tuple(outputs[:-1]), outputs[-1])
