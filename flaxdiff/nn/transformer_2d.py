"""Transformer blocks over the positions of a feature map, as the U-Nets of Stable Diffusion have them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.core import note, watched
from flaxdiff.nn.attention import Attention, KeysValues
from flaxdiff.nn.feed_forward import FeedForward
from flaxdiff.nn.grounding import GatedSelfAttentionDense
from flaxdiff.nn.layers import Conv, GroupNorm, LayerNorm, Linear
from flaxdiff.nn.merging import merging
from flaxdiff.nn.perturb import Given, Perturbed, rows
from flaxdiff.nn.stack import over, run, stack
from flaxdiff.parallel import constrain


class BasicTransformerBlock(nnx.Module):
    """Self-attention, attention to the context, feed-forward; each added to what it reads normalised.

    With `only_cross` the first attends to the context as well. `merge` is the share of tokens that it passes over.
    With `gated` there is something between the two that attends to objects, see nn/grounding.py.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context: int,
        chunking: tuple[int, int] | None,
        only_cross: bool,
        merge: float,
        gated: bool,
    ):
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, heads, width // heads, context if only_cross else None)
        self.norm2, self.attn2 = LayerNorm(width), Attention(width, heads, width // heads, context)
        self.norm3, self.ff = LayerNorm(width), FeedForward(width, chunking=chunking)
        self.fuser = GatedSelfAttentionDense(width, heads, context, FeedForward(width)) if gated else None
        self.only_cross, self.merge = only_cross, merge

    def keys_values(self, context: jax.Array) -> Any:
        """What the attentions make of a context [B, M, D]."""
        second = self.attn2.keys_values(context)
        return (self.attn1.keys_values(context), second) if self.only_cross else second

    def __call__(self, state: tuple[jax.Array, Any], context: Any, sides: tuple[int, int]) -> tuple[jax.Array, Any]:
        """Tokens [B, H W, C] of so many rows and columns and their moments, and `keys_values`, perhaps `Perturbed`."""
        x, moments = state
        context, perturb = context if isinstance(context, Perturbed) else (context, {})
        first, context = context if self.only_cross else (None, context)
        before = x
        if self.merge:
            if "blur" in perturb:
                raise ValueError("Blurred queries need all tokens, and token_merging leaves some out; use one of them.")
            merge, spread = merging(x, sides, self.merge)
            x = x + spread(self.attn1(merge(self.norm1(x, moments)), first, perturb))
            if (pairs := watched.get()) is not None:  # whoever watches sees all tokens
                whole = lambda a: spread(a.reshape(*a.shape[:2], -1)).reshape(len(a), -1, *a.shape[2:])
                pairs[-1] = tuple(map(whole, pairs[-1]))
        else:
            x = x + self.attn1(self.norm1(x, moments), first, perturb, sides)
        x = self.fuser(x, *perturb["objects"]) if "objects" in perturb else x
        h = context.output if isinstance(context, Given) else self.attn2(self.norm2(x), context)
        note("cross", h)
        x = x + h
        x = x + self.ff(self.norm3(x))
        x = jnp.where(rows(perturb["skip"], x) > 0, before, x) if "skip" in perturb else x
        return x, LayerNorm.moments(x)


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the positions of a feature map, with a projection before and after."""

    def __init__(self, width: int, heads: int, depth: int, c: Any, only_cross: bool = False, merge: float = 0.0):
        project = Linear if c.use_linear_projection else functools.partial(Conv, kernel=1, padding=0)
        gated = getattr(c, "attention_type", "default") != "default"
        shared = width, heads, c.cross_attention_dim, c.forward_chunking, only_cross, merge, gated
        block = functools.partial(BasicTransformerBlock, *shared)
        self.norm = GroupNorm(width, c.norm_num_groups, 1e-6)
        self.proj_in = project(width, width)
        self.transformer_blocks = stack(block, depth, c.scan_layers)
        self.proj_out = project(width, width)

    def keys_values(self, context: jax.Array) -> KeysValues:
        """What the blocks make of a context [B, M, D]: [B, depth, M, C] each."""
        pairs = over(self.transformer_blocks, lambda block: block.keys_values(context))
        return jax.tree.map(lambda a: a.swapaxes(0, 1), pairs)

    def grounded(self, objects: jax.Array) -> KeysValues:
        """What the blocks make of objects [B, N, D]: [B, depth, N, C] each."""
        pairs = over(self.transformer_blocks, lambda block: block.fuser.keys_values(objects))
        return jax.tree.map(lambda a: a.swapaxes(0, 1), pairs)

    def __call__(self, x: jax.Array, context: KeysValues) -> jax.Array:
        """[B, H, W, C] and `keys_values` -> [B, H, W, C]."""
        h = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        h = constrain(h, "batch", "context")
        # A TPU works out moments on the way out of a product, but not across the turns of a loop.
        state = h, LayerNorm.moments(h)
        h, _ = run(self.transformer_blocks, state, jax.tree.map(lambda a: a.swapaxes(0, 1), context), x.shape[1:3])
        return x + self.proj_out(h.reshape(x.shape))
