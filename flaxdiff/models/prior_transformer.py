"""PriorTransformer: what a diffusion model of embeddings asks, from a text's embedding to that of a picture of it.

A transformer over a short row of tokens: the text's, then the text as one vector, the time, the noisy embedding itself,
and a learned token whose place in the last layer is the answer. Each sees those before it. In Shap-E the sample is
itself a row of tokens, there is no further token and no text, and all see all.

Reference: Ramesh et al., Hierarchical Text-Conditional Image Generation with CLIP Latents, 2022.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, Model, only, param
from flaxdiff.nn.attention import Attention
from flaxdiff.nn.embeddings import TimestepEmbedding, sinusoids
from flaxdiff.nn.feed_forward import FeedForward
from flaxdiff.nn.layers import LayerNorm, Linear, normal, ones, value, zeros
from flaxdiff.nn.stack import run, stack


@dataclasses.dataclass(frozen=True)
class PriorTransformerConfig(Config):
    """diffusers' keys and defaults."""

    num_attention_heads: int = 32
    attention_head_dim: int = 64
    num_layers: int = 20
    embedding_dim: int = 768
    num_embeddings: int = 77
    additional_embeddings: int = 4
    dropout: float = only(0.0)
    time_embed_act_fn: str = "silu"
    norm_in_type: str | None = only(None, "layer")
    embedding_proj_norm_type: str | None = only(None, "layer")
    encoder_hid_proj_type: str | None = only("linear", None)
    added_emb_type: str | None = only("prd", None)
    time_embed_dim: int | None = None
    embedding_proj_dim: int | None = None
    clip_embed_dim: int | None = None

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


class Block(nnx.Module):
    """Self-attention and feed-forward, each added to what it reads normalised."""

    def __init__(self, c: PriorTransformerConfig):
        self.norm1, self.norm3 = LayerNorm(c.width), LayerNorm(c.width)
        self.attn1 = Attention(c.width, c.num_attention_heads, c.attention_head_dim, bias=True)
        self.ff = FeedForward(c.width, "gelu")

    def __call__(self, x: jax.Array, each: tuple[()], mask: jax.Array | None) -> jax.Array:
        """[B, N, D], with a mask [B, 1, N, N] of who sees whom."""
        x = x + self.attn1(self.norm1(x), mask=mask)
        return x + self.ff(self.norm3(x))


class PriorTransformer(Model):
    """Predict an embedding from a noisy one, the time, and what describes it.

    >>> import flaxdiff
    >>> small = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=12, num_embeddings=5)
    >>> spec = PriorTransformer.from_config(small)
    >>> params, text = flaxdiff.init(spec, jax.random.key(0)), jnp.ones((1, 5, 12))
    >>> flaxdiff.apply(spec, params, text[:, 0], 10, proj_embedding=text[:, 0], encoder_hidden_states=text).shape
    (1, 12)
    """

    config_class = PriorTransformerConfig

    def __init__(self, config: PriorTransformerConfig):
        c, width = config, config.width
        read, written = c.embedding_proj_dim or c.embedding_dim, c.clip_embed_dim or c.embedding_dim
        self.time_embedding = TimestepEmbedding(
            width, c.time_embed_dim or width, act_fn=c.time_embed_act_fn, fan_out=width
        )
        self.proj_in = Linear(c.embedding_dim, width)
        self.embedding_proj_norm = LayerNorm(read) if c.embedding_proj_norm_type else None
        self.embedding_proj = Linear(read, width)
        self.encoder_hidden_states_proj = Linear(c.embedding_dim, width) if c.encoder_hid_proj_type else None
        places = c.num_embeddings + c.additional_embeddings
        self.positional_embedding = param((1, places, width), "raw", normal)
        self.prd_embedding = param((1, 1, width), "raw", normal) if c.added_emb_type else None
        self.transformer_blocks = stack(lambda: Block(c), c.num_layers, c.scan_layers)
        self.norm_in = LayerNorm(width) if c.norm_in_type else None
        self.norm_out, self.proj_to_clip_embeddings = LayerNorm(width), Linear(width, written)
        self.clip_mean, self.clip_std = param((1, written), "raw", zeros), param((1, written), "raw", ones)
        self.config = c

    def __call__(
        self,
        hidden_states: jax.Array,
        timestep: jax.Array | float,
        proj_embedding: jax.Array,
        encoder_hidden_states: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Run the network.

        Args:
          hidden_states: noisy embeddings [B, D], or [B, N, D] where they are rows of tokens.
          timestep: a number, or one for each sample [B].
          proj_embedding: what describes them [B, P].
          encoder_hidden_states: the text [B, M, D], for networks that read one.
          attention_mask: bool [B, M], which tokens of the text are to be seen; with a mask each token sees only those
            before it.

        Returns:
          The prediction [B, E], or [B, N, E] in networks without a token of their own for it.

        Raises:
          ValueError: the text is missing.
        """
        c, dtype = self.config, weights.dtype(value(self.proj_in.weight))
        if self.encoder_hidden_states_proj is not None and encoder_hidden_states is None:
            raise ValueError("This prior reads a text: give encoder_hidden_states.")
        t = jnp.broadcast_to(timestep, hidden_states.shape[:1])
        told = proj_embedding.astype(dtype)
        told = told if self.embedding_proj_norm is None else self.embedding_proj_norm(told)
        tokens = lambda x: x[:, None] if x.ndim == 2 else x
        row = [
            tokens(self.embedding_proj(told)),
            self.time_embedding(sinusoids(t, c.width).astype(dtype))[:, None],
            tokens(self.proj_in(hidden_states.astype(dtype))),
        ]
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.astype(dtype)
            text = text if self.encoder_hidden_states_proj is None else self.encoder_hidden_states_proj(text)
            row.insert(0, text)
        before = sum(part.shape[1] for part in row[:-1])
        if self.prd_embedding is not None:
            row.append(jnp.broadcast_to(value(self.prd_embedding).astype(dtype), (len(t), 1, c.width)))
        x = jnp.concatenate(row, 1)

        places = value(self.positional_embedding).astype(dtype)
        if places.shape[1] < x.shape[1]:  # those of the sample alone
            places = jnp.pad(places, ((0, 0), (before, x.shape[1] - before - places.shape[1]), (0, 0)))
        x, mask = x + places, None
        if attention_mask is not None:
            seen = jnp.pad(attention_mask.astype(bool), ((0, 0), (0, c.additional_embeddings)), constant_values=True)
            mask = seen[:, None, None] & jnp.tri(x.shape[1], dtype=bool)
        x = x if self.norm_in is None else self.norm_in(x)
        x = self.norm_out(run(self.transformer_blocks, x, (), mask))
        return self.proj_to_clip_embeddings(x[:, before:] if self.prd_embedding is None else x[:, -1])

    def post_process_latents(self, prior_latents: jax.Array) -> jax.Array:
        """A sample [B, E], of unit variance, as the embedding [B, E] that it stands for."""
        std, mean = (value(moment).astype(jnp.float32) for moment in (self.clip_std, self.clip_mean))
        return prior_latents * std + mean
