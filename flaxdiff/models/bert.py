"""BertModel: an encoder of text in which every token sees all others, normalised after each addition.

Its attention and feed-forward are the Q-Former's too, see blip2.py.

Reference: Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding, 2018.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.core import Config, Model
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import attention, split_heads
from flaxdiff.nn.layers import Embedding, LayerNorm, Linear
from flaxdiff.nn.stack import stack, states


@dataclasses.dataclass(frozen=True)
class BertConfig(Config):
    """transformers' keys and defaults, as far as the network reads them."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0


class BertOutput(NamedTuple):
    """What the encoder has to say."""

    last_hidden_state: jax.Array  # [B, N, D]
    pooler_output: jax.Array  # [B, D]
    hidden_states: jax.Array  # [L + 1, B, N, D]: the embeddings, then each layer's output


class BertSelfAttention(nnx.Module):
    """Multi-head attention, to the tokens themselves or to a context with so many channels."""

    def __init__(self, c: BertConfig, context: int | None = None):
        width = c.hidden_size
        self.query, self.key, self.value = (Linear(n, width) for n in (width, context or width, context or width))
        self.heads = c.num_attention_heads

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, context: jax.Array | None = None) -> jax.Array:
        """[B, N, D], to the positions in a mask [B, M]."""
        split = lambda a: split_heads(a, self.heads)
        seen = x if context is None else context
        mask = None if mask is None else mask[:, None, None]
        return attention(*map(split, (self.query(x), self.key(seen), self.value(seen))), mask=mask).reshape(x.shape)


class BertResidual(nnx.Module):
    """What a part of a layer says, projected and added to what it read, normalised."""

    def __init__(self, c: BertConfig, fan_in: int):
        self.dense, self.LayerNorm = Linear(fan_in, c.hidden_size), LayerNorm(c.hidden_size, c.layer_norm_eps)

    def __call__(self, says: jax.Array, x: jax.Array) -> jax.Array:
        return self.LayerNorm(x + self.dense(says))


class BertAttention(nnx.Module):
    """Attention, and its residual; `name`: what checkpoints call the first."""

    def __init__(self, c: BertConfig, name: str = "self", context: int | None = None):
        setattr(self, name, BertSelfAttention(c, context))
        self.output, self.name = BertResidual(c, c.hidden_size), name

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, context: jax.Array | None = None) -> jax.Array:
        return self.output(getattr(self, self.name)(x, mask, context), x)


class BertIntermediate(nnx.Module):
    """Expand, activate."""

    def __init__(self, c: BertConfig):
        self.dense, self.activation = Linear(c.hidden_size, c.intermediate_size), c.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.activation](self.dense(x))


class BertLayer(nnx.Module):
    """Attention and feed-forward."""

    def __init__(self, c: BertConfig):
        self.attention, self.intermediate = BertAttention(c), BertIntermediate(c)
        self.output = BertResidual(c, c.intermediate_size)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class BertEmbeddings(nnx.Module):
    """Token, position and, where there are several, sort of text; normalised."""

    def __init__(self, c: BertConfig, typed: bool = True):
        self.word_embeddings = Embedding(c.vocab_size, c.hidden_size)
        self.position_embeddings = Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = Embedding(c.type_vocab_size, c.hidden_size) if typed else None
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps)

    def __call__(
        self, ids: jax.Array, before: jax.Array | None = None, token_type_ids: jax.Array | None = None
    ) -> jax.Array:
        """Tokens [B, N] -> [B, N, D], behind others [B, M, D] that are embedded already."""
        x = self.word_embeddings(ids) + self.position_embeddings(jnp.arange(ids.shape[1]))
        if self.token_type_embeddings is not None:
            x += self.token_type_embeddings(jnp.zeros_like(ids) if token_type_ids is None else token_type_ids)
        return self.LayerNorm(x if before is None else jnp.concatenate([before, x], 1))


class BertEncoder(nnx.Module):
    """The layers, under the name that the checkpoint gives them."""

    def __init__(self, c: BertConfig):
        self.layer = stack(lambda: BertLayer(c), c.num_hidden_layers, c.scan_layers)


class BertPooler(nnx.Module):
    """The state of the first token, projected."""

    def __init__(self, c: BertConfig):
        self.dense = Linear(c.hidden_size, c.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(x[:, 0]))


class BertModel(Model):
    """Tokens, and which may be seen -> the states of all layers.

    >>> import flaxdiff
    >>> spec = BertModel.from_config({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2})
    >>> out = flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), jnp.zeros((1, 7), int))
    >>> out.last_hidden_state.shape, out.hidden_states.shape
    ((1, 7, 32), (3, 1, 7, 32))
    """

    config_class = BertConfig
    library, model_type = "transformers", "bert"
    renames = ((r"^bert\.", ""), (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
    ignored = r"cls\..*|embeddings\.position_ids"  # what its training predicts

    def __init__(self, config: BertConfig):
        self.embeddings, self.encoder = BertEmbeddings(config), BertEncoder(config)
        self.pooler = BertPooler(config)

    def __call__(
        self, input_ids: jax.Array, mask: jax.Array | None = None, token_type_ids: jax.Array | None = None
    ) -> BertOutput:
        """Tokens int32 [B, N], bool [B, N], and of which of two texts each is."""
        hidden = states(self.encoder.layer, self.embeddings(input_ids, None, token_type_ids), mask)
        return BertOutput(hidden[-1], self.pooler(hidden[-1]), hidden)
