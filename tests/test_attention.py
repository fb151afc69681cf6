"""Every way to compute attention is the same attention, in values and gradients; and convolutions by nine products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from flaxdiff import weights
from flaxdiff.core import attention_backend
from flaxdiff.nn import attention as module
from flaxdiff.nn import flash, kernels, rope, strips, winograd
from flaxdiff.nn.attention import attention
from flaxdiff.nn.layers import RMSNorm
from flaxdiff.parallel import make_mesh

# batch, queries, keys, heads, head size, causal: a text of 77, lengths that no block divides, the heads of SD 1 and 2
SHAPES = [
    (2, 200, 200, 2, 40, False),
    (1, 130, 77, 3, 64, False),
    (1, 300, 300, 1, 160, True),
    (1, 33, 257, 2, 80, False),
]


def draw(b, n, m, h, d, causal=False):
    rng = np.random.default_rng(n)
    return [jnp.asarray(rng.standard_normal((b, length, h, d)), jnp.float32) for length in (n, m, m)]


@pytest.fixture
def by():
    """Attention by a given backend, in blocks smaller than the tests' sequences."""
    rows, keys, token = module.ROWS, module.KEYS, attention_backend.set("auto")
    module.ROWS, module.KEYS = 64, 32

    def run(backend, *arrays, **options):
        attention_backend.set(backend)
        return attention(*arrays, **options)

    yield lambda backend, **options: functools.partial(run, backend, **options)
    module.ROWS, module.KEYS = rows, keys
    attention_backend.reset(token)


