"""The network of decoder-only language models, with which newer diffusion transformers read texts: one for all.

Every token sees those before it, in some layers only those that are near. Which projections have biases, what is
normalised, how places turn queries and keys, and a few factors differ: facts of a class, in its `Traits`, or keys of
its `config.json`. The classes are in language_model.py. Nothing is generated; `hidden_states` holds every layer.

Reference: Touvron et al., LLaMA: Open and Efficient Foundation Language Models, 2023; Gemma Team, Gemma 2: Improving
Open Language Models at a Practical Size, 2024; Yang et al., Qwen2.5 Technical Report, 2024.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, only
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import attention, split_heads
from flaxdiff.nn.layers import Embedding, Linear, RMSNorm, value
from flaxdiff.nn.rope import Rope, frequencies, rotate, turns
from flaxdiff.nn.stack import stack, states

FULL, SLIDING = "full_attention", "sliding_attention"


class Traits(NamedTuple):
    """What tells one class of models from another and is in no configuration.

    Attributes:
      biases: which of the projections have one whatever `attention_bias` says, and which may have one where it does.
      normed: whether queries and keys are normalised, head by head.
      around: what the scales of norms are held as a distance from.
      scaled: whether embedded tokens are multiplied by the root of their width.
      after: whether what attention and feed-forward say is normalised too.
      fused: whether the feed-forward's first two projections are one.
      halves: whether a channel turns with the one half a head further, or else with its neighbour.
    """

    biases: tuple[str, str] = ("", "qkvo")
    normed: bool = False
    around: float = 0.0
    scaled: bool = False
    after: bool = False
    fused: bool = False
    halves: bool = True


@dataclasses.dataclass(frozen=True)
class LanguageConfig(Config):
    """transformers' keys as far as the network reads them; defaults are those of Llama."""

    traits: ClassVar[Traits] = Traits()
    theta: ClassVar[float] = 10_000.0  # where a configuration says nothing

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = only(False)
    pad_token_id: int | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    use_bidirectional_attention: bool | None = only(None, False)
    layer_types: tuple[str, ...] | None = None
    sliding_window: int | None = None
    rope_parameters: Any = None  # (key, value) pairs, perhaps for each kind of layer; older files have what follows
    rope_theta: float | None = None
    rope_scaling: Any = None
    partial_rotary_factor: float = 1.0

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def heads(self) -> tuple[int, int]:
        """How many there are of queries, and of keys and values."""
        return self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads

    @property
    def scale(self) -> float:
        """Of the scores of attention."""
        return (self.query_pre_attn_scalar or self.width) ** -0.5

    @property
    def activation(self) -> str:
        """Its name."""
        return self.hidden_act

    def slides(self, layer: int) -> bool:
        """Whether a layer sees only what is near, where `layer_types` does not say so."""
        return False

    def turns(self, layer: int) -> bool:
        """Whether places count in a layer."""
        return True

    @property
    def near(self) -> tuple[bool, ...]:
        """Which layers see only what is near."""
        if self.layer_types is not None:
            return tuple(kind == SLIDING for kind in self.layer_types)
        return tuple(map(self.slides, range(self.num_hidden_layers)))

    def rope(self, kind: str) -> dict[str, Any]:
        """How places turn queries and keys in one kind of layer."""
        new, old = dict(self.rope_parameters or ()), dict(self.rope_scaling or ())
        said = {"rope_theta": self.rope_theta or self.theta, "partial_rotary_factor": self.partial_rotary_factor}
        kinds = {"rope_type": old.pop("type")} if "type" in old else {}
        return said | kinds | old | dict(new.get(kind, new))


# --- the network -----------------------------------------------------------------------------------------------------


