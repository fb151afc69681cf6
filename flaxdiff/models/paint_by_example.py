"""PaintByExampleImageEncoder: a picture as the one token that its U-Net attends to.

CLIP's state of the whole picture goes through a few transformer blocks more, so that what is told is what the picture
is of and not how it looks pixel by pixel. A learned token stands for no picture.

Reference: Yang et al., Paint by Example: Exemplar-based Image Editing with Diffusion Models, 2023.
"""

import jax
from flax import nnx

from flaxdiff.core import param
from flaxdiff.models.clip_vision import CLIPVisionConfig, CLIPVisionModelWithProjection, CLIPVisionTransformer
from flaxdiff.nn.attention import Attention
from flaxdiff.nn.feed_forward import FeedForward
from flaxdiff.nn.layers import LayerNorm, Linear, value
from flaxdiff.nn.stack import stack, states


class PaintByExampleBlock(nnx.Module):
    """Self-attention and feed-forward, each added to what it reads normalised."""

    def __init__(self, width: int):
        self.norm1, self.attn1 = LayerNorm(width), Attention(width, 1, width, bias=True)
        self.norm3, self.ff = LayerNorm(width), FeedForward(width, "gelu")

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attn1(self.norm1(x))
        return x + self.ff(self.norm3(x))


class PaintByExampleMapper(nnx.Module):
    """One block for every five layers of the encoder."""

    def __init__(self, c: CLIPVisionConfig):
        depth = (c.num_hidden_layers + 1) // 5
        self.blocks = stack(lambda: PaintByExampleBlock(c.hidden_size), depth, c.scan_layers)


class PaintByExampleImageEncoder(CLIPVisionModelWithProjection):
    """The image encoder of Paint by Example.

    >>> import flaxdiff, jax.numpy as jnp
    >>> spec = PaintByExampleImageEncoder.from_config(
    ...     {"hidden_size": 32, "num_hidden_layers": 9, "num_attention_heads": 2, "image_size": 16, "patch_size": 8})
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> flaxdiff.apply(spec, params, jnp.zeros((1, 16, 16, 3))).shape
    (1, 1, 512)
    """

    package = "paint_by_example"
    renames = ((r"^model\.vision_model\.", "model."),)
    ignored = r"model\.(vision_model\.)?embeddings\.position_ids"

    def __init__(self, config: CLIPVisionConfig):
        c = config
        self.model, self.mapper = CLIPVisionTransformer(c), PaintByExampleMapper(c)
        self.final_layer_norm = LayerNorm(c.hidden_size)
        self.proj_out = Linear(c.hidden_size, c.projection_dim)
        self.uncond_vector = param((1, 1, c.projection_dim), "raw", jax.random.normal)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Normalised pictures [B, S, S, 3], see `images.clip_pixels` -> a token of each [B, 1, P]."""
        x = self.model(pixel_values)[1][:, None]
        return self.proj_out(self.final_layer_norm(states(self.mapper.blocks, x)[-1]))

    def nothing(self) -> jax.Array:
        """The token of no picture [1, 1, P]."""
        return value(self.uncond_vector)
