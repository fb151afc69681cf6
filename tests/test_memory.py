"""Memory: every setting computes the same numbers (or as PyTorch's does), and takes less."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

import flaxdiff
from flaxdiff import memory, parallel, weights
from flaxdiff.nn.tiling import tiled
from flaxdiff.planning import chips, plan

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device

VAE = flaxdiff.AutoencoderKL.from_config(
    {"block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 4}
    | {"up_block_types": ["UpDecoderBlock2D"] * 2, "sample_size": 16, "mid_block_add_attention": False}
)
CLIP = flaxdiff.CLIPTextModel.from_config(
    dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, vocab_size=99)
)
UNET = flaxdiff.UNet2DConditionModel.from_config(
    dict(
        block_out_channels=[8, 16],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=1,
        transformer_layers_per_block=[2, 1],
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
)


@functools.cache
def params_of(spec):
    with jax.ensure_compile_time_eval():  # also when first asked for inside of a trace
        return flaxdiff.init(spec, jax.random.key(0))


def working(function, *args) -> int:
    """Bytes that a compiled function works in."""
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def decoded(spec, z, params=None):
    return flaxdiff.apply(spec, params_of(VAE) if params is None else params, z, method="decode")


# --- slices and tiles ------------------------------------------------------------------------------------------------


@functools.cache
def tiling_peer():
    vae = peers.stable_diffusion_1().vae
    vae.enable_tiling()
    folder = peers.saved(peers.stable_diffusion_1)
    return vae, *flaxdiff.AutoencoderKL.from_pretrained(folder, subfolder="vae", tiling=16)


# tiles of 8 latents every 6: whole and cut ones, one within the tile before it, one row only, none at all
@pytest.mark.parametrize(("height", "width"), [(14, 20), (13, 7), (8, 6)])
def test_tiles_are_those_of_pytorch(height, width):
    vae, spec, params = tiling_peer()
    latent, image = normal(2, height, width, 4), normal(1, 2 * height, 2 * width, 3)
    with torch.no_grad():
        there, posterior = vae.decode(peers.nchw(latent)).sample, vae.encode(peers.nchw(image)).latent_dist
    assert peers.relative(decoded(spec, latent, params), peers.nhwc(there)) < 1e-4
    ours = flaxdiff.apply(spec, params, image, method="encode")
    assert peers.relative(ours.mean, peers.nhwc(posterior.mean)) < 1e-4
    assert peers.relative(ours.logvar, peers.nhwc(posterior.logvar)) < 1e-4
    whole = decoded(spec.replace(tiling=None), latent, params)
    assert (peers.relative(whole, peers.nhwc(there)) > 1e-3) == (max(height, width) > 8)


def test_tiles_put_together_are_what_they_were_cut_from():
    for height, width in ((5, 31), (24, 20), (9, 8)):
        x = normal(2, height, width, 3)
        assert peers.relative(tiled(lambda x: x, 8)(x), x) < 1e-6
        twice = tiled(lambda x: x.repeat(2, 1).repeat(2, 2), 8)(x)
        assert peers.relative(twice, x.repeat(2, 1).repeat(2, 2)) < 1e-6


def test_slices_and_tiles_take_less():
    z = normal(4, 32, 32, 4)
    at_once, one, tiles = (
        functools.partial(decoded, VAE.replace(**settings))
        for settings in ({}, {"slicing": True}, {"slicing": True, "tiling": 16})
    )
    assert peers.relative(jax.jit(one)(z), jax.jit(at_once)(z)) < 1e-5
    assert working(one, z) < 0.6 * working(at_once, z)
    assert working(tiles, z) < 0.6 * working(one, z)


def test_tiles_under_jit_vmap_and_grad():
    z, spec = normal(2, 12, 10, 4), VAE.replace(tiling=16, slicing=True)
    run = lambda z: decoded(spec, z)
    each = jax.jit(jax.vmap(lambda z: run(z[None])[0]))(z)
    assert peers.relative(each, run(z)) < 1e-5
    v, step = normal(*z.shape), 1e-2
    f = jax.jit(lambda z: jnp.square(run(z)).mean())
    slope = float(jnp.vdot(jax.jit(jax.grad(f))(z), v))
    assert slope == pytest.approx(float(f(z + step * v) - f(z - step * v)) / (2 * step), rel=2e-2)


def test_a_pipeline_in_tiles(tmp_path):
    """A new pipeline; the setting is in no file; the picture is nearly the same."""
    pipe, params = flaxdiff.load(peers.saved(peers.stable_diffusion_1))
    pipe = pipe.replace(progress=False)
    both = pipe.enable_vae_slicing().enable_vae_tiling()
    assert both.vae.config.tiling == 16 and both.vae.config.slicing and pipe.vae.config.tiling is None
    assert pipe.enable_vae_tiling(8).vae.config.tiling == 8
    draw = lambda pipe: pipe(params, jax.random.key(0), prompt="red", num_inference_steps=1, height=24, width=16)
    difference = np.abs(np.float32(draw(pipe).images[0]) - np.float32(draw(both).images[0]))
    assert 0 < difference.mean() < 16
    flaxdiff.save(tmp_path / "saved", both, params)
    assert not {"tiling", "slicing", "remat", "scan_layers"} & set(
        json.loads((tmp_path / "saved/vae/config.json").read_text())
    )


def test_refuses_tiles_that_do_not_overlap_by_a_quarter():
    with pytest.raises(ValueError, match="tiling=12; use a positive multiple of 8 pixels"):
        VAE.replace(tiling=12)
    with pytest.raises(ValueError, match="side 6 do not overlap"):
        tiled(lambda x: x, 6)


# --- chunks, and what is computed again ------------------------------------------------------------------------------

X, TEXT = normal(2, 16, 16, 4), normal(2, 5, 8)


def unet(params, spec, x=X):
    return flaxdiff.apply(spec, params, x, jnp.float32([3, 500]), TEXT)


@pytest.mark.parametrize("chunking", [(32, 1), (24, 1), (1, 0)])
def test_feed_forward_in_chunks(chunking):
    """Also of a size that does not divide the tokens."""
    chunked = UNET.replace(forward_chunking=chunking)
    assert peers.relative(unet(params_of(UNET), chunked), unet(params_of(UNET), UNET)) < 1e-5


def test_a_feed_forward_in_chunks_takes_less():
    from flaxdiff.nn.feed_forward import FeedForward
    from flaxdiff.nn.layers import nnx

    def run(x, chunking):
        graph, state = nnx.split(FeedForward(32, chunking=chunking))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), nnx.to_pure_dict(state))
        return nnx.merge(graph, zeros)(x)

    x = normal(2, 1024, 32)
    whole, chunked = (working(functools.partial(run, chunking=c), x) for c in (None, (64, 1)))
    assert chunked < 0.3 * whole


def kept(loss, params) -> int:
    """Bytes that are kept for the way back, parameters aside."""
    residuals = lambda params: jax.vjp(loss, params)[1]
    bytes_of = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    return bytes_of(jax.eval_shape(residuals, params)) - bytes_of(params)


IDS = jnp.arange(512).reshape(8, 64) % 99
LOSSES = {
    "AutoencoderKL": (VAE, lambda params, spec: jnp.square(decoded(spec, X, params)).mean()),
    "CLIPTextModel": (
        CLIP,
        lambda params, spec: jnp.power(flaxdiff.apply(spec, params, IDS).last_hidden_state, 3).mean(),
    ),
    "UNet2DConditionModel": (UNET, lambda params, spec: jnp.square(unet(params, spec)).mean()),
}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_remat_keeps_less(name, scan):
    spec, loss = LOSSES[name]
    spec = spec.replace(scan_layers=scan)
    shapes = flaxdiff.abstract(spec)
    none, dots, full = (
        kept(functools.partial(loss, spec=spec.replace(remat=remat)), shapes) for remat in ("none", "dots", "full")
    )
    assert full < 0.8 * dots and dots < 0.4 * none
    with pytest.raises(ValueError, match=r"remat='half' is not known; use one of \['none', 'full', 'dots'\]"):
        kept(functools.partial(loss, spec=spec.replace(remat="half")), shapes)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_gives_the_same_gradients(remat):
    for name in ("CLIPTextModel", "UNet2DConditionModel"):
        spec, loss = LOSSES[name]
        scale = lambda tree: max(float(jnp.abs(a).max()) for a in jax.tree.leaves(tree))
        plain, again = (
            jax.jit(jax.grad(functools.partial(loss, spec=s)))(params_of(spec))
            for s in (spec, spec.replace(remat=remat))
        )
        assert scale(jax.tree.map(jnp.subtract, plain, again)) < 1e-5 * scale(plain)


def test_remat_takes_less():
    spec, loss = LOSSES["CLIPTextModel"]
    none, dots, full = (
        working(jax.grad(functools.partial(loss, spec=spec.replace(remat=remat))), params_of(spec))
        for remat in ("none", "dots", "full")
    )
    assert full < 0.9 * dots and dots < 0.6 * none


@pytest.mark.slow
def test_plan_of_a_training_step_that_computes_again():
    folder = peers.saved(peers.stable_diffusion_1)
    with jax.numpy_dtype_promotion("standard"):
        options = dict(batch=2, height=16, width=16, train=True)
        reports = [flaxdiff.plan(folder, "v5e:1x1", **options, remat=remat) for remat in ("none", "full")]
    before, after = (report.parts[0].cost.flops for report in reports)
    assert after > 1.15 * before and "remat full" in reports[1].what


# --- dtypes by path --------------------------------------------------------------------------------------------------

MIXED = [("^vae|norm", "float32"), ("", "bfloat16")]


def test_dtypes_by_path():
    folder = peers.saved(peers.stable_diffusion_1)
    pipe, params = flaxdiff.load(folder, dtype=MIXED)
    for component, own in params.items():
        for name, weight in own.items():
            wide = component == "vae" or "norm" in name
            assert weight.dtype == (jnp.float32 if wide else jnp.bfloat16), (component, name)
    assert jax.tree.map(jnp.array_equal, params, memory.cast(flaxdiff.load(folder)[1], MIXED)) == jax.tree.map(
        lambda _: True, params
    )
    images = pipe.replace(progress=False)(params, jax.random.key(0), prompt="red", num_inference_steps=1).images
    assert images[0].size == (16, 16)
    _, own = flaxdiff.AutoencoderKL.from_pretrained(f"{folder}/vae", dtype=[("^encoder", "bfloat16"), ("", None)])
    assert own["encoder.conv_in.weight"].dtype == jnp.bfloat16 and own["decoder.conv_in.weight"].dtype == jnp.float32
    with pytest.raises(ValueError, match="int32 are not supported"):
        flaxdiff.load(folder, dtype=[("norm", None), ("", "int32")])


def test_cast_of_kinds():
    lora = weights.LoRA(weights.quantize(jnp.ones((4, 4)), weights.Float8), *[jnp.ones((4, 4))] * 2, jnp.ones(()))
    cast = memory.cast({"a.weight": lora}, jnp.bfloat16)["a.weight"]
    assert cast.base.q.dtype == jnp.float8_e4m3fn and weights.dtype(cast) == cast.down.dtype == jnp.bfloat16
    dora = weights.LoRA(*[jnp.ones((4, 4))] * 3, jnp.ones(()), 2 * jnp.ones(4))
    packed = memory.quantize({"a.weight": dora})["a.weight"]
    assert weights.dense(packed) == pytest.approx(np.ones((4, 4)))  # columns of length 2


# --- 8 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.08)])
def test_quantised_networks_are_near(kind, bound):
    """Scanned layers, convolutions and all; what stays is what the rules leave."""
    for spec, run in (
        (UNET, unet),
        (CLIP, lambda p, spec: flaxdiff.apply(spec, p, jnp.arange(9)[None]).last_hidden_state),
    ):
        params = params_of(spec)
        small = flaxdiff.quantize(params, kind)
        error = peers.relative(run(small, spec), run(params, spec))
        assert 0 < error < bound
        dense = {name: weights.dense(weight) for name, weight in small.items()}
        assert peers.relative(run(small, spec), run(dense, spec)) < 1e-4
        for name, weight in small.items():
            layer = name.endswith("weight") and "norm" not in name and "embedding" not in name
            assert isinstance(weight, weights.Quantized) == (layer and "conv_in" not in name and "conv_out" not in name)
    assert sum(
        isinstance(w, memory.KINDS[kind]) and w.q.ndim == 4 for w in flaxdiff.quantize(params_of(UNET), kind).values()
    )


def test_rules_of_kinds():
    rules = [("attn", "fp8"), (r"ff\.", "int8"), ("^time", "int8"), ("", None)]
    kinds = {name: type(weight).__name__ for name, weight in flaxdiff.quantize(params_of(UNET), rules).items()}
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert kinds[f"{block}.attn1.to_q.weight"] == "Float8" and kinds[f"{block}.ff.net.2.weight"] == "Int8"
    assert kinds["time_embedding.linear_1.weight"] == "Int8" and "8" not in kinds[f"{block}.ff.net.2.bias"]
    assert "8" not in kinds["mid_block.resnets.0.conv1.weight"] + kinds[f"{block}.norm1.weight"]
    with pytest.raises(ValueError, match=r"'int4' is not known; use one of \['int8', 'fp8', None\]"):
        flaxdiff.quantize(params_of(UNET), "int4")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_extreme_weights(kind):
    """A channel of zeros, one far from the others, numbers near the limits of bfloat16's exponent."""
    w = jnp.array([[0, 1e30, 3e-30], [0, -7e29, 1e-30]], jnp.bfloat16)
    size = jnp.array([1, 1e30, 3e-30], jnp.bfloat16)
    assert peers.relative(weights.dense(weights.quantize(w, memory.KINDS[kind])) / size, w / size) < 0.04


