"""NLayerDiscriminator: tells real pictures from made ones patch by patch, as autoencoders are trained against it.

It normalises by the moments of the batch that it sees, as it does throughout training; nothing asks it afterwards.

Reference: Isola et al., Image-to-Image Translation with Conditional Adversarial Networks, 2017 (PatchGAN).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, Model, param
from flaxdiff.nn.layers import Conv, normal, value, zeros


def about_one(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """N(1, 0.02²)."""
    return 1 + normal(key, shape)


class BatchNorm(nnx.Module):
    """Channels normalised by their moments over the batch and all places."""

    def __init__(self, channels: int):
        self.weight, self.bias = param((channels,), "norm", about_one), param((channels,), "norm", zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x.astype(jnp.float32)
        h = (h - h.mean((0, 1, 2))) * jax.lax.rsqrt(h.var((0, 1, 2)) + 1e-5)
        weight, bias = (value(a).astype(jnp.float32) for a in (self.weight, self.bias))
        return (h * weight + bias).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class NLayerDiscriminatorConfig(Config):
    """The names of taming-transformers."""

    input_nc: int = 3  # channels of a picture
    ndf: int = 64  # channels behind the first layer; each doubles them, up to eight times
    n_layers: int = 3  # of stride 2


class NLayerDiscriminator(Model):
    """Pictures [B, H, W, C] -> logits of patches [B, h, w, 1], high where they look real.

    >>> import flaxdiff
    >>> spec = NLayerDiscriminator.from_config({"ndf": 8})
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> flaxdiff.apply(spec, params, jnp.zeros((2, 64, 64, 3))).shape
    (2, 6, 6, 1)
    """

    config_class = NLayerDiscriminatorConfig
    library = None
    ignored = r".*\.(running_mean|running_var|num_batches_tracked)"

    def __init__(self, config: NLayerDiscriminatorConfig):
        c = config
        widths = [c.ndf * min(2**i, 8) for i in range(c.n_layers + 1)]
        self.main = nnx.List([Conv(c.input_nc, c.ndf, 4, 2), None])  # a file counts the activations as well
        for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:]), 1):
            stride = 2 if i < c.n_layers else 1
            self.main.extend([Conv(fan_in, fan_out, 4, stride, bias=False), BatchNorm(fan_out), None])
        self.main.append(Conv(widths[-1], 1, 4))

    def __call__(self, image: jax.Array) -> jax.Array:
        """[B, H, W, C] in [-1, 1] -> [B, h, w, 1]."""
        image = image.astype(weights.dtype(value(self.main[0].weight)))
        for layer in self.main:
            image = jax.nn.leaky_relu(image, 0.2) if layer is None else layer(image)
        return image
