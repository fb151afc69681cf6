"""FluxTransformer2DModel: a flow transformer over the tokens of a text and of a picture.

In the first blocks text and picture have weights of their own and attend jointly; in the others, one sequence,
attention and feed-forward run side by side. Time, pooled text and the strength of guidance shift, scale and gate every
block. A quarter of all weights does nothing but that, and none of it depends on the sample: `times` works it out for
all steps at once. A picture's tokens are 2 x 2 latents; where each lies comes in as numbers that turn queries and keys.

Reference: Black Forest Labs, FLUX.1, 2024.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, Model
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.joint import JointAttention, JointTransformerBlock, Residuals, Tokens
from flaxdiff.nn.layers import Linear, value
from flaxdiff.nn.modulation import AdaLayerNorm, CombinedTimestepTextProjEmbeddings
from flaxdiff.nn.rope import Rope, rope
from flaxdiff.nn.skipping import settled
from flaxdiff.nn.stack import over, run, stack
from flaxdiff.parallel import constrain


@dataclasses.dataclass(frozen=True)
class FluxConfig(Config):
    """diffusers' keys and defaults."""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def sample_size(self) -> int:
        """Latents along each side of the pictures it was trained on; no checkpoint says so."""
        return 128

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


class Told(NamedTuple):
    """What time, text and guidance say to the blocks, [..., B, blocks, parts, D], and at the end [..., B, 2, D]."""

    double: Tokens  # to the text and to the picture
    single: jax.Array | None
    out: jax.Array | None


Seen = tuple[tuple[jax.Array, ...], ...]  # keys and values [B, T, D] of other pictures, and how much they count [B, 1]


class FluxTransformerBlock(JointTransformerBlock):
    """Text and picture attend jointly; behind that come what is found in other pictures, and a residual, if any."""

    def __call__(
        self,
        x: Tokens,
        told: tuple[Tokens, jax.Array | None, Seen],
        turn: Rope,
        more: Residuals | None = None,
    ) -> Tokens:
        text, image = super().__call__(x, told[0], turn)
        for k, v, weight in told[2]:
            found = self.attn.look(self.norm1(x[1], told[0][1])[0], k, v)
            image = image + weight[:, None].astype(image.dtype) * found
        return text, image if more is None else image + more.behind(told[1])


class FluxSingleTransformerBlock(nnx.Module):
    """x + gate · projection of attention and feed-forward of x, side by side."""

    def __init__(self, width: int, heads: int, head_dim: int):
        self.norm = AdaLayerNorm(width, 3)
        self.proj_mlp = Linear(width, 4 * width)
        self.attn = JointAttention(width, heads, head_dim, text=False, out=False)
        self.proj_out = Linear(5 * width, width)

    def __call__(
        self,
        x: jax.Array,
        told: tuple[jax.Array, jax.Array | None],
        turn: Rope,
        more: Residuals | None = None,
        texts: int = 0,
    ) -> jax.Array:
        """[B, M + N, D], the text's M tokens first, and what this block is told -> [B, M + N, D]."""
        h, gate = self.norm(x, told[0])
        # first the feed-forward, with its activation: a TPU has h on the core for it and the attention
        h, wide = jax.lax.optimization_barrier((h, ACTIVATIONS["gelu_pytorch_tanh"](self.proj_mlp(h))))
        h = jnp.concatenate([self.attn(h, turn=turn)[1], wide], -1)
        x = constrain(x + gate * self.proj_out(h), "batch", "context")
        return x if more is None else x + more.behind(told[1], texts)


