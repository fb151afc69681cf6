"""UNet2DModel: the denoiser of unconditional diffusion in pixels.

The network of DDPM: residual blocks, self-attention at some resolutions, no text. Some are told a class.

Reference: Ho et al., Denoising Diffusion Probabilistic Models, 2020; Dhariwal and Nichol, Diffusion Models Beat GANs on
Image Synthesis, 2021.
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
from flaxdiff.nn.layers import Conv, Embedding, GroupNorm, value
from flaxdiff.nn.unet import MidBlock, ResnetBlock2D, Stage, check_stages, down_fans, times, up_fans


@dataclasses.dataclass(frozen=True)
class UNet2DConfig(Config):
    """diffusers' keys and defaults."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = only("positional", "learned")
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
    downsample_type: str = only("conv", "resnet")  # this and the next: of the stages that attend
    upsample_type: str = only("conv", "resnet")
    dropout: float = only(0.0)
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = only("default", "scale_shift")
    add_attention: bool = True
    class_embed_type: str | None = only(None)
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    def __post_init__(self):
        kinds = lambda way, resnet: (f"Attn{way}Block2D", f"{way}Block2D", f"Resnet{resnet}Block2D")
        check_stages("UNet2DModel", self, down=kinds("Down", "Downsample"), up=kinds("Up", "Upsample"))
        if self.time_embedding_type == "learned" and not self.num_train_timesteps:
            raise ValueError(
                "UNet2DModel: time_embedding_type='learned' needs num_train_timesteps, the table's length."
            )


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
            scale_shift=c.resnet_time_scale_shift == "scale_shift",
        )

        def attention(channels: int, groups: int = c.norm_num_groups) -> Attention:
            size = c.attention_head_dim or channels
            return Attention(channels, channels // size, size, bias=True, groups=groups, eps=c.norm_eps)

        middle = functools.partial(attention, groups=c.attn_norm_num_groups or c.norm_num_groups)
        last = len(width) - 1
        by_resnet = lambda kind, resampled: (
            kind.startswith("Resnet") or kind.startswith("Attn") and resampled == "resnet"
        )

        self.conv_in = Conv(c.in_channels, width[0])
        self.time_proj = Embedding(c.num_train_timesteps, width[0]) if c.time_embedding_type == "learned" else None
        self.time_embedding = TimestepEmbedding(width[0], temb)
        self.class_embedding = None if c.num_class_embeds is None else Embedding(c.num_class_embeds, temb)
        self.down_blocks = nnx.List(
            Stage(
                fans,
                resnet,
                attention if kind.startswith("Attn") else None,
                down=c.downsample_padding if i < last else None,
                by_resnet=by_resnet(kind, c.downsample_type),
            )
            for i, (kind, fans) in enumerate(zip(c.down_block_types, down_fans(width, c.layers_per_block)))
        )
        self.mid_block = MidBlock(width[-1], resnet, middle if c.add_attention else None)
        self.up_blocks = nnx.List(
            Stage(
                fans,
                resnet,
                attention if kind.startswith("Attn") else None,
                up=i < last,
                by_resnet=by_resnet(kind, c.upsample_type),
            )
            for i, (kind, fans) in enumerate(zip(c.up_block_types, up_fans(width, c.layers_per_block)))
        )
        self.conv_norm_out = GroupNorm(width[0], c.norm_num_groups, c.norm_eps)
        self.conv_out = Conv(width[0], c.out_channels)
        self.config = c

    def __call__(
        self, sample: jax.Array, timestep: jax.Array | float, class_labels: jax.Array | None = None
    ) -> jax.Array:
        """Noisy images [B, H, W, C], a time, or one for each [B], and classes int32 [B] -> the prediction [B, H, W, C].

        Raises:
          ValueError: classes for a network without, or none for a network with classes.
        """
        c, dtype = self.config, weights.dtype(value(self.conv_in.weight))
        if (class_labels is None) != (self.class_embedding is None):
            has = f"one of {c.num_class_embeds} classes: give" if self.class_embedding else "no class: leave out"
            raise ValueError(f"This UNet is conditioned on {has} class_labels.")
        t = jnp.broadcast_to(timestep, sample.shape[:1])
        if self.time_proj is not None:
            waves = self.time_proj(t.astype(jnp.int32))
        else:
            waves = sinusoids(t, c.block_out_channels[0], flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift)
        temb = self.time_embedding(waves.astype(dtype))
        temb = temb if class_labels is None else temb + self.class_embedding(class_labels).astype(dtype)
        stages = (*self.down_blocks, self.mid_block, *self.up_blocks)
        projected = iter(times(stages, temb))

        x = sample.astype(dtype)
        x = self.conv_in(2 * x - 1 if c.center_input_sample else x)
        skips = [x]
        for block in self.down_blocks:
            skips += block.down(skips[-1], projected)
        x = self.mid_block(skips[-1], projected)
        for block in self.up_blocks:
            x = block.up(x, skips, projected)
        return self.conv_out(ACTIVATIONS[c.act_fn](self.conv_norm_out(x)))
