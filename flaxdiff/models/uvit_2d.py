"""UVit2DModel: what the masked tokens of a picture are, given the others and a text.

A picture is a grid of codes, some of them masked. They are looked up in a table, pass through a stage of convolutions
and attention to the text, a transformer over all positions, another such stage, and become logits over the codebook. No
time comes in: how much is masked can be seen. What does is the text's pooled state beside the numbers that SDXL calls
micro-conditions, of the picture's size, its crop and its looks.

Reference: Patil et al., aMUSEd: An Open MUSE Reproduction, 2024; Hoogeboom et al., Simple Diffusion, 2023.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, Model, only, param
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import Attention
from flaxdiff.nn.embeddings import TimestepEmbedding, sinusoids
from flaxdiff.nn.feed_forward import FeedForward
from flaxdiff.nn.layers import Conv, Embedding, Enlarge, LayerNorm, Linear, RMSNorm, value, zeros
from flaxdiff.nn.modulation import AdaLayerNorm
from flaxdiff.nn.stack import run, stack
from flaxdiff.parallel import constrain


@dataclasses.dataclass(frozen=True)
class UVit2DConfig(Config):
    """diffusers' keys and defaults."""

    hidden_size: int = 1024
    use_bias: bool = False
    hidden_dropout: float = only(0.0)
    cond_embed_dim: int = 768
    micro_cond_encode_dim: int = 256
    micro_cond_embed_dim: int = 1280
    encoder_hidden_size: int = 768
    vocab_size: int = 8256  # codes, the mask, and what rounds their number up
    codebook_size: int = 8192
    in_channels: int = 768
    block_out_channels: int = 768
    num_res_blocks: int = 3
    downsample: bool = False
    upsample: bool = False
    block_num_heads: int = 12
    num_hidden_layers: int = 22
    num_attention_heads: int = 16
    attention_dropout: float = only(0.0)
    intermediate_size: int = 2816
    layer_norm_eps: float = 1e-6
    ln_elementwise_affine: bool = True
    sample_size: int = 64

    def norm(self, width: int) -> RMSNorm:
        """The normalisation of this network."""
        return RMSNorm(width, self.layer_norm_eps, self.ln_elementwise_affine)

    def attends(self, width: int, heads: int, context: int | None) -> Attention:
        """The attention of this network."""
        return Attention(width, heads, width // heads, context, bias=self.use_bias, out_bias=self.use_bias)


class GlobalResponseNorm(nnx.Module):
    """Channels compete: each is weighed by its norm over all positions, relative to that of the others.

    Reference: Woo et al., ConvNeXt V2, 2023.
    """

    def __init__(self, channels: int):
        self.gamma, self.beta = (param((1, 1, 1, channels), "raw", zeros) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum((1, 2), keepdims=True))
        share = (norm / (norm.mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)
        return value(self.gamma) * (x * share) + value(self.beta) + x


class ConvNextBlock(nnx.Module):
    """x + what a convolution of each channel and a feed-forward make of it, scaled and shifted by the condition."""

    def __init__(self, c: UVit2DConfig):
        width, bias = c.block_out_channels, c.use_bias
        self.depthwise, self.norm = Conv(width, width, bias=bias, groups=width), c.norm(width)
        self.channelwise_linear_1 = Linear(width, 4 * width, bias)
        self.channelwise_norm = GlobalResponseNorm(4 * width)
        self.channelwise_linear_2 = Linear(4 * width, width, bias)
        self.cond_embeds_mapper = Linear(c.hidden_size, 2 * width, bias)

    def __call__(self, x: jax.Array, cond: jax.Array) -> jax.Array:
        """[B, H, W, C], and the condition [B, D] -> [B, H, W, C]."""
        h = ACTIVATIONS["gelu"](self.channelwise_linear_1(self.norm(self.depthwise(x))))
        x = x + self.channelwise_linear_2(self.channelwise_norm(h))
        scale, shift = jnp.split(self.cond_embeds_mapper(jax.nn.silu(cond))[:, None, None], 2, -1)
        return x * (1 + scale) + shift


class SkipFFTransformerBlock(nnx.Module):
    """Attention to the text, twice, and no feed-forward."""

    def __init__(self, c: UVit2DConfig):
        width = c.block_out_channels
        self.kv_mapper = None if c.hidden_size == width else Linear(c.hidden_size, width, c.use_bias)
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn1, self.attn2 = (c.attends(width, c.block_num_heads, width) for _ in range(2))

    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        """[B, H, W, C] and the text [B, M, D] -> [B, H, W, C]."""
        text = text if self.kv_mapper is None else self.kv_mapper(jax.nn.silu(text))
        h = x.reshape(x.shape[0], -1, x.shape[-1])
        for norm, attn in ((self.norm1, self.attn1), (self.norm2, self.attn2)):
            h = h + attn(norm(h), attn.keys_values(text))
        return h.reshape(x.shape)


class Resample(nnx.Module):
    """Normalise, then halve height and width, or double them."""

    def __init__(self, c: UVit2DConfig, up: bool):
        width, bias = c.block_out_channels, c.use_bias
        self.norm = c.norm(width)
        halve = functools.partial(Conv, kernel=2, stride=2, padding=((0, 1), (0, 1)))
        self.conv = Enlarge(width, 2, bias) if up else halve(width, width, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(self.norm(x))


class UVitBlock(nnx.Module):
    """The stage before the transformer, or that after it."""

    def __init__(self, c: UVit2DConfig, down: bool = False, up: bool = False):
        self.downsample = Resample(c, up=False) if down else None
        self.res_blocks = nnx.List([ConvNextBlock(c) for _ in range(c.num_res_blocks)])
        self.attention_blocks = nnx.List([SkipFFTransformerBlock(c) for _ in range(c.num_res_blocks)])
        self.upsample = Resample(c, up=True) if up else None

    def __call__(self, x: jax.Array, cond: jax.Array, text: jax.Array) -> jax.Array:
        x = x if self.downsample is None else self.downsample(x)
        for convolve, attend in zip(self.res_blocks, self.attention_blocks):
            x = attend(convolve(x, cond), text)
        return x if self.upsample is None else self.upsample(x)


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the text, feed-forward; each added to what it reads normalised."""

    def __init__(self, c: UVit2DConfig):
        width, heads, bias = c.hidden_size, c.num_attention_heads, c.use_bias
        told = lambda norm: AdaLayerNorm(width, 2, norm=norm, bias=bias)
        self.norm1, self.attn1 = told(c.norm(width)), c.attends(width, heads, None)
        self.norm2, self.attn2 = told(c.norm(width)), c.attends(width, heads, width)
        self.norm3 = told(LayerNorm(width, c.layer_norm_eps, c.ln_elementwise_affine, bias))
        self.ff = FeedForward(width, inner=c.intermediate_size, bias=bias)

    def __call__(self, x: jax.Array, _: None, cond: jax.Array, text: jax.Array) -> jax.Array:
        told = lambda norm: norm(x, norm.modulation(cond))[0]
        x = x + self.attn1(told(self.norm1))
        x = x + self.attn2(told(self.norm2), self.attn2.keys_values(text))
        return x + self.ff(told(self.norm3))


class UVit2DConvEmbed(nnx.Module):
    """Codes [B, H, W] -> [B, H, W, C]."""

    def __init__(self, c: UVit2DConfig):
        self.embeddings, self.layer_norm = Embedding(c.vocab_size, c.in_channels), c.norm(c.in_channels)
        self.conv = Conv(c.in_channels, c.block_out_channels, kernel=1, padding=0, bias=c.use_bias)

    def __call__(self, codes: jax.Array) -> jax.Array:
        return self.conv(self.layer_norm(self.embeddings(codes)))


class ConvMlmLayer(nnx.Module):
    """[B, H, W, C] -> logits [B, H, W, K]."""

    def __init__(self, c: UVit2DConfig):
        conv = functools.partial(Conv, kernel=1, padding=0, bias=c.use_bias)
        self.conv1, self.layer_norm = conv(c.block_out_channels, c.in_channels), c.norm(c.in_channels)
        self.conv2 = conv(c.in_channels, c.codebook_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv2(self.layer_norm(self.conv1(x)))


class UVit2DModel(Model):
    """Logits over the codebook for every position of a picture.

    >>> import flaxdiff
    >>> spec = UVit2DModel.from_config(dict(
    ...     hidden_size=32, block_out_channels=16, in_channels=16, num_hidden_layers=2, num_attention_heads=2,
    ...     block_num_heads=2, encoder_hidden_size=8, cond_embed_dim=8, micro_cond_encode_dim=4,
    ...     micro_cond_embed_dim=20, vocab_size=40, codebook_size=32))
    >>> params, text = flaxdiff.init(spec, jax.random.key(0)), jnp.ones((1, 7, 8))
    >>> flaxdiff.apply(spec, params, jnp.zeros((1, 4, 4), int), text, text[:, 0], jnp.ones((1, 5))).shape
    (1, 4, 4, 32)
    """

    config_class = UVit2DConfig

    def __init__(self, config: UVit2DConfig):
        c, width, bias = config, config.block_out_channels, config.use_bias
        self.encoder_proj = Linear(c.encoder_hidden_size, c.hidden_size, bias)
        self.encoder_proj_layer_norm = c.norm(c.hidden_size)
        self.embed = UVit2DConvEmbed(c)
        self.cond_embed = TimestepEmbedding(c.micro_cond_embed_dim + c.cond_embed_dim, c.hidden_size, bias=bias)
        self.down_block = UVitBlock(c, down=c.downsample)
        self.project_to_hidden_norm, self.project_to_hidden = c.norm(width), Linear(width, c.hidden_size, bias)
        self.transformer_layers = stack(lambda: TransformerBlock(c), c.num_hidden_layers, c.scan_layers)
        self.project_from_hidden_norm = c.norm(c.hidden_size)
        self.project_from_hidden = Linear(c.hidden_size, width, bias)
        self.up_block = UVitBlock(c, up=c.upsample)
        self.mlm_layer = ConvMlmLayer(c)
        self.config = c

    def __call__(
        self,
        input_ids: jax.Array,
        encoder_hidden_states: jax.Array,
        pooled_text_emb: jax.Array,
        micro_conds: jax.Array,
    ) -> jax.Array:
        """Codes int32 [B, H, W], a text [B, M, D], its pooled state [B, P] and numbers [B, 5] -> logits [B, H, W, K].

        The numbers are the picture's width and height, two of its crop, and how good it is to look.
        """
        dtype = weights.dtype(value(self.encoder_proj.weight))
        waves = sinusoids(micro_conds, self.config.micro_cond_encode_dim).reshape(len(micro_conds), -1)
        cond = jnp.concatenate([pooled_text_emb.astype(dtype), waves.astype(dtype)], -1)
        cond = self.cond_embed(cond)
        text = self.encoder_proj_layer_norm(self.encoder_proj(encoder_hidden_states.astype(dtype)))

        x = self.down_block(self.embed(input_ids), cond, text)
        h = self.project_to_hidden(self.project_to_hidden_norm(x.reshape(x.shape[0], -1, x.shape[-1])))
        h = run(self.transformer_layers, constrain(h, "batch", "context"), None, cond, text)
        x = self.project_from_hidden(self.project_from_hidden_norm(h)).reshape(x.shape)
        return self.mlm_layer(self.up_block(x, cond, text))
