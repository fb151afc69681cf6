"""AutoencoderTiny (TAESD): an autoencoder of a few plain convolutions, distilled from a large one.

It reads and writes the latents of `AutoencoderKL` a hundred times faster, for previews and small machines. There is no
Gaussian: an image has one latent.

Reference: https://github.com/madebyollin/taesd.
"""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import only
from flaxdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from flaxdiff.models.autoencoder_kl import DiagonalGaussian
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.layers import Conv, value
from flaxdiff.nn.tiling import overlaid


@dataclasses.dataclass(frozen=True)
class AutoencoderTinyConfig(AutoencoderConfig):
    """diffusers' keys and defaults."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    block_out_channels: tuple[int, ...] | None = None  # written beside the decoder's, the same
    act_fn: str = "relu"
    upsample_fn: str = only("nearest")
    latent_channels: int = 4
    upsampling_scaling_factor: int = only(2)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3  # latents lie about between -3 and 3,
    latent_shift: float = 0.5  # and become bytes around the middle
    force_upcast: bool = False
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    sample_size: ClassVar[int] = 512  # no key of diffusers, but the side of its tiles

    def __post_init__(self):
        for side in ("encoder", "decoder"):
            channels, blocks = getattr(self, f"{side}_block_out_channels"), getattr(self, f"num_{side}_blocks")
            if len(channels) != len(blocks):
                raise ValueError(
                    f"AutoencoderTiny: {side}_block_out_channels={channels} and num_{side}_blocks={blocks} differ in "
                    "length; give one number of blocks for each number of channels."
                )
        object.__setattr__(self, "block_out_channels", self.decoder_block_out_channels)
        super().__post_init__()


class AutoencoderTinyBlock(nnx.Module):
    """relu(x + three convolutions of x)."""

    def __init__(self, channels: int, act_fn: str):
        self.conv = nnx.List([Conv(channels, channels), None, Conv(channels, channels), None, Conv(channels, channels)])
        self.act_fn = act_fn

    def __call__(self, x: jax.Array) -> jax.Array:
        act, (first, _, second, _, third) = ACTIVATIONS[self.act_fn], self.conv
        return jax.nn.relu(x + third(act(second(act(first(x))))))


class EncoderTiny(nnx.Module):
    """Image -> latent: a convolution, halving from the second on, before each run of blocks."""

    def __init__(self, c: AutoencoderTinyConfig):
        layers = []
        for i, (n, width) in enumerate(zip(c.num_encoder_blocks, c.encoder_block_out_channels)):
            layers.append(Conv(width, width, stride=2, bias=False) if i else Conv(c.in_channels, width))
            layers += [AutoencoderTinyBlock(width, c.act_fn) for _ in range(n)]
        self.layers = nnx.List([*layers, Conv(width, c.latent_channels)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = (x + 1) / 2
        for layer in self.layers:
            x = layer(x)
        return x


class DecoderTiny(nnx.Module):
    """Latent -> image: runs of blocks, each but the last doubled and convolved."""

    def __init__(self, c: AutoencoderTinyConfig):
        layers, widths = [Conv(c.latent_channels, c.decoder_block_out_channels[0]), None], c.decoder_block_out_channels
        for n, width in zip(c.num_decoder_blocks, widths):  # activation and doubling keep their numbers
            layers += [AutoencoderTinyBlock(width, c.act_fn) for _ in range(n)]
            layers += [None, Conv(width, width, bias=False)]
        self.layers = nnx.List([*layers[:-2], Conv(widths[-1], c.out_channels)])
        self.act_fn = c.act_fn

    def __call__(self, z: jax.Array) -> jax.Array:
        x = ACTIVATIONS[self.act_fn](self.layers[0](3 * jnp.tanh(z / 3)))
        for before, layer in itertools.pairwise(self.layers[1:]):
            if layer is not None:
                x = layer(x, doubled=True) if before is None and isinstance(layer, Conv) else layer(x)
        return 2 * x - 1


class AutoencoderTiny(Autoencoder):
    """Encode images into latents and decode them, see the module's paragraph.

    >>> import flaxdiff
    >>> spec = AutoencoderTiny.from_config({})
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> flaxdiff.apply(spec, params, jnp.zeros((1, 16, 16, 3)), method="encode").mean.shape
    (1, 2, 2, 4)
    """

    config_class = AutoencoderTinyConfig

    def __init__(self, config: AutoencoderTinyConfig):
        self.encoder, self.decoder, self.config = EncoderTiny(config), DecoderTiny(config), config

    def encode(self, image: jax.Array) -> DiagonalGaussian:
        """Image [B, H, W, C] in [-1, 1] -> its latent, as a Gaussian without spread."""
        image = image.astype(weights.dtype(value(self.encoder.layers[0].weight)))
        z = self.in_parts(self.encoder, 1, overlaid)(image).astype(jnp.float32)
        return DiagonalGaussian(z, jnp.full_like(z, -jnp.inf))

    def decode(self, latent: jax.Array) -> jax.Array:
        """Latent [B, h, w, Z] -> image [B, H, W, C], about [-1, 1]."""
        z = latent.astype(weights.dtype(value(self.decoder.layers[0].weight)))
        return self.in_parts(self.decoder, self.config.factor, overlaid)(z).astype(jnp.float32)

    def __call__(self, image: jax.Array) -> jax.Array:
        """The reconstruction, from a latent kept in bytes."""
        c, z = self.config, self.encode(image).mean
        kept = jnp.round(255 * jnp.clip(z / (2 * c.latent_magnitude) + c.latent_shift, 0, 1)) / 255
        return self.decode((kept - c.latent_shift) * (2 * c.latent_magnitude))