@pytest.mark.parametrize("backend", ["plain", "sliced", "flash"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_pytorch_in_values_and_gradients(by, backend, shape):
    arrays, causal = draw(*shape), shape[-1]
    theirs = [torch.tensor(np.asarray(a)).transpose(1, 2).requires_grad_() for a in arrays]
    want = torch.nn.functional.scaled_dot_product_attention(*theirs, is_causal=causal)
    (want**2).sum().backward()
    run = by(backend, causal=causal)
    np.testing.assert_allclose(run(*arrays), want.transpose(1, 2).detach(), atol=2e-6)
    grads = jax.grad(lambda *arrays: (run(*arrays) ** 2).sum(), (0, 1, 2))(*arrays)
    for ours, their in zip(grads, theirs):
        np.testing.assert_allclose(ours, their.grad.transpose(1, 2), atol=2e-4)


@pytest.mark.parametrize("backend", ["plain", "sliced"])
def test_masks_and_biases_as_pytorch(by, backend):
    rng, (q, k, v) = np.random.default_rng(0), draw(2, 100, 70, 3, 16)
    seen, bias = rng.random((2, 1, 100, 70)) < 0.7, rng.standard_normal((1, 3, 100, 70)).astype(np.float32)
    padding = np.arange(70) < np.array([[[[50]]], [[[70]]]])
    for mask, extra in ((seen, None), (None, bias), (padding, None), (seen, bias), (padding, bias)):
        total = np.zeros((2, 3, 100, 70), np.float32) + (0 if extra is None else extra)
        total = total if mask is None else np.where(mask, total, -np.inf).astype(np.float32)
        turned = [torch.tensor(np.asarray(a)).transpose(1, 2) for a in (q, k, v)]
        want = torch.nn.functional.scaled_dot_product_attention(*turned, attn_mask=torch.tensor(total), scale=0.3)
        given = {"mask": None if mask is None else jnp.asarray(mask), "bias": extra}
        np.testing.assert_allclose(by(backend, scale=0.3, **given)(q, k, v), want.transpose(1, 2), atol=2e-6)


@pytest.mark.parametrize("backend", ["plain", "sliced"])
def test_scores_approach_a_bound(by, backend):
    """Before anything is masked."""
    q, k, v = draw(2, 100, 70, 3, 16)
    seen = jnp.asarray(np.random.default_rng(0).random((2, 1, 100, 70)) < 0.7)
    scores = 0.9 * jnp.tanh(jnp.einsum("bnhd,bmhd->bhnm", q, k) / 4 / 0.9)
    want = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)
    np.testing.assert_allclose(by(backend, mask=seen, cap=0.9)(q, k, v), want, atol=2e-6)


@pytest.mark.parametrize("backend", ["plain", "sliced"])
def test_who_sees_nothing_gets_a_finite_mean(by, backend):
    q, k, v = draw(1, 40, 40, 1, 8)
    out = by(backend, mask=jnp.zeros((1, 1, 1, 40), bool))(q, k, v)
    np.testing.assert_allclose(out, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-5)


def test_long_sequences_never_materialise_their_scores(by, monkeypatch):
    q, k, v = draw(1, 512, 512, 2, 8)
    monkeypatch.setattr(module, "LARGE", 2**10)
    forward = by("auto")
    for run in (forward, jax.grad(lambda *arrays: forward(*arrays).sum())):
        compiled = jax.jit(run).lower(q, k, v).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2 * 512 * 512 * 4


@pytest.mark.parametrize("keys, loops", [(300, False), (600, True)])
def test_under_a_mask_to_few_keys_a_tpu_has_no_blocks(by, keys, loops):
    q, k, v = draw(1, 2048, keys, 8, 16)
    run = jax.jit(by("auto", mask=jnp.arange(keys) < 200))
    text = run.trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()
    assert ("stablehlo.while" in text) == loops


def test_the_kernel_on_many_devices(by):
    arrays = draw(4, 150, 150, 2, 40)
    want, run = by("plain")(*arrays), jax.jit(by("flash"))
    grads = jax.jit(jax.grad(lambda *a: (by("flash")(*a) ** 2).sum(), (0, 1, 2)))
    wanted = jax.grad(lambda *a: (by("plain")(*a) ** 2).sum(), (0, 1, 2))(*arrays)
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    for spec in (PartitionSpec("data", None, "tensor"), PartitionSpec("data", "tensor"), PartitionSpec()):
        placed = jax.device_put(arrays, NamedSharding(mesh, spec))
        np.testing.assert_allclose(run(*placed), want, atol=2e-6)
        for ours, theirs in zip(grads(*placed), wanted):
            np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_the_kernel_under_vmap(by):
    q, k, v = draw(2, 130, 130, 2, 16)
    both = jax.vmap(by("flash"), (0, None, 0))(jnp.stack([q, 2 * q]), k, jnp.stack([v, v + 1]))
    np.testing.assert_allclose(both[1], by("plain")(2 * q, k, v + 1), atol=5e-6)


def test_blocks_waste_little():
    lengths = 77, 128, 1000, 1024, 1100, 4096, 4608
    assert [flash._block(n, 128) for n in lengths] == [128, 128, 1024, 1024, 384, 1024, 768]
    assert [flash._block(n, 160) for n in lengths] == [128, 128, 512, 512, 384, 512, 512]


def test_normalised_and_turned_in_one_pass(monkeypatch):
    """The kernel does what norm and rotation do, on heads and tokens that fill no block, split, mapped, and back."""
    x, weight = draw(2, 40, 40, 6, 128)[0], 1 + 0.1 * draw(1, 1, 1, 1, 128)[0].ravel()
    turn = rope.rope(jnp.arange(80.0).reshape(40, 2), (48, 80))
    plain = functools.partial(rope._plainly, 1e-6)
    want = plain(x, weight, *turn)
    layer = RMSNorm(128)
    layer.weight.set_value(weight)
    np.testing.assert_allclose(want, rope.rotate(layer(x), turn), atol=1e-5)
    for size, most in {"TOKENS": 16, "HEADS": 4}.items():
        monkeypatch.setattr(kernels, size, most)
    np.testing.assert_allclose(rope._by_kernel(1e-6, True, x, weight, *turn), want, atol=1e-5)
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", None, "tensor")))
    run = jax.jit(lambda x, weight: rope.normalised(x, weight, turn))
    np.testing.assert_allclose(run(placed, weight), want, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(run, (0, None))(x[None], weight)[0], want, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(run, (None, 0))(x, weight[None])[0], want, atol=1e-5)
    loss = lambda run: jax.grad(lambda x, w: (run(x, w) ** 3).sum(), (0, 1))(x, weight)
    for ours, theirs in zip(loss(run), loss(lambda x, w: plain(x, w, *turn))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
    # without a turn heads of any size are, and stay, side by side in a token
    np.testing.assert_allclose(rope._by_kernel(1e-6, True, x, weight), layer(x), atol=1e-5)
    small, few = x[..., :24], weight[:24]
    np.testing.assert_allclose(rope._by_kernel(1e-6, True, small, few), rope.rms(small, few), atol=1e-5)


@pytest.mark.parametrize("heads, d", [(6, 128), (6, 64), (5, 24), (16, 72)])
def test_heads_move_in_front_of_tokens_and_back(heads, d, monkeypatch):
    """Tokens fill no block; there are more or fewer of them afterwards; and gradients go the other way."""
    monkeypatch.setattr(kernels, "TOKENS", 128)
    x = draw(2, 300, 300, heads, d)[0]
    move = functools.partial(kernels.regrouped, interpret=True)
    first = jax.jit(lambda x: move(x, True, 384))
    want = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, 84), (0, 0)))
    np.testing.assert_array_equal(first(x), want)
    np.testing.assert_array_equal(move(want, False, 300), x)
    np.testing.assert_array_equal(jax.vmap(first)(x[None])[0], want)
    weight = draw(2, 384, 384, heads, d)[0].swapaxes(1, 2)
    grad = jax.jit(jax.grad(lambda x: (first(x) * weight).sum()))(x)
    np.testing.assert_array_equal(grad, weight.swapaxes(1, 2)[:, :300])


