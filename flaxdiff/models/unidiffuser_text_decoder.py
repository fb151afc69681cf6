"""UniDiffuserTextDecoder: the words of an embedded text, by a language model that reads it as what came before.

Between the text encoder and the denoiser an embedding is projected to fewer channels; this model has both projections.
The language model is GPT-2.

Reference: Radford et al., Language Models are Unsupervised Multitask Learners, 2019; Bao et al., One Transformer Fits
All Distributions in Multi-Modal Diffusion at Scale, 2023.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, Model, only, param
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import attention, split_heads
from flaxdiff.nn.layers import Embedding, LayerNorm, Linear, normal, value, zeros
from flaxdiff.nn.stack import run, stack

BEAMS, WORDS = 5, 67  # texts that are kept in view, and tokens of the longest


@dataclasses.dataclass(frozen=True)
class UniDiffuserTextDecoderConfig(Config):
    """diffusers' keys and defaults."""

    prefix_length: int = 77
    prefix_inner_dim: int = 768
    prefix_hidden_dim: int | None = None
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1  # dropouts are for training, which is not here
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = only(True)
    use_cache: bool = True
    scale_attn_by_inverse_layer_idx: bool = only(False)
    reorder_and_upcast_attn: bool = False


class Conv1D(nnx.Module):
    """y = x W + b, which a file holds as it is here: [in, out]."""

    def __init__(self, fan_in: int, fan_out: int):
        self.weight, self.bias = param((fan_in, fan_out), "raw", normal), param((fan_out,), "raw", zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        return weights.dot(x, value(self.weight)) + value(self.bias)


class GPT2Attention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int):
        self.c_attn, self.c_proj, self.heads = Conv1D(width, 3 * width), Conv1D(width, width), heads

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (split_heads(a, self.heads) for a in jnp.split(self.c_attn(x), 3, -1))
        return self.c_proj(attention(q, k, v, causal=True).reshape(x.shape))


class GPT2MLP(nnx.Module):
    """Expand, activate, contract."""

    def __init__(self, width: int, inner: int, activation: str):
        self.c_fc, self.c_proj, self.activation = Conv1D(width, inner), Conv1D(inner, width), activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


class GPT2Block(nnx.Module):
    """Attention and feed-forward, each added to what it reads normalised."""

    def __init__(self, c: UniDiffuserTextDecoderConfig):
        self.ln_1, self.ln_2 = (LayerNorm(c.n_embd, c.layer_norm_epsilon) for _ in range(2))
        self.attn = GPT2Attention(c.n_embd, c.n_head)
        self.mlp = GPT2MLP(c.n_embd, c.n_inner or 4 * c.n_embd, c.activation_function)

    def __call__(self, x: jax.Array, _: None) -> jax.Array:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nnx.Module):
    """Embedded tokens [B, N, D] -> what stands at each, normalised."""

    def __init__(self, c: UniDiffuserTextDecoderConfig):
        self.wte, self.wpe = Embedding(c.vocab_size, c.n_embd), Embedding(c.n_positions, c.n_embd)
        self.h = stack(lambda: GPT2Block(c), c.n_layer, c.scan_layers)
        self.ln_f = LayerNorm(c.n_embd, c.layer_norm_epsilon)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.ln_f(run(self.h, x + self.wpe(jnp.arange(x.shape[1])), None))


