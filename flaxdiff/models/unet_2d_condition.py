"""UNet2DConditionModel: the denoiser of Stable Diffusion 1, 2 and XL.

A U-Net of residual blocks in which transformer blocks attend to the text. The timestep, and in SDXL the pooled text and
the sizes of the picture, enter every residual block as one embedding. In unCLIP single attentions do, to the text and
the picture at once, and it is an embedding of a picture that enters with the time.

Reference: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022; Podell et al., SDXL,
2023.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, Model, only, setting
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import AddedAttention, KeysValues
from flaxdiff.nn.embeddings import GaussianFourierProjection, TimestepEmbedding, sinusoids
from flaxdiff.nn.freeu import reweighed
from flaxdiff.nn.grounding import GLIGENTextBoundingboxProjection
from flaxdiff.nn.k_unet import k_down, k_up
from flaxdiff.nn.layers import Conv, Embedding, GroupNorm, value
from flaxdiff.nn.perturb import perturbed
from flaxdiff.nn.stack import depth
from flaxdiff.nn.transformer_2d import Transformer2DModel
from flaxdiff.nn.unet import Each, MidBlock, ResnetBlock2D, Stage, check_stages, down_fans, times, up_fans
from flaxdiff.parallel import constrain

BY_RESNET = ("Resnet", "Simple")  # what stages are called whose residual blocks resample


@dataclasses.dataclass(frozen=True)
class EncoderConfig(Config):
    """diffusers' keys and defaults of the first half, from the latent down to the middle."""

    in_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = only("UNetMidBlock2DCrossAttn", None)
    only_cross_attention: bool | tuple[bool, ...] = False  # in place of self-attention
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = only(1)
    act_fn: str = "silu"
    norm_num_groups: int | None = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    encoder_hid_dim: int | None = only(None)
    encoder_hid_dim_type: str | None = only(None)
    attention_head_dim: int | tuple[int, ...] = 8  # the number of heads: a misnomer that every checkpoint keeps
    num_attention_heads: int | None = only(None)
    use_linear_projection: bool = False
    addition_embed_type: str | None = only(None, "text_time")
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool = False  # softmax runs in float32 here either way
    resnet_time_scale_shift: str = only("default", "scale_shift")
    time_cond_proj_dim: int | None = None  # this and time_embedding_dim: diffusers' ControlNet has no choice of them
    projection_class_embeddings_input_dim: int | None = None
    time_embedding_dim: int | None = None
    addition_embed_type_num_heads: int = 64
    # (chunk_size, dim): so many tokens (dim 1) or pictures (dim 0) at a time go through the feed-forward
    forward_chunking: tuple[int, int] | None = setting(None)
    token_merging: float = setting(0.0)  # the share of tokens that self-attention passes over, where there are most

    def __post_init__(self):
        up = ("CrossAttnUpBlock2D", "UpBlock2D") if hasattr(self, "up_block_types") else None
        model, n = type(self).__name__.replace("Config", "Model"), len(self.block_out_channels)
        ours = "CrossAttnDownBlock2D", "DownBlock2D"
        if up:
            ours, up = (
                ours + ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
                up + ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            )
        if up and self.crowson:
            ours, up = ("KCrossAttnDownBlock2D", "KDownBlock2D"), ("KCrossAttnUpBlock2D", "KUpBlock2D")
        check_stages(model, self, ours, up)
        if not 0 <= self.token_merging <= 0.75:
            raise ValueError(f"{model}: token_merging={self.token_merging}; a share of tokens from 0 to 0.75 can go.")
        for key in ("attention_head_dim", "transformer_layers_per_block", "only_cross_attention"):
            if len(self.per_stage(key)) != n:
                raise ValueError(f"{model}: {key}={getattr(self, key)} needs {n} entries, or one number.")

    @property
    def crowson(self) -> bool:
        """Whether the stages are those of `nn/k_unet.py`."""
        return self.down_block_types[0].startswith("K")

    def per_stage(self, key: str) -> tuple[int, ...]:
        """A setting that is one number or one for each stage, as the latter."""
        setting = getattr(self, key)
        return setting if isinstance(setting, tuple) else (setting,) * len(self.block_out_channels)


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig(EncoderConfig):
    """diffusers' keys and defaults; what no Stable Diffusion 1, 2 or XL checkpoint sets is fixed."""

    sample_size: int | tuple[int, int] | None = None
    out_channels: int = 4
    center_input_sample: bool = only(False)
    mid_block_type: str | None = only("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn", None)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    dropout: float = only(0.0)
    reverse_transformer_layers_per_block: tuple[int, ...] | None = only(None)
    dual_cross_attention: bool = only(False)
    class_embed_type: str | None = only(None, "projection", "identity")
    resnet_skip_time_act: bool = only(False)
    resnet_out_scale_factor: float = only(1.0)
    time_embedding_type: str = only("positional", "fourier")
    time_embedding_act_fn: str | None = only(None)
    timestep_post_act: str | None = None
    conv_in_kernel: int = only(3, 1)
    conv_out_kernel: int = only(3, 1)
    attention_type: str = only("default", "gated", "gated-text-image")
    class_embeddings_concat: bool = only(False)
    mid_block_only_cross_attention: bool | None = only(None)
    cross_attention_norm: str | None = only(None)


