"""ReduxImageEncoder: what a picture's patches are as tokens of a text, for Flux.

Reference: Black Forest Labs, FLUX.1 Tools, 2024.
"""

import dataclasses

import jax

from flaxdiff import weights
from flaxdiff.core import Config, Model
from flaxdiff.nn.layers import Linear, value


@dataclasses.dataclass(frozen=True)
class ReduxConfig(Config):
    """diffusers' keys and defaults."""

    redux_dim: int = 1152
    txt_in_features: int = 4096


class ReduxImageEncoder(Model):
    """Patches as SigLIP sees them [B, N, D] -> tokens as T5 makes them [B, N, E].

    >>> import flaxdiff
    >>> spec = ReduxImageEncoder.from_config({"redux_dim": 8, "txt_in_features": 16})
    >>> flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), jax.numpy.zeros((1, 4, 8))).shape
    (1, 4, 16)
    """

    config_class = ReduxConfig
    package = "flux"

    def __init__(self, config: ReduxConfig):
        width = 3 * config.txt_in_features
        self.redux_up, self.redux_down = Linear(config.redux_dim, width), Linear(width, config.txt_in_features)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.redux_down(jax.nn.silu(self.redux_up(x.astype(weights.dtype(value(self.redux_up.weight))))))
