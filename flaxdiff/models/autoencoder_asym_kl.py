"""AsymmetricAutoencoderKL: an autoencoder whose larger decoder also sees what inpainting is to leave as it is.

The encoder is that of `AutoencoderKL`. At each resolution the decoder takes over features of the masked image outside
of the mask, so that what was not repainted comes back sharper.

Reference: Zhu et al., Designing a Better Asymmetric VQGAN for StableDiffusion, 2023.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.models.autoencoder import AutoencoderConfig
from flaxdiff.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, Decoder, Encoder
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.layers import Conv, value


@dataclasses.dataclass(frozen=True)
class AsymmetricAutoencoderKLConfig(AutoencoderConfig):
    """diffusers' keys and defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    down_block_out_channels: tuple[int, ...] = (64,)
    layers_per_down_block: int = 1
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    up_block_out_channels: tuple[int, ...] = (64,)
    layers_per_up_block: int = 1
    block_out_channels: tuple[int, ...] | None = None  # written beside the decoder's, the same
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    force_upcast: bool = False

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", self.up_block_out_channels)
        super().__post_init__()

    def half(self, side: str) -> AutoencoderKLConfig:
        """The configuration of the "down" or the "up" half, as of an `AutoencoderKL`."""
        n, shared = len(getattr(self, f"{side}_block_types")), ("in_channels", "out_channels", "act_fn")
        return AutoencoderKLConfig(
            down_block_types=("DownEncoderBlock2D",) * n,
            up_block_types=("UpDecoderBlock2D",) * n,
            block_out_channels=getattr(self, f"{side}_block_out_channels"),
            layers_per_block=getattr(self, f"layers_per_{side}_block"),
            **{key: getattr(self, key) for key in (*shared, "latent_channels", "norm_num_groups")},
        )


class MaskConditionEncoder(nnx.Module):
    """A picture -> its features, two at its own size and one at each half of the size before."""

    def __init__(self, fan_in: int, first: int, last: int):
        widths = [min(first * 2**i, last) for i in range(4)] + [last]
        fans = list(itertools.pairwise([fan_in, *widths]))
        halve = {"kernel": 4, "stride": 2, "padding": 1}
        self.layers = nnx.List([Conv(*fan, **(halve if i > 1 else {})) for i, fan in enumerate(fans)])

    def __call__(self, x: jax.Array) -> dict[tuple[int, ...], jax.Array]:
        features = {}  # the decoder looks for what has the shape of its own
        for layer in self.layers:
            x = layer(x)
            features[x.shape] = x
            x = jax.nn.relu(x)
        return features


class MaskConditionDecoder(Decoder):
    """Latent -> image, with features of a known picture outside of a mask."""

    def __init__(self, c: AutoencoderKLConfig):
        super().__init__(c)
        self.condition_encoder = MaskConditionEncoder(c.out_channels, c.block_out_channels[0], c.block_out_channels[-1])

    def __call__(self, z: jax.Array, image: jax.Array | None = None, mask: jax.Array | None = None) -> jax.Array:
        if image is None:
            return super().__call__(z)
        image, mask = image.astype(z.dtype), mask.astype(z.dtype)
        known = self.condition_encoder(image * (1 - mask))

        def join(x: jax.Array) -> jax.Array:
            step = mask.shape[1] // x.shape[1], mask.shape[2] // x.shape[2]
            inside = mask[:, :: step[0], :: step[1]]
            return x * inside + known[x.shape] * (1 - inside)

        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block.up(join(x))
        return self.conv_out(ACTIVATIONS[self.act_fn](self.conv_norm_out(join(x))))


class AsymmetricAutoencoderKL(AutoencoderKL):
    """Encode images into latents and decode them, see the module's paragraph.

    >>> import flaxdiff
    >>> widths = dict(down_block_out_channels=[32], up_block_out_channels=[32])
    >>> spec = AsymmetricAutoencoderKL.from_config(widths)
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> flaxdiff.apply(spec, params, jnp.zeros((1, 8, 8, 4)), method="decode").shape
    (1, 8, 8, 3)
    """

    config_class = AsymmetricAutoencoderKLConfig

    def __init__(self, config: AsymmetricAutoencoderKLConfig):
        self.config, z = config, config.latent_channels
        self.encoder, self.decoder = Encoder(config.half("down"), 2 * z), MaskConditionDecoder(config.half("up"))
        self.quant_conv, self.post_quant_conv = (Conv(n, n, kernel=1, padding=0) for n in (2 * z, z))

    def decode(self, latent: jax.Array, image: jax.Array | None = None, mask: jax.Array | None = None) -> jax.Array:
        """Latent [B, h, w, Z], unscaled -> image [B, H, W, C], about [-1, 1].

        Args:
          image, mask: a picture [B, H, W, C] in [-1, 1] that is known where the mask [B, H, W, 1] is 0; with it the
            whole is decoded at once.
        """
        if image is None or mask is None:
            return super().decode(latent)
        dtype = weights.dtype(value(self.decoder.conv_in.weight))
        return self.decoder(self.post_quant_conv(latent.astype(dtype)), image, mask).astype(jnp.float32)
