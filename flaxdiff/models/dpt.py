"""DPTForDepthEstimation: how near things are in a picture, the depth model of depth-to-image.

A vision transformer reads patches, or, in the hybrid form, the features of a residual network (BiT). A few of its
layers are laid out as pictures again, at four scales, and joined from the coarsest to the finest.

Reference: Ranftl et al., Vision Transformers for Dense Prediction, 2021; Kolesnikov et al., Big Transfer, 2020.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdiff.core import Config, Model, only, param
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import attention, split_heads
from flaxdiff.nn.layers import Conv, Enlarge, GroupNorm, LayerNorm, Linear, normal, value
from flaxdiff.nn.stack import stack, states

# of the residual network, where the configuration leaves it out
BIT = {"depths": (3, 4, 9), "hidden_sizes": (256, 512, 1024), "embedding_size": 64, "num_groups": 32}


@dataclasses.dataclass(frozen=True)
class DPTConfig(Config):
    """transformers' keys and defaults, as far as the network reads them."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 384
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    is_hybrid: bool = False
    backbone_out_indices: tuple[int, ...] = (2, 5, 8, 11)
    readout_type: str = only("project")
    reassemble_factors: tuple[float, ...] = (4, 2, 1, 0.5)
    neck_hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    fusion_hidden_size: int = 256
    head_in_index: int = only(-1)
    use_batch_norm_in_fusion_residual: bool = only(False)
    use_bias_in_fusion_residual: bool | None = None
    add_projection: bool = only(False)
    backbone_config: Any = None  # of the hybrid's residual network: (key, value) pairs

    @property
    def backbone(self) -> dict[str, Any]:
        """The sizes of the residual network."""
        return BIT | {k: v for k, v in dict(self.backbone_config or ()).items() if k in BIT}


# --- the residual network ---------------------------------------------------------------------------------------------


class StandardizedConv(Conv):
    """A convolution whose weights have mean 0 and variance 1 in every output; padded as TensorFlow does."""

    def __init__(self, fan_in: int, fan_out: int, kernel: int, stride: int = 1):
        super().__init__(fan_in, fan_out, kernel, stride, padding=0, bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = value(self.weight).astype(jnp.float32)
        mean, variance = weight.mean((0, 1, 2)), weight.var((0, 1, 2))
        weight = ((weight - mean) * jax.lax.rsqrt(variance + 1e-8)).astype(x.dtype)
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, weight, (self.stride,) * 2, "SAME", dimension_numbers=dims)


class BitDownsampleConv(nnx.Module):
    """The shortcut of a stage's first layer."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, groups: int):
        self.conv, self.norm = StandardizedConv(fan_in, fan_out, 1, stride), GroupNorm(fan_out, groups)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class BitBottleneckLayer(nnx.Module):
    """Narrow, convolve, widen; added to what comes in."""

    def __init__(self, fan_in: int, width: int, stride: int, groups: int, first: bool):
        narrow = max(8, (width // 4 + 4) // 8 * 8)
        narrow += 8 * (narrow < 0.9 * width / 4)
        self.downsample = BitDownsampleConv(fan_in, width, stride, groups) if first else None
        self.conv1, self.norm1 = StandardizedConv(fan_in, narrow, 1), GroupNorm(narrow, groups)
        self.conv2, self.norm2 = StandardizedConv(narrow, narrow, 3, stride), GroupNorm(narrow, groups)
        self.conv3, self.norm3 = StandardizedConv(narrow, width, 1), GroupNorm(width, groups)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.nn.relu(self.norm1(self.conv1(x)))
        h = jax.nn.relu(self.norm2(self.conv2(h)))
        return jax.nn.relu(self.norm3(self.conv3(h)) + (x if self.downsample is None else self.downsample(x)))


class BitEmbeddings(nnx.Module):
    """A quarter of the size: a wide convolution, and the largest of every three pixels."""

    def __init__(self, channels: int, width: int, groups: int):
        self.convolution, self.norm = StandardizedConv(channels, width, 7, 2), GroupNorm(width, groups)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm(self.convolution(x)))
        return jax.lax.reduce_window(x, jnp.zeros((), x.dtype), jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")


class BitStage(nnx.Module):
    """Layers of one width, the first of which may halve."""

    def __init__(self, fan_in: int, width: int, depth: int, stride: int, groups: int):
        self.layers = nnx.List(
            [
                BitBottleneckLayer(width if i else fan_in, width, 1 if i else stride, groups, first=not i)
                for i in range(depth)
            ]
        )


class Bit(nnx.Module):
    """A picture [B, H, W, C] -> the features of each stage, the first a quarter of its size."""

    def __init__(self, c: DPTConfig):
        b = c.backbone
        self.embedder = BitEmbeddings(c.num_channels, b["embedding_size"], b["num_groups"])
        fans = [b["embedding_size"], *b["hidden_sizes"]]
        stages = [
            BitStage(fans[i], fans[i + 1], depth, 2 if i else 1, b["num_groups"]) for i, depth in enumerate(b["depths"])
        ]
        self.encoder = nnx.Dict({"stages": nnx.List(stages)})

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        x, features = self.embedder(x), []
        for stage in self.encoder["stages"]:
            for layer in stage.layers:
                x = layer(x)
            features.append(x)
        return features


# --- the transformer --------------------------------------------------------------------------------------------------


class DPTEmbeddings(nnx.Module):
    """Patches of a picture, or features of the residual network, and a token for the whole, with their positions."""

    def __init__(self, c: DPTConfig):
        width, positions = c.hidden_size, (c.image_size // c.patch_size) ** 2 + 1
        self.cls_token = param((1, 1, width), "raw", normal)
        self.position_embeddings = param((1, positions, width), "raw", normal)
        if c.is_hybrid:
            self.backbone = nnx.Dict({"bit": Bit(c)})
            self.projection = Conv(c.backbone["hidden_sizes"][-1], width, kernel=1, padding=0)
        else:
            project = Conv(c.num_channels, width, c.patch_size, c.patch_size, padding=0)
            self.patch_embeddings = nnx.Dict({"projection": project})
        self.hybrid = c.is_hybrid

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Tokens, and the features of the first two stages where there are such."""
        features = self.backbone["bit"](pixels) if self.hybrid else []
        x = self.projection(features[-1]) if self.hybrid else self.patch_embeddings["projection"](pixels)
        first = jnp.broadcast_to(value(self.cls_token), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x.reshape(len(x), -1, x.shape[-1])], 1)
        return x + value(self.position_embeddings), features[:2]


