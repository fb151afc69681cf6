"""PixArtTransformer2DModel: the transformer over patches of a latent that PixArt tells of a text.

It is DiT's with an attention to the text between its own and the feed-forward. What a condition says is the same for
all blocks, so that one layer reads it, and each block adds a table of its own: a quarter of the parameters less. Some
are told how large the picture is, and its aspect, with the time.

Reference: Chen et al., PixArt-α: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis,
2023; PixArt-Σ: Weak-to-Strong Training of Diffusion Transformer for 4K Text-to-Image Generation, 2024.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Model, note, only, param
from flaxdiff.models.dit_transformer_2d import DiTConfig
from flaxdiff.nn.attention import Attention, KeysValues
from flaxdiff.nn.embeddings import TimestepEmbedding, sinusoids
from flaxdiff.nn.feed_forward import FeedForward
from flaxdiff.nn.layers import LayerNorm, Linear, normal, value
from flaxdiff.nn.modulation import WAVES, vary
from flaxdiff.nn.patches import PatchEmbed, unpatched
from flaxdiff.nn.perturb import Given, Perturbed, perturbed, rows
from flaxdiff.nn.skipping import settled
from flaxdiff.nn.stack import over, run, stack
from flaxdiff.parallel import constrain

Times = tuple[jax.Array, jax.Array]  # what blocks read of a time [..., B, 6, D], and its embedding [..., B, D]
SIZES = ("resolution", "aspect_ratio")


@dataclasses.dataclass(frozen=True)
class PixArtConfig(DiTConfig):
    """diffusers' keys and defaults."""

    out_channels: int | None = 8
    cross_attention_dim: int = 1152
    sample_size: int = 128
    norm_type: str = only("ada_norm_single")
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = None
    attention_type: str = only("default")

    @property
    def scale(self) -> float:
        """How much closer places lie than in a grid of so many."""
        return self.interpolation_scale or max(self.sample_size // 64, 1)

    @property
    def told_sizes(self) -> bool:
        """Whether the network is told the size of the picture."""
        given = self.use_additional_conditions
        return self.sample_size == 128 if given is None else given


class PixArtAlphaCombinedTimestepSizeEmbeddings(nnx.Module):
    """A time, and with `sizes` height, width and aspect of the picture, a third of the channels each."""

    def __init__(self, width: int, sizes: bool):
        self.timestep_embedder = TimestepEmbedding(WAVES, width)
        self.resolution_embedder = TimestepEmbedding(WAVES, width // 3) if sizes else None
        self.aspect_ratio_embedder = TimestepEmbedding(WAVES, width // 3) if sizes else None

    def __call__(self, t: jax.Array, added: Mapping[str, jax.Array] | None) -> jax.Array:
        """Times [..., B], and sizes [B, 2] and [B, 1] -> [..., B, D]."""
        dtype = weights.dtype(value(self.timestep_embedder.linear_1.weight))
        waves = lambda numbers: sinusoids(jnp.asarray(numbers), WAVES).astype(dtype)
        y = self.timestep_embedder(waves(t))
        if self.resolution_embedder is None:
            return y
        embedders = self.resolution_embedder, self.aspect_ratio_embedder
        parts = [embed(waves(added[name])) for embed, name in zip(embedders, SIZES)]
        return y + jnp.concatenate([part.reshape(len(part), -1) for part in parts], -1)


class AdaLayerNormSingle(nnx.Module):
    """What a condition says to all blocks."""

    def __init__(self, width: int, sizes: bool):
        self.emb = PixArtAlphaCombinedTimestepSizeEmbeddings(width, sizes)
        self.linear = Linear(width, 6 * width)


class PixArtBlock(nnx.Module):
    """Attention to itself, attention to the text, feed-forward; the first and last are shifted, scaled and gated."""

    def __init__(self, c: PixArtConfig):
        attend = functools.partial(
            Attention, c.width, c.num_attention_heads, c.attention_head_dim, bias=c.attention_bias
        )
        self.norm1, self.attn1 = LayerNorm(c.width, c.norm_eps, affine=False), attend()
        self.attn2 = attend(context=c.cross_attention_dim)
        self.norm2, self.ff = LayerNorm(c.width, c.norm_eps, affine=False), FeedForward(c.width, c.activation_fn)
        self.scale_shift_table = param((6, c.width), "raw", normal)

    def parts(self, told: jax.Array) -> list[jax.Array]:
        """The condition [B, 6, D] as this block reads it: shift, scale and gate of the attention, and of the rest."""
        return jnp.split(value(self.scale_shift_table) + told, 6, -2)

    def modulated(self, x: jax.Array, context: Any, told: jax.Array, *args: Any) -> jax.Array:
        """What the attention to itself reads."""
        shift, scale, *_ = self.parts(told)
        return vary(self.norm1(x), shift, scale)

    def __call__(
        self, x: jax.Array, context: Any, told: jax.Array, mask: jax.Array | None, sides: tuple[int, int]
    ) -> jax.Array:
        """Tokens [B, N, D], what `attn2` reads, perhaps `Perturbed`, the condition [B, 6, D], which words to see."""
        context, perturb = context if isinstance(context, Perturbed) else (context, {})
        shift, scale, gate, *rest = self.parts(told)
        before = x
        x = x + gate * self.attn1(vary(self.norm1(x), shift, scale), None, perturb, sides)
        h = context.output if isinstance(context, Given) else self.attn2(x, context, mask=mask)
        note("cross", h)
        shift, scale, gate = rest
        x = x + h
        x = x + gate * self.ff(vary(self.norm2(x), shift, scale))
        return jnp.where(rows(perturb["skip"], x) > 0, before, x) if "skip" in perturb else x


class PixArtTransformer2DModel(Model):
    """Predict the noise in a noisy latent and its variance, given a text, a time and perhaps the picture's size.

    >>> import flaxdiff
    >>> tiny = dict(num_layers=2, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, sample_size=8)
    >>> spec = PixArtTransformer2DModel.from_config({**tiny, "caption_channels": 16})
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> flaxdiff.apply(spec, params, jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 5, 16)), 10).shape
    (1, 8, 8, 8)
    """

    config_class = PixArtConfig
    ignored = r"pos_embed\.pos_embed|caption_projection\.y_embedding"  # worked out here; and for training alone

    def __init__(self, config: PixArtConfig):
        c = config
        self.pos_embed = PatchEmbed(c.in_channels, c.width, c.patch_size, c.sample_size // c.patch_size, scale=c.scale)
        self.transformer_blocks = stack(lambda: PixArtBlock(c), c.num_layers, c.scan_layers)
        self.norm_out = LayerNorm(c.width, 1e-6, affine=False)
        self.scale_shift_table = param((2, c.width), "raw", normal)
        self.proj_out = Linear(c.width, c.patch_size**2 * c.channels)
        self.adaln_single = AdaLayerNormSingle(c.width, c.told_sizes)
        words = c.caption_channels
        self.caption_projection = words and TimestepEmbedding(words, c.width, act_fn="gelu_pytorch_tanh")
        self.config = c

    @property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """The names of the blocks that attend."""
        return (tuple(f"transformer_blocks.{i}" for i in range(self.config.num_layers)),)

    def keys_values(self, text: jax.Array) -> tuple[KeysValues, ...]:
        """What the blocks make of a text [B, M, D]: [B, depth, M, C] each. It is the same at every step."""
        text = text.astype(weights.dtype(value(self.proj_out.weight)))
        text = self.caption_projection(text) if self.caption_projection else text
        pairs = over(self.transformer_blocks, lambda block: block.attn2.keys_values(text))
        return (jax.tree.map(lambda a: a.swapaxes(0, 1), pairs),)

    def times(self, t: jax.Array, added_cond_kwargs: Mapping[str, jax.Array] | None = None) -> Times:
        """What the network makes of times [..., B], and of sizes.

        Raises:
          ValueError: it is told sizes, and there are none.
        """
        if self.config.told_sizes and not all(name in (added_cond_kwargs or {}) for name in SIZES):
            raise ValueError(f"This network needs added_cond_kwargs with {' and '.join(SIZES)}; give both.")
        y = self.adaln_single.emb(t, added_cond_kwargs)
        told = self.adaln_single.linear(jax.nn.silu(y))
        return told.reshape(*y.shape[:-1], 6, -1), y

    def __call__(
        self,
        hidden_states: jax.Array,
        encoder_hidden_states: jax.Array | tuple[Any, ...],
        timestep: jax.Array | float | Times,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
        encoder_attention_mask: jax.Array | None = None,
        perturb: Mapping[str, tuple[jax.Array, ...]] | None = None,
    ) -> jax.Array:
        """Run the network.

        Args:
          hidden_states: noisy latents [B, H, W, C].
          encoder_hidden_states: the text [B, M, D], or what `keys_values` made of it.
          timestep: a number, one for each [B], or what `times` made of one.
          added_cond_kwargs: `resolution` [B, 2], height and width in pixels, and `aspect_ratio` [B, 1], where it is
            told sizes.
          encoder_attention_mask: which words may be seen, bool [B, M].
          perturb: what hinders blocks, see nn/perturb.py.

        Returns:
          The prediction [B, H, W, O].

        Raises:
          ValueError: height or width is no multiple of the patches' side; sizes are missing.
        """
        b, height, width, _ = hidden_states.shape
        given = isinstance(encoder_hidden_states, tuple)
        text = encoder_hidden_states if given else self.keys_values(encoder_hidden_states)
        given = isinstance(timestep, tuple)
        told, y = timestep if given else self.times(jnp.broadcast_to(timestep, (b,)), added_cond_kwargs)
        contexts = jax.tree.map(lambda a: a.swapaxes(0, 1), perturbed(text, perturb)[0])
        mask = None if encoder_attention_mask is None else encoder_attention_mask.astype(bool)[:, None, None]
        sides = height // self.config.patch_size, width // self.config.patch_size
        x = constrain(self.pos_embed(hidden_states), "batch", "context")
        x = run(self.transformer_blocks, x, contexts, told, mask, sides)
        shift, scale = jnp.split(value(self.scale_shift_table) + y[:, None], 2, -2)
        return unpatched(
            self.proj_out(vary(self.norm_out(settled(x)), shift, scale)), height, width, self.config.patch_size
        )
