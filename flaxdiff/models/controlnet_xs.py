"""ControlNet-XS: a narrow second encoder beside the U-Net's, and the two run as one.

The small network sees a picture and, before each of its blocks, what the U-Net makes of the latent; after each block
the U-Net is told what the small one made. `ControlNetXSAdapter` holds the small network alone, as its files do.
`UNetControlNetXSModel` is both: its parameters are the U-Net's and the adapter's under `base.` and `ctrl.`.

Reference: Zavadski et al., ControlNet-XS: Rethinking the Control of Text-to-Image Diffusion Models as
Feedback-Control Systems, 2023.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import core, weights
from flaxdiff.core import Config, Model, Params, Spec, only
from flaxdiff.models.controlnet import ControlNetConditioningEmbedding, ZeroConv
from flaxdiff.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import KeysValues
from flaxdiff.nn.embeddings import TimestepEmbedding, sinusoids
from flaxdiff.nn.layers import Conv, value
from flaxdiff.nn.transformer_2d import Transformer2DModel
from flaxdiff.nn.unet import Downsample2D, MidBlock, ResnetBlock2D, Stage, down_fans, times

# what an adapter has of its U-Net's configuration
SHARED = ("cross_attention_dim", "down_block_types", "sample_size", "transformer_layers_per_block")
SHARED += ("upcast_attention", "use_linear_projection")
LAYERS = 2  # residual blocks of a down stage: the networks that are controlled so have no other number

_zero = functools.partial(ZeroConv, kernel=1, padding=0)


@dataclasses.dataclass(frozen=True)
class ControlNetXSAdapterConfig(Config):
    """diffusers' keys and defaults."""

    conditioning_channels: int = 3
    conditioning_channel_order: str = only("rgb", "bgr")
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    time_embedding_mix: float = 1.0
    learn_time_embedding: bool = False
    num_attention_heads: int | tuple[int, ...] = 4
    block_out_channels: tuple[int, ...] = (4, 8, 16, 16)
    base_block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    cross_attention_dim: int = 1024
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    sample_size: int | None = 96
    transformer_layers_per_block: int | tuple[int, ...] = 1
    upcast_attention: bool = True  # softmax runs in float32 here either way
    max_norm_num_groups: int = 32
    use_linear_projection: bool = True

    def __post_init__(self):
        for key in ("down_block_types", "base_block_out_channels", "num_attention_heads"):
            given, n = getattr(self, key), len(self.block_out_channels)
            if isinstance(given, tuple) and len(given) != n:
                raise ValueError(f"ControlNetXSAdapter: {key} has {len(given)} entries, block_out_channels {n}.")

    def at(self, key: str, i: int) -> Any:
        """A setting that is one for all stages, or one for each."""
        given = getattr(self, key)
        return given[i] if isinstance(given, tuple) else given


def largest_factor(number: int, limit: int) -> int:
    """The largest factor of a number up to a limit: into how many groups channels divide.

    >>> largest_factor(324, 32), largest_factor(4, 32)
    (27, 4)
    """
    return next(n for n in range(min(number, limit), 0, -1) if number % n == 0)


# --- the small network ------------------------------------------------------------------------------------------------


class _Attentions(NamedTuple):
    """What `Transformer2DModel` reads of a configuration."""

    norm_num_groups: int
    cross_attention_dim: int
    use_linear_projection: bool
    scan_layers: bool
    forward_chunking: None = None


def _resnet(temb: int, most: int, eps: float, fan_in: int, fan_out: int) -> ResnetBlock2D:
    """A residual block whose channels divide into as many groups as they can, up to `most`."""
    groups = largest_factor(fan_in, most)
    return ResnetBlock2D(fan_in, fan_out, temb, groups, eps, groups_out=largest_factor(fan_out, most))


def _attention(c: ControlNetXSAdapterConfig, i: int, groups: int, width: int) -> Transformer2DModel:
    """The transformer of stage i."""
    settings = _Attentions(groups, c.at("cross_attention_dim", i), c.use_linear_projection, c.scan_layers)
    return Transformer2DModel(width, c.at("num_attention_heads", i), c.at("transformer_layers_per_block", i), settings)