def test_the_kernel_refuses_what_it_cannot_do(by):
    q, k, v = draw(1, 8, 8, 1, 8)
    with pytest.raises(ValueError, match="'flash' knows neither masks nor biases; use 'auto'"):
        by("flash", mask=jnp.ones((8, 8), bool))(q, k, v)
    with pytest.raises(ValueError, match="'flash' knows no bound of scores; use 'auto'"):
        by("flash", cap=1.0)(q, k, v)
    with pytest.raises(ValueError, match="attention='slow' is not known; use one of"):
        by("slow")(q, k, v)


def torch_conv(x, w):
    x, w = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2), torch.tensor(np.asarray(w)).permute(3, 2, 0, 1)
    return torch.nn.functional.conv2d(x, w, padding=1).permute(0, 2, 3, 1)


def test_convolutions_as_pytorch():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 12, 9, 130), (3, 3, 130, 128)))
    same = functools.partial(weights.conv, padding=((1, 1), (1, 1)))
    close = functools.partial(np.testing.assert_allclose, atol=2e-3, rtol=1e-4)
    for gather in (0, 1, 2):
        close(weights._products(x, w, (1, 1), ((1, 1), (1, 1)), gather), torch_conv(x, w))
    close(same(x, w), torch_conv(x, w))
    close(same(x, w, doubled=True), torch_conv(x.repeat(2, 1).repeat(2, 2), w))
    close(weights.conv(x, w[1:2, 1:2]), x @ w[1, 1])
    # where a TPU is meant, there is a product for each tap and no convolution; elsewhere, one convolution
    lowered = lambda f, platform: jax.jit(f).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    assert lowered(same, "tpu").count("dot_general") == 9 and "convolution" not in lowered(same, "tpu")
    assert lowered(functools.partial(same, doubled=True), "tpu").count("dot_general") == 16
    assert "dot_general" not in lowered(same, "cpu") and lowered(same, "cpu").count("stablehlo.convolution") == 1
    # a few pixels under a large window are one product on a CPU, with strides too
    few, down = x[:, :8, :7], functools.partial(same, strides=(2, 2))
    assert "convolution" not in jax.jit(down).lower(few, w).as_text()
    close(down(few, w), torch_conv(few, w)[:, ::2, ::2])