class GPT2LMHead(nnx.Module):
    """The language model, whose table of tokens also tells the next one."""

    def __init__(self, c: UniDiffuserTextDecoderConfig):
        self.transformer = GPT2(c)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Embedded tokens [B, N, D] -> logits [B, N, V]."""
        table = weights.dense(value(self.transformer.wte.weight))
        return jnp.einsum("bnd,vd->bnv", self.transformer(x), table, preferred_element_type=jnp.float32)


class UniDiffuserTextDecoder(Model):
    """Embeddings to fewer channels (`encode`), and from there to words (`generate`).

    >>> import flaxdiff
    >>> spec = UniDiffuserTextDecoder.from_config(dict(
    ...     prefix_length=7, prefix_inner_dim=16, prefix_hidden_dim=8, n_embd=16, n_layer=2, n_head=2, vocab_size=40))
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> few = flaxdiff.apply(spec, params, jnp.ones((2, 7, 16)), method="encode")
    >>> tokens, lengths = flaxdiff.apply(spec, params, few, 3, method="generate")
    >>> few.shape, tokens.shape, lengths.shape
    ((2, 7, 8), (2, 67), (2,))
    """

    config_class = UniDiffuserTextDecoderConfig
    origin = "unidiffuser"
    ignored = r"transformer\.lm_head\.weight|.*\.attn\.(masked_)?bias"  # the table of tokens again; masks

    def __init__(self, config: UniDiffuserTextDecoderConfig):
        c, hidden = config, config.prefix_hidden_dim
        self.encode_prefix = None if hidden is None else Linear(c.prefix_inner_dim, hidden)
        self.decode_prefix = None if hidden is None else Linear(hidden, c.n_embd)
        self.transformer = GPT2LMHead(c)

    def encode(self, prefix: jax.Array) -> jax.Array:
        """An embedded text [B, N, D], as the denoiser has it: [B, N, H]."""
        return prefix if self.encode_prefix is None else self.encode_prefix(prefix.astype(self.dtype))

    def decode(self, features: jax.Array) -> jax.Array:
        """What the denoiser has, as the language model reads it: [B, N, H] -> [B, N, E]."""
        return features if self.decode_prefix is None else self.decode_prefix(features.astype(self.dtype))

    @property
    def dtype(self) -> jnp.dtype:
        """That of the weights."""
        return weights.dtype(value(self.transformer.transformer.wte.weight))

    def __call__(self, input_ids: jax.Array, prefix_embeds: jax.Array) -> jax.Array:
        """Tokens int32 [B, M] behind an embedded text [B, N, D] -> logits [B, N + M, V]."""
        prefix = self.decode(self.encode(prefix_embeds))
        return self.transformer(jnp.concatenate([prefix, self.transformer.transformer.wte(input_ids)], 1))

    def generate(self, features: jax.Array, end: int) -> tuple[jax.Array, jax.Array]:
        """The likeliest text for each row, found by a search that keeps `BEAMS` beginnings in view.

        Of two texts the one with the higher mean log probability of its tokens is likelier.

        Args:
          features: [B, N, H] as the denoiser has them.
          end: the token that ends a text.

        Returns:
          Tokens int32 [B, WORDS], and how many of them are the text, the end included: int32 [B].
        """
        return jax.lax.map(lambda row: self._search(row, end), self.decode(features))

    def _search(self, prefix: jax.Array, end: int) -> tuple[jax.Array, jax.Array]:
        """`generate` for one text, [N, E]."""
        n, wte = len(prefix), self.transformer.transformer.wte
        read = jnp.pad(jnp.broadcast_to(prefix, (BEAMS, *prefix.shape)), ((0, 0), (0, WORDS), (0, 0)))
        tokens, ended = jnp.zeros((BEAMS, WORDS), jnp.int32), jnp.zeros(BEAMS, bool)
        # at first all beginnings are the same, and one of them is enough
        total = jnp.where(jnp.arange(BEAMS) == 0, 0.0, -jnp.inf)

        def extend(carry, i):
            read, tokens, total, lengths, ended = carry
            log_p = jax.nn.log_softmax(self.transformer(read)[:, n - 1 + i])
            vocabulary = log_p.shape[1]
            stay = jnp.where(jnp.arange(vocabulary) == 0, 0.0, -jnp.inf)  # a text that has ended goes on in one way
            sums = total[:, None] + jnp.where(ended[:, None], stay, log_p)
            lengths = lengths + jnp.where(ended, 0.0, 1.0)
            mean, best = jax.lax.top_k((sums / lengths[:, None]).reshape(-1), BEAMS)
            source, token = best // vocabulary, best % vocabulary
            read, tokens, lengths, ended = read[source], tokens[source], lengths[source], ended[source]
            done = ended.all()
            new = (
                read.at[:, n + i].set(wte(token)),
                tokens.at[:, i].set(token),
                mean * lengths,
                lengths,
                ended | (token == end),
            )
            return jax.tree.map(lambda old, new: jnp.where(done, old, new), carry, new), None

        carry = read, tokens, total, jnp.zeros(BEAMS), ended
        (_, tokens, total, lengths, _), _ = jax.lax.scan(extend, carry, jnp.arange(WORDS))
        best = jnp.argmax(total / lengths)
        return tokens[best], lengths[best].astype(jnp.int32)
