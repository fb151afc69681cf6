"""Blip2QFormerModel: what a picture shows of a subject that a word names, as a few tokens for a text encoder.

Learned queries read the word beside them, and in every other layer the patches of the picture. The queries have a
feed-forward of their own in each layer.

Reference: Li et al., BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
Models, 2023; Li et al., BLIP-Diffusion: Pre-trained Subject Representation for Controllable Text-to-Image Generation
and Editing, 2023.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.core import Config, Model, param, part, thawed
from flaxdiff.models.bert import BertAttention, BertConfig, BertEmbeddings, BertIntermediate, BertResidual
from flaxdiff.models.clip import CLIPEncoder, CLIPEncoderLayer
from flaxdiff.models.clip_vision import patches
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import attention, split_heads
from flaxdiff.nn.layers import Conv, LayerNorm, Linear, normal, value
from flaxdiff.nn.stack import states


@dataclasses.dataclass(frozen=True)
class Blip2VisionConfig(Config):
    """transformers' keys and defaults, as far as the network reads them."""

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True


@dataclasses.dataclass(frozen=True)
class Blip2QFormerConfig(BertConfig):
    """BERT's keys, and how often the queries see the picture."""

    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408


@dataclasses.dataclass(frozen=True)
class Blip2Config(Config):
    """transformers' keys and defaults, as far as the network reads them; `tokenizer` is diffusers'."""

    num_query_tokens: int = 32
    tokenizer: str | None = None  # where the one for subjects is; None: bert-base-uncased
    vision_config: Any = None  # of each part: (key, value) pairs
    qformer_config: Any = None

    @property
    def vision(self) -> Blip2VisionConfig:
        """The settings of the image encoder."""
        return part(self, Blip2VisionConfig, self.vision_config)

    @property
    def qformer(self) -> Blip2QFormerConfig:
        """The settings of the Q-Former."""
        width = {"encoder_hidden_size": self.vision.hidden_size}
        return dataclasses.replace(part(self, Blip2QFormerConfig, self.qformer_config), **width)


# --- the picture -----------------------------------------------------------------------------------------------------


