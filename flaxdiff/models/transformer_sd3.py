"""SD3Transformer2DModel: the flow transformer of Stable Diffusion 3 and 3.5, over the tokens of a text and a picture.

Every block lets both attend jointly, each with weights of its own; in version 3.5 the picture attends to itself alone
as well in some blocks, and queries and keys are normalised. The last block drops the text. Time and pooled text shift,
scale and gate every block; as none of it depends on the sample, `times` works it out for all steps at once.

Reference: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, Model, only
from flaxdiff.nn.feed_forward import FeedForward
from flaxdiff.nn.joint import JointAttention, JointTransformerBlock, Residuals, Seen, Tokens
from flaxdiff.nn.layers import LayerNorm, Linear, value
from flaxdiff.nn.modulation import AdaLayerNorm, CombinedTimestepTextProjEmbeddings, vary
from flaxdiff.nn.patches import PatchEmbed, unpatched
from flaxdiff.nn.perturb import alone, rows
from flaxdiff.nn.skipping import settled
from flaxdiff.nn.stack import Runs, depth, over, run
from flaxdiff.parallel import constrain

Hindered = Mapping[str, jax.Array]  # kind -> of which images, see nn/perturb.py


@dataclasses.dataclass(frozen=True)
class SD3Config(Config):
    """diffusers' keys and defaults."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int | None = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = only(None, "rms_norm")

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


class Told(NamedTuple):
    """What time and text say to the blocks of each run, [..., B, blocks, parts, D], and at the end [..., B, 2, D]."""

    runs: tuple[Any, ...]  # to the text and to the picture
    out: jax.Array | None


class SD3Block(JointTransformerBlock):
    """Text and picture attend jointly, unless hindered; behind that a residual of the picture, where there is one."""

    def __call__(
        self,
        x: Tokens,
        each: tuple[Tokens, Hindered, jax.Array | None, tuple[Seen, ...]],
        more: Residuals | None = None,
    ) -> Tokens:
        """Tokens, what this block is told, how it is hindered, which residual is behind it, what the picture sees."""
        told, perturb, which, seen = each
        mask = alone(perturb["identity"], *(part.shape[1] for part in x)) if "identity" in perturb else None
        after = super().__call__(x, told, mask=mask, seen=seen)
        if "skip" in perturb:
            after = jax.tree.map(lambda old, new: jnp.where(rows(perturb["skip"], new) > 0, old, new), x, after)
        text, image = after
        return text, image if more is None else image + more.behind(which)


class SD3SingleTransformerBlock(nnx.Module):
    """Attention and feed-forward of the picture's tokens alone, shifted, scaled and gated."""

    def __init__(self, width: int, heads: int, head_dim: int):
        self.norm1 = AdaLayerNorm(width, 6)
        self.attn = JointAttention(width, heads, head_dim, qk_norm=False, text=False)
        self.norm2, self.ff = LayerNorm(width, 1e-6, affine=False), FeedForward(width, "gelu-approximate")

    def modulation(self, condition: jax.Array) -> jax.Array:
        """What a condition [..., D] says: [..., 6, D]."""
        return self.norm1.modulation(condition)

    def __call__(self, x: tuple[None, jax.Array], each: tuple[jax.Array, Any, Any, Any]) -> tuple[None, jax.Array]:
        """No text and tokens [B, N, D], and what `modulation` says to them first of all [B, 6, D]."""
        _, x = x
        h, gate, shift, scale, gate_ff = self.norm1(x, each[0])
        x = x + gate * self.attn(h)[1]
        return None, constrain(x + gate_ff * self.ff(vary(self.norm2(x), shift, scale)), "batch", "context")


class SD3Blocks(Model):
    """What the transformer and its ControlNets share: the ways in, and the blocks.

    `text_out` says of each block whether the text's tokens are wanted behind it; without a `joint_attention_dim` there
    is no text at all.
    """

    config_class = SD3Config

    def __init__(self, config: SD3Config, text_out: tuple[bool, ...]):
        c, words = config, config.joint_attention_dim
        sizes = c.width, c.num_attention_heads, c.attention_head_dim

        def block(kind: tuple[bool, bool]) -> nnx.Module:
            if words is None:
                return SD3SingleTransformerBlock(*sizes)
            return SD3Block(*sizes, qk_norm=c.qk_norm is not None, dual=kind[0], text_out=kind[1])

        base = c.sample_size // c.patch_size
        self.pos_embed = PatchEmbed(c.in_channels, c.width, c.patch_size, base, largest=c.pos_embed_max_size)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(c.width, c.pooled_projection_dim)
        self.context_embedder = None if words is None else Linear(words, c.caption_projection_dim)
        kinds = [(i in c.dual_attention_layers, out) for i, out in enumerate(text_out)]
        self.transformer_blocks = Runs(kinds, block, c.scan_layers)
        self.config = c

    @property
    def dtype(self) -> jnp.dtype:
        """That of the weights."""
        return weights.dtype(value(self.time_text_embed.text_embedder.linear_1.weight))

    def told(self, condition: jax.Array) -> tuple[Any, ...]:
        """What a condition [..., B, D] says to the blocks of each run."""
        of = lambda blocks: over(blocks, lambda block: block.modulation(condition))
        return tuple(jax.tree.map(lambda a: jnp.moveaxis(a, 0, -3), of(blocks)) for blocks in self.transformer_blocks)


