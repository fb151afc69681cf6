"""SiglipVisionModel: an image encoder whose every patch is of use, as Flux Redux reads them.

CLIP's layers without a token for the whole of a picture; a learned query attends to the patches in its place.

Reference: Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.core import Config, Model, param
from flaxdiff.models.clip import CLIPMLP, CLIPEncoder
from flaxdiff.models.clip_vision import patches
from flaxdiff.nn.attention import attention, split_heads
from flaxdiff.nn.layers import Conv, Embedding, LayerNorm, Linear, normal, uniform, value, zeros
from flaxdiff.nn.stack import states
from flaxdiff.weights import dot


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig(Config):
    """transformers' keys and defaults, as far as the network reads them."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = True


class SiglipVisionOutput(NamedTuple):
    """What the encoder has to say."""

    last_hidden_state: jax.Array  # [B, N, D], normalised
    pooler_output: jax.Array | None  # [B, D], where the network has a query for it
    hidden_states: jax.Array  # [L + 1, B, N, D]: the embeddings, then each layer's output, not normalised


class SiglipVisionEmbeddings(nnx.Module):
    """Patches of a picture [B, H, W, C] with their positions."""

    def __init__(self, c: SiglipVisionConfig):
        self.patch_embedding = Conv(c.num_channels, c.hidden_size, c.patch_size, c.patch_size, padding=0)
        self.position_embedding = Embedding((c.image_size // c.patch_size) ** 2, c.hidden_size)
        self.image_size = c.image_size

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return patches(self.patch_embedding, pixels, self.image_size) + value(self.position_embedding.weight)


class MultiheadAttention(nnx.Module):
    """PyTorch's: queries, keys and values by one matrix."""

    def __init__(self, width: int, heads: int):
        self.in_proj_weight = param((width, 3 * width), "linear", uniform(width))
        self.in_proj_bias, self.out_proj = param((3 * width,), "raw", zeros), Linear(width, width)
        self.heads = heads

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """[B, N, D] to a context [B, M, D]."""
        weight, bias = value(self.in_proj_weight), jnp.split(value(self.in_proj_bias), 3)
        parts = (jnp.split(dot(a, weight), 3, -1)[i] + bias[i] for i, a in enumerate((x, context, context)))
        q, k, v = (split_heads(a, self.heads) for a in parts)
        return self.out_proj(attention(q, k, v).reshape(x.shape))


class SiglipMultiheadAttentionPoolingHead(nnx.Module):
    """What a learned query finds in the patches: [B, N, D] -> [B, D]."""

    def __init__(self, c: SiglipVisionConfig):
        self.probe = param((1, 1, c.hidden_size), "raw", normal)
        self.attention = MultiheadAttention(c.hidden_size, c.num_attention_heads)
        self.layernorm, self.mlp = LayerNorm(c.hidden_size, c.layer_norm_eps), CLIPMLP(c)

    def __call__(self, x: jax.Array) -> jax.Array:
        probe = value(self.probe)
        h = self.attention(jnp.broadcast_to(probe, (len(x), *probe.shape[1:])), x)
        return (h + self.mlp(self.layernorm(h)))[:, 0]


class SiglipVisionTransformer(nnx.Module):
    """A picture -> what `SiglipVisionOutput` holds."""

    def __init__(self, c: SiglipVisionConfig):
        self.embeddings, self.encoder = SiglipVisionEmbeddings(c), CLIPEncoder(c, causal=False)
        self.post_layernorm = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.head = SiglipMultiheadAttentionPoolingHead(c) if c.vision_use_head else None

    def __call__(self, pixels: jax.Array) -> SiglipVisionOutput:
        hidden = states(self.encoder.layers, self.embeddings(pixels))
        last = self.post_layernorm(hidden[-1])
        return SiglipVisionOutput(last, None if self.head is None else self.head(last), hidden)


class SiglipVisionModel(Model):
    """The image encoder of Flux Redux.

    >>> import flaxdiff
    >>> spec = SiglipVisionModel.from_config(
    ...     {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32})
    >>> out = flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), jnp.zeros((1, 32, 32, 3)))
    >>> out.last_hidden_state.shape, out.pooler_output.shape
    ((1, 4, 32), (1, 32))
    """

    config_class = SiglipVisionConfig
    library, model_type = "transformers", "siglip_vision_model"
    renames = ((r"^(?=embeddings\.|encoder\.|post_layernorm\.|head\.)", "vision_model."),)
    ignored = r"vision_model\.embeddings\.position_ids"

    def __init__(self, config: SiglipVisionConfig):
        self.vision_model = SiglipVisionTransformer(config)

    def __call__(self, pixel_values: jax.Array) -> SiglipVisionOutput:
        """Pictures [B, S, S, 3] in [-1, 1], see `images.square_pixels`."""
        return self.vision_model(pixel_values)
