"""Decoder-only language models, with which newer diffusion transformers read texts: one network for all of them.

Every token sees those before it, in some layers only those that are near. Llama, Mistral, Qwen, Gemma, GLM and SmolLM
differ in which projections have biases, what is normalised, how places turn queries and keys, and a few factors: facts
of a class, in its `Traits`, or keys of its `config.json`. Nothing is generated; `hidden_states` holds every layer.

Reference: Touvron et al., LLaMA: Open and Efficient Foundation Language Models, 2023; Gemma Team, Gemma 2: Improving
Open Language Models at a Practical Size, 2024; Yang et al., Qwen2.5 Technical Report, 2024.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, Model, Spec, only, thawed
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import attention
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
        split = lambda a: a.reshape(*a.shape[:2], -1, c.width)
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


# --- the classes -----------------------------------------------------------------------------------------------------


class LlamaModel(Decoder, Model):
    """A language model without what would tell the next token.

    >>> import flaxdiff
    >>> spec = LlamaModel.from_config(dict(
    ...     hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    >>> out = flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), jnp.zeros((1, 7), int))
    >>> out.last_hidden_state.shape, out.hidden_states.shape
    ((1, 7, 32), (3, 1, 7, 32))
    """

    config_class = LanguageConfig
    library, model_type = "transformers", "llama"
    renames = ((r"^(language_model\.)?model\.(language_model\.)?", ""),)
    ignored = r"(language_model\.)?lm_head\.weight|.*rotary_emb\.inv_freq"

    @classmethod
    def to_config(cls, config: LanguageConfig) -> dict[str, Any]:
        """transformers' keys, without those that nothing is said by."""
        silent = {f.name for f in dataclasses.fields(config) if f.default is None and getattr(config, f.name) is None}
        return {k: thawed(v) for k, v in super().to_config(config).items() if k not in silent}


@dataclasses.dataclass(frozen=True)
class MistralConfig(LanguageConfig):
    """transformers' keys and defaults, as far as the network reads them."""

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    sliding_window: int | None = 4096

    def slides(self, layer: int) -> bool:
        """All of them, where there is a window."""
        return self.sliding_window is not None


class MistralModel(LlamaModel):
    """Mistral, without what would tell the next token."""

    config_class, model_type = MistralConfig, "mistral"


@dataclasses.dataclass(frozen=True)
class Qwen2Config(LanguageConfig):
    """transformers' keys and defaults, as far as the network reads them."""

    traits = Traits(biases=("qkv", ""))

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    sliding_window: int | None = 4096
    use_sliding_window: bool = False
    max_window_layers: int = 28

    def slides(self, layer: int) -> bool:
        """The last ones, where that is switched on."""
        return self.use_sliding_window and self.sliding_window is not None and layer >= self.max_window_layers


class Qwen2Model(LlamaModel):
    """Qwen 2 and 2.5, without what would tell the next token."""

    config_class, model_type = Qwen2Config, "qwen2"


@dataclasses.dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """transformers' keys and defaults, as far as the network reads them."""

    traits = Traits(normed=True)

    head_dim: int | None = 128


class Qwen3Model(LlamaModel):
    """Qwen 3, without what would tell the next token."""

    config_class, model_type = Qwen3Config, "qwen3"


@dataclasses.dataclass(frozen=True)
class GemmaConfig(LanguageConfig):
    """transformers' keys and defaults, as far as the network reads them."""

    traits = Traits(around=1.0, scaled=True)

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    head_dim: int | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    pad_token_id: int | None = 0

    @property
    def activation(self) -> str:
        """Its name; the approximation is what "gelu" has always meant."""
        return "gelu_pytorch_tanh" if self.hidden_act == "gelu" else self.hidden_act


class GemmaModel(LlamaModel):
    """Gemma, without what would tell the next token."""

    config_class, model_type = GemmaConfig, "gemma"


@dataclasses.dataclass(frozen=True)
class Gemma2Config(GemmaConfig):
    """transformers' keys and defaults, as far as the network reads them."""

    traits = Traits(around=1.0, scaled=True, after=True)

    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    hidden_activation: str = "gelu_pytorch_tanh"
    query_pre_attn_scalar: float | None = 256
    sliding_window: int | None = 4096
    attn_logit_softcapping: float | None = 50.0

    @property
    def activation(self) -> str:
        """Its name."""
        return self.hidden_activation

    def slides(self, layer: int) -> bool:
        """Every other one, from the first on."""
        return layer % 2 == 0


class Gemma2Model(LlamaModel):
    """Gemma 2, without what would tell the next token."""

    config_class, model_type = Gemma2Config, "gemma2"


@dataclasses.dataclass(frozen=True)
class Gemma3TextConfig(Gemma2Config):
    """transformers' keys and defaults, as far as the network reads them."""

    traits = Traits(around=1.0, scaled=True, after=True, normed=True)
    theta = 1_000_000.0

    vocab_size: int = 262_208
    attn_logit_softcapping: float | None = only(None)
    sliding_window_pattern: int = 6
    rope_local_base_freq: float = 10_000.0

    def slides(self, layer: int) -> bool:
        """All but every sixth."""
        return (layer + 1) % self.sliding_window_pattern != 0

    def rope(self, kind: str) -> dict[str, Any]:
        """Of layers that see what is near: faster, and not scaled."""
        if kind == FULL:
            return super().rope(kind)
        near = dataclasses.replace(self, rope_theta=self.rope_local_base_freq, rope_scaling=None)
        return super(Gemma3TextConfig, near).rope(kind)