class UNetEncoder(Model):
    """The first half of the U-Net, down to the middle, and how time and text enter: what a ControlNet has as well."""

    def __init__(self, config: EncoderConfig):
        c, width = config, config.block_out_channels
        temb, last, kernel = self.temb(c), len(width) - 1, getattr(c, "conv_in_kernel", 3)
        self.conv_in = Conv(c.in_channels, width[0], kernel, padding=kernel // 2)
        fourier = getattr(c, "time_embedding_type", None) == "fourier"
        self.time_proj = GaussianFourierProjection(width[0], c.flip_sin_to_cos) if fourier else None
        after = c.time_cond_proj_dim, getattr(c, "timestep_post_act", None)
        self.time_embedding = TimestepEmbedding(width[0] * (1 + fourier), temb, c.act_fn, *after)
        if getattr(c, "class_embed_type", None) == "projection":
            self.class_embedding = TimestepEmbedding(c.projection_class_embeddings_input_dim, temb)
        else:
            self.class_embedding = None if c.num_class_embeds is None else Embedding(c.num_class_embeds, temb)
        text_time = c.addition_embed_type == "text_time"
        self.add_embedding = TimestepEmbedding(c.projection_class_embeddings_input_dim, temb) if text_time else None
        if c.crowson:
            stages = [k_down(i, kind, **self.k_blocks(c, i)) for i, kind in enumerate(c.down_block_types)]
        else:
            stages = [
                Stage(
                    fans,
                    self.resnet(c),
                    self.attention(c, kind, i),
                    down=c.downsample_padding if i < last else None,
                    by_resnet=kind.startswith(BY_RESNET),
                )
                for i, (kind, fans) in enumerate(zip(c.down_block_types, down_fans(width, c.layers_per_block)))
            ]
        self.down_blocks = nnx.List(stages)
        middle = (c.mid_block_type or "").removeprefix("UNetMidBlock2D")
        attention = self.attention(c, middle, last)
        self.mid_block = MidBlock(width[-1], self.resnet(c), attention) if middle else None
        self.config = c

    @staticmethod
    def temb(c: EncoderConfig) -> int:
        """Channels of the embedding of time."""
        fourier = getattr(c, "time_embedding_type", None) == "fourier"
        return c.time_embedding_dim or (2 if fourier else 4) * c.block_out_channels[0]

    @classmethod
    def k_blocks(cls, c: EncoderConfig, i: int) -> dict[str, Any]:
        """What `k_down` and `k_up` are told of resolution i, whose `attention_head_dim` is just that."""
        return {
            "width": c.block_out_channels,
            "layers": c.layers_per_block,
            "head_dim": c.per_stage("attention_head_dim")[i],
            "context": c.cross_attention_dim,
            "temb": cls.temb(c),
            "eps": c.norm_eps,
            "act_fn": c.act_fn,
        }

    @classmethod
    def resnet(cls, c: EncoderConfig) -> Callable[[int, int], ResnetBlock2D]:
        """(in, out) channels -> a residual block."""
        return functools.partial(
            ResnetBlock2D,
            temb=cls.temb(c),
            groups=c.norm_num_groups,
            eps=c.norm_eps,
            act_fn=c.act_fn,
            scale_shift=c.resnet_time_scale_shift == "scale_shift",
        )

    @staticmethod
    def attention(c: EncoderConfig, kind: str, i: int) -> Callable[[int], nnx.Module] | None:
        """Channels -> the attention of resolution i, if blocks of this kind have any: a transformer, or a single one.

        In a transformer `attention_head_dim` is the number of heads, in a single attention it is what it says.
        """
        heads, depth = c.per_stage("attention_head_dim")[i], c.per_stage("transformer_layers_per_block")[i]
        only_cross = c.per_stage("only_cross_attention")[i]
        if kind.startswith("Simple"):
            if kind == "SimpleCrossAttn":  # that in the middle
                only_cross = c.only_cross_attention is True
            shared = c.cross_attention_dim, c.norm_num_groups, only_cross
            return lambda width: AddedAttention(width, width // heads, heads, *shared)
        if not kind.startswith("Cross"):
            return None
        only_cross = kind != "CrossAttn" and only_cross
        finest = i == min((j for j, k in enumerate(c.down_block_types) if k.startswith("Cross")), default=i)
        merge = c.token_merging if finest else 0.0
        return functools.partial(Transformer2DModel, heads=heads, depth=depth, c=c, only_cross=only_cross, merge=merge)

    def entered(
        self,
        sample: jax.Array,
        timestep: jax.Array | float | tuple[jax.Array, ...],
        text: jax.Array | tuple[KeysValues, ...],
        added: Mapping[str, jax.Array] | None,
        perturb: Mapping[str, tuple[jax.Array, ...]] | None = None,
        mask: jax.Array | None = None,
        **told: jax.Array | None,
    ) -> tuple[jax.Array, Each, Each]:
        """The first convolution of a sample, and what each block in turn reads of time and text; see `__call__`."""
        if not isinstance(timestep, tuple):
            timestep = self.times(jnp.broadcast_to(timestep, sample.shape[:1]), added, **told)
        x = self.conv_in(sample.astype(weights.dtype(value(self.conv_in.weight))))
        contexts = text if isinstance(text, tuple) else self.keys_values(text, mask)
        return x, iter(timestep), iter(perturbed(contexts, perturb))

    @property
    def named_stages(self) -> dict[str, nnx.Module]:
        """The stages by name, in the order of their use."""
        middle = {} if self.mid_block is None else {"mid_block": self.mid_block}
        return {f"down_blocks.{i}": stage for i, stage in enumerate(self.down_blocks)} | middle

    @property
    def stages(self) -> tuple[nnx.Module, ...]:
        """The stages in the order of their use."""
        return tuple(self.named_stages.values())

    @property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """The names of the blocks of each transformer, in the order of their use."""
        transformers = [
            (f"{name}.attentions.{i}.transformer_blocks", depth(transformer.transformer_blocks))
            for name, stage in self.named_stages.items()
            for i, transformer in enumerate(stage.attentions or ())
            if isinstance(transformer, Transformer2DModel)
        ]
        return tuple(tuple(f"{name}.{i}" for i in range(n)) for name, n in transformers)

    def keys_values(
        self, encoder_hidden_states: jax.Array, attention_mask: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, ...], ...]:
        """What the attentions make of a text [B, M, D], in the order of their use.

        A mask [B, M] says which tokens may be seen. Raises ValueError where transformers would have to heed it.
        """
        text = encoder_hidden_states.astype(weights.dtype(value(self.conv_in.weight)))
        attentions = [attention for stage in self.stages for attention in stage.attentions or ()]
        pairs = tuple(attention.keys_values(text) for attention in attentions)
        if attention_mask is None:
            return pairs
        if not all(isinstance(attention, AddedAttention) for attention in attentions):
            raise ValueError("attention_mask is for U-Nets of SimpleCrossAttn stages; leave it out.")
        return tuple((*pair, attention_mask.astype(bool)) for pair in pairs)

    def times(
        self, timestep: jax.Array, added_cond_kwargs: Mapping[str, jax.Array] | None = None, **told: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        """What the residual blocks make of times [B], or [N, 1] for N steps at once: [..., B, C] each, in order."""
        return times(self.stages, self.embed(timestep, added_cond_kwargs, **told))

    def embed(
        self,
        t: jax.Array,
        added: Mapping[str, jax.Array] | None,
        class_labels: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
    ) -> jax.Array:
        """The embedding of times [..., B], of a class, and of SDXL's conditions: [..., B, T]."""
        c, dtype = self.config, weights.dtype(value(self.conv_in.weight))
        waves = functools.partial(sinusoids, flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift)
        condition = None if timestep_cond is None else timestep_cond.astype(dtype)
        told = waves(t, c.block_out_channels[0]) if self.time_proj is None else self.time_proj(t)
        temb = self.time_embedding(told.astype(dtype), condition)
        kind = getattr(c, "class_embed_type", None)
        if self.class_embedding is not None or kind is not None:
            if class_labels is None:
                what = f"one of {c.num_class_embeds} classes" if kind is None else "an embedding"
                raise ValueError(f"This UNet is conditioned on {what}: give class_labels.")
            labels = class_labels if kind is None else class_labels.astype(dtype)
            temb = temb + (labels if kind == "identity" else self.class_embedding(labels)).astype(dtype)
        if self.add_embedding is None:
            return temb
        if added is None or not {"text_embeds", "time_ids"} <= set(added):
            raise ValueError(
                "This network is conditioned on pooled text and sizes: "
                f"give added_cond_kwargs with text_embeds and time_ids (given: {sorted(added or ())})."
            )
        sizes = waves(added["time_ids"], c.addition_time_embed_dim).reshape(len(added["time_ids"]), -1)
        return temb + self.add_embedding(jnp.concatenate([added["text_embeds"].astype(dtype), sizes.astype(dtype)], -1))


class UNet2DConditionModel(UNetEncoder):
    """Predict the noise (or velocity) in a noisy latent, given the time and the text.

    >>> import flaxdiff
    >>> tiny = dict(block_out_channels=[32, 64], down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    ...             up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], cross_attention_dim=16)
    >>> spec = UNet2DConditionModel.from_config(tiny)
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> x, text = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 5, 16))
    >>> flaxdiff.apply(spec, params, x, 10, encoder_hidden_states=text).shape
    (1, 8, 8, 4)
    """

    config_class = UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig):
        super().__init__(config)
        c, width, last = config, config.block_out_channels, len(config.block_out_channels) - 1
        if c.crowson:
            stages = [k_up(i, kind, **self.k_blocks(c, last - i)) for i, kind in enumerate(c.up_block_types)]
        else:
            stages = [
                Stage(
                    fans,
                    self.resnet(c),
                    self.attention(c, kind, last - i),
                    up=i < last,
                    by_resnet=kind.startswith(BY_RESNET),
                )
                for i, (kind, fans) in enumerate(zip(c.up_block_types, up_fans(width, c.layers_per_block)))
            ]
        self.up_blocks = nnx.List(stages)
        groups = c.norm_num_groups
        self.conv_norm_out = None if groups is None else GroupNorm(width[0], groups, c.norm_eps)
        self.conv_out = Conv(width[0], c.out_channels, c.conv_out_kernel, padding=c.conv_out_kernel // 2)
        kinds = {"gated": ("",), "gated-text-image": ("text", "image")}.get(c.attention_type)
        self.position_net = kinds and GLIGENTextBoundingboxProjection(c.cross_attention_dim, kinds)

    def __call__(
        self,
        sample: jax.Array,
        timestep: jax.Array | float | tuple[jax.Array, ...],
        encoder_hidden_states: jax.Array | tuple[KeysValues, ...],
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
        down_block_additional_residuals: Sequence[jax.Array] | None = None,
        mid_block_additional_residual: jax.Array | None = None,
        down_intrablock_additional_residuals: Sequence[jax.Array] = (),
        class_labels: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
        perturb: Mapping[str, tuple[jax.Array, ...]] | None = None,
        freeu: jax.Array | None = None,
        deep: jax.Array | None = None,
        objects: tuple[tuple[jax.Array, ...], ...] | None = None,
        attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Run the network.

        Args:
          sample: noisy latents [B, H, W, C].
          timestep: a number, or one for each sample [B]; or, for many steps, what `times` made of it.
          encoder_hidden_states: the text [B, M, D]; or, for many steps with the same text, its `keys_values`.
          added_cond_kwargs: SDXL's `text_embeds` [B, P] (pooled text) and `time_ids` [B, 6] (sizes and crops in
            pixels).
          down_block_additional_residuals, mid_block_additional_residual: what a ControlNet adds to the skips and to the
            middle.
          down_intrablock_additional_residuals: what a T2I-Adapter adds in each down stage; in the middle, if one is
            left over that has its shape.
          class_labels: [B] int32, for networks with classes, e.g. the noise in the picture to upscale; or [B, D], by
            `class_embed_type`, an embedding.
          timestep_cond: [B, D], the strength of guidance for networks that were distilled with it.
          perturb: what hinders which block, as of nn/perturb.py: for each of `blocks`, [B, depth].
          freeu: [B, 4], the factors s1, s2, b1, b2 of nn/freeu.py for the lowest two up stages.
          objects: what `grounded` made of objects in boxes, and how much they count [B, depth], behind the keys and
            values of each transformer.
          deep: the input of the last block [B, H, W, C], noted at another time; nothing before is run, see caching.py.
          attention_mask: [B, M], which tokens of the text may be seen, for single attentions.

        Returns:
          The prediction [B, H, W, C], in the dtype of the parameters.

        Raises:
          ValueError: SDXL's conditions are missing, or the class is; a mask for a network that heeds none.
        """
        told = dict(class_labels=class_labels, timestep_cond=timestep_cond)
        perturb = perturb if objects is None else {**(perturb or {}), "objects": objects}
        x, projected, contexts = self.entered(
            sample, timestep, encoder_hidden_states, added_cond_kwargs, perturb, attention_mask, **told
        )
        x = constrain(x, "batch", "context")
        factors = [
            None if freeu is None or i > 1 else (freeu[:, 2 + i], freeu[:, i]) for i in range(len(self.up_blocks))
        ]
        if deep is not None:
            skip = x if down_block_additional_residuals is None else x + down_block_additional_residuals[0]
            return self.ended(self.last(deep, skip, list(projected)[-1], list(contexts)[-1], factors[-1]))
        skips, more = [x], iter(down_intrablock_additional_residuals)
        for block in self.down_blocks:
            skips += block.down(skips[-1], projected, contexts, next(more, None))
        x = skips[-1] if self.mid_block is None else self.mid_block(skips[-1], projected, contexts)
        if (left := next(more, None)) is not None and left.shape == x.shape:
            x += left
        if down_block_additional_residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, down_block_additional_residuals, strict=True)]
        x = x if mid_block_additional_residual is None else x + mid_block_additional_residual
        for i, block in enumerate(self.up_blocks):
            below = skips[: -len(block.resnets)]  # what the next stage joins has the size to reach
            size = below[-1].shape[1:3] if i < len(self.up_blocks) - 1 else None
            x = block.up(x, skips, projected, contexts, size, *(() if factors[i] is None else (factors[i],)))
        return self.ended(x)

    def grounded(self, boxes: jax.Array, masks: jax.Array, *features: tuple[jax.Array, jax.Array]) -> tuple:
        """What the transformers make of objects in boxes, in the order of their use; see nn/grounding.py.

        Raises:
          ValueError: a network that knows no boxes.
        """
        if self.position_net is None:
            raise ValueError(
                "This U-Net knows no objects in boxes: its attention_type is 'default'; use a checkpoint of GLIGEN."
            )
        tokens = self.position_net(boxes, masks, *features)
        return tuple(attention.grounded(tokens) for stage in self.stages for attention in stage.attentions or ())

    def last(self, deep: jax.Array, skip: jax.Array, time: jax.Array, context: Any, weighed: Any) -> jax.Array:
        """The last block of the last stage, of what comes from below and the first skip."""
        stage, parts = self.up_blocks[-1], (deep, skip)
        parts = parts if weighed is None else reweighed(*parts, *weighed)
        return stage.block(len(stage.resnets) - 1, parts, iter([time]), iter([context]))

    def ended(self, x: jax.Array) -> jax.Array:
        """What the last stage gives -> the prediction."""
        if self.conv_norm_out is not None:
            x = ACTIVATIONS[self.config.act_fn](self.conv_norm_out(x))
        return self.conv_out(x)

    @property
    def named_stages(self) -> dict[str, nnx.Module]:
        return super().named_stages | {f"up_blocks.{i}": stage for i, stage in enumerate(self.up_blocks)}
