"""The small networks between CLIP and the denoisers of unCLIP: how an embedding of a picture enters a U-Net.

Reference: Ramesh et al., Hierarchical Text-Conditional Image Generation with CLIP Latents, 2022, section 2.1.
"""

import dataclasses

import jax
import jax.numpy as jnp

from flaxdiff import weights
from flaxdiff.core import Config, Model, param
from flaxdiff.nn.layers import LayerNorm, Linear, normal, ones, value, zeros


@dataclasses.dataclass(frozen=True)
class UnCLIPTextProjConfig(Config):
    """diffusers' keys and defaults; the last two have none there."""

    clip_extra_context_tokens: int = 4
    clip_embeddings_dim: int = 768
    time_embed_dim: int = 1280
    cross_attention_dim: int = 1536


class UnCLIPTextProjModel(Model):
    """Embeddings of a picture and of a text as what the decoder attends to, and what it adds to the time.

    >>> import flaxdiff
    >>> spec = UnCLIPTextProjModel.from_config(dict(clip_embeddings_dim=12, time_embed_dim=16, cross_attention_dim=8))
    >>> params, text = flaxdiff.init(spec, jax.random.key(0)), jnp.ones((2, 5, 12))
    >>> context, time = flaxdiff.apply(spec, params, None, text[:, 0], text)
    >>> context.shape, time.shape
    ((2, 9, 8), (2, 16))
    """

    config_class = UnCLIPTextProjConfig
    package = "unclip"

    def __init__(self, config: UnCLIPTextProjConfig):
        c, read = config, config.clip_embeddings_dim
        self.learned_classifier_free_guidance_embeddings = param((read,), "raw", normal)
        self.embedding_proj = Linear(read, c.time_embed_dim)
        self.clip_image_embeddings_project_to_time_embeddings = Linear(read, c.time_embed_dim)
        self.clip_extra_context_tokens_proj = Linear(read, c.clip_extra_context_tokens * c.cross_attention_dim)
        self.encoder_hidden_states_proj = Linear(read, c.cross_attention_dim)
        self.text_encoder_hidden_states_norm = LayerNorm(c.cross_attention_dim)
        self.config = c

    def __call__(
        self, image_embeddings: jax.Array | None, prompt_embeds: jax.Array, text_encoder_hidden_states: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Embeddings [B, D] of pictures, or None for no picture, of texts [B, D], and these by token [B, M, D].

        Returns:
          The context [B, T + M, C] and what is added to the embedding of time [B, E].
        """
        dtype = weights.dtype(value(self.embedding_proj.weight))
        if image_embeddings is None:
            none = value(self.learned_classifier_free_guidance_embeddings)
            image_embeddings = jnp.broadcast_to(none, prompt_embeds.shape)
        image = image_embeddings.astype(dtype)
        time = self.clip_image_embeddings_project_to_time_embeddings(image)
        time = time + self.embedding_proj(prompt_embeds.astype(dtype))
        extra = self.clip_extra_context_tokens_proj(image)
        extra = extra.reshape(len(image), -1, self.config.clip_extra_context_tokens).swapaxes(1, 2)
        text = self.encoder_hidden_states_proj(text_encoder_hidden_states.astype(dtype))
        return jnp.concatenate([extra, self.text_encoder_hidden_states_norm(text)], 1), time


@dataclasses.dataclass(frozen=True)
class StableUnCLIPImageNormalizerConfig(Config):
    """diffusers' keys and defaults."""

    embedding_dim: int = 768


class StableUnCLIPImageNormalizer(Model):
    """The mean and deviation of CLIP's embeddings of pictures.

    >>> import flaxdiff
    >>> spec = StableUnCLIPImageNormalizer.from_config({"embedding_dim": 2})
    >>> params = {"mean": jnp.ones((1, 2)), "std": 2 * jnp.ones((1, 2))}
    >>> flaxdiff.apply(spec, params, jnp.array([[1.0, 5.0]]), method="scale")
    Array([[0., 2.]], dtype=float32)
    """

    config_class = StableUnCLIPImageNormalizerConfig
    package = "stable_diffusion"

    def __init__(self, config: StableUnCLIPImageNormalizerConfig):
        width = config.embedding_dim
        self.mean, self.std = param((1, width), "raw", zeros), param((1, width), "raw", ones)

    def scale(self, embeds: jax.Array) -> jax.Array:
        """Embeddings [B, D] at mean 0 and deviation 1, in float32."""
        mean, std = (value(moment).astype(jnp.float32) for moment in (self.mean, self.std))
        return (embeds.astype(jnp.float32) - mean) / std

    def unscale(self, embeds: jax.Array) -> jax.Array:
        """What `scale` has made of embeddings [B, D] as these were, in float32."""
        mean, std = (value(moment).astype(jnp.float32) for moment in (self.mean, self.std))
        return embeds.astype(jnp.float32) * std + mean
