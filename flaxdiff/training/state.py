"""One training step: a pure function of the state, the batch and a key.

A loss is any function `(params, batch, key) -> (value, metrics)`; an optimiser is optax's. Which parameters move is a
regex over their paths, so fine-tuning a text encoder, training an adapter or freezing an autoencoder's encoder are
the same call. What is frozen has neither gradients nor optimiser state nor a moving average, and is not saved. Masters
are float32, computation is in what the step is told.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flaxdiff.parallel import by_kind, constrain

Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, Mapping[str, jax.Array]]]


class TrainState(NamedTuple):
    """All that a run must remember; random numbers follow from `step`.

    Attributes:
      step: how many updates have been made, int32 [].
      trainable: the parameters that move, by path.
      opt: the optimiser's state.
      ema: their moving average, by path; empty where none is kept.
      frozen: the tree of all parameters, with None in place of those that move.
    """

    step: jax.Array
    trainable: dict[str, jax.Array]
    opt: optax.OptState
    ema: dict[str, jax.Array]
    frozen: Any

    @property
    def params(self) -> Any:
        """Every parameter: a tree of dictionaries."""
        return replace(self.frozen, self.trainable)


def paths(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, e.g. "unet.conv_in.weight"."""
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


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
    """The tree with some leaves exchanged, by path; None is a leaf too.

    >>> replace({"vae": {"encoder.w": 1, "decoder.w": None}}, {"vae.decoder.w": 3})
    {'vae': {'decoder.w': 3, 'encoder.w': 1}}
    """
    exchange = lambda path, leaf: leaves.get(_path(path), leaf)
    return jax.tree_util.tree_map_with_path(exchange, params, is_leaf=lambda leaf: leaf is None)


def create(params: Any, tx: optax.GradientTransformation, trainable: str = ".*", *, average: bool = True) -> TrainState:
    """The state before the first step. What is trained is copied: it may begin as a frozen network's own arrays.

    Args:
      params: every parameter.
      tx: the optimiser.
      trainable: regex over whole paths.
      average: whether to keep a moving average.
    """
    master = lambda a: jnp.array(a, jnp.promote_types(a.dtype, jnp.float32))
    hot = jax.tree.map(master, select(params, trainable))
    ema = jax.tree.map(jnp.copy, hot) if average else {}
    opt = jax.tree.map(jnp.copy, tx.init(hot))  # an optimiser may hold one array twice, or the parameters themselves
    return TrainState(jnp.zeros((), jnp.int32), hot, opt, ema, replace(params, dict.fromkeys(hot)))


def computed(params: Any, dtype: Any = None) -> Any:
    """Parameters in the dtype that networks compute in; None for as they are."""
    floating = lambda a: dtype is not None and jnp.issubdtype(a.dtype, jnp.floating)
    return jax.tree.map(lambda a: a.astype(dtype) if floating(a) else a, params)


def gradients(
    loss: Loss, state: TrainState, batch: Any, key: jax.Array, dtype: Any = None, target: bool = False
) -> tuple[tuple[jax.Array, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """((value, metrics), gradients of what `state` trains), computed in `dtype`, in the masters' own by default.

    With `target` the loss finds `averaged(state)` among the parameters, as "averaged".
    """
    more = {"averaged": averaged(state)} if target else {}

    def objective(hot: dict[str, jax.Array]) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        params = replace(state.frozen, hot)
        return loss(computed({**params, **more} if more else params, dtype), batch, key)

    return jax.value_and_grad(objective, has_aux=True)(state.trainable)


def accumulated(
    loss: Loss, state: TrainState, batch: Any, key: jax.Array, dtype: Any, target: bool, parts: int
) -> tuple[tuple[jax.Array, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """As `gradients`, the mean over so many parts of the batch, computed one after the other to take less memory.

    Row i of the batch is in part i mod `parts`, so that each has rows of every device.
    """

    def rows(a: jax.Array) -> jax.Array:
        if a.shape[0] % parts:
            raise ValueError(f"A batch of {a.shape[0]} does not divide into {parts} parts; use a multiple of that.")
        return constrain(jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), "whole", "batch")

    def of(part: tuple[jax.Array, Any]) -> Any:
        n, batch = part
        return gradients(loss, state, batch, jax.random.fold_in(key, n), dtype, target)

    every = jnp.arange(parts), by_kind(lambda a: jnp.broadcast_to(a, (parts, *jnp.shape(a))), rows, batch)
    shapes = jax.eval_shape(of, jax.tree.map(lambda a: a[0], every))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    add = lambda total, part: (jax.tree.map(lambda a, b: a + b / parts, total, of(part)), None)
    return jax.lax.scan(add, zeros, every)[0]


def train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    state: TrainState,
    batch: Any,
    key: jax.Array,
    *,
    decay: float = 0.999,
    dtype: Any = None,
    parts: int = 1,
    target: bool = False,
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
      dtype: that the loss is computed in, of all parameters; by default each in its own.
      parts: into which the batch is split to take less memory: gradients are accumulated.
      target: whether the average is a network that the loss asks as well, see `gradients`; then d = decay always.

    Returns:
      The next state and the metrics: `loss`, `grad_norm` and those of the loss.

    >>> loss = lambda params, x, key: (jnp.mean((params["w"] * x - 3 * x) ** 2), {})
    >>> tx = optax.sgd(0.1)
    >>> state, metrics = train_step(loss, tx, create({"w": jnp.float32(1)}, tx), jnp.ones(4), jax.random.key(0))
    >>> float(metrics["loss"]), round(float(state.params["w"]), 4)
    (4.0, 1.4)
    """
    key = jax.random.fold_in(key, state.step)
    compute = gradients if parts == 1 else functools.partial(accumulated, parts=parts)
    (value, metrics), grads = compute(loss, state, batch, key, dtype, target)

    updates, opt = tx.update(grads, state.opt, state.trainable)
    hot = optax.apply_updates(state.trainable, updates)
    d = jnp.float32(decay) if target else jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    follow = lambda path, e: e + (1 - d).astype(e.dtype) * (hot[path] - e)
    ema = {path: follow(path, e) for path, e in state.ema.items()}

    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics}
    return TrainState(state.step + 1, hot, opt, ema, state.frozen), metrics


def averaged(state: TrainState) -> Any:
    """Every parameter, with the moving averages in place of the trained ones where there are any."""
    return replace(state.frozen, state.trainable | state.ema)


def jitted(
    loss: Loss, tx: optax.GradientTransformation, decay: float = 0.999, *, places: Any = None, **options: Any
) -> Callable:
    """`train_step` compiled, with the memory of the old state reused for the new, which lies where `places` says."""
    step = functools.partial(train_step, loss, tx, decay=decay, **options)
    return jax.jit(step, donate_argnums=0, out_shardings=None if places is None else (places, None))
