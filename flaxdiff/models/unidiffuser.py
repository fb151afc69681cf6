"""UniDiffuserModel: one transformer that takes the noise off a picture and a text, each at a time of its own.

The latent of a picture, CLIP's embedding of it and an embedded text are tokens side by side, behind a token for the
time of each. A time of zero says that this half is known, the last one that nothing is. Blocks of the second half read
the results of those of the first as well, like the stages of a U-Net.

Reference: Bao et al., One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale, 2023; Bao et al., All
are Worth Words, 2022.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, Model, only, param
from flaxdiff.nn.attention import Attention
from flaxdiff.nn.embeddings import sinusoids
from flaxdiff.nn.feed_forward import FeedForward
from flaxdiff.nn.layers import Conv, Embedding, LayerNorm, Linear, normal, value, zeros
from flaxdiff.nn.stack import run, stack, states
from flaxdiff.parallel import constrain


@dataclasses.dataclass(frozen=True)
class UniDiffuserConfig(Config):
    """diffusers' keys and defaults; what no published checkpoint sets is fixed."""

    text_dim: int = 768
    clip_img_dim: int = 512
    num_text_tokens: int = 77
    num_attention_heads: int = 16
    attention_head_dim: int = 88
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 1
    dropout: float = only(0.0)
    norm_num_groups: int = 32  # this, the next and a few below are written down, and read by nothing
    cross_attention_dim: int | None = only(None)
    attention_bias: bool = False
    sample_size: int = 64
    num_vector_embeds: int | None = None
    patch_size: int = 2
    activation_fn: str = only("gelu", "gelu-approximate")
    num_embeds_ada_norm: int | None = None
    use_linear_projection: bool = False
    only_cross_attention: bool = only(False)
    upcast_attention: bool = False
    norm_type: str = only("layer_norm")
    block_type: str = only("unidiffuser")
    pre_layer_norm: bool = only(False)
    use_timestep_embedding: bool = only(False)
    norm_elementwise_affine: bool = only(True)
    use_patch_pos_embed: bool = only(False)
    ff_final_dropout: bool = True
    use_data_type_embedding: bool = False

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patches(self) -> int:
        """Tokens of a picture's latent."""
        return (self.sample_size // self.patch_size) ** 2

    @property
    def channels(self) -> int:
        """Channels of the predicted latent."""
        return self.out_channels or self.in_channels


class UniDiffuserOutput(NamedTuple):
    """A prediction for each part."""

    latent: jax.Array  # [B, H, W, C]
    image: jax.Array  # [B, 1, I]
    text: jax.Array  # [B, N, T]


class UniDiffuserBlock(nnx.Module):
    """Attention and feed-forward, each added to its input; what comes of it is normalised."""

    def __init__(self, c: UniDiffuserConfig):
        self.attn1 = Attention(c.width, c.num_attention_heads, c.attention_head_dim, bias=c.attention_bias)
        self.norm1, self.norm3 = LayerNorm(c.width), LayerNorm(c.width)
        self.ff = FeedForward(c.width, c.activation_fn)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        x = self.norm1(x + self.attn1(x))
        return self.norm3(x + self.ff(x))


class SkipBlock(nnx.Module):
    """What has come so far and an earlier result, side by side, projected and normalised."""

    def __init__(self, width: int):
        self.skip_linear, self.norm = Linear(2 * width, width), LayerNorm(width)

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        return self.norm(self.skip_linear(jnp.concatenate([x, skip], -1)))


class OutBlock(nnx.Module):
    """A block of the second half."""

    def __init__(self, c: UniDiffuserConfig):
        self.skip, self.block = SkipBlock(c.width), UniDiffuserBlock(c)

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        return self.block(self.skip(x, skip))


class PatchEmbed(nnx.Module):
    """Square patches as tokens: [B, H, W, C] -> [B, N, D]."""

    def __init__(self, c: UniDiffuserConfig):
        self.proj = Conv(c.in_channels, c.width, c.patch_size, stride=c.patch_size, padding=0)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.proj(x)
        return x.reshape(len(x), -1, x.shape[-1])


class UTransformer2D(nnx.Module):
    """The blocks: [B, N, D] -> [B, N, D]."""

    def __init__(self, c: UniDiffuserConfig):
        half = c.num_layers // 2
        self.pos_embed = PatchEmbed(c)  # in every checkpoint, and read by nothing: tokens come from outside
        self.transformer_in_blocks = stack(lambda: UniDiffuserBlock(c), half, c.scan_layers)
        self.transformer_mid_block = UniDiffuserBlock(c)
        self.transformer_out_blocks = stack(lambda: OutBlock(c), half, c.scan_layers)
        self.norm_out = LayerNorm(c.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        passed = states(self.transformer_in_blocks, x)[::-1]  # the last result first
        return self.norm_out(run(self.transformer_out_blocks, self.transformer_mid_block(passed[0]), passed[:-1]))


class UniDiffuserModel(Model):
    """Predict the noise in a picture and in a text, each given its time.

    >>> import flaxdiff
    >>> spec = UniDiffuserModel.from_config(dict(
    ...     text_dim=8, clip_img_dim=6, num_text_tokens=7, num_attention_heads=2, attention_head_dim=8, num_layers=3,
    ...     sample_size=8, activation_fn="gelu"))
    >>> params, of = flaxdiff.init(spec, jax.random.key(0)), lambda *shape: jnp.zeros((1, *shape))
    >>> [a.shape for a in flaxdiff.apply(spec, params, of(8, 8, 4), of(1, 6), of(7, 8), 10, 0)]
    [(1, 8, 8, 4), (1, 1, 6), (1, 7, 8)]
    """

    config_class = UniDiffuserConfig
    origin = "unidiffuser"

    def __init__(self, config: UniDiffuserConfig):
        c, width = config, config.width
        self.vae_img_in = PatchEmbed(c)
        self.clip_img_in, self.text_in = Linear(c.clip_img_dim, width), Linear(c.text_dim, width)
        self.pos_embed = param((1, 3 + c.num_text_tokens + c.patches, width), "raw", normal)
        typed = c.use_data_type_embedding
        self.data_type_token_embedding = Embedding(2, width) if typed else None
        self.data_type_pos_embed_token = param((1, 1, width), "raw", zeros) if typed else None
        self.transformer = UTransformer2D(c)
        self.vae_img_out = Linear(width, c.patch_size**2 * c.channels)
        self.clip_img_out, self.text_out = Linear(width, c.clip_img_dim), Linear(width, c.text_dim)
        self.config = c

    def __call__(
        self,
        latent_image_embeds: jax.Array,
        image_embeds: jax.Array,
        prompt_embeds: jax.Array,
        timestep_img: jax.Array | float,
        timestep_text: jax.Array | float,
        data_type: jax.Array | int = 1,
    ) -> UniDiffuserOutput:
        """The noise in each part.

        Args:
          latent_image_embeds: [B, S, S, C], the latent of a picture of the size that the network was trained on.
          image_embeds: [B, 1, I] CLIP's embedding of the picture.
          prompt_embeds: [B, N, T] the text.
          timestep_img, timestep_text: times, [] or [B].
          data_type: 0 or 1, [] or [B]: what sort of data the result is to be like, where a network was told.

        Raises:
          ValueError: a latent of another size.
        """
        c, b = self.config, len(latent_image_embeds)
        side, p = c.sample_size, c.patch_size
        if latent_image_embeds.shape[1:3] != (side, side):
            height, width = latent_image_embeds.shape[1:3]
            raise ValueError(f"Latents of {height} x {width}; this network has places for {side} x {side} alone.")
        positions = value(self.pos_embed)
        dtype = weights.dtype(positions)
        time = lambda t: sinusoids(jnp.broadcast_to(t, b), c.width)[:, None].astype(dtype)
        tokens = [time(jnp.asarray(timestep_img)), time(jnp.asarray(timestep_text))]
        if self.data_type_token_embedding is not None:
            tokens.append(self.data_type_token_embedding(jnp.broadcast_to(data_type, b))[:, None])
            middle = value(self.data_type_pos_embed_token)
            positions = jnp.concatenate([positions[:, :2], middle, positions[:, 2:]], 1)
        tokens += [self.text_in(prompt_embeds.astype(dtype)), self.clip_img_in(image_embeds.astype(dtype))]
        tokens.append(self.vae_img_in(latent_image_embeds.astype(dtype)))
        x = constrain(jnp.concatenate(tokens, 1) + positions, "batch", "context")
        x = self.transformer(x)

        n = c.num_text_tokens
        text, image, latent = jnp.split(x[:, -(n + 1 + c.patches) :], [n, n + 1], 1)
        latent = self.vae_img_out(latent).reshape(b, side // p, side // p, p, p, c.channels).swapaxes(2, 3)
        latent = latent.reshape(b, side, side, c.channels)
        return UniDiffuserOutput(latent, self.clip_img_out(image), self.text_out(text))