class DPTAttention(nnx.Module):
    """Self-attention, under the names that the checkpoint gives its parts."""

    def __init__(self, c: DPTConfig):
        width = c.hidden_size
        self.attention = nnx.Dict({n: Linear(width, width, bias=c.qkv_bias) for n in ("query", "key", "value")})
        self.output, self.heads = nnx.Dict({"dense": Linear(width, width)}), c.num_attention_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        split = lambda name: split_heads(self.attention[name](x), self.heads)
        return self.output["dense"](attention(split("query"), split("key"), split("value")).reshape(x.shape))


class DPTLayer(nnx.Module):
    """Attention and feed-forward, each added to what it reads normalised."""

    def __init__(self, c: DPTConfig):
        norm = lambda: LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.layernorm_before, self.attention, self.layernorm_after = norm(), DPTAttention(c), norm()
        self.intermediate = nnx.Dict({"dense": Linear(c.hidden_size, c.intermediate_size)})
        self.output, self.act = nnx.Dict({"dense": Linear(c.intermediate_size, c.hidden_size)}), c.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.layernorm_before(x))
        h = ACTIVATIONS[self.act](self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](h)


class DPT(nnx.Module):
    """A picture -> what the neck reads: every layer's tokens, and features of the residual network."""

    def __init__(self, c: DPTConfig):
        self.embeddings = DPTEmbeddings(c)
        self.encoder = nnx.Dict({"layer": stack(lambda: DPTLayer(c), c.num_hidden_layers, c.scan_layers)})
        self.layernorm = LayerNorm(c.hidden_size, c.layer_norm_eps)  # in the files; depth reads layers before it

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        x, features = self.embeddings(pixels)
        return states(self.encoder["layer"], x)[1:], features


# --- the neck and the head --------------------------------------------------------------------------------------------


def linear(old: int, new: int, corners: bool) -> np.ndarray:
    """The matrix [new, old] that interpolates linearly; whether the first and the last sample keep their places.

    >>> linear(2, 3, corners=True)
    array([[1. , 0. ],
           [0.5, 0.5],
           [0. , 1. ]], dtype=float32)
    """
    at = np.arange(new) * (old - 1) / max(new - 1, 1) if corners else (np.arange(new) + 0.5) * old / new - 0.5
    return np.maximum(1 - np.abs(np.clip(at, 0, old - 1)[:, None] - np.arange(old)), 0).astype(np.float32)


def resized(x: jax.Array, height: int, width: int, corners: bool) -> jax.Array:
    """x [B, H, W, C] at another size, linearly."""
    rows, columns = (jnp.asarray(linear(*ends, corners), x.dtype) for ends in zip(x.shape[1:3], (height, width)))
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns)


class Reassemble(nnx.Module):
    """Tokens laid out as a picture, at a scale of their own."""

    def __init__(self, width: int, channels: int, factor: float):
        self.projection = Conv(width, channels, kernel=1, padding=0)
        if factor > 1:
            self.resize = Enlarge(channels, int(factor))
        else:
            self.resize = Conv(channels, channels, stride=int(1 / factor)) if factor < 1 else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.projection(x)
        return x if self.resize is None else self.resize(x)


