"""CLIPImageProjection: from CLIP's embedding of a picture to what its text encoder would say of it, one matrix."""

import dataclasses

import jax

from flaxdiff.core import Config, Model
from flaxdiff.nn.layers import Linear


@dataclasses.dataclass(frozen=True)
class CLIPImageProjectionConfig(Config):
    """diffusers' keys and defaults."""

    hidden_size: int = 768


class CLIPImageProjection(Model):
    """x ↦ x W.

    >>> import flaxdiff, jax.numpy as jnp
    >>> spec = CLIPImageProjection.from_config({"hidden_size": 32})
    >>> flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), jnp.zeros((2, 32))).shape
    (2, 32)
    """

    config_class = CLIPImageProjectionConfig
    package = "stable_diffusion"

    def __init__(self, config: CLIPImageProjectionConfig):
        self.project = Linear(config.hidden_size, config.hidden_size, bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Embeddings [..., D] -> [..., D]."""
        return self.project(x)