class ControlStage(Stage):
    """A down stage of the small network, with the ways to and from the U-Net's."""

    def __init__(self, c: ControlNetXSAdapterConfig, i: int, fans: list[tuple[int, int]], base: list[tuple[int, int]]):
        width, base_width = fans[-1][1], base[-1][1]
        joined = [(own + others, out) for (own, out), (others, _) in zip(fans, base)]
        most = largest_factor(joined[0][0], c.max_norm_num_groups)
        resnet = functools.partial(_resnet, 4 * c.base_block_out_channels[0], most, 1e-5)
        attention = functools.partial(_attention, c, i, largest_factor(width, most))
        super().__init__(joined, resnet, attention if c.down_block_types[i].startswith("Cross") else None)
        told, last = [others for others, _ in base], i == len(c.block_out_channels) - 1
        if not last:
            self.downsamplers = nnx.data(Downsample2D(width + base_width, 1, width))
            told.append(base_width)
        self.base_to_ctrl = nnx.List([_zero(n, n) for n in told])
        self.ctrl_to_base = nnx.List([_zero(width, base_width) for _ in told])

    @property
    def residual(self) -> tuple[ResnetBlock2D, ...]:
        """The residual blocks in the order of their use."""
        return tuple(self.resnets)


class ControlMidBlock(nnx.Module):
    """The middle of the small network, with the ways to and from the U-Net's."""

    def __init__(self, c: ControlNetXSAdapterConfig):
        own, base, last = c.block_out_channels[-1], c.base_block_out_channels[-1], len(c.block_out_channels) - 1
        groups = largest_factor(math.gcd(own, own + base), 32)
        resnet = lambda fan_in, fan_out: ResnetBlock2D(
            fan_in, fan_out, 4 * c.base_block_out_channels[0], groups, eps=1e-6
        )
        self.base_to_ctrl, self.ctrl_to_base = _zero(base, base), _zero(own, base)
        self.midblock = MidBlock(own, resnet, functools.partial(_attention, c, last, groups), fan_in=own + base)


class ControlNetXSAdapter(Model):
    """The small network of ControlNet-XS; it runs within `UNetControlNetXSModel`.

    >>> import flaxdiff
    >>> spec = ControlNetXSAdapter.from_config({})
    >>> sum(s.size for s in flaxdiff.abstract(spec).values()) < 17_000_000
    True
    """

    config_class = ControlNetXSAdapterConfig

    def __init__(self, config: ControlNetXSAdapterConfig):
        c, width, base = config, config.block_out_channels, config.base_block_out_channels
        picture = c.conditioning_channels, c.conditioning_embedding_out_channels
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(width[0], *picture)
        self.time_embedding = TimestepEmbedding(base[0], 4 * base[0]) if c.learn_time_embedding else None
        self.conv_in, self.control_to_base_for_conv_in = Conv(4, width[0]), _zero(width[0], base[0])
        fans = zip(down_fans(width, LAYERS), down_fans(base, LAYERS))
        self.down_blocks = nnx.List([ControlStage(c, i, *both) for i, both in enumerate(fans)])
        self.mid_block = ControlMidBlock(c)
        # what each block of the U-Net's way up is told: as wide as what came before it, from the notes of the way down
        notes = [width[0], *(w for i, w in enumerate(width) for _ in range(LAYERS + (i < len(width) - 1)))]
        wide = [w for i, w in enumerate(reversed(base)) for w in (base[-max(i, 1)], w, w)]
        ways = [_zero(notes.pop(), w) for w in wide]
        self.up_connections = nnx.List(
            [nnx.Dict({"ctrl_to_base": nnx.List(ways[i : i + LAYERS + 1])}) for i in range(0, len(ways), LAYERS + 1)]
        )

    @staticmethod
    def from_unet(
        spec: Spec,
        params: Params,
        key: jax.Array,
        size_ratio: float | None = None,
        block_out_channels: tuple[int, ...] | None = None,
        **changes: Any,
    ) -> tuple[Spec, Params]:
        """An adapter to train, that changes nothing yet.

        Args:
          spec, params: of the U-Net.
          key: a PRNG key.
          size_ratio: how wide it is, as a share of the U-Net; or
          block_out_channels: the channels of each stage.
          **changes: other settings, such as `learn_time_embedding`.

        Raises:
          ValueError: both or neither of size_ratio and block_out_channels are given.

        >>> import flaxdiff
        >>> pipe, params = flaxdiff.load()
        >>> spec, mine = ControlNetXSAdapter.from_unet(
        ...     flaxdiff.UNet2DConditionModel.from_config({}), {"conv_in.bias": jnp.zeros(4)}, jax.random.key(0), 0.1)
        >>> spec.config.block_out_channels
        (32, 64, 128, 128)
        """
        if (size_ratio is None) == (block_out_channels is None):
            raise ValueError("Give either size_ratio or block_out_channels, to say how wide the adapter is.")
        c = spec.config
        config = {key: getattr(c, key) for key in SHARED}
        config |= {"num_attention_heads": c.attention_head_dim, "max_norm_num_groups": c.norm_num_groups}
        config |= {"base_block_out_channels": c.block_out_channels, "block_out_channels": block_out_channels}
        if size_ratio is not None:
            config["block_out_channels"] = [int(width * size_ratio) for width in c.block_out_channels]
        ours = ControlNetXSAdapter.from_config(config | changes)
        return ours, core.init(ours, key, params["conv_in.bias"].dtype)