def test_quantised_weights_on_many_devices(tmp_path):
    """Scales lie with the outputs that they belong to; saved, they are the array that they stand for."""
    small = flaxdiff.quantize(params_of(CLIP))
    mesh = parallel.make_mesh({"fsdp": 2, "tensor": 4})
    spread = parallel.distribute(small, mesh)
    layer = "text_model.encoder.layers"
    first, second = (spread[f"{layer}.{name}.weight"] for name in ("mlp.fc1", "mlp.fc2"))
    assert first.q.sharding.spec == PartitionSpec(None, "fsdp", "tensor") and first.scale.sharding.spec[1] == "tensor"
    assert second.q.sharding.spec[1] == "tensor" and second.scale.sharding.is_fully_replicated
    run = jax.jit(lambda params: flaxdiff.apply(CLIP, params, jnp.arange(9)[None]).last_hidden_state)
    assert peers.relative(run(spread), run(small)) < 1e-5
    flaxdiff.save(tmp_path, CLIP, spread)
    _, loaded = flaxdiff.CLIPTextModel.from_pretrained(tmp_path)
    assert all((loaded[name] == weights.dense(weight)).all() for name, weight in small.items())


@functools.cache
def v5e():
    return parallel.make_mesh(devices=chips.describe("v5e:1x1").devices)


