"""The language models that diffusion transformers read texts with: Llama, Mistral, Qwen, Gemma, GLM and SmolLM.

Each is a configuration with transformers' keys, and a name for the network of decoder.py: alone, as checkpoints have it
that tell the next token too, or as the half for texts of a model that reads pictures.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx

from flaxdiff.core import Model, Spec, only, thawed
from flaxdiff.models.decoder import FULL, Decoder, LanguageConfig, LanguageOutput, Traits


class LlamaModel(Decoder, Model):
    """A language model without what would tell the next token.

    >>> import flaxdiff, jax
    >>> spec = LlamaModel.from_config(dict(
    ...     hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    >>> out = flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), jax.numpy.zeros((1, 7), int))
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