class Gemma3TextModel(LlamaModel):
    """Gemma 3's half for texts, without what would tell the next token."""

    config_class, model_type = Gemma3TextConfig, "gemma3_text"


@dataclasses.dataclass(frozen=True)
class GlmConfig(LanguageConfig):
    """transformers' keys and defaults, as far as the network reads them."""

    traits = Traits(biases=("", "qkv"), fused=True, halves=False)

    vocab_size: int = 151552
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_key_value_heads: int | None = 2
    head_dim: int | None = 128
    rms_norm_eps: float = 0.00000015625
    attention_bias: bool = True
    pad_token_id: int | None = 151329
    partial_rotary_factor: float = 0.5


class GlmModel(LlamaModel):
    """GLM 4, without what would tell the next token."""

    config_class, model_type = GlmConfig, "glm"


@dataclasses.dataclass(frozen=True)
class SmolLM3Config(LanguageConfig):
    """transformers' keys and defaults, as far as the network reads them."""

    theta = 2_000_000.0

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    pad_token_id: int | None = 128004
    use_sliding_window: bool = False
    no_rope_layers: tuple[int, ...] | None = None
    no_rope_layer_interval: int = 4

    def turns(self, layer: int) -> bool:
        """In all but every fourth."""
        if self.no_rope_layers is not None:
            return bool(self.no_rope_layers[layer])
        return (layer + 1) % self.no_rope_layer_interval != 0

    def slides(self, layer: int) -> bool:
        """Those without places, where that is switched on."""
        return self.use_sliding_window and self.sliding_window is not None and not self.turns(layer)


class SmolLM3Model(LlamaModel):
    """SmolLM 3, without what would tell the next token."""

    config_class, model_type = SmolLM3Config, "smollm3"


# --- inside larger models --------------------------------------------------------------------------------------------


class Inside(nnx.Module):
    """A module under a name."""

    def __init__(self, name: str, inside: nnx.Module):
        setattr(self, name, inside)


class LlamaForCausalLM(LlamaModel):
    """Llama, as checkpoints have it that tell the next token too; what does that is passed over."""

    where: ClassVar[tuple[str, ...]] = ("model",)  # the names under which the network lies
    renames = ((r"^(language_model\.)?model\.(language_model\.)?(?=embed_tokens|layers|norm)", "model."),)

    def __init__(self, config: LanguageConfig):
        inside: nnx.Module = Decoder(config)
        for name in self.where[:0:-1]:
            inside = Inside(name, inside)
        setattr(self, self.where[0], inside)

    def __call__(self, *args: Any, **kwargs: Any) -> LanguageOutput:
        """As of `LlamaModel`."""
        return functools.reduce(getattr, self.where, self)(*args, **kwargs)


class GemmaForCausalLM(LlamaForCausalLM):
    """Gemma, likewise."""

    config_class, model_type = GemmaConfig, "gemma"


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen 3, likewise."""

    config_class, model_type = Qwen3Config, "qwen3"


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """SmolLM 3, likewise."""

    config_class, model_type = SmolLM3Config, "smollm3"


class ForConditionalGeneration(LlamaForCausalLM):
    """A language model that reads pictures as well; the half for texts, where no subclass has the other."""

    half: ClassVar[str]  # what transformers calls its configuration
    whole: ClassVar[tuple[str, ...]] = ()  # keys that are not in that

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Spec:
        """The spec of a `config.json` whose `text_config` is that half's, or which has its keys beside the others."""
        text = config.get("text_config") or {}
        if not isinstance(text, Mapping):
            raise ValueError(f"{cls.__name__}: text_config={text!r} is no object of settings; give one.")
        return super().from_config({**config, **text})

    @classmethod
    def to_config(cls, config: LanguageConfig) -> dict[str, Any]:
        """transformers' form, in which the half for texts is an object."""
        text = super().to_config(config)
        own = {name: text.pop(name) for name in ("architectures", "model_type", *cls.whole) if name in text}
        return own | {"text_config": {"model_type": cls.half, **text}}


class Gemma3ForConditionalGeneration(ForConditionalGeneration):
    """Gemma 3's half for texts."""

    config_class, model_type, half = Gemma3TextConfig, "gemma3", "gemma3_text"
    where = ("language_model", "model")
    renames = ((LlamaForCausalLM.renames[0][0], "language_model.model."),)
    ignored = rf"{LlamaModel.ignored}|(model\.)?(vision_tower|multi_modal_projector)\..*"


class Mistral3ForConditionalGeneration(Gemma3ForConditionalGeneration):
    """Mistral 3's half for texts."""

    config_class, model_type, half = MistralConfig, "mistral3", "mistral"