def laid_on_v5e(tree, kind="device"):
    """Shapes on a chip, or in its host's memory, those that do not lie there yet."""
    lies = NamedSharding(v5e(), PartitionSpec(), memory_kind=kind)
    return jax.tree.map(lambda a: a if a.sharding else a.update(sharding=lies), tree)


def compiled_for_v5e(function, first, *others, kind="device"):
    args = laid_on_v5e(first, kind), *laid_on_v5e(others)
    with plan.unkept():
        return jax.jit(function).lower(*args).compile()


LAYERS, WIDTH = 8, 1024
STACK, BATCH = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((LAYERS, WIDTH, WIDTH), (64, WIDTH)))
through = lambda layers, x: jax.lax.scan(
    lambda x, w: (jnp.tanh(weights.dot(x, weights.moved(w, DEVICE))), None), x, layers
)[0]
often = lambda layers, x: jax.lax.fori_loop(0, 9, lambda _, x: through(layers, x), x)


@pytest.mark.parametrize("kind", memory.KINDS)
def test_eight_bits_stay_eight_bits_on_a_tpu(kind):
    """No wider copy of more than a layer, in a loop of scans as sampling is."""
    layers = jax.eval_shape(functools.partial(weights.quantize, kind=memory.KINDS[kind]), STACK)
    made = compiled_for_v5e(often, layers, BATCH)
    said = made.memory_analysis()
    assert said.argument_size_in_bytes < 1.1 * STACK.size and said.temp_size_in_bytes < 2 * 2 * WIDTH**2
    assert f"bf16[{LAYERS},{WIDTH},{WIDTH}]" not in made.as_text()


