"""Objects in boxes, as GLIGEN tells a U-Net of them: tokens that each transformer block attends to beside its own.

An object is what it is (the state of a phrase, or of a picture) and where it is. Places without an object have learned
features, so that their number is always the same.

Reference: Li et al., GLIGEN: Open-Set Grounded Text-to-Image Generation, 2023.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdiff.core import param, setting_of, watched
from flaxdiff.nn.attention import Attention, KeysValues
from flaxdiff.nn.layers import LayerNorm, Linear, value, zeros

WAVES, HIDDEN = 8, 512  # frequencies of a coordinate; channels of the layers between


def waves(boxes: jax.Array) -> jax.Array:
    """Sines and cosines of coordinates [B, N, 4]: [B, N, 64].

    >>> waves(jnp.zeros((1, 2, 4))).shape
    (1, 2, 64)
    """
    angles = boxes[..., None, :] * (100 ** (np.arange(WAVES, dtype=np.float32) / WAVES))[:, None]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -2).reshape(*boxes.shape[:2], -1)


class GLIGENTextBoundingboxProjection(nnx.Module):
    """Features and boxes -> tokens.

    Args:
      width: channels of the features, and of the tokens.
      kinds: what features an object has: "" of a phrase alone, or "text" and "image".
    """

    def __init__(self, width: int, kinds: tuple[str, ...]):
        self.kinds, positions = kinds, 2 * 4 * WAVES
        self.null_position_feature = param((positions,), "raw", zeros)
        for kind in kinds:
            layers = [Linear(width + positions, HIDDEN), None, Linear(HIDDEN, HIDDEN), None, Linear(HIDDEN, width)]
            setattr(self, f"linears_{kind}".rstrip("_"), nnx.List(layers))
            setattr(self, f"null_{kind or 'positive'}_feature", param((width,), "raw", zeros))

    def __call__(self, boxes: jax.Array, masks: jax.Array, *features: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Boxes [B, N, 4], which of them there are [B, N], and of each kind the features [B, N, D] with which of them
        there are [B, N] -> tokens [B, kinds · N, D]."""
        or_none = lambda x, there, none: jnp.where(there[..., None] > 0, x.astype(none.dtype), none)
        places, tokens = or_none(waves(boxes), masks, value(self.null_position_feature)), []
        for kind, (feature, there) in zip(self.kinds, features, strict=True):
            first, _, second, _, third = getattr(self, f"linears_{kind}".rstrip("_"))
            known = or_none(feature, there, value(getattr(self, f"null_{kind or 'positive'}_feature")))
            h = jax.nn.silu(first(jnp.concatenate([known, places], -1)))
            tokens.append(third(jax.nn.silu(second(h))))
        return jnp.concatenate(tokens, 1)


class GatedSelfAttentionDense(nnx.Module):
    """Attention of a block's tokens to themselves and to objects, and a feed-forward, each behind a gate.

    Args:
      width, heads: of the tokens.
      context: channels of the objects.
      feed_forward: the second part.
    """

    def __init__(self, width: int, heads: int, context: int, feed_forward: nnx.Module):
        self.linear, self.attn, self.ff = Linear(context, width), Attention(width, heads, width // heads), feed_forward
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.alpha_attn, self.alpha_dense = (param((), "raw", zeros) for _ in range(2))

    def keys_values(self, objects: jax.Array) -> KeysValues:
        """What the attention makes of objects [B, N, D], enough to work out once."""
        return self.attn.keys_values(self.norm1(self.linear(objects)))

    def __call__(self, x: jax.Array, keys: jax.Array, values: jax.Array, weight: jax.Array) -> jax.Array:
        """Tokens [B, M, C], `keys_values` of objects, how much they count [B] -> tokens; where nothing counts, x."""
        alphas = (self.alpha_attn, self.alpha_dense)
        gates = [weight[:, None, None].astype(x.dtype) * jnp.tanh(value(alpha)) for alpha in alphas]

        def grounded(x: jax.Array) -> jax.Array:
            h = self.norm1(x)
            pairs = [jnp.concatenate(two, 1) for two in zip(self.attn.keys_values(h), (keys, values))]
            with setting_of(watched, None):  # whoever watches asks what tokens see of each other and of the text
                x = x + gates[0] * self.attn(h, tuple(pairs))
            return x + gates[1] * self.ff(self.norm2(x))

        return jax.lax.cond((weight > 0).any(), grounded, lambda x: x, x)
