"""One training step: a pure function of the state, the batch and a key.

A loss is any function `(params, batch, key) -> (value, metrics)`; an optimiser is optax's. Which parameters move is a
regex over their paths, so fine-tuning a text encoder, training an adapter or freezing an autoencoder's encoder are
the same call. What is frozen has neither gradients nor optimiser state nor a moving average.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, Mapping[str, jax.Array]]]


class TrainState(NamedTuple):
    """All that a run must remember; the data and the random numbers follow from `step`.

    Attributes:
      step: how many updates have been made, int32 [].
      params: every parameter, frozen ones too: a tree of dictionaries.
      opt: the optimiser's state.
      ema: the moving average of the trained parameters, by path.
    """

    step: jax.Array
    params: Any
    opt: optax.OptState
    ema: dict[str, jax.Array]


def paths(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, e.g. "unet.conv_in.weight"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def select(params: Any, trainable: str) -> dict[str, Any]:
    """The parameters whose whole path matches the regex.

    Raises:
      ValueError: there are none.

    >>> select({"vae": {"encoder.w": 1, "decoder.w": 2}}, r"vae\\.decoder\\..*")
    {'vae.decoder.w': 2}
    """
    chosen = {path: leaf for path, leaf in paths(params).items() if re.fullmatch(trainable, path)}
    if not chosen:
        raise ValueError(f"trainable={trainable!r} matches no parameter; paths look like {list(paths(params))[:3]}.")
    return chosen


def replace(params: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with some leaves exchanged, by path.

    >>> replace({"vae": {"encoder.w": 1, "decoder.w": 2}}, {"vae.decoder.w": 3})
    {'vae': {'decoder.w': 3, 'encoder.w': 1}}
    """
    return jax.tree.unflatten(jax.tree.structure(params), list({**paths(params), **leaves}.values()))


def create(params: Any, tx: optax.GradientTransformation, trainable: str = ".*") -> TrainState:
    """The state before the first step. What is trained is copied: it may begin as a frozen network's own arrays."""
    hot = jax.tree.map(jnp.copy, select(params, trainable))
    return TrainState(jnp.zeros((), jnp.int32), replace(params, hot), tx.init(hot), jax.tree.map(jnp.copy, hot))


def adam(
    peak: float, steps: int, *, warmup: int = 100, b2: float = 0.99, decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW on gradients clipped to norm 1, its rate up to `peak` in `warmup` steps and down to 0 along a cosine.

    Args:
      peak: the highest learning rate.
      steps: how long the run is.
      warmup: how many of them are spent going up.
      b2: the decay of the second moment.
      decay: of the weights.
    """
    rate = optax.warmup_cosine_decay_schedule(0, peak, warmup, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=b2, weight_decay=decay))


def train_step(
    loss: Loss, tx: optax.GradientTransformation, state: TrainState, batch: Any, key: jax.Array, *, decay: float = 0.999
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the parameters that `state` trains, and of their moving average.

    The average is short at first and tends to the given decay: ema ← d ema + (1 - d) θ, d = min(decay, (1+n)/(10+n)).

    Args:
      loss: what to minimise; its key is `key` folded with the step.
      tx: an optax transformation.
      state: donate it when jitting.
      batch: anything that the loss reads.
      key: the key of the run, the same at every step.
      decay: of the moving average.

    Returns:
      The next state and the metrics: `loss`, `grad_norm` and those of the loss.

    >>> loss = lambda params, x, key: (jnp.mean((params["w"] * x - 3 * x) ** 2), {})
    >>> tx = optax.sgd(0.1)
    >>> state, metrics = train_step(loss, tx, create({"w": jnp.float32(1)}, tx), jnp.ones(4), jax.random.key(0))
    >>> float(metrics["loss"]), round(float(state.params["w"]), 4)
    (4.0, 1.4)
    """
    hot = {path: leaf for path, leaf in paths(state.params).items() if path in state.ema}
    objective = lambda hot: loss(replace(state.params, hot), batch, jax.random.fold_in(key, state.step))
    (value, metrics), grads = jax.value_and_grad(objective, has_aux=True)(hot)

    updates, opt = tx.update(grads, state.opt, hot)
    hot = optax.apply_updates(hot, updates)
    d = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    ema = jax.tree.map(lambda e, p: e + (1 - d).astype(e.dtype) * (p - e), state.ema, hot)

    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics}
    return TrainState(state.step + 1, replace(state.params, hot), opt, ema), metrics


def averaged(state: TrainState) -> Any:
    """The parameters with the moving averages in place of the trained ones."""
    return replace(state.params, state.ema)


def jitted(loss: Loss, tx: optax.GradientTransformation, decay: float = 0.999) -> Callable:
    """`train_step` compiled, with the memory of the old state reused for the new."""
    return jax.jit(functools.partial(train_step, loss, tx, decay=decay), donate_argnums=0)