# --- on the host -----------------------------------------------------------------------------------------------------


def where(tree):
    return {jax.typeof(a).memory_space for a in jax.tree.leaves(tree)}


def test_layers_on_the_host_come_one_at_a_time_on_a_tpu():
    said = compiled_for_v5e(often, STACK, BATCH, kind="pinned_host").memory_analysis()
    assert said.host_argument_size_in_bytes == 2 * STACK.size
    assert said.argument_size_in_bytes == 2 * BATCH.size and said.temp_size_in_bytes < 4 * 2 * WIDTH**2


@pytest.mark.parametrize("kind", [None, *memory.KINDS])
def test_a_model_on_the_host_on_a_tpu(kind):
    """What `offload` moves is what a TPU can fetch from scanned layers; and 8 bits compile in a real model."""
    spec = CLIP.replace(hidden_size=256, intermediate_size=512)
    shapes = flaxdiff.abstract(spec, jnp.bfloat16)
    shapes = jax.eval_shape(functools.partial(flaxdiff.quantize, rules=kind), shapes) if kind else shapes
    host = flaxdiff.offload(laid_on_v5e(shapes))
    run = lambda params, ids: flaxdiff.apply(spec, params, ids).last_hidden_state
    ids = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    before, after = (compiled_for_v5e(run, params, ids).memory_analysis() for params in (laid_on_v5e(shapes), host))
    assert after.argument_size_in_bytes < 0.1 * before.argument_size_in_bytes < 0.2 * after.host_argument_size_in_bytes


