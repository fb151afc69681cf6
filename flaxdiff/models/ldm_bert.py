"""LDMBertModel: the text encoder of the first latent diffusion model, trained together with its U-Net.

A transformer over the tokens of BERT in which every position sees all others, padding too. Its heads are narrower than
the tokens, so attention has a width of its own.

Reference: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.core import Config, Model
from flaxdiff.models.clip import CLIPAttention
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.layers import Embedding, LayerNorm, Linear
from flaxdiff.nn.stack import stack, states


@dataclasses.dataclass(frozen=True)
class LDMBertConfig(Config):
    """diffusers' keys and defaults, as far as the network reads them."""

    vocab_size: int = 30522
    max_position_embeddings: int = 77
    encoder_layers: int = 32
    encoder_ffn_dim: int = 5120
    encoder_attention_heads: int = 8
    head_dim: int = 64
    activation_function: str = "gelu"
    d_model: int = 1280
    pad_token_id: int = 0


class LDMBertEncoderLayer(nnx.Module):
    """Attention and feed-forward, each added to what it reads normalised."""

    def __init__(self, c: LDMBertConfig):
        self.self_attn_layer_norm, self.final_layer_norm = LayerNorm(c.d_model), LayerNorm(c.d_model)
        self.self_attn = CLIPAttention(c.d_model, c.encoder_attention_heads, c.head_dim, bias=False)
        self.fc1, self.fc2 = Linear(c.d_model, c.encoder_ffn_dim), Linear(c.encoder_ffn_dim, c.d_model)
        self.activation = c.activation_function

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.final_layer_norm(x))))


class LDMBertEncoder(nnx.Module):
    """Token and position, the layers, and a last normalisation."""

    def __init__(self, c: LDMBertConfig):
        self.embed_tokens = Embedding(c.vocab_size, c.d_model)
        self.embed_positions = Embedding(c.max_position_embeddings, c.d_model)
        self.layers = stack(lambda: LDMBertEncoderLayer(c), c.encoder_layers, c.scan_layers)
        self.layer_norm = LayerNorm(c.d_model)


class LDMBertModel(Model):
    """Tokens -> what a denoiser attends to.

    >>> import flaxdiff
    >>> spec = LDMBertModel.from_config({"d_model": 32, "encoder_layers": 2, "encoder_ffn_dim": 64, "vocab_size": 99})
    >>> flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), jnp.zeros((1, 7), int)).shape
    (1, 7, 32)
    """

    config_class = LDMBertConfig
    library, package, model_type = "transformers", "latent_diffusion", "ldmbert"

    def __init__(self, config: LDMBertConfig):
        self.model = LDMBertEncoder(config)
        self.to_logits = Linear(config.d_model, config.vocab_size)  # for its training, and in every checkpoint
        self.config = config

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Tokens [B, N] -> [B, N, D], normalised.

        Raises:
          ValueError: more tokens than there are positions.
        """
        n, model = input_ids.shape[1], self.model
        if n > self.config.max_position_embeddings:
            raise ValueError(
                f"{n} tokens; this encoder has {self.config.max_position_embeddings} positions: give fewer."
            )
        x = model.embed_tokens(input_ids) + model.embed_positions(jnp.arange(n))
        return model.layer_norm(states(model.layers, x)[-1])
