"""Kinds of weight: a contraction with a kind equals that with the array it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

import flaxdiff
from flaxdiff import weights
from flaxdiff.weights import Int8, LoRA

rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)

LINEAR = normal(8, 6)
KINDS = {
    "LoRA": LoRA(LINEAR, normal(8, 2), normal(2, 6), jnp.float32(0.5)),
    "DoRA": LoRA(LINEAR, normal(8, 2), normal(2, 6), jnp.float32(0.5), jnp.arange(1.0, 7)),
    "Int8": weights.quantize(LINEAR),
    "LoRA on Int8": LoRA(weights.quantize(LINEAR), normal(8, 2), normal(2, 6), jnp.float32(0.5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_dot(kind):
    x, w = normal(5, 8), KINDS[kind]
    assert peers.relative(weights.dot(x, w), x @ weights.dense(w)) < 1e-5
    assert weights.dtype(w) == jnp.float32


def test_quantised_is_near():
    assert peers.relative(weights.dense(KINDS["Int8"]), LINEAR) < 0.005


def test_conv():
    w = LoRA(normal(3, 3, 4, 6), normal(3, 3, 4, 2), normal(1, 1, 2, 6), jnp.float32(0.5))
    options = {"padding": ((1, 1), (1, 1))}
    x = normal(1, 5, 5, 4)
    assert peers.relative(weights.conv(x, w, **options), weights.conv(x, weights.dense(w), **options)) < 1e-5
    q = normal(3, 3, 4, 6)
    int8 = Int8((q * 20).astype(jnp.int8), jnp.full(6, 0.05))
    assert peers.relative(weights.conv(x, int8, **options), weights.conv(x, weights.dense(int8), **options)) < 1e-5


def test_a_stacked_lora_in_a_model():
    """An adapter on scanned layers computes what merging it computes, and gradients reach it."""
    spec = flaxdiff.CLIPTextModel.from_config(
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
    )
    params = flaxdiff.init(spec, jax.random.key(0))
    name = "text_model.encoder.layers.self_attn.q_proj.weight"
    adapter = LoRA(params[name], normal(3, 16, 2), normal(3, 2, 16), jnp.ones(3))
    ids = jnp.arange(7)[None]
    run = jax.jit(lambda params: flaxdiff.apply(spec, params, ids).last_hidden_state)
    adapted = run({**params, name: adapter})
    assert peers.relative(adapted, run({**params, name: weights.dense(adapter)})) < 1e-4
    assert peers.relative(adapted, run(params)) > 1e-3
    gradient = jax.grad(lambda down: run({**params, name: LoRA(adapter.base, down, adapter.up, adapter.scale)}).std())
    assert jnp.abs(gradient(adapter.down)).max() > 0