def test_weights_on_the_host():
    """Scanned, quantised or sharded; gradients too."""
    params = flaxdiff.quantize(params_of(CLIP), [("mlp", "int8"), ("", None)])
    loss = lambda params: jnp.power(flaxdiff.apply(CLIP, params, jnp.arange(9)[None]).last_hidden_state, 3).mean()
    mesh = parallel.make_mesh({"fsdp": 8})
    for own in (params, parallel.distribute(params, mesh)):
        host = flaxdiff.offload(own, [("layers", "host"), ("", None)])
        moved = {name for name, weight in host.items() if where(weight) != {DEVICE}}
        assert moved == {name for name in own if "layers" in name and name.endswith("weight") and "norm" not in name}
        assert where(own) == {DEVICE}
        assert jax.jit(loss)(host) == pytest.approx(float(jax.jit(loss)(own)), rel=1e-5)
        same = lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert jax.tree.all(jax.tree.map(same, flaxdiff.offload(host, "device"), own))
    name = "text_model.encoder.layers.self_attn.q_proj.weight"
    gradient = jax.grad(lambda w, params: loss(params | {name: w}))
    assert peers.relative(gradient(host[name], host), gradient(params[name], params)) < 1e-5
    with pytest.raises(ValueError, match=r"'disk' is not known; use one of \['device', 'host', None\]"):
        flaxdiff.offload(params, "disk")


def test_components_on_the_host():
    """What stays and what comes for its stage, and the same picture."""
    pipe, params = flaxdiff.load(peers.saved(peers.stable_diffusion_xl))
    size = {name: sum(a.nbytes for a in jax.tree.leaves(own)) for name, own in params.items()}
    text = size["text_encoder"] + size["text_encoder_2"]
    stays = lambda budget: {k for k, v in flaxdiff.residency(pipe, params, budget).items() if v == "device"}
    assert stays(sum(size.values())) == set(size)
    assert stays(size["unet"]) == set()  # the largest: no room for anything beside it
    assert stays(size["unet"] + max(text, size["vae"])) == {"unet"}
    with pytest.raises(ValueError, match=f"take {size['unet']:,} bytes, the budget is 1,000; quantize"):
        flaxdiff.residency(pipe, params, 1000)

    host = flaxdiff.offload(params, dict.fromkeys(params, "host") | {"vae": "device"})
    on_device = {
        name: sum(a.nbytes for a in jax.tree.leaves(own) if where(a) == {DEVICE}) for name, own in host.items()
    }
    assert on_device["unet"] < 0.1 * size["unet"] and on_device["vae"] == size["vae"]
    draw = lambda params: (
        pipe.replace(progress=False)(
            params, jax.random.key(0), prompt="red", num_inference_steps=2, output_type="np"
        ).images
    )
    there = draw(params)
    assert peers.relative(draw(host), there) < 1e-5
    pipe.compile(host, num_inference_steps=2)  # ahead of time, as a call moves them
    assert peers.relative(draw(host), there) < 1e-5
