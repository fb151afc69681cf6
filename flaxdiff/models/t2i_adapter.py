"""T2IAdapter: a small network that turns a picture (edges, depth) into what is added in the U-Net's down stages.

It sees neither the time nor the noisy latent, so it runs once for a whole run. There are three forms: full, full for
SDXL, and light.

Reference: Mou et al., T2I-Adapter: Learning Adapters to Dig out More Controllable Ability for Text-to-Image Diffusion
Models, 2023.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.core import Config, Model, only
from flaxdiff.nn.layers import Conv


@dataclasses.dataclass(frozen=True)
class T2IAdapterConfig(Config):
    """diffusers' keys and defaults."""

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = only("full_adapter", "full_adapter_xl", "light_adapter")


class AdapterResnetBlock(nnx.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, channels: int, kernel: int):
        self.block1, self.block2 = Conv(channels, channels), Conv(channels, channels, kernel, padding=kernel // 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.block2(nnx.relu(self.block1(x)))


class AdapterBlock(nnx.Module):
    """Halve height and width (or not), change the channels, then residual blocks."""

    def __init__(self, fan_in: int, fan_out: int, depth: int, down: bool, light: bool):
        width = fan_out // 4 if light else fan_out
        self.in_conv = Conv(fan_in, width, kernel=1, padding=0) if light or fan_in != width else None
        self.resnets = nnx.List([AdapterResnetBlock(width, 3 if light else 1) for _ in range(depth)])
        self.out_conv = Conv(width, fan_out, kernel=1, padding=0) if light else None
        self.down = down

    def __call__(self, x: jax.Array) -> jax.Array:
        x = _halved(x) if self.down else x
        for layer in (self.in_conv, *self.resnets, self.out_conv):
            x = x if layer is None else layer(x)
        return x


def _halved(x: jax.Array) -> jax.Array:
    """The mean of each two by two pixels, or of as many as there are at the edge."""
    total, count = (
        jnp.pad(a, ((0, 0), (0, a.shape[1] % 2), (0, a.shape[2] % 2), (0, 0)))
        .reshape(len(a), -(-a.shape[1] // 2), 2, -(-a.shape[2] // 2), 2, a.shape[-1])
        .sum((2, 4))
        for a in (x, jnp.ones((1, *x.shape[1:3], 1), x.dtype))
    )
    return total / count


class Adapter(nnx.Module):
    """The blocks, under the name that the checkpoint gives them."""

    def __init__(self, c: T2IAdapterConfig):
        read, light, n = c.in_channels * c.downscale_factor**2, c.adapter_type == "light_adapter", len(c.channels)
        self.conv_in = None if light else Conv(read, c.channels[0])
        if light:
            fans, down = [*zip((read, *c.channels), (*c.channels, c.channels[-1]))], range(1, n + 1)
        elif c.adapter_type == "full_adapter":
            fans, down = [*zip((c.channels[0], *c.channels), c.channels)], range(1, n)
        else:
            fans, down = [(c.channels[i - 1] if i in (1, 2) else c.channels[i], c.channels[i]) for i in range(n)], (2,)
        self.body = nnx.List([AdapterBlock(*fan, c.num_res_blocks, i in down, light) for i, fan in enumerate(fans)])


class T2IAdapter(Model):
    """A picture -> features, one for each down stage of the U-Net.

    >>> import flaxdiff
    >>> spec = T2IAdapter.from_config({"channels": [8, 16], "num_res_blocks": 1})
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> [x.shape for x in flaxdiff.apply(spec, params, jnp.zeros((1, 64, 64, 3)))]
    [(1, 8, 8, 8), (1, 4, 4, 16)]
    """

    config_class = T2IAdapterConfig

    def __init__(self, config: T2IAdapterConfig):
        self.adapter, self.factor = Adapter(config), config.downscale_factor

    def __call__(self, picture: jax.Array) -> tuple[jax.Array, ...]:
        """[B, H, W, C] in [0, 1] -> [B, h, w, c] each."""
        b, h, w, c = picture.shape
        r, first = self.factor, self.adapter.conv_in or self.adapter.body[0].in_conv
        x = picture.astype(first.weight.get_value().dtype).reshape(b, h // r, r, w // r, r, c)
        x = x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // r, w // r, c * r * r)
        x = x if self.adapter.conv_in is None else self.adapter.conv_in(x)
        features = []
        for block in self.adapter.body:
            x = block(x)
            features.append(x)
        return tuple(features)