class PreActResidual(nnx.Module):
    """Two convolutions, added to what comes in."""

    def __init__(self, channels: int, bias: bool):
        self.convolution1, self.convolution2 = (Conv(channels, channels, bias=bias) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.convolution2(jax.nn.relu(self.convolution1(jax.nn.relu(x))))


class Fusion(nnx.Module):
    """What came from the coarser scales joined with one scale, at twice the size."""

    def __init__(self, channels: int, bias: bool):
        self.projection = Conv(channels, channels, kernel=1, padding=0)
        self.residual_layer1, self.residual_layer2 = (PreActResidual(channels, bias) for _ in range(2))

    def __call__(self, x: jax.Array | None, scale: jax.Array) -> jax.Array:
        if x is not None:
            x = x + self.residual_layer1(resized(scale, *x.shape[1:3], corners=False))
        x = self.residual_layer2(scale if x is None else x)
        return self.projection(resized(x, 2 * x.shape[1], 2 * x.shape[2], corners=True))


class DPTNeck(nnx.Module):
    """Four scales of features -> the finest, that knows of all."""

    def __init__(self, c: DPTConfig):
        width, sizes = c.hidden_size, c.neck_hidden_sizes
        kept = 2 if c.is_hybrid else 0  # scales that are pictures already, and have no weights here
        empty = [nnx.Dict({}) for _ in range(kept)]
        scales = [Reassemble(width, *part) for part in zip(sizes[kept:], c.reassemble_factors[kept:])]
        projects = [nnx.List([Linear(2 * width, width)]) for _ in sizes[kept:]]
        self.reassemble_stage = nnx.Dict(
            {"layers": nnx.List([*empty, *scales]), "readout_projects": nnx.List([*empty, *projects])}
        )
        self.convs = nnx.List([Conv(size, c.fusion_hidden_size, bias=False) for size in sizes])
        bias = c.use_bias_in_fusion_residual is not False
        self.fusion_stage = nnx.Dict({"layers": nnx.List([Fusion(c.fusion_hidden_size, bias) for _ in sizes])})
        self.act, self.kept = c.hidden_act, kept

    def reassembled(self, tokens: jax.Array, i: int) -> jax.Array:
        """Tokens [B, N + 1, D] as a picture; what they know of the whole is told to each."""
        whole, parts = tokens[:, :1], tokens[:, 1:]
        told = jnp.concatenate([parts, jnp.broadcast_to(whole, parts.shape)], -1)
        parts = ACTIVATIONS[self.act](self.reassemble_stage["readout_projects"][i][0](told))
        side = int(parts.shape[1] ** 0.5)
        return self.reassemble_stage["layers"][i](parts.reshape(len(parts), side, side, -1))

    def __call__(self, layers: list[jax.Array], features: list[jax.Array]) -> jax.Array:
        scales = [*features, *(self.reassembled(x, i) for i, x in enumerate(layers, self.kept))]
        x = None
        for i, fuse in enumerate(self.fusion_stage["layers"]):
            x = fuse(x, self.convs[len(scales) - 1 - i](scales[-1 - i]))
        return x


class DPTHead(nnx.Module):
    """Features -> depth, at twice the size."""

    def __init__(self, width: int):
        convs = {"0": Conv(width, width // 2), "2": Conv(width // 2, 32), "4": Conv(32, 1, kernel=1, padding=0)}
        self.head = nnx.Dict(convs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.head["0"](x)
        x = jax.nn.relu(self.head["2"](resized(x, 2 * x.shape[1], 2 * x.shape[2], corners=True)))
        return jax.nn.relu(self.head["4"](x))[..., 0]


class DPTForDepthEstimation(Model):
    """The depth model of depth-to-image.

    >>> import flaxdiff
    >>> spec = DPTForDepthEstimation.from_config(
    ...     dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32,
    ...          patch_size=16, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8))
    >>> flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), jnp.zeros((1, 32, 32, 3))).shape
    (1, 32, 32)
    """

    config_class = DPTConfig
    library, model_type = "transformers", "dpt"

    def __init__(self, config: DPTConfig):
        self.dpt, self.neck = DPT(config), DPTNeck(config)
        self.head = DPTHead(config.fusion_hidden_size)
        self.config = config

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Pictures [B, S, S, 3] in [-1, 1], see `images.square_pixels` -> how near things are [B, h, w].

        Raises:
          ValueError: pictures of another size than the network's.
        """
        size = self.config.image_size
        if pixel_values.shape[1:3] != (size, size):
            raise ValueError(
                f"The depth model reads pictures of {size} x {size} pixels, and was given "
                f"{pixel_values.shape[1]} x {pixel_values.shape[2]}; see flaxdiff.images.square_pixels."
            )
        layers, features = self.dpt(pixel_values.astype(value(self.dpt.embeddings.cls_token).dtype))
        chosen = [layers[i] for i in self.config.backbone_out_indices[len(features) :]]
        return self.head(self.neck(chosen, features)).astype(jnp.float32)

    @classmethod
    def to_config(cls, config: Any) -> dict[str, Any]:
        """transformers' form, in which the residual network is an object, or absent."""
        keys = super().to_config(config)
        if (backbone := keys.pop("backbone_config")) is not None:
            keys["backbone_config"] = dict(backbone)
        return keys