class SD3Transformer2DModel(SD3Blocks):
    """Predict the velocity from picture to noise, given the time and a text.

    >>> import flaxdiff
    >>> tiny = dict(num_layers=3, num_attention_heads=2, attention_head_dim=12, caption_projection_dim=24,
    ...             joint_attention_dim=8, pooled_projection_dim=8, sample_size=8, pos_embed_max_size=6)
    >>> spec = SD3Transformer2DModel.from_config(tiny)
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> text = jnp.zeros((1, 5, 8))
    >>> flaxdiff.apply(spec, params, jnp.zeros((1, 8, 8, 16)), text, text[:, 0], 500.0).shape
    (1, 8, 8, 16)
    """

    def __init__(self, config: SD3Config):
        c = config
        super().__init__(c, (True,) * (c.num_layers - 1) + (False,))
        self.norm_out = AdaLayerNorm(c.width, 2)
        self.proj_out = Linear(c.width, c.patch_size**2 * (c.out_channels or c.in_channels))

    @property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """The names of the blocks that attend."""
        return (tuple(f"transformer_blocks.{i}" for i in range(self.config.num_layers)),)

    def tokens(self, hidden_states: jax.Array) -> jax.Array:
        """Latents [B, H, W, C] -> the tokens that the first block reads."""
        return self.pos_embed(hidden_states)

    def times(self, timestep: jax.Array, pooled_projections: jax.Array) -> Told:
        """What times [B], or [N, 1] for N steps at once, and pooled texts [B, P] say to the blocks and at the end."""
        condition = self.time_text_embed(timestep, pooled_projections)
        return Told(self.told(condition), self.norm_out.modulation(condition))

    def __call__(
        self,
        hidden_states: jax.Array,
        encoder_hidden_states: jax.Array,
        pooled_projections: jax.Array | None,
        timestep: jax.Array | float | Told,
        block_controlnet_hidden_states: jax.Array | None = None,
        perturb: Mapping[str, tuple[jax.Array, ...]] | None = None,
        pictures: tuple[Seen, ...] = (),
    ) -> jax.Array:
        """Run the network.

        Args:
          hidden_states: noisy latents [B, H, W, C].
          encoder_hidden_states: the text [B, M, E].
          pooled_projections: its pooled state [B, P].
          timestep: a number, or one for each [B]; or, for many steps, what `times` made of it and of the pooled state.
          block_controlnet_hidden_states: what ControlNets add behind the blocks but the last, [K, B, N, D], each behind
            several in a row.
          perturb: what hinders blocks, see nn/perturb.py; queries are not blurred.
          pictures: what IP-Adapters show the blocks, [blocks, …], see `SD3IPAdapter`.

        Returns:
          The velocity [B, H, W, O], in the dtype of the parameters.

        Raises:
          ValueError: a size that does not divide into patches, or larger than the network has places for; or `perturb`
            asks for a blur.
        """
        b, height, width, _ = hidden_states.shape
        if not isinstance(timestep, Told):
            timestep = self.times(jnp.broadcast_to(timestep, (b,)), pooled_projections)
        if unknown := sorted(set(perturb or {}) - {"identity", "skip"}):
            raise ValueError(f"{type(self).__name__} knows no hindrance of its blocks by {unknown}; use another rule.")
        image = constrain(self.tokens(hidden_states), "batch", "context")
        x = self.context_embedder(encoder_hidden_states.astype(self.dtype)), image

        more, n = None, self.config.num_layers
        if (added := block_controlnet_hidden_states) is not None:
            added, k = jnp.asarray(added), len(added)
            behind = [i * k // n if i < n - 1 else k for i in range(n)]  # behind the last nothing
            more = Residuals(jnp.pad(added, [(0, 1)] + [(0, 0)] * 3), jnp.array(behind))
        at = 0
        for blocks, told in zip(self.transformer_blocks, timestep.runs, strict=True):
            here = slice(at, at := at + depth(blocks))
            told = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), told)
            hindered = {kind: flags[0].T[here] for kind, flags in (perturb or {}).items()}
            seen = jax.tree.map(lambda a, here=here: a[here], pictures)
            x = run(blocks, x, (told, hindered, None if more is None else more.which[here], seen), more)
        y = self.proj_out(self.norm_out(settled(x[1]), timestep.out)[0])
        return unpatched(y, height, width, self.config.patch_size)
