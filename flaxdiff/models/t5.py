"""T5EncoderModel and UMT5EncoderModel: the text encoders of most diffusion transformers.

Every token sees all others that are no padding. Places enter as a bias of the attention: one number a head for each
distance, of which those far away share some. T5 has one table of them for all layers, UMT5 one in each. Scores are not
scaled, and norms only scale.

Reference: Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, 2020;
Chung et al., UniMax: Fairer and More Effective Language Sampling for Large-Scale Multilingual Pretraining, 2023.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdiff.core import Config, Model, param
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import attention, split_heads
from flaxdiff.nn.layers import Embedding, Linear, RMSNorm, normal, value
from flaxdiff.nn.stack import run, stack


@dataclasses.dataclass(frozen=True)
class T5Config(Config):
    """transformers' keys and defaults, as far as the network reads them."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"  # an activation, perhaps with "gated-" before it
    pad_token_id: int = 0

    @property
    def gated(self) -> bool:
        """Whether one projection gates another in the feed-forward."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """Its name; the approximation is what "gated-gelu" has always meant."""
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else self.feed_forward_proj.split("-")[-1]


@dataclasses.dataclass(frozen=True)
class UMT5Config(T5Config):
    """transformers' keys and defaults, as far as the network reads them."""

    vocab_size: int = 250112
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    feed_forward_proj: str = "gated-gelu"


def buckets(n: int, count: int, furthest: int) -> np.ndarray:
    """Which row of a table of biases is for each pair of n places: int32 [query, key].

    A half of the `count` rows is for keys that come after. Near distances have rows of their own, larger ones share
    them by their logarithm, and the last is for `furthest` and beyond.

    >>> buckets(4, 8, 16)[0]
    array([0, 5, 6, 6], dtype=int32)
    """
    count //= 2
    apart = np.arange(n) - np.arange(n)[:, None]
    distance, near = np.abs(apart), count // 2
    ratio = np.log(np.maximum(distance, near).astype(np.float32) / near) / np.log(np.float32(furthest / near))
    far = np.minimum(near + (ratio * (count - near)).astype(np.int32), count - 1)
    return (count * (apart > 0) + np.where(distance < near, distance, far)).astype(np.int32)


class T5Attention(nnx.Module):
    """Multi-head self-attention with a bias, and no scale."""

    def __init__(self, c: T5Config, table: bool):
        self.q, self.k, self.v = (Linear(c.d_model, c.num_heads * c.d_kv, bias=False) for _ in range(3))
        self.o = Linear(c.num_heads * c.d_kv, c.d_model, bias=False)
        entries = c.relative_attention_num_buckets
        self.relative_attention_bias = Embedding(entries, c.num_heads) if table else None
        self.heads = c.num_heads

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
        """[B, N, D]; the bias [N, N, H], or with a table of its own which rows of that, [N, N]; a mask [B, N]."""
        bias = bias if self.relative_attention_bias is None else self.relative_attention_bias(bias)
        split = lambda a: split_heads(a, self.heads)
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        mask = None if mask is None else mask[:, None, None]
        h = attention(q, k, v, mask=mask, bias=jnp.moveaxis(bias, -1, 0), scale=1.0)
        return self.o(h.reshape(*x.shape[:2], -1))


class T5LayerSelfAttention(nnx.Module):
    """Attention to what is normalised."""

    def __init__(self, c: T5Config, table: bool):
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)
        self.SelfAttention = T5Attention(c, table)


class T5DenseActDense(nnx.Module):
    """Expand, activate or gate, contract."""

    def __init__(self, c: T5Config):
        expand = lambda: Linear(c.d_model, c.d_ff, bias=False)
        if c.gated:
            self.wi_0, self.wi_1 = expand(), expand()
        else:
            self.wi = expand()
        self.wo, self.gated, self.activation = Linear(c.d_ff, c.d_model, bias=False), c.gated, c.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        return self.wo(act(self.wi_0(x)) * self.wi_1(x) if self.gated else act(self.wi(x)))


class T5LayerFF(nnx.Module):
    """Feed-forward of what is normalised."""

    def __init__(self, c: T5Config):
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)
        self.DenseReluDense = T5DenseActDense(c)


class T5Block(nnx.Module):
    """Attention and feed-forward, each added to what it reads normalised."""

    def __init__(self, c: T5Config, table: bool):
        self.layer = nnx.List([T5LayerSelfAttention(c, table), T5LayerFF(c)])

    def __call__(self, x: jax.Array, _: None, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
        attend, expand = self.layer
        x = x + attend.SelfAttention(attend.layer_norm(x), bias, mask)
        return x + expand.DenseReluDense(expand.layer_norm(x))


class T5Stack(nnx.Module):
    """The layers, with a table of biases for all of them or one in each, and a last norm."""

    def __init__(self, c: T5Config, tables: bool):
        self.block = stack(lambda: T5Block(c, tables), c.num_layers, c.scan_layers)
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)
        shape = c.relative_attention_num_buckets, c.num_heads
        first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        self.relative_attention_bias = None if tables else param(shape, "embedding", normal, called=first)
        self.distances = c.relative_attention_num_buckets, c.relative_attention_max_distance

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        rows = jnp.asarray(buckets(x.shape[1], *self.distances))
        table = self.relative_attention_bias
        bias = rows if table is None else jnp.take(value(table), rows, axis=0)
        return self.final_layer_norm(run(self.block, x, None, bias, mask))


class T5EncoderModel(Model):
    """The text encoder of Stable Diffusion 3, Flux, PixArt and many others.

    >>> import flaxdiff
    >>> spec = T5EncoderModel.from_config({"d_model": 32, "num_layers": 2, "vocab_size": 99})
    >>> ids = jnp.array([[5, 7, 1, 0, 0]])
    >>> flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), ids, ids != 0).shape
    (1, 5, 32)
    """

    config_class = T5Config
    library, model_type = "transformers", "t5"
    ignored = r"encoder\.embed_tokens\.weight|decoder\..*|lm_head\.weight"  # the first is `shared`, the rest not read
    tables = False  # whether each layer has its own biases

    def __init__(self, config: T5Config):
        self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, self.tables)

    def __call__(self, input_ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Tokens [B, N], of which those in a mask, bool [B, N], may be seen -> [B, N, D], normalised."""
        return self.encoder(self.shared(input_ids), mask)


class UMT5EncoderModel(T5EncoderModel):
    """The text encoder of Wan and AuraFlow, of many languages.

    >>> UMT5EncoderModel.from_config({}).config.vocab_size
    250112
    """

    config_class = UMT5Config
    model_type = "umt5"
    tables = True
