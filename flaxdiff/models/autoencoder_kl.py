"""AutoencoderKL: the variational autoencoder of latent diffusion.

The encoder turns an image in [-1, 1] into the mean and log-variance of a Gaussian over latents eight times smaller; the
decoder turns a latent back into an image. Stable Diffusion 1, 2, XL and most later families use it with other numbers.

Reference: Kingma and Welling, Auto-Encoding Variational Bayes, 2013; Rombach et al., High-Resolution Image Synthesis
with Latent Diffusion Models, 2022.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import RENAMES, Attention
from flaxdiff.nn.layers import Conv, GroupNorm, value
from flaxdiff.nn.unet import MidBlock, ResnetBlock2D, Stage, check_stages, down_fans
from flaxdiff.parallel import constrain

EPS = 1e-6  # of every normalisation


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(AutoencoderConfig):
    """diffusers' keys and defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215  # latents leave the encoder times this, so that their variance is near one
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True  # float16 overflows in the decoder; bfloat16 does not
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_stages("AutoencoderKL", self, down=("DownEncoderBlock2D",), up=("UpDecoderBlock2D",))


class DiagonalGaussian(NamedTuple):
    """A Gaussian over latents with independent components."""

    mean: jax.Array  # [B, H, W, C]
    logvar: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """mean + exp(logvar / 2) ε."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self) -> jax.Array:
        """KL divergence from the standard normal, summed over each latent: [B]."""
        return 0.5 * jnp.sum(self.mean**2 + jnp.exp(self.logvar) - 1 - self.logvar, (1, 2, 3))


def _parts(c: AutoencoderKLConfig):
    """The residual block and the attention of this configuration."""
    resnet = functools.partial(ResnetBlock2D, temb=None, groups=c.norm_num_groups, eps=EPS, act_fn=c.act_fn)
    attention = functools.partial(_Attention, groups=c.norm_num_groups)
    return resnet, attention if c.mid_block_add_attention else None


def _Attention(width: int, groups: int) -> Attention:
    return Attention(width, 1, width, bias=True, groups=groups, eps=EPS, split="rest")


class Encoder(nnx.Module):
    """Image -> so many features: of the KL autoencoder, mean and log-variance."""

    def __init__(self, c: AutoencoderKLConfig, features: int):
        resnet, attention = _parts(c)
        stages, last = down_fans(c.block_out_channels, c.layers_per_block), len(c.block_out_channels) - 1
        self.conv_in = Conv(c.in_channels, c.block_out_channels[0])
        self.down_blocks = nnx.List([Stage(f, resnet, down=0 if i < last else None) for i, f in enumerate(stages)])
        self.mid_block = MidBlock(c.block_out_channels[-1], resnet, attention)
        self.conv_norm_out = GroupNorm(c.block_out_channels[-1], c.norm_num_groups, EPS)
        self.conv_out = Conv(c.block_out_channels[-1], features)
        self.act_fn = c.act_fn

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block.down(x)[-1]
        return self.conv_out(ACTIVATIONS[self.act_fn](self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latent -> image."""

    def __init__(self, c: AutoencoderKLConfig):
        resnet, attention = _parts(c)
        channels = c.block_out_channels[::-1]
        stages, last = down_fans(channels, c.layers_per_block + 1), len(channels) - 1
        self.conv_in = Conv(c.latent_channels, channels[0])
        self.mid_block = MidBlock(channels[0], resnet, attention)
        self.up_blocks = nnx.List([Stage(f, resnet, up=i < last) for i, f in enumerate(stages)])
        self.conv_norm_out = GroupNorm(channels[-1], c.norm_num_groups, EPS)
        self.conv_out = Conv(channels[-1], c.out_channels)
        self.act_fn = c.act_fn

    def __call__(self, z: jax.Array) -> jax.Array:
        # The rows of a picture lie on devices that the batch leaves idle; convolutions fetch a row from either side.
        spread = lambda x: constrain(x, "batch", "rest")
        x = spread(self.mid_block(spread(self.conv_in(z))))
        for block in self.up_blocks:
            x = spread(block.up(x))
        return self.conv_out(ACTIVATIONS[self.act_fn](self.conv_norm_out(x)))


class AutoencoderKL(Autoencoder):
    """Encode images into latents and decode them, see the module's paragraph.

    >>> import flaxdiff
    >>> spec = AutoencoderKL.from_config({"block_out_channels": [32]})
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> flaxdiff.apply(spec, params, jnp.zeros((1, 8, 8, 3)), method="encode").mean.shape
    (1, 8, 8, 4)
    """

    config_class = AutoencoderKLConfig
    renames = RENAMES

    def __init__(self, config: AutoencoderKLConfig):
        c, z = config, config.latent_channels
        self.config = c
        self.encoder, self.decoder = Encoder(c, 2 * z), Decoder(c)
        self.quant_conv = Conv(2 * z, 2 * z, kernel=1, padding=0) if c.use_quant_conv else None
        self.post_quant_conv = Conv(z, z, kernel=1, padding=0) if c.use_post_quant_conv else None

    def encode(self, image: jax.Array) -> DiagonalGaussian:
        """Image [B, H, W, C] in [-1, 1] -> the Gaussian over its latent, not yet scaled."""
        run = lambda x: self.encoder(x) if self.quant_conv is None else self.quant_conv(self.encoder(x))
        h = self.in_parts(run, 1)(image.astype(weights.dtype(value(self.encoder.conv_in.weight))))
        mean, logvar = jnp.split(h.astype(jnp.float32), 2, -1)
        return DiagonalGaussian(mean, jnp.clip(logvar, -30, 20))

    def decode(self, latent: jax.Array) -> jax.Array:
        """Latent [B, h, w, Z], unscaled -> image [B, H, W, C], about [-1, 1]."""
        run = lambda z: self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
        z = latent.astype(weights.dtype(value(self.decoder.conv_in.weight)))
        return self.in_parts(run, self.config.factor)(z).astype(jnp.float32)

    def __call__(self, image: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The reconstruction: from the mean, or from a sample where a key is given."""
        posterior = self.encode(image)
        return self.decode(posterior.mean if key is None else posterior.sample(key))
