"""DiTTransformer2DModel: a transformer over patches of a latent, told the time and a class.

Where others have a U-Net, equal blocks of self-attention and feed-forward read square patches as tokens. The condition
shifts, scales and gates what each block adds; at the start of training all gates are zero, so that a block changes
nothing.

Reference: Peebles and Xie, Scalable Diffusion Models with Transformers, 2023.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.core import Config, Model, only
from flaxdiff.nn.attention import Attention
from flaxdiff.nn.embeddings import TimestepEmbedding, sinusoids
from flaxdiff.nn.feed_forward import FeedForward
from flaxdiff.nn.layers import Embedding, LayerNorm, Linear
from flaxdiff.nn.modulation import WAVES, AdaLayerNorm, vary
from flaxdiff.nn.patches import PatchEmbed, unpatched
from flaxdiff.nn.skipping import settled
from flaxdiff.nn.stack import over, run, stack
from flaxdiff.parallel import constrain


@dataclasses.dataclass(frozen=True)
class DiTConfig(Config):
    """diffusers' keys and defaults."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    dropout: float = only(0.0)
    norm_num_groups: int = 32  # written down, and read by nothing
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = only("gelu-approximate", "gelu")
    num_embeds_ada_norm: int = 1000
    upcast_attention: bool = False  # softmax runs in float32 here either way
    norm_type: str = only("ada_norm_zero")
    norm_elementwise_affine: bool = only(False)
    norm_eps: float = 1e-5

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def channels(self) -> int:
        """Channels of the output."""
        return self.out_channels or self.in_channels


class LabelEmbedding(nnx.Module):
    """A table of classes; the last is none of them."""

    def __init__(self, classes: int, width: int):
        self.embedding_table = Embedding(classes + 1, width)


class CombinedTimestepLabelEmbeddings(nnx.Module):
    """Times [B] and classes [B] -> [B, D]."""

    def __init__(self, classes: int, width: int):
        self.timestep_embedder = TimestepEmbedding(WAVES, width)
        self.class_embedder = LabelEmbedding(classes, width)

    def __call__(self, t: jax.Array, labels: jax.Array) -> jax.Array:
        classes = self.class_embedder.embedding_table(labels)
        return self.timestep_embedder(sinusoids(t, WAVES, freq_shift=1).astype(classes.dtype)) + classes


class AdaLayerNormZero(AdaLayerNorm):
    """Normalise, and say how to shift, scale and gate, with an embedding of the block's own."""

    def __init__(self, c: DiTConfig):
        super().__init__(c.width, 6)
        self.emb = CombinedTimestepLabelEmbeddings(c.num_embeds_ada_norm, c.width)


class DiTBlock(nnx.Module):
    """x + gate · attention(modulated x), then so with the feed-forward."""

    def __init__(self, c: DiTConfig):
        self.norm1 = AdaLayerNormZero(c)
        self.attn1 = Attention(c.width, c.num_attention_heads, c.attention_head_dim, bias=c.attention_bias)
        self.norm3 = LayerNorm(c.width, c.norm_eps, affine=False)
        self.ff = FeedForward(c.width, c.activation_fn)

    def modulated(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """What the attention reads."""
        return self.norm1(x, self.norm1.modulation(condition))[0]

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """[B, N, D], and what this block's own embedding makes of time and class [B, D] -> [B, N, D]."""
        h, gate, shift, scale, gate_ff = self.norm1(x, self.norm1.modulation(condition))
        x = x + gate * self.attn1(h)
        return x + gate_ff * self.ff(vary(self.norm3(x), shift, scale))


class DiTTransformer2DModel(Model):
    """Predict the noise in a noisy latent, and where it has twice the channels its variance, given time and class.

    >>> import flaxdiff
    >>> spec = DiTTransformer2DModel.from_config(dict(num_layers=2, num_attention_heads=2, attention_head_dim=8))
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> flaxdiff.apply(spec, params, jnp.zeros((1, 8, 8, 4)), 10, class_labels=jnp.array([207])).shape
    (1, 8, 8, 4)
    """

    config_class = DiTConfig
    ignored = r"pos_embed\.pos_embed"  # worked out here

    def __init__(self, config: DiTConfig):
        c = config
        self.pos_embed = PatchEmbed(c.in_channels, c.width, c.patch_size, c.sample_size // c.patch_size)
        self.transformer_blocks = stack(lambda: DiTBlock(c), c.num_layers, c.scan_layers)
        self.norm_out = LayerNorm(c.width, 1e-6, affine=False)
        self.proj_out_1 = Linear(c.width, 2 * c.width)
        self.proj_out_2 = Linear(c.width, c.patch_size**2 * c.channels)
        self.config = c

    def __call__(self, hidden_states: jax.Array, timestep: jax.Array | float, class_labels: jax.Array) -> jax.Array:
        """Noisy latents [B, H, W, C], a time, or one for each [B], classes int32 [B] -> the prediction [B, H, W, O].

        The class behind the last, `num_embeds_ada_norm`, is none.

        Raises:
          ValueError: height or width is no multiple of the patches' side.
        """
        b, height, width, _ = hidden_states.shape
        t, x = jnp.broadcast_to(timestep, (b,)), self.pos_embed(hidden_states)
        told = over(self.transformer_blocks, lambda block: block.norm1.emb(t, class_labels))  # [L, B, D]
        x = run(self.transformer_blocks, constrain(x, "batch", "context"), told)
        shift, scale = jnp.split(self.proj_out_1(jax.nn.silu(told[0]))[:, None], 2, -1)
        return unpatched(
            self.proj_out_2(vary(self.norm_out(settled(x)), shift, scale)), height, width, self.config.patch_size
        )