class DecoderAttention(nnx.Module):
    """Multi-head attention in which several queries share a key and a value."""

    def __init__(self, c: LanguageConfig):
        (queries, keys), (always, perhaps), width = c.heads, c.traits.biases, c.hidden_size
        bias = lambda part: part in always or c.attention_bias and part in perhaps
        self.q_proj = Linear(width, queries * c.width, bias("q"))
        self.k_proj, self.v_proj = (Linear(width, keys * c.width, bias(part)) for part in "kv")
        self.o_proj = Linear(queries * c.width, width, bias("o"))
        norm = lambda: RMSNorm(c.width, c.rms_norm_eps, around=c.traits.around)
        self.q_norm, self.k_norm = (norm(), norm()) if c.traits.normed else (None, None)
        self.config = c

    def __call__(self, x: jax.Array, turn: Rope, mask: jax.Array | None) -> jax.Array:
        """[B, N, D], of which each may see what a mask [B, 1, 1 or N, N] says; without one, what comes before."""
        c = self.config
        split = lambda a: split_heads(a, a.shape[-1] // c.width)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(a, turn, c.traits.halves) for a in (q, k))
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
        out = attention(q, k, v, mask=mask, causal=True, scale=c.scale, cap=c.attn_logit_softcapping)
        return self.o_proj(out.reshape(*x.shape[:2], -1))


class GatedMLP(nnx.Module):
    """Expand, one half gating the other, contract; `fused`: the first two projections are one."""

    def __init__(self, width: int, inner: int, activation: str, bias: bool = False, fused: bool = False):
        self.gate_up_proj = Linear(width, 2 * inner, bias) if fused else None
        self.gate_proj, self.up_proj = (None if fused else Linear(width, inner, bias) for _ in range(2))
        self.down_proj, self.activation = Linear(inner, width, bias), activation

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = jnp.split(self.gate_up_proj(x), 2, -1)
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up)


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each added to what it reads normalised."""

    def __init__(self, c: LanguageConfig):
        norm = lambda: RMSNorm(c.hidden_size, c.rms_norm_eps, around=c.traits.around)
        self.self_attn = DecoderAttention(c)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, c.activation, fused=c.traits.fused)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = (
            norm() if c.traits.after else None for _ in range(2)
        )

    def __call__(self, x: jax.Array, each: Mapping[str, jax.Array], told: "Told") -> jax.Array:
        """`each`: whether this layer sees only what is `near`, and whether places count, `turns`."""
        turn, mask = told.of(each)
        said = self.self_attn(self.input_layernorm(x), turn, mask)
        if self.post_feedforward_layernorm is None:
            x = x + said
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(said)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Told(NamedTuple):
    """What all layers are told: for those that see everything and for those that see what is near."""

    turn: Mapping[str, Rope]
    mask: Mapping[str, jax.Array | None]

    def of(self, each: Mapping[str, jax.Array]) -> tuple[Rope, jax.Array | None]:
        """The turn and the mask of one layer."""
        turn, mask = self.turn[FULL], self.mask[FULL]
        if "near" in each:
            pick = lambda near, full: jnp.where(each["near"], near, full)
            turn, mask = jax.tree.map(pick, (self.turn[SLIDING], self.mask[SLIDING]), (turn, mask))
        if "turns" in each:
            turn = tuple(jnp.where(each["turns"], a, still) for a, still in zip(turn, (1.0, 0.0)))
        return turn, mask


class LanguageOutput(NamedTuple):
    """What the network has to say."""

    last_hidden_state: jax.Array  # [B, N, D], normalised
    hidden_states: jax.Array  # [L + 1, B, N, D]: the embeddings, then each layer's output, the last one normalised


class Decoder(nnx.Module):
    """Tokens -> the states of all layers."""

    def __init__(self, config: LanguageConfig):
        c = config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = stack(lambda: DecoderLayer(c), c.num_hidden_layers, c.scan_layers)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, around=c.traits.around)
        self.config = c

    def __call__(
        self,
        input_ids: jax.Array,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        pictures: jax.Array | None = None,
    ) -> LanguageOutput:
        """What the network makes of texts.

        Args:
          input_ids: int32 [B, N].
          mask: bool [B, N], which of them may be seen.
          positions: where each stands, [N] or [B, N], or for networks that read pictures in three axes [3, B, N]; by
            default one after the other.
          pictures: [B, M, D], what stands for tokens that say there is a picture, in their order.
        """
        c, n = self.config, input_ids.shape[1]
        x = self.embed_tokens(input_ids)
        if c.traits.scaled:
            x = x * jnp.asarray(c.hidden_size**0.5, weights.dtype(value(self.embed_tokens.weight)))
        if pictures is not None:
            there = input_ids == c.image_token_id
            nth = jnp.clip(jnp.cumsum(there, 1) - 1, 0, pictures.shape[1] - 1)
            x = jnp.where(there[..., None], jnp.take_along_axis(pictures.astype(x.dtype), nth[..., None], 1), x)
        each = {}
        if any(c.near):
            each["near"] = jnp.asarray(c.near)
        if not all(places := [c.turns(i) for i in range(c.num_hidden_layers)]):
            each["turns"] = jnp.asarray(places)
        positions = jnp.arange(n) if positions is None else positions
        kinds = (FULL, SLIDING) if "near" in each else (FULL,)
        told = Told({kind: self._turn(kind, positions) for kind in kinds}, self._masks(kinds, n, mask))
        hidden = states(self.layers, x, told, each=each)
        last = self.norm(hidden[-1])
        return LanguageOutput(last, jnp.concatenate([hidden[:-1], last[None]]))

    def _turn(self, kind: str, positions: jax.Array) -> Rope:
        said, c = self.config.rope(kind), self.config
        omega, factor = frequencies(int(c.width * said["partial_rotary_factor"]), said)
        return turns(positions, omega, c.width, c.traits.halves, said.get("mrope_section"), factor)

    def _masks(self, kinds: tuple[str, ...], n: int, mask: jax.Array | None) -> dict[str, jax.Array | None]:
        seen = None if mask is None else jnp.asarray(mask, bool)[:, None, None]
        window = self.config.sliding_window or n
        if n <= window:
            return dict.fromkeys(kinds, seen)
        row, seen = np.arange(n), np.ones((1, 1, 1, n), bool) if seen is None else seen
        near = (row[:, None] - row < window)[None, None]
        return {FULL: jnp.broadcast_to(seen, (len(seen), 1, n, n)), SLIDING: seen & near}
