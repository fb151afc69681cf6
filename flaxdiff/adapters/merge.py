"""Several LoRAs made one: side by side, as a sum of factors, or with what is small or in conflict left out.

Apart from "cat", the rules work on the two factors of each module apart, as PEFT does, so the adapters need the same
rank; each factor takes the root of the adapter's weight.

Reference: Yadav et al., TIES-Merging: Resolving Interference When Merging Models, 2023; Yu et al., Language Models are
Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch (DARE), 2024.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxdiff.adapters.lora import Adapter
from flaxdiff.weights import LoRA

Rule = Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array]  # (factors [n, …], weights, key, density) -> one


def _largest(a: jax.Array, density: float) -> jax.Array:
    """a with only that share of its entries kept that are largest."""
    keep = jax.lax.top_k(jnp.abs(a).reshape(-1), int(density * a.size))[1]
    return a * jnp.zeros(a.size, a.dtype).at[keep].set(1).reshape(a.shape)


def _sum(factors: jax.Array, weights: jax.Array) -> jax.Array:
    return (factors * weights).sum(0)


def _agreed(factors: jax.Array, weights: jax.Array) -> jax.Array:
    """The mean over those adapters that have the sign of the sum."""
    elected = jnp.where(factors.sum(0) >= 0, 1.0, -1.0)
    agree = (jnp.sign(factors) == elected).astype(factors.dtype)
    return (factors * weights * agree).sum(0) / jnp.maximum(agree.sum(0), 1)


def _at_random(factors: jax.Array, key: jax.Array, density: float) -> jax.Array:
    """Factors of which a share is kept at random, and made larger by what was dropped."""
    return jnp.where(jax.random.bernoulli(key, density, factors.shape), factors / density, 0)


def _pruned(factors: jax.Array, density: float) -> jax.Array:
    return jax.vmap(lambda a: _largest(a, density))(factors)


RULES: dict[str, Rule] = {
    "linear": lambda a, w, key, density: _sum(a, w),
    "magnitude_prune": lambda a, w, key, density: _sum(_pruned(a, density), w),
    "ties": lambda a, w, key, density: _agreed(_pruned(a, density), w),
    "dare_linear": lambda a, w, key, density: _sum(_at_random(a, key, density), w),
    "dare_ties": lambda a, w, key, density: _agreed(_at_random(a, key, density), w),
}


def merge_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combination_type: str = "cat",
    *,
    density: float = 1.0,
    key: jax.Array | None = None,
) -> Adapter:
    """One adapter of several.

    Args:
      adapters: from `read_lora`.
      weights: one for each; may be negative.
      combination_type: "cat" (exactly the weighted sum of the updates, the ranks add up), "linear" (weighted sums of
        the factors), "ties", "dare_linear", "dare_ties" or "magnitude_prune".
      density: the share of entries that the pruning rules keep.
      key: a PRNG key, for the rules that prune at random.

    Raises:
      ValueError: an unknown rule, ranks that differ, a density out of (0, 1], no key where one is needed, or DoRA.

    >>> one = {"unet": {"w": LoRA(None, jnp.ones((3, 1)), jnp.ones((1, 2)), jnp.ones(1))}}
    >>> merge_adapters([one, one], [1.0, 3.0], "linear")["unet"]["w"].down[0, 0].round(3)
    Array(2.732, dtype=float32)
    """
    if combination_type not in ("cat", *RULES):
        raise ValueError(f"combination_type={combination_type!r} is not known; use one of {['cat', *RULES]}.")
    if not 0 < density <= 1:
        raise ValueError(f"density={density} is no share of entries to keep; give one above 0, up to 1.")
    if len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights; give one for each.")
    if combination_type.startswith("dare") and key is None:
        raise ValueError(f"{combination_type!r} drops entries at random; give a PRNG key.")
    names = {(c, n) for adapter in adapters for c, own in adapter.items() for n in own}
    merged: Adapter = {}
    for component, name in sorted(names):
        there = [(a[component][name], w) for a, w in zip(adapters, weights) if name in a.get(component, {})]
        own = None if key is None else jax.random.fold_in(key, zlib.crc32(f"{component}.{name}".encode()))
        merged.setdefault(component, {})[name] = _merged(name, *zip(*there), combination_type, density, own)
    return merged


def _merged(name: str, loras: Sequence[LoRA], weights: Sequence[float], kind: str, density: float, key: Any) -> LoRA:
    if any(lora.magnitude is not None or lora.base is not None for lora in loras):
        raise ValueError(f"{name} has magnitudes (DoRA), which do not add up; put several on with set_adapters.")
    signed = [lora.scale * jnp.float32(weight) for lora, weight in zip(loras, weights)]
    if kind == "cat":
        down = jnp.concatenate([lora.down for lora in loras], -1)
        up = jnp.concatenate([lora.up for lora in loras], -2)
        return LoRA(None, down, up, jnp.concatenate(signed, -1))
    if len(shapes := {lora.down.shape for lora in loras}) > 1:
        ranks = sorted(shape[-1] for shape in shapes)
        raise ValueError(f"{name}: adapters of ranks {ranks} can be joined by 'cat' only; {kind!r} needs equal ranks.")
    scales, stack = jnp.stack(signed), loras[0].scale.ndim > 1
    roots = jnp.sqrt(jnp.abs(scales))
    keys = (None, None) if key is None else jax.random.split(key)
    factor = functools.partial(_factor, kind=kind, density=density, stack=stack)
    down = factor(jnp.stack([lora.down for lora in loras]), roots * jnp.sign(scales), keys[0], along=-1)
    up = factor(jnp.stack([lora.up for lora in loras]), roots, keys[1], along=-2)
    return LoRA(None, down, up, jnp.ones_like(loras[0].scale))


@functools.partial(jax.jit, static_argnames=("kind", "density", "stack", "along"))
def _factor(
    factors: jax.Array, roots: jax.Array, key: jax.Array | None, *, kind: str, density: float, stack: bool, along: int
) -> jax.Array:
    """One factor of several adapters [n, ...], layer by layer in a stack, with roots of weights [n, ..., rank]."""

    def layer(factors: jax.Array, roots: jax.Array, key: jax.Array | None) -> jax.Array:
        shape = [1] * factors.ndim
        shape[0], shape[along] = roots.shape
        return RULES[kind](factors, roots.reshape(shape), key, density)

    if not stack:
        return layer(factors, roots, key)
    each = None if key is None else jax.random.split(key, factors.shape[1])
    return jax.vmap(layer, (1, 1, None if key is None else 0))(factors, roots, each)
