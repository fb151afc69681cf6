"""CLIPVisionModelWithProjection: the image encoder of IP-Adapter and of image variations.

A transformer over the patches of a picture, with one token more for the whole. `image_embeds` is the projection of that
token, `hidden_states` holds every layer for those that read the patches.

Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, Model, Spec, param
from flaxdiff.models.clip import CLIPEncoder
from flaxdiff.nn.layers import Conv, Embedding, LayerNorm, Linear, normal, value
from flaxdiff.nn.stack import states


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(Config):
    """transformers' keys and defaults, as far as the network reads them."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


class CLIPVisionOutput(NamedTuple):
    """What the encoder has to say."""

    image_embeds: jax.Array  # [B, P]
    last_hidden_state: jax.Array  # [B, N + 1, D], the whole picture first
    hidden_states: jax.Array  # [L + 1, B, N + 1, D]: the embeddings, then each layer's output


def patches(embed: Conv, pixels: jax.Array, side: int) -> jax.Array:
    """A picture [B, S, S, C] as patches in a row, [B, N, D]. Raises ValueError where S is not `side`."""
    if pixels.shape[1:3] != (side,) * 2:
        raise ValueError(
            f"The image encoder reads pictures of {side} x {side} pixels, and was given {pixels.shape[1]} x "
            f"{pixels.shape[2]}; see flaxdiff.images.clip_pixels."
        )
    x = embed(pixels.astype(weights.dtype(value(embed.weight))))
    return x.reshape(len(x), -1, x.shape[-1])


class CLIPVisionEmbeddings(nnx.Module):
    """Patches of a picture [B, H, W, C], and a token for the whole of it, with their positions."""

    def __init__(self, c: CLIPVisionConfig):
        self.class_embedding = param((c.hidden_size,), "raw", normal)
        self.patch_embedding = Conv(c.num_channels, c.hidden_size, c.patch_size, c.patch_size, padding=0, bias=False)
        self.position_embedding = Embedding((c.image_size // c.patch_size) ** 2 + 1, c.hidden_size)
        self.image_size = c.image_size

    def __call__(self, pixels: jax.Array) -> jax.Array:
        whole, position = value(self.class_embedding), value(self.position_embedding.weight)
        x = patches(self.patch_embedding, pixels, self.image_size)
        first = jnp.broadcast_to(whole, (len(pixels), 1, len(whole)))
        return jnp.concatenate([first, x], 1) + position


class CLIPVisionTransformer(nnx.Module):
    """A picture -> every layer's tokens [L + 1, B, N + 1, D], and the state of the whole [B, D], normalised."""

    def __init__(self, c: CLIPVisionConfig):
        norm = lambda: LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.embeddings, self.pre_layrnorm = CLIPVisionEmbeddings(c), norm()  # the checkpoints' spelling
        self.encoder, self.post_layernorm = CLIPEncoder(c, causal=False), norm()

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = states(self.encoder.layers, self.pre_layrnorm(self.embeddings(pixels)))
        return hidden, self.post_layernorm(hidden[-1, :, 0])


class CLIPVisionModelWithProjection(Model):
    """The image encoder of IP-Adapter.

    >>> import flaxdiff
    >>> spec = CLIPVisionModelWithProjection.from_config(
    ...     {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8})
    >>> out = flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), jnp.zeros((1, 16, 16, 3)))
    >>> out.image_embeds.shape, out.hidden_states.shape
    ((1, 512), (3, 1, 5, 32))
    """

    config_class = CLIPVisionConfig
    library, model_type = "transformers", "clip_vision_model"
    ignored = r"(text|vision)_model\.embeddings\.position_ids|text_(model|projection)\..*|logit_scale"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Spec:
        """The spec of a `config.json`, also of a whole CLIP, of which this is the half that sees."""
        vision = config.get("vision_config")
        if isinstance(vision, Mapping):
            shared = {k: v for k, v in config.items() if k in ("projection_dim", "scan_layers", "attention", "remat")}
            config = {**vision, **shared}
        return super().from_config(config)

    def __init__(self, config: CLIPVisionConfig):
        self.vision_model = CLIPVisionTransformer(config)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def __call__(self, pixel_values: jax.Array) -> CLIPVisionOutput:
        """Normalised pictures [B, S, S, 3], see `images.clip_pixels`."""
        hidden, whole = self.vision_model(pixel_values)
        return CLIPVisionOutput(self.visual_projection(whole), hidden[-1], hidden)