# --- both -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class UNetControlNetXSConfig(Config):
    """The configurations of the two."""

    base: UNet2DConditionConfig = UNet2DConditionConfig()
    ctrl: ControlNetXSAdapterConfig = ControlNetXSAdapterConfig()


class UNetControlNetXSModel(Model):
    """A U-Net and its ControlNet-XS as one network.

    Folders that PyTorch's pipeline saved hold the two in one file; they are taken apart as they are read.
    """

    config_class = UNetControlNetXSConfig
    renames = (
        (r"^base_(conv_in|conv_out|conv_norm_out|time_embedding|add_embedding)\.", r"base.\1."),
        (r"^ctrl_(conv_in|time_embedding)\.", r"ctrl.\1."),
        (r"^(controlnet_cond_embedding|control_to_base_for_conv_in)\.", r"ctrl.\1."),
        (r"^(mid_block|down_blocks\.\d+)\.(base_to_ctrl|ctrl_to_base)\.", r"ctrl.\1.\2."),
        (r"^(down_blocks\.\d+)\.base_downsamplers\.", r"base.\1.downsamplers.0."),
        (r"^(down_blocks\.\d+)\.(base|ctrl)_", r"\2.\1."),
        (r"^mid_block\.base_midblock\.", "base.mid_block."),
        (r"^mid_block\.ctrl_midblock\.", "ctrl.mid_block.midblock."),
        (r"^up_blocks\.(\d+)\.ctrl_to_base\.", r"ctrl.up_connections.\1.ctrl_to_base."),
        (r"^(up_blocks\.\d+)\.upsamplers\.", r"base.\1.upsamplers.0."),
        (r"^up_blocks\.", "base.up_blocks."),
    )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Spec:
        """The spec that a `config.json` of PyTorch's class of this name describes; the adapter's keys begin `ctrl_`."""
        ours = {k: v for k, v in config.items() if k in {f.name for f in dataclasses.fields(Config)}}
        ctrl = {k.removeprefix("ctrl_"): v for k, v in config.items() if k.startswith("ctrl_")}
        base = {k: v for k, v in config.items() if not k.startswith("ctrl_") and k != "time_embedding_mix"}
        base["attention_head_dim"] = base.pop("num_attention_heads", 8)
        base = {"cross_attention_dim": 1024, "use_linear_projection": True, "upcast_attention": True} | base
        ctrl |= {k: base[k] for k in SHARED if k in base} | {"time_embedding_mix": config.get("time_embedding_mix", 1)}
        ctrl["base_block_out_channels"] = base.get("block_out_channels", (320, 640, 1280, 1280))
        return cls.joined(UNet2DConditionModel.from_config(base), ControlNetXSAdapter.from_config(ctrl | ours))

    @classmethod
    def joined(cls, unet: Spec, adapter: Spec) -> Spec:
        """The spec of a U-Net with an adapter. Raises ValueError if that was made for a U-Net of other channels."""
        ours, theirs = unet.config.block_out_channels, adapter.config.base_block_out_channels
        if ours != theirs:
            raise ValueError(f"This ControlNet-XS is for a U-Net of {theirs} channels, and the pipeline's has {ours}.")
        return Spec(cls, UNetControlNetXSConfig(base=unet.config, ctrl=adapter.config))

    @classmethod
    def split(cls, spec: Spec, params: Params) -> dict[str, tuple[Spec, Params]]:
        """The U-Net and the adapter of this network, as a pipeline holds them."""
        part = lambda at: {k.removeprefix(at): v for k, v in params.items() if k.startswith(at)}
        return {
            "unet": (Spec(UNet2DConditionModel, spec.config.base), part("base.")),
            "controlnet": (Spec(ControlNetXSAdapter, spec.config.ctrl), part("ctrl.")),
        }

    def __init__(self, config: UNetControlNetXSConfig):
        # as PyTorch's class has it, whatever the U-Net's own norm_eps
        self.base = UNet2DConditionModel(dataclasses.replace(config.base, norm_eps=1e-6))
        self.base.conv_norm_out.eps = 1e-5
        self.ctrl, self.config = ControlNetXSAdapter(config.ctrl), config

    @property
    def stages(self) -> tuple[nnx.Module, ...]:
        """Those of the small network, in the order of their use."""
        return (*self.ctrl.down_blocks, self.ctrl.mid_block.midblock)

    def keys_values(self, encoder_hidden_states: jax.Array) -> tuple[tuple[KeysValues, ...], ...]:
        """What the attentions of the U-Net, and those of the small network, make of a text [B, M, D]."""
        base = self.base.keys_values(encoder_hidden_states)
        text = encoder_hidden_states.astype(weights.dtype(value(self.base.conv_in.weight)))
        return base, tuple(a.keys_values(text) for stage in self.stages for a in stage.attentions or ())

    def times(
        self,
        timestep: jax.Array,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
        within: jax.Array | bool = True,
        **told: jax.Array | None,
    ) -> tuple[tuple[jax.Array, ...], ...]:
        """What the residual blocks of the two make of times [..., B], where control counts `within` or does not."""
        temb, c = self.base.embed(timestep, added_cond_kwargs, **told), self.config
        if self.ctrl.time_embedding is not None:
            waves = sinusoids(timestep, c.base.block_out_channels[0], flip_sin_to_cos=True, freq_shift=0)
            own, others = (net.time_embedding(waves.astype(temb.dtype)) for net in (self.ctrl, self.base))
            mixed = jnp.asarray(within, jnp.float32)[..., None] * c.ctrl.time_embedding_mix**0.3
            temb = temb + mixed.astype(temb.dtype) * (own - others)
        return times(self.base.stages, temb), times(self.stages, temb)

    def condition(self, picture: jax.Array) -> jax.Array:
        """What is added to the small network's latent of a picture [B, H, W, C] in [0, 1]: the same at every time."""
        picture = picture[..., ::-1] if self.config.ctrl.conditioning_channel_order == "bgr" else picture
        return self.ctrl.controlnet_cond_embedding(picture.astype(weights.dtype(value(self.ctrl.conv_in.weight))))

    def __call__(
        self,
        sample: jax.Array,
        timestep: jax.Array | float | tuple[tuple[jax.Array, ...], ...],
        encoder_hidden_states: jax.Array | tuple[tuple[KeysValues, ...], ...],
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
        condition: jax.Array | None = None,
        scale: jax.Array | float = 1.0,
    ) -> jax.Array:
        """Run both.

        Args:
          sample, timestep, encoder_hidden_states, added_cond_kwargs: as of the U-Net.
          condition: what `condition` made of the picture [B, h, w, C].
          scale: of what the U-Net is told, one number or one for each picture [B].
        """
        if not isinstance(timestep, tuple):
            timestep = self.times(jnp.broadcast_to(timestep, sample.shape[:1]), added_cond_kwargs)
        if not isinstance(encoder_hidden_states, tuple):
            encoder_hidden_states = self.keys_values(encoder_hidden_states)
        of_base, of_ctrl = ((iter(timestep[i]), iter(encoder_hidden_states[i])) for i in (0, 1))
        sample = sample.astype(weights.dtype(value(self.base.conv_in.weight)))
        scale = jnp.broadcast_to(scale, sample.shape[:1])[:, None, None, None].astype(sample.dtype)
        x, notes = self._down(sample, condition, scale, of_base, of_ctrl)
        skips = [skip for skip, _ in notes]
        for stage, ways in zip(self.base.up_blocks, self.ctrl.up_connections):
            for i, way in enumerate(ways["ctrl_to_base"]):
                x = x + scale * way(notes.pop()[1])
                x = stage.block(i, (x, skips.pop()), *of_base)
            x = x if stage.upsamplers is None else stage.upsamplers[0](x)
        return self.base.conv_out(ACTIVATIONS[self.config.base.act_fn](self.base.conv_norm_out(x)))

    def _down(
        self, x: jax.Array, condition: jax.Array, scale: jax.Array, of_base: tuple[Iterator, ...], of_ctrl: Any
    ) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
        """Down to the middle, both at once: the U-Net's features there, and what both made on the way."""
        base, ctrl = self.base, self.ctrl
        join = lambda h, way, x: jnp.concatenate([h, way(x)], -1)
        x, h = base.conv_in(x), ctrl.conv_in(x) + condition
        x = x + scale * ctrl.control_to_base_for_conv_in(h)
        notes = [(x, h)]
        for stage, small in zip(base.down_blocks, ctrl.down_blocks):
            for i in range(len(stage.resnets)):
                h = join(h, small.base_to_ctrl[i], x)
                x, h = stage.block(i, (x,), *of_base), small.block(i, (h,), *of_ctrl)
                x = x + scale * small.ctrl_to_base[i](h)
                notes.append((x, h))
            if stage.downsamplers is not None:
                h = join(h, small.base_to_ctrl[-1], x)
                x, h = stage.downsamplers[0](x), small.downsamplers(h)
                x = x + scale * small.ctrl_to_base[-1](h)
                notes.append((x, h))
        h = join(h, ctrl.mid_block.base_to_ctrl, x)
        x, h = base.mid_block(x, *of_base), ctrl.mid_block.midblock(h, *of_ctrl)
        return x + scale * ctrl.mid_block.ctrl_to_base(h), notes