class Blip2VisionEmbeddings(nnx.Module):
    """Patches of a picture [B, H, W, 3], and a token for the whole of it, with their positions."""

    def __init__(self, c: Blip2VisionConfig):
        self.class_embedding = param((1, 1, c.hidden_size), "raw", normal)
        self.patch_embedding = Conv(3, c.hidden_size, c.patch_size, c.patch_size, padding=0, bias=False)
        self.position_embedding = param((1, (c.image_size // c.patch_size) ** 2 + 1, c.hidden_size), "raw", normal)
        self.image_size = c.image_size

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x, whole = patches(self.patch_embedding, pixels, self.image_size), value(self.class_embedding)
        whole = jnp.broadcast_to(whole, (len(x), *whole.shape[1:]))
        return jnp.concatenate([whole, x], 1) + value(self.position_embedding)


class Blip2Attention(nnx.Module):
    """Multi-head self-attention from one projection."""

    def __init__(self, c: Blip2VisionConfig):
        self.qkv = Linear(c.hidden_size, 3 * c.hidden_size, c.qkv_bias)
        self.projection, self.heads = Linear(c.hidden_size, c.hidden_size), c.num_attention_heads

    def __call__(self, x: jax.Array, mask: None = None) -> jax.Array:
        q, k, v = (split_heads(a, self.heads) for a in jnp.split(self.qkv(x), 3, -1))
        return self.projection(attention(q, k, v).reshape(x.shape))


class Blip2EncoderLayer(CLIPEncoderLayer):
    """CLIP's layer with attention from one projection."""

    def __init__(self, c: Blip2VisionConfig, causal: bool):
        super().__init__(c, causal)
        self.self_attn = Blip2Attention(c)


class Blip2VisionModel(nnx.Module):
    """A picture [B, S, S, 3] -> its patches [B, N + 1, D], normalised, the whole of it first."""

    def __init__(self, c: Blip2VisionConfig):
        norm = lambda: LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.embeddings, self.pre_layernorm, self.post_layernorm = Blip2VisionEmbeddings(c), norm(), norm()
        self.encoder = CLIPEncoder(c, causal=False, layer=Blip2EncoderLayer)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.pre_layernorm(self.embeddings(pixels))
        return self.post_layernorm(states(self.encoder.layers, x)[-1])


# --- the queries -----------------------------------------------------------------------------------------------------


class Blip2QFormerLayer(nnx.Module):
    """Attention of queries and words to each other, of queries to the picture where they see it, and feed-forwards."""

    def __init__(self, c: Blip2QFormerConfig, looks: bool):
        self.attention = BertAttention(c, "attention")
        self.crossattention = BertAttention(c, "attention", c.encoder_hidden_size) if looks else None
        self.intermediate, self.intermediate_query = BertIntermediate(c), BertIntermediate(c)
        self.output, self.output_query = (BertResidual(c, c.intermediate_size) for _ in range(2))

    def __call__(self, x: jax.Array, queries: int, mask: jax.Array, picture: jax.Array) -> jax.Array:
        """Queries and words [B, Q + N, D], which may be seen [B, Q + N], and a picture [B, M, P]."""
        x = self.attention(x, mask)
        q, words = x[:, :queries], x[:, queries:]
        if self.crossattention is not None:
            q = self.crossattention(q, context=picture)
        q = self.output_query(self.intermediate_query(q), q)
        return jnp.concatenate([q, self.output(self.intermediate(words), words)], 1)


class Blip2QFormerEncoder(nnx.Module):
    """The layers, under the name that the checkpoint gives them; they are of two kinds, so one by one."""

    def __init__(self, c: Blip2QFormerConfig):
        looks = [i % c.cross_attention_frequency == 0 for i in range(c.num_hidden_layers)]
        self.layer = nnx.List([Blip2QFormerLayer(c, look) for look in looks])


class ProjLayer(nnx.Module):
    """What is left to the text encoder: x and what a feed-forward makes of it."""

    def __init__(self, width: int):
        self.dense1, self.dense2 = Linear(width, 4 * width), Linear(4 * width, width)
        self.LayerNorm = LayerNorm(width, 1e-12)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.dense2(ACTIVATIONS["quick_gelu"](self.dense1(self.LayerNorm(x))))


class Blip2QFormerModel(Model):
    """A picture and the name of a subject in it -> tokens that stand for the subject.

    >>> import flaxdiff
    >>> vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    >>> words = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    >>> spec = Blip2QFormerModel.from_config(dict(num_query_tokens=5, vision_config=vision, qformer_config=words))
    >>> params, ids = flaxdiff.init(spec, jax.random.key(0)), jnp.ones((1, 4), int)
    >>> flaxdiff.apply(spec, params, ids, ids > 0, jnp.zeros((1, 28, 28, 3))).shape
    (1, 5, 32)
    """

    config_class = Blip2Config
    library, package, model_type = "transformers", "blip_diffusion", "blip-2"
    ignored = r"embeddings\.position_ids"

    @classmethod
    def to_config(cls, config: Blip2Config) -> dict[str, Any]:
        """transformers' form, in which the parts are objects."""
        keys, parts = super().to_config(config), {"vision_config": "vision_model", "qformer_config": "qformer"}
        of = lambda name: {**(thawed(getattr(config, name)) or {}), "model_type": f"blip_2_{parts[name]}"}
        return keys | {name: of(name) for name in parts}

    def __init__(self, config: Blip2Config):
        c = config.qformer
        self.embeddings = BertEmbeddings(c, typed=False)
        self.visual_encoder = Blip2VisionModel(config.vision)
        self.query_tokens = param((1, config.num_query_tokens, c.hidden_size), "raw", normal)
        self.proj_layer, self.encoder = ProjLayer(c.hidden_size), Blip2QFormerEncoder(c)

    def __call__(self, input_ids: jax.Array, mask: jax.Array, pixels: jax.Array) -> jax.Array:
        """The tokens [B, Q, D] of a subject.

        Args:
          input_ids, mask: int32 and bool [B, N], the subject's name, and which of it may be seen.
          pixels: [B, S, S, 3], normalised.
        """
        queries = value(self.query_tokens)
        n = queries.shape[1]
        picture = self.visual_encoder(pixels)
        x = self.embeddings(input_ids, jnp.broadcast_to(queries, (len(input_ids), *queries.shape[1:])))
        mask = jnp.pad(mask, ((0, 0), (n, 0)), constant_values=True)
        for layer in self.encoder.layer:
            x = layer(x, n, mask, picture)
        return self.proj_layer(x[:, :n])
