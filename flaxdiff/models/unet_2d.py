"""UNet2DModel: the denoiser of unconditional diffusion in pixels.

The network of DDPM: residual blocks, self-attention at some resolutions, no text.

Reference: Ho et al., Denoising Diffusion Probabilistic Models, 2020.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, Model, only
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import RENAMES, Attention
from flaxdiff.nn.embeddings import TimestepEmbedding, sinusoids
from flaxdiff.nn.layers import Conv, GroupNorm, value
from flaxdiff.nn.unet import MidBlock, ResnetBlock2D, Stage, check_stages, down_fans, times, up_fans


@dataclasses.dataclass(frozen=True)
class UNet2DConfig(Config):
    """diffusers' keys and defaults."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = only("positional")
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    mid_block_type: str = only("UNetMidBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = only(1)
    downsample_padding: int = 1
    downsample_type: str = only("conv")
    upsample_type: str = only("conv")
    dropout: float = only(0.0)
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = only("default")
    add_attention: bool = True
    class_embed_type: str | None = only(None)
    num_class_embeds: int | None = only(None)
    num_train_timesteps: int | None = None

    def __post_init__(self):
        check_stages("UNet2DModel", self, down=("AttnDownBlock2D", "DownBlock2D"), up=("AttnUpBlock2D", "UpBlock2D"))


class UNet2DModel(Model):
    """Predict the noise in a noisy image, given the time.

    >>> import flaxdiff
    >>> spec = UNet2DModel.from_config(dict(
    ...     block_out_channels=[32, 64],
    ...     down_block_types=["DownBlock2D", "AttnDownBlock2D"],
    ...     up_block_types=["AttnUpBlock2D", "UpBlock2D"],
    ... ))
    >>> flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), jnp.zeros((1, 8, 8, 3)), 10).shape
    (1, 8, 8, 3)
    """

    config_class = UNet2DConfig
    renames = RENAMES

    def __init__(self, config: UNet2DConfig):
        c, width = config, config.block_out_channels
        temb = c.time_embedding_dim or 4 * width[0]
        resnet = functools.partial(
            ResnetBlock2D,
            temb=temb,
            groups=c.norm_num_groups,
            eps=c.norm_eps,
            act_fn=c.act_fn,
        )

        def attention(channels: int, groups: int = c.norm_num_groups) -> Attention:
            size = c.attention_head_dim or channels
            return Attention(channels, channels // size, size, bias=True, groups=groups, eps=c.norm_eps)

        middle = functools.partial(attention, groups=c.attn_norm_num_groups or c.norm_num_groups)
        last = len(width) - 1

        self.conv_in = Conv(c.in_channels, width[0])
        self.time_embedding = TimestepEmbedding(width[0], temb)
        self.down_blocks = nnx.List(
            Stage(
                fans, resnet, attention if kind.startswith("Attn") else None, c.downsample_padding if i < last else None
            )
            for i, (kind, fans) in enumerate(zip(c.down_block_types, down_fans(width, c.layers_per_block)))
        )
        self.mid_block = MidBlock(width[-1], resnet, middle if c.add_attention else None)
        self.up_blocks = nnx.List(
            Stage(fans, resnet, attention if kind.startswith("Attn") else None, up=i < last)
            for i, (kind, fans) in enumerate(zip(c.up_block_types, up_fans(width, c.layers_per_block)))
        )
        self.conv_norm_out = GroupNorm(width[0], c.norm_num_groups, c.norm_eps)
        self.conv_out = Conv(width[0], c.out_channels)
        self.config = c

    def __call__(self, sample: jax.Array, timestep: jax.Array | float) -> jax.Array:
        """Noisy images [B, H, W, C] and a time, or one for each [B] -> the prediction [B, H, W, C]."""
        c, dtype = self.config, weights.dtype(value(self.conv_in.weight))
        t = jnp.broadcast_to(timestep, sample.shape[:1])
        waves = sinusoids(t, c.block_out_channels[0], flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift)
        stages = (*self.down_blocks, self.mid_block, *self.up_blocks)
        projected = iter(times(stages, self.time_embedding(waves.astype(dtype))))

        x = sample.astype(dtype)
        x = self.conv_in(2 * x - 1 if c.center_input_sample else x)
        skips = [x]
        for block in self.down_blocks:
            skips += block.down(skips[-1], projected)
        x = self.mid_block(skips[-1], projected)
        for block in self.up_blocks:
            x = block.up(x, skips, projected)
        return self.conv_out(ACTIVATIONS[c.act_fn](self.conv_norm_out(x)))