class FluxBlocks(Model):
    """What the transformer and its ControlNets share: the way in and the blocks; with `ends` a normalisation, too."""

    config_class = FluxConfig

    def __init__(self, config: FluxConfig, ends: bool):
        c = config
        sizes = c.width, c.num_attention_heads, c.attention_head_dim
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(c.width, c.pooled_projection_dim, c.guidance_embeds)
        self.context_embedder = Linear(c.joint_attention_dim, c.width)
        self.x_embedder = Linear(c.in_channels, c.width)
        self.transformer_blocks = stack(lambda: FluxTransformerBlock(*sizes), c.num_layers, c.scan_layers)
        self.single_transformer_blocks = stack(
            lambda: FluxSingleTransformerBlock(*sizes), c.num_single_layers, c.scan_layers
        )
        self.norm_out = AdaLayerNorm(c.width, 2) if ends else None
        self.config = c

    @property
    def dtype(self) -> jnp.dtype:
        """That of the weights."""
        return weights.dtype(value(self.x_embedder.weight))

    def times(self, timestep: jax.Array, pooled_projections: jax.Array, guidance: jax.Array | None = None) -> Told:
        """What times in [0, 1], [B], or [N, 1] for N steps at once, pooled texts [B, P] and guidance [B] say to blocks.

        Raises:
          ValueError: guidance is missing, or the network knows none.
        """
        if (guidance is None) == self.config.guidance_embeds:
            remedy = "give guidance" if guidance is None else "leave guidance out"
            knows = "was" if guidance is None else "was not"
            raise ValueError(f"This {type(self).__name__} {knows} distilled with guidance (guidance_embeds); {remedy}.")
        scaled = None if guidance is None else 1000 * guidance
        condition = self.time_text_embed(1000 * jnp.asarray(timestep), pooled_projections, scaled)
        of = lambda blocks, read: jax.tree.map(
            lambda a: jnp.moveaxis(a, 0, -3), over(blocks, lambda block: read(block).modulation(condition))
        )
        double = of(self.transformer_blocks, lambda block: block)
        single = of(self.single_transformer_blocks, lambda block: block.norm) if self.config.num_single_layers else None
        return Told(double, single, None if self.norm_out is None else self.norm_out.modulation(condition))

    def told(self, timestep: jax.Array | float | Told, pooled: jax.Array | None, guidance: jax.Array | None) -> Told:
        """What `times` makes of one time, with the blocks first, as they are run: [blocks, B, parts, D]."""
        if not isinstance(timestep, Told):
            timestep = self.times(jnp.broadcast_to(timestep, (len(pooled),)), pooled, guidance)
        double, single = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), timestep[:2])
        return Told(double, single, timestep.out)

    def turn(self, img_ids: jax.Array, texts: int, txt_ids: jax.Array | None = None) -> Rope:
        """The rotation of all tokens by their places [N, 3], those of the text first, by default at the origin."""
        txt_ids = jnp.zeros((texts, img_ids.shape[-1])) if txt_ids is None else txt_ids
        places = jnp.concatenate([jnp.asarray(ids, jnp.float32) for ids in (txt_ids, img_ids)])
        return rope(places, self.config.axes_dims_rope)


class FluxTransformer2DModel(FluxBlocks):
    """Predict the velocity from picture to noise, given the time and a text.

    >>> import flaxdiff
    >>> tiny = dict(num_layers=1, num_single_layers=2, num_attention_heads=2, attention_head_dim=12, in_channels=16,
    ...             joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[4, 4, 4])
    >>> spec = FluxTransformer2DModel.from_config(tiny)
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> x, text = jnp.zeros((1, 6, 16)), jnp.zeros((1, 5, 8))
    >>> flaxdiff.apply(spec, params, x, text, text[:, 0], 0.5, jnp.zeros((6, 3))).shape
    (1, 6, 16)
    """

    def __init__(self, config: FluxConfig):
        super().__init__(config, ends=True)
        c = config
        self.proj_out = Linear(c.width, c.patch_size**2 * (c.out_channels or c.in_channels))

    def __call__(
        self,
        hidden_states: jax.Array,
        encoder_hidden_states: jax.Array,
        pooled_projections: jax.Array | None,
        timestep: jax.Array | float | Told,
        img_ids: jax.Array,
        txt_ids: jax.Array | None = None,
        guidance: jax.Array | None = None,
        controlnet_block_samples: jax.Array | None = None,
        controlnet_single_block_samples: jax.Array | None = None,
        controlnet_blocks_repeat: bool = False,
        pictures: Seen = (),
    ) -> jax.Array:
        """Run the network.

        Args:
          hidden_states: the picture's tokens [B, N, C].
          encoder_hidden_states: the text [B, M, E].
          pooled_projections: its pooled state [B, P].
          timestep: in [0, 1], a number, or one for each sample [B]; or, for many steps, what `times` made of it, the
            pooled text and the guidance.
          img_ids: where each token of the picture is: which picture, row and column [N, 3].
          txt_ids: the same of the text [M, 3], by default the origin.
          guidance: the strength of guidance [B], for networks that were distilled with it.
          controlnet_block_samples, controlnet_single_block_samples: what ControlNets add behind the blocks of each
            kind, [K, B, N, D]; each serves several blocks in a row, or, with controlnet_blocks_repeat, they begin anew.
          pictures: what IP-Adapters add to the blocks of the first kind, [B, blocks, …]: see `adapters.ip_adapter`.

        Returns:
          The velocity [B, N, C], in the dtype of the parameters.

        Raises:
          ValueError: guidance is missing, or the network knows none.
        """
        told = self.told(timestep, pooled_projections, guidance)
        text = constrain(self.context_embedder(encoder_hidden_states.astype(self.dtype)), "batch", "context")
        image = constrain(self.x_embedder(hidden_states.astype(self.dtype)), "batch", "context")
        turn, texts = self.turn(img_ids, text.shape[1], txt_ids), text.shape[1]

        more = Residuals.spread(controlnet_block_samples, self.transformer_blocks, controlnet_blocks_repeat)
        first = jax.tree.map(lambda a: a.swapaxes(0, 1), pictures)
        each = told.double, None if more is None else more.which, first
        text, image = run(self.transformer_blocks, (text, image), each, turn, more)

        x = constrain(jnp.concatenate([text, image], 1), "batch", "context")
        more = Residuals.spread(controlnet_single_block_samples, self.single_transformer_blocks)
        each = told.single, None if more is None else more.which
        x = run(self.single_transformer_blocks, x, each, turn, more, texts)
        return self.proj_out(self.norm_out(settled(x[:, texts:]), told.out)[0])
