"""Optimisers and schedules of the learning rate by the names that training scripts use; optax does the work.

Everything is a number, a name or a list of (regex, factor) of a recipe's configuration, so a run is said in a few words
and a state is rebuilt from them.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from flaxdiff import weights
from flaxdiff.parallel import first_match

Schedule = Callable[[jax.Array], jax.Array]
SMALL = 4096  # a weight of fewer numbers has its moments in float32


# regex of paths: embeddings by token or place, and shifts and scales by layer
TABLES = (
    r"\b(shared|wte|wpe|embed_(tokens|positions)|embeddings?|(?!patch_)\w+_embeddings?|relative_attention_bias|"
    r"controlnet_mode_embedder)\.weight|\b(pos_embed|position(al)?_embeddings?|query_tokens|\w+_table)'\]"
)


def _matrices(params: Any) -> Any:
    """How Muon reads weights as matrices: outputs last, inputs before them, layers that are stacked apart.

    Tables are none: a batch has few rows of an embedding, and each row is a vector. Adam updates them as it does those.

    >>> params = {"shared.weight": jnp.ones((9, 4)), "x_embedder.weight": jnp.ones((9, 4)), "norm.weight": jnp.ones(4)}
    >>> [path for path, how in _matrices(params).items() if how]
    ['x_embedder.weight']
    """

    def axes(path: Any, a: jax.Array) -> contrib.MuonDimensionNumbers | None:
        if a.ndim < 2 or re.search(TABLES, jax.tree_util.keystr(path)):
            return None
        inputs = range(a.ndim - 4, a.ndim - 1) if a.ndim >= 4 else [a.ndim - 2]
        return contrib.MuonDimensionNumbers(tuple(inputs), a.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


# name -> (rate, b1, b2, eps, decay of the weights) -> transformation
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": lambda rate, b1, b2, eps, decay: optax.adamw(rate, b1, b2, eps, weight_decay=decay),
    "adamw8bit": lambda rate, b1, b2, eps, decay: optax.chain(
        scale_by_adam_8bit(b1, b2, eps), optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate)
    ),
    "adafactor": lambda rate, b1, b2, eps, decay: optax.adafactor(
        rate,
        multiply_by_parameter_scale=False,
        weight_decay_rate=lambda n: decay * (rate(n) if callable(rate) else rate),  # which it takes as it is
    ),
    "lion": lambda rate, b1, b2, eps, decay: optax.lion(rate, b1, b2, weight_decay=decay),
    "prodigy": lambda rate, b1, b2, eps, decay: contrib.prodigy(  # which divides by sums of rates: none is to be 0
        (lambda n: jnp.maximum(rate(n), 1e-6)) if callable(rate) else rate, (b1, b2), eps=eps, weight_decay=decay
    ),
    "muon": lambda rate, b1, b2, eps, decay: contrib.muon(
        rate, weight_decay=decay, adam_b1=b1, adam_b2=b2, muon_weight_dimension_numbers=_matrices
    ),
    "sgd": lambda rate, b1, b2, eps, decay: optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, b1)),
}


def schedule(name: str, peak: float, steps: int, warmup: int = 0, cycles: float = 1, power: float = 1) -> Schedule:
    """The learning rate at each update: up to `peak` along a line in `warmup` of them, and then on as the name says.

    Args:
      name: "constant" and "constant_with_warmup" (the same), "linear", "cosine", "cosine_with_restarts", "polynomial".
      peak: the highest rate.
      steps: how long the run is; the others but the constant end at 0.
      warmup: updates before the peak.
      cycles: of the cosine with restarts.
      power: of the polynomial.

    Raises:
      ValueError: an unknown name, or a warm-up as long as the run.

    >>> [round(float(schedule("linear", 1.0, 10, warmup=2)(n)), 3) for n in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    left = {
        "constant": lambda r: jnp.ones_like(r),
        "constant_with_warmup": lambda r: jnp.ones_like(r),
        "linear": lambda r: 1 - r,
        "cosine": lambda r: 0.5 * (1 + jnp.cos(jnp.pi * r)),
        "cosine_with_restarts": lambda r: jnp.where(r < 1, 0.5 * (1 + jnp.cos(jnp.pi * (cycles * r % 1))), 0),
        "polynomial": lambda r: (1 - r) ** power,
    }
    if name not in left:
        raise ValueError(f"lr_scheduler={name!r} is not known; use one of {sorted(left)}.")
    if not 0 <= warmup < steps:
        raise ValueError(f"A warm-up of {warmup} updates does not fit into a run of {steps}.")

    def rate(count: jax.Array) -> jax.Array:
        n = jnp.asarray(count, jnp.float32)
        after = jnp.clip((n - warmup) / (steps - warmup), 0, 1)
        return peak * jnp.where(n < warmup, n / max(warmup, 1), left[name](after))

    return rate


def optimizer(
    name: str,
    rate: Schedule | float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    decay: float = 1e-2,
    max_grad_norm: float | None = 1.0,
    factors: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformation:
    """Gradients clipped to a norm, an optimiser, and rates that differ by path.

    Args:
      name: "adamw", "adamw8bit", "adafactor", "lion", "prodigy" (with a rate of 1), "muon" or "sgd".
      rate: the learning rate, or its schedule.
      b1, b2, eps: of the moments, where the optimiser has such.
      decay: of the weights.
      max_grad_norm: of all gradients together; None for no clipping.
      factors: (regex, factor) of the rate, the first that is found in a parameter's path; all others have 1.

    Raises:
      ValueError: an unknown name.

    >>> tx = optimizer("sgd", 0.5, b1=0.0, decay=0.0, max_grad_norm=None, factors=[("text", 0.1)])
    >>> grads = {"text.w": jnp.ones(()), "unet.w": jnp.ones(())}
    >>> {k: round(float(u), 3) for k, u in tx.update(grads, tx.init(grads), grads)[0].items()}
    {'text.w': -0.05, 'unet.w': -0.5}
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} is not known; use one of {sorted(OPTIMIZERS)}.")
    clip = () if max_grad_norm is None else (optax.stateless(functools.partial(_clipped, max_grad_norm)),)
    rules = (*factors, ("", 1.0))
    weigh = lambda updates, params: {path: u * first_match(rules, path) for path, u in updates.items()}
    return optax.chain(
        *clip, OPTIMIZERS[name](rate, b1, b2, eps, decay), *([optax.stateless(weigh)] if factors else [])
    )


def _clipped(most: float, grads: Any, _: Any = None) -> Any:
    """Gradients of at most such a norm, by one factor: what follows multiplies by it in passing.

    Optax divides each by the norm, and keeps what that gives beside the gradient until it has chosen between them.

    >>> grads = {"w": jnp.full(4, 2.0)}
    >>> [_clipped(most, grads)["w"].tolist() for most in (1.0, 5.0)]
    [[0.5, 0.5, 0.5, 0.5], [2.0, 2.0, 2.0, 2.0]]
    """
    norm = optax.global_norm(grads)
    factor = most / jnp.maximum(norm, most)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


def adam(
    peak: float, steps: int, *, warmup: int = 100, b2: float = 0.99, decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW on gradients clipped to norm 1, its rate up to `peak` in `warmup` steps and down to 0 along a cosine."""
    return optimizer("adamw", schedule("cosine", peak, steps, warmup), b2=b2, decay=decay)


# --- moments in eight bits -------------------------------------------------------------------------------------------


class Adam8State(NamedTuple):
    """Of `scale_by_adam_8bit`: updates made, and both moments, of large weights in float8, the second as its root."""

    count: jax.Array
    mu: dict[str, Any]
    root: dict[str, Any]


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam with moments of a byte a number, one scale for each output of a weight; what is small stays in float32.

    The second moment is kept as its root, which has half of the exponents; what would vanish beside the largest is kept
    from that, as the step would divide by it.

    Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021.
    """
    large = lambda a: a.ndim > 1 and a.size >= SMALL
    pack = lambda a: weights.quantize(a, weights.Float8) if large(a) else a

    def init(params: dict[str, jax.Array]) -> Adam8State:
        zeros = {path: pack(jnp.zeros_like(a)) for path, a in params.items()}
        return Adam8State(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads: dict[str, jax.Array], state: Adam8State, params: Any = None) -> tuple[Any, Adam8State]:
        n = state.count + 1
        steps, mu, root = {}, {}, {}
        for path, g in grads.items():
            m = b1 * weights.dense(state.mu[path]) + (1 - b1) * g
            v = b2 * jnp.square(weights.dense(state.root[path])) + (1 - b2) * jnp.square(g)
            r = jnp.sqrt(v)
            steps[path] = m / (1 - b1**n) / (r / jnp.sqrt(1 - b2**n) + eps)
            floor = jnp.max(r, range(max(r.ndim - 4, 0), r.ndim - 1), keepdims=True) * 2.0**-17 if large(r) else 0
            mu[path], root[path] = pack(m), pack(jnp.maximum(r, floor))
        return steps, Adam8State(n, mu, root)

    return optax.GradientTransformation(init, update)
