"""VQModel: the autoencoder whose latents are entries of a codebook.

Between the encoder and the decoder of `AutoencoderKL` each latent vector becomes the nearest of a few hundred learned
ones, so that an image is a grid of whole numbers.

Reference: van den Oord et al., Neural Discrete Representation Learning, 2017; Esser et al., Taming Transformers for
High-Resolution Image Synthesis, 2021.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import only
from flaxdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from flaxdiff.models.autoencoder_kl import Decoder, DiagonalGaussian, Encoder
from flaxdiff.nn.attention import RENAMES
from flaxdiff.nn.layers import Conv, Embedding, value
from flaxdiff.nn.unet import check_stages


@dataclasses.dataclass(frozen=True)
class VQModelConfig(AutoencoderConfig):
    """diffusers' keys and defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 3
    sample_size: int = 32
    num_vq_embeddings: int = 256
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    norm_type: str = only("group")
    mid_block_add_attention: bool = True
    lookup_from_codebook: bool = False  # integers are looked up here in any case
    force_upcast: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_stages("VQModel", self, down=("DownEncoderBlock2D",), up=("UpDecoderBlock2D",))


class VectorQuantizer(nnx.Module):
    """The codebook e."""

    def __init__(self, entries: int, width: int):
        self.embedding = Embedding(entries, width)

    def codes(self, z: jax.Array) -> jax.Array:
        """argmin_k |z - e_k|² for each vector: [..., D] -> int32 [...]."""
        z, e = z.astype(jnp.float32), weights.dense(value(self.embedding.weight)).astype(jnp.float32)
        return jnp.argmin(jnp.square(e).sum(-1) - 2 * z @ e.T, -1).astype(jnp.int32)

    def __call__(self, z: jax.Array) -> jax.Array:
        """The nearest entry of each vector; gradients pass straight through."""
        return z + jax.lax.stop_gradient(self.embedding(self.codes(z)) - z)


class VQModel(Autoencoder):
    """Encode images into latents, and decode latents or codes by way of the codebook.

    >>> import flaxdiff
    >>> spec = VQModel.from_config({"block_out_channels": [32]})
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> codes = flaxdiff.apply(spec, params, jnp.zeros((1, 8, 8, 3)), method="codes")
    >>> codes.shape, flaxdiff.apply(spec, params, codes, method="decode").shape
    ((1, 8, 8), (1, 8, 8, 3))
    """

    config_class = VQModelConfig
    renames = RENAMES

    def __init__(self, config: VQModelConfig):
        c, width = config, config.vq_embed_dim or config.latent_channels
        self.encoder, self.decoder = Encoder(c, c.latent_channels), Decoder(c)
        self.quant_conv = Conv(c.latent_channels, width, kernel=1, padding=0)
        self.quantize = VectorQuantizer(c.num_vq_embeddings, width)
        self.config = c
        self.post_quant_conv = Conv(width, c.latent_channels, kernel=1, padding=0)

    def encode(self, image: jax.Array) -> DiagonalGaussian:
        """Image [B, H, W, C] in [-1, 1] -> its latent before the codebook, as a Gaussian without spread."""
        image = image.astype(weights.dtype(value(self.encoder.conv_in.weight)))
        z = self.in_parts(lambda x: self.quant_conv(self.encoder(x)), 1)(image)
        return DiagonalGaussian(z.astype(jnp.float32), jnp.full(z.shape, -jnp.inf))

    def codes(self, image: jax.Array) -> jax.Array:
        """Image [B, H, W, C] in [-1, 1] -> the number of each latent's entry, int32 [B, h, w]."""
        return self.quantize.codes(self.encode(image).mean)

    def decode(self, latent: jax.Array) -> jax.Array:
        """Latents [B, h, w, Z], or codes, int32 [B, h, w] -> image [B, H, W, C], about [-1, 1]."""
        dtype = weights.dtype(value(self.decoder.conv_in.weight))
        whole = jnp.issubdtype(latent.dtype, jnp.integer)
        z = self.quantize.embedding(latent) if whole else self.quantize(latent.astype(dtype))
        run = self.in_parts(lambda z: self.decoder(self.post_quant_conv(z)), self.config.factor)
        return run(z).astype(jnp.float32)

    def __call__(self, image: jax.Array) -> jax.Array:
        """The reconstruction."""
        return self.decode(self.encode(image).mean)
