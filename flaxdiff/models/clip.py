"""CLIPTextModel and its kin: the text encoders of Stable Diffusion and many others.

A causal transformer over at most 77 tokens. `last_hidden_state` is what a denoiser attends to, `hidden_states` holds
every layer (SDXL reads the last but one), `pooler_output` is the state at the end-of-text token, and `text_embeds`
its projection.

Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
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
class CLIPTextConfig(Config):
    """transformers' keys and defaults, as far as the network reads them."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1


class CLIPTextOutput(NamedTuple):
    """What the encoder has to say."""

    last_hidden_state: jax.Array  # [B, N, D], normalised
    pooler_output: jax.Array  # [B, D]
    hidden_states: jax.Array  # [L + 1, B, N, D]: the embeddings, then each layer's output, not normalised
    text_embeds: jax.Array | None  # [B, P], with projection only


class CLIPAttention(nnx.Module):
    """Multi-head self-attention; `bias`: of queries, keys and values, `causal` in texts."""

    def __init__(self, width: int, heads: int, head_dim: int, bias: bool = True, causal: bool = False):
        self.q_proj, self.k_proj, self.v_proj = (Linear(width, heads * head_dim, bias) for _ in range(3))
        self.out_proj = Linear(heads * head_dim, width)
        self.heads, self.causal = heads, causal

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, N, D], of which the positions in a mask [B, N] may be seen."""
        split = lambda a: split_heads(a, self.heads)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        h = attention(q, k, v, mask=None if mask is None else mask[:, None, None], causal=self.causal)
        return self.out_proj(h.reshape(*x.shape[:2], -1))


class CLIPMLP(nnx.Module):
    """Expand, activate, contract."""

    def __init__(self, c: Config):
        self.fc1, self.fc2 = Linear(c.hidden_size, c.intermediate_size), Linear(c.intermediate_size, c.hidden_size)
        self.hidden_act = c.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    """Attention and feed-forward, each added to what it reads normalised."""

    def __init__(self, c: Config, causal: bool):
        width, heads = c.hidden_size, c.num_attention_heads
        self.layer_norm1 = LayerNorm(width, c.layer_norm_eps)
        self.self_attn = CLIPAttention(width, heads, width // heads, causal=causal)
        self.layer_norm2, self.mlp = LayerNorm(c.hidden_size, c.layer_norm_eps), CLIPMLP(c)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextEmbeddings(nnx.Module):
    """Token and position; `inserted`: embeddings [B, M, D] that stand among those of the tokens, and from where on."""

    def __init__(self, c: CLIPTextConfig):
        self.token_embedding = Embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = Embedding(c.max_position_embeddings, c.hidden_size)

    def __call__(self, ids: jax.Array, inserted: tuple[jax.Array, int | jax.Array] | None = None) -> jax.Array:
        x = self.token_embedding(ids)
        if inserted is not None:
            more, begin = inserted
            (n, m), i = (x.shape[1], more.shape[1]), jnp.arange(x.shape[1] + more.shape[1])
            order = jnp.where(i < begin, i, jnp.where(i < begin + m, n + i - begin, i - m))
            x = jnp.concatenate([x, more.astype(x.dtype)], 1)[:, order]
        return x + self.position_embedding(jnp.arange(x.shape[1]))


class CLIPEncoder(nnx.Module):
    """The layers, under the name that the checkpoint gives them."""

    def __init__(self, c: Config, causal: bool, layer: type[CLIPEncoderLayer] = CLIPEncoderLayer):
        self.layers = stack(lambda: layer(c, causal), c.num_hidden_layers, c.scan_layers)


def end_of_text(ids: jax.Array, eos_token_id: int) -> jax.Array:
    """The place [B] of the token in ids [B, N] that ends the text; what follows it fills up."""
    # The first configurations gave eos_token_id 2 by mistake; their end of text is the largest id.
    return jnp.argmax(ids if eos_token_id == 2 else ids == eos_token_id, -1)


class CLIPTextTransformer(nnx.Module):
    """Tokens [B, N], and which may be seen [B, N] -> what `CLIPTextOutput` holds, projection aside."""

    def __init__(self, c: CLIPTextConfig):
        self.embeddings, self.encoder = CLIPTextEmbeddings(c), CLIPEncoder(c, causal=True)
        self.final_layer_norm = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.eos_token_id = c.eos_token_id

    def __call__(
        self, ids: jax.Array, mask: jax.Array | None = None, inserted: tuple[jax.Array, int | jax.Array] | None = None
    ) -> CLIPTextOutput:
        hidden = states(self.encoder.layers, self.embeddings(ids, inserted), mask)
        last = self.final_layer_norm(hidden[-1])
        end = end_of_text(ids, self.eos_token_id)
        return CLIPTextOutput(last, last[jnp.arange(ids.shape[0]), end], hidden, None)


class CLIPTextModel(Model):
    """The text encoder of Stable Diffusion 1 and 2, and the first of SDXL.

    >>> import flaxdiff
    >>> spec = CLIPTextModel.from_config({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99})
    >>> out = flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), jnp.zeros((1, 7), int))
    >>> out.last_hidden_state.shape, out.hidden_states.shape
    ((1, 7, 32), (3, 1, 7, 32))
    """

    config_class = CLIPTextConfig
    library, model_type = "transformers", "clip_text_model"
    renames = ((r"^(?=embeddings\.|encoder\.|final_layer_norm\.)", "text_model."),)
    ignored = r"text_model\.embeddings\.position_ids"

    def __init__(self, config: CLIPTextConfig):
        self.text_model = CLIPTextTransformer(config)

    def __call__(self, input_ids: jax.Array, mask: jax.Array | None = None) -> CLIPTextOutput:
        return self.text_model(input_ids, mask)

    def skip(self, input_ids: jax.Array, layers: jax.Array | int) -> jax.Array:
        """The hidden states some layers before the last, normalised like the last: [B, N] -> [B, N, D]."""
        hidden = self.text_model(input_ids).hidden_states
        return self.text_model.final_layer_norm(hidden[len(hidden) - 1 - jnp.asarray(layers)])


class CLIPTextModelWithProjection(CLIPTextModel):
    """The second text encoder of SDXL: the pooled state is projected as well."""

    def __init__(self, config: CLIPTextConfig):
        self.text_model = CLIPTextTransformer(config)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def __call__(self, input_ids: jax.Array, mask: jax.Array | None = None) -> CLIPTextOutput:
        out = self.text_model(input_ids, mask)
        return out._replace(text_embeds=self.text_projection(out.pooler_output))


class ContextCLIPTextModel(CLIPTextModel):
    """The text encoder of BLIP-Diffusion: what stands for a subject is read among the tokens of the text."""

    package = "blip_diffusion"

    def __call__(
        self, input_ids: jax.Array, context: jax.Array | None = None, begin: int | jax.Array = 2
    ) -> CLIPTextOutput:
        """Tokens [B, N], and embeddings [B, M, D] that stand before the token `begin` of them."""
        return self.text_model(input_ids, None, None if context is None else (context, begin))
