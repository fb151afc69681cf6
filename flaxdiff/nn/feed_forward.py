"""The feed-forward of transformer blocks: wider by an expansion, gated or not, and back."""

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.layers import Linear

# diffusers' activation_fn -> whose values count, and whether those of half the projection gate the other half
EXPANSIONS = {"geglu": ("gelu", True), "gelu": ("gelu", False), "gelu-approximate": ("gelu_pytorch_tanh", False)}


class Expansion(nnx.Module):
    """act(x W + b), or x ⊙ act(gate), the two halves of one projection."""

    def __init__(self, fan_in: int, fan_out: int, activation_fn: str, bias: bool = True):
        self.activation, self.gated = EXPANSIONS[activation_fn]
        self.proj = Linear(fan_in, (1 + self.gated) * fan_out, bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        act, x = ACTIVATIONS[self.activation], self.proj(x)
        if not self.gated:  # worked out on the way out of this product on a TPU, rather than into the next
            return jax.lax.optimization_barrier(act(x))
        x, gate = jnp.split(x, 2, -1)
        return x * act(gate)


class FeedForward(nnx.Module):
    """Expansion, to four times the width unless `inner` says otherwise, and back.

    With `chunking`, (size, dimension), so many entries of a dimension at once.
    """

    def __init__(
        self,
        width: int,
        activation_fn: str = "geglu",
        *,
        chunking: tuple[int, int] | None = None,
        inner: int | None = None,
        bias: bool = True,
    ):
        inner = inner or 4 * width
        expand = Expansion(width, inner, activation_fn, bias)
        self.net = nnx.List([expand, None, Linear(inner, width, bias)])  # dropout keeps its number
        self.chunking = chunking

    def __call__(self, x: jax.Array) -> jax.Array:
        run = lambda x: self.net[2](self.net[0](x))
        if self.chunking is None:
            return run(x)
        size, dim = self.chunking
        return jnp.moveaxis(jax.lax.map(run, jnp.moveaxis(x, dim, 0), batch_size=size), 0, dim)