@pytest.mark.parametrize(
    "height, options, operations, near",
    [
        (32, {}, (1, 1, 0), winograd.NEAR),  # by fours of rows, with half the products, one point after another
        (32, {}, (2, 1, 0), 2**18),  # the same in pieces of four rows
        (16, {}, (1, 0, 1), winograd.NEAR),  # so few pixels that products take copies of them
        (31, {}, (0, 1, 0), winograd.NEAR),
        (32, {"strides": (2, 2)}, (0, 1, 0), winograd.NEAR),
        (7, {"doubled": True}, (0, 4, 0), winograd.NEAR),
        (16, {"doubled": True}, (4, 0, 4), winograd.NEAR),
        (32, {"doubled": True}, (4, 4, 0), winograd.NEAR),  # a window of two rows for each of four parts
    ],
)
def test_convolutions_on_a_cpu_and_their_gradients_as_pytorch(height, options, operations, near, monkeypatch):
    monkeypatch.setattr(winograd, "NEAR", near)
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x, w = draw(2, height, 34, 65), draw(3, 3, 65, 72) / 8
    ours = functools.partial(weights.conv, padding=((1, 1), (1, 1)), **options)
    lowered = jax.jit(ours).lower(x, w).as_text()
    assert tuple(lowered.count(f"stablehlo.{name}") for name in ("while", "convolution", "dot_general")) == operations

    asked = [torch.tensor(a).permute(*order).requires_grad_() for a, order in ((x, (0, 3, 1, 2)), (w, (3, 2, 0, 1)))]
    seen = torch.nn.functional.interpolate(asked[0], scale_factor=2) if "doubled" in options else asked[0]
    theirs = torch.nn.functional.conv2d(seen, asked[1], padding=1, stride=options.get("strides", 1))
    g = draw(*theirs.shape)
    (gx, gw), channels_last = torch.autograd.grad(theirs, asked, torch.tensor(g)), (0, 2, 3, 1)
    want = theirs.permute(*channels_last), gx.permute(*channels_last), gw.permute(2, 3, 1, 0)
    y, back = jax.vjp(ours, jnp.asarray(x), jnp.asarray(w))
    for a, b in zip((y, *back(jnp.asarray(g.transpose(channels_last)))), want):
        np.testing.assert_allclose(a, b.detach(), atol=5e-5 * float(b.std()))


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("features", [3, 384])
def test_convolutions_in_strips_as_pytorch(doubled, features, monkeypatch):
    """By the kernel of TPUs, in several blocks of rows and of features; gradients are those of XLA's convolution."""
    monkeypatch.setattr(weights, "ON_CHIP", 0)
    monkeypatch.setattr(strips, "fit", lambda *_: True)
    monkeypatch.setattr(strips, "_rows", lambda *_: 4)
    monkeypatch.setattr(strips, "convolved", functools.partial(strips.convolved, interpret=True))
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 16, 32, 128), (3, 3, 128, features)))
    ours = functools.partial(weights.conv, padding=((1, 1), (1, 1)), doubled=doubled)
    plainly = jax.vjp(ours, x, w)
    choose = jax.lax.platform_dependent
    as_on_tpu = lambda *arrays, tpu=None, **ways: tpu(*arrays) if tpu else choose(*arrays, **ways)
    monkeypatch.setattr(jax.lax, "platform_dependent", as_on_tpu)
    by_kernel = jax.vjp(ours, x, w)
    close = functools.partial(np.testing.assert_allclose, atol=2e-3, rtol=1e-4)
    close(by_kernel[0], torch_conv(x.repeat(2, 1).repeat(2, 2) if doubled else x, w))
    g = jnp.asarray(rng.standard_normal(by_kernel[0].shape), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, by_kernel[1](g), plainly[1](g))


def test_doubled_convolutions_by_every_kind_of_weight():
    rng = np.random.default_rng(1)
    x, w, down, up = (
        jnp.asarray(rng.standard_normal(s), jnp.float32)
        for s in ((1, 5, 4, 6), (3, 3, 6, 8), (3, 3, 6, 2), (1, 1, 2, 8))
    )
    lora = weights.LoRA(w, down, up, jnp.float32(0.5))
    want = torch_conv(x.repeat(2, 1).repeat(2, 2), w + 0.5 * jnp.einsum("hwir,ro->hwio", down, up[0, 0]))
    np.testing.assert_allclose(weights.conv(x, lora, padding=((1, 1), (1, 1)), doubled=True), want, atol=1e-4)
