"""Planning with the real TPU compiler: figures that can be checked by hand, presets of meshes, what it refuses."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import flaxdiff
from flaxdiff import cli, parallel, weights
from flaxdiff.core import abstract, apply
from flaxdiff.planning import chips, hlo
from flaxdiff.planning.plan import Program, advised, compiled, pipeline, unkept, weight
from flaxdiff.planning.report import Part, Report
from flaxdiff.published import COMPONENTS

NETWORKS = {
    "unet": (
        flaxdiff.UNet2DConditionModel,
        dict(
            block_out_channels=[32],
            down_block_types=["CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D"],
            attention_head_dim=4,
            cross_attention_dim=16,
            norm_num_groups=8,
            layers_per_block=1,
            sample_size=16,
        ),
    ),
    "vae": (flaxdiff.AutoencoderKL, dict(block_out_channels=[32], norm_num_groups=8, layers_per_block=1)),
    "text_encoder": (
        flaxdiff.CLIPTextModel,
        dict(
            vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16,
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of configurations alone."""
    root = tmp_path_factory.mktemp("tiny")
    index = {name: ["diffusers", cls.__name__] for name, (cls, _) in NETWORKS.items()}
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))
    for name, (_, config) in NETWORKS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def sampled(folder):
    return flaxdiff.plan(folder, "v5e:2x4", preset="fsdp", batch=8, steps=7)


# --- what a plan says ------------------------------------------------------------------------------------------------


def test_sampling(sampled, folder):
    """Three programs, every figure is there, and a chip holds an eighth of the weights."""
    assert [(part.name, part.times) for part in sampled.parts] == [("encode", 1), ("step", 7), ("decode", 1)]
    assert sampled.fits and sampled.mesh == {"fsdp": 8} and sampled.chips == 8 and not sampled.advice
    whole = sum(2 * a.size for _, spec in pipeline(folder).specs for a in flaxdiff.abstract(spec).values())
    assert whole / 8 <= sampled.weights <= 1.2 * whole / 8
    for part in sampled.parts:
        assert sampled.weights <= part.memory.arguments <= part.peak < 64e6
        assert part.cost.flops > 0 and part.cost.cycles > 0 and part.cost.unknown_loops == 0
        assert part.cost.cycles == pytest.approx(sum(part.cost.layers.values()))
    step = sampled.parts[1].cost
    assert {"all-gather", "all-reduce"} & set(step.collectives)
    assert {"Attention › Linear", "ResnetBlock2D › Conv"} <= set(step.layers)
    # both branches of the guidance: the largest convolution alone, twice
    assert step.flops > 2 * 2 * 16 * 16 * 9 * 64 * 32


def test_table_and_json(sampled):
    text, data = str(sampled), json.loads(json.dumps(sampled.to_json()))
    for words in ("step × 7", "of 17.2 GB", "MFU at most", "FLOP per byte", "transfers, step", "It fits: ", "an image"):
        assert words in text
    step = data["parts"][1]
    assert data["fits"] and step["times"] == 7 and step["peak"] == sum(step["memory"].values())
    limits = step["roofline"]
    assert limits["seconds"] == max(limits["arithmetic"], limits["memory"], limits["links"])
    assert limits["mfu"] == pytest.approx(step["cost"]["flops"] / 197e12 / limits["seconds"])
    whole = sum(part["times"] * part["roofline"]["seconds"] for part in data["parts"])
    assert data["seconds"] == pytest.approx(whole) and data["seconds_per_image"] == pytest.approx(whole / 8)


@pytest.mark.slow
def test_training_by_command(folder, capsys):
    """Parameters, two moments and the average in float32, divided; the new state takes the place of the old."""
    given = [
        "--model",
        str(folder),
        "--topology",
        "v5e:2x4",
        "--preset",
        "fsdp+tp=2",
        "--batch",
        "8",
        "--train",
        "--json",
    ]
    with jax.numpy_dtype_promotion("standard"):  # Adam of optax raises a number to an integer array
        assert cli.main(["plan", *given]) == 0
    data = json.loads(capsys.readouterr().out)
    (part,) = data["parts"]
    assert part["name"] == "training step" and data["fits"] and data["mesh"] == {"fsdp": 4, "tensor": 2}
    spec = dict(pipeline(folder).specs)["unet"]
    count = sum(a.size for a in flaxdiff.abstract(spec).values())
    assert 16 * count / 8 < data["weights"] < 16 * count / 3
    assert part["memory"]["outputs"] < 0.1 * part["memory"]["arguments"]
    layers = part["cost"]["layers"]
    backward = sum(cycles for layer, cycles in layers.items() if layer.endswith("(backward)"))
    assert 0.2 < backward / part["cost"]["cycles"] < 1


# --- reading a program -----------------------------------------------------------------------------------------------


def costs(function, *shapes, split=(), out=(), topology="v5e:1x2"):
    """What a function costs one chip, its arguments along the axis "x" as `split` says, its result as `out`."""
    devices = chips.describe(topology).devices
    mesh = parallel.make_mesh({"x": len(devices)}, devices)
    places = [NamedSharding(mesh, spec) for spec in [*split, *[PartitionSpec()] * (len(shapes) - len(split))]]
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape, place in zip(shapes, places)]
    with unkept():
        made = jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec(*out))).lower(*args).compile()
    return hlo.Program(made.as_text()).cost(), made.cost_analysis()


def test_arithmetic_and_loops():
    """Products as counted by hand, convolutions as by XLA, both in a loop as often as it turns."""
    ours, xla = costs(lambda a, b: a @ b, (256, 512), (512, 384))
    assert ours.flops == 2 * 256 * 512 * 384
    conv = lambda x, w: jax.lax.conv(x, w, (2, 2), "SAME")
    ours, xla = costs(conv, (2, 128, 16, 16), (256, 128, 3, 3))
    assert ours.flops == pytest.approx(xla["flops"], rel=0.02)  # XLA adds what is no product
    assert ours.flops >= 2 * 2 * (3 * 8 - 1) ** 2 * 128 * 256  # windows at one edge of each side reach into the padding

    body = lambda x, w: (jnp.tanh(x @ w), None)
    looped, xla = costs(lambda x, ws: jax.lax.scan(body, x, ws)[0], (256, 512), (24, 512, 512))
    assert looped.flops == 24 * 2 * 256 * 512 * 512 > 2 * xla["flops"] and looped.unknown_loops == 0
    # every weight is read once; that the loop reads them from one array of all layers costs nothing more
    assert 24 * 512 * 512 * 2 <= looped.bytes < 1.5 * 24 * 512 * 512 * 2

    until = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 100, lambda x: x @ x, x)
    assert costs(until, (256, 256))[0].unknown_loops == 1


def test_kernels():
    """Attention's kernels count by their products, forward and backward; others by what they say, or are reported."""
    from jax.experimental import pallas as pl

    from flaxdiff.nn import flash

    run = lambda function, *shapes: costs(function, *shapes, topology="v5e:1x1")[0]
    heads = [(2, 256, 3, 64), (2, 384, 3, 64), (2, 384, 3, 64)]
    product = 2 * 2 * 3 * 256 * 384 * 64
    forward = run(flash.attention, *heads)
    assert forward.flops == forward.kernel_flops == 2 * product and forward.unknown_kernels == 0
    # heads move to the front and back, each number read once and written once
    assert forward.kernel_bytes == 2 * 2 * 2 * 3 * 64 * (256 + 384 + 384 + 256)
    loss = lambda *qkv: flash.attention(*qkv).astype(jnp.float32).sum()
    assert run(jax.grad(loss, (0, 1, 2)), *heads).kernel_flops == (2 + 3 + 4) * product

    def double(x, told):
        write = lambda source, target: target.__setitem__(Ellipsis, source[...] * 2)
        return pl.pallas_call(write, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=told)(x)

    told = pl.CostEstimate(flops=123, bytes_accessed=4, transcendentals=5)
    spoken = run(lambda x: double(x, told), (256, 256))
    assert (spoken.kernel_flops, spoken.kernel_bytes) == (123, 4)
    silent = run(lambda x: double(x, None), (256, 256))
    assert silent.kernel_flops == 0 and silent.unknown_kernels == 1


@pytest.mark.parametrize("layer", ["Attention", "JointAttention", "JointAttention, turned"])
def test_heads_move_by_kernels_alone(layer):
    """XLA copies nothing as large as the tokens between the products and attention; it would take twice the time."""
    from flax import nnx

    from flaxdiff.nn.attention import Attention
    from flaxdiff.nn.joint import JointAttention

    one = chips.describe("v5e:1x1").devices[0]
    place = jax.sharding.SingleDeviceSharding(one)
    on = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    x, text, table = on(2, 2048, 256), on(2, 80, 256), on(2128, 128, dtype=jnp.float32)
    made, inputs = {
        "Attention": (lambda: Attention(256, 4, 64), [x]),
        "JointAttention": (lambda: JointAttention(256, 4, 64), [x, text]),
        "JointAttention, turned": (lambda: JointAttention(256, 2, 128), [x, text, (table, table)]),
    }[layer]
    graph, state = nnx.split(nnx.eval_shape(made))
    state = jax.tree.map(lambda a: on(*a.shape), state)
    with unkept():
        compiled = jax.jit(lambda state, *args: nnx.merge(graph, state)(*args)).lower(state, *inputs).compile()
    moves = [i for rows in hlo.Program(compiled.as_text()).computations.values() for i in rows if i.op == "copy"]
    assert not [i.name for i in moves if i.arrays[0].bytes >= 2 * 2048 * 256 * 2]


@pytest.mark.parametrize("tokens,heads,channels", [(1024, 20, 64), (4096, 10, 64), (4096, 2, 128), (16384, 1, 512)])
def test_attention_takes_little_fast_memory(tokens, heads, channels):
    """The kernel fits where fused operations are told to do with 6 MB, see docs/cold_start.md."""
    from flaxdiff.nn import flash

    place = jax.sharding.SingleDeviceSharding(chips.describe("v5e:1x1").devices[0])
    x = jax.ShapeDtypeStruct((2, tokens, heads, channels), jnp.bfloat16, sharding=place)
    with unkept():
        made = jax.jit(flash.attention).lower(x, x, x)
        assert "tpu_custom_call" in made.compile({"xla_tpu_scoped_vmem_limit_kib": "6144"}).as_text()


@pytest.mark.parametrize("preset", ["fsdp+tp=2", "cp"])
def test_kernels_on_several_chips(preset):
    """The compiler refuses kernels that it would have to split: each chip runs them on its own pictures and heads."""
    from flaxdiff.core import attention_backend, setting_of
    from flaxdiff.nn import rope
    from flaxdiff.nn.attention import attention

    mesh = parallel.make_mesh(preset, chips.describe("v5e:2x2").devices)

    def loss(x, weight, cos, sin):
        turned = rope.normalised(x, weight, (cos, sin))
        with setting_of(attention_backend, "flash"):
            return attention(turned, turned, x).astype(jnp.float32).sum()

    on = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    table = on((512, 128), jnp.float32)
    arrays = on((2, 512, 2, 128), jnp.bfloat16), on((128,), jnp.bfloat16), table, table
    with jax.set_mesh(mesh), unkept():
        made = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()
    assert made.as_text().count("tpu_custom_call") >= 3


def test_no_weights_are_copied_for_heads():
    """A product that puts heads in front of tokens would first copy its weights, those of several layers."""
    config = dict(d_model=4096, num_heads=64, d_ff=512, num_layers=4, feed_forward_proj="gated-gelu")
    spec = flaxdiff.T5EncoderModel.from_config(config)
    place = jax.sharding.SingleDeviceSharding(chips.describe("v6e:1x1").devices[0])
    on = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    params = {name: on(a.shape, jnp.bfloat16) for name, a in abstract(spec).items()}
    text = on((1, 300), jnp.int32), on((1, 300), jnp.bool_)
    with unkept():
        made = jax.jit(lambda *args: apply(spec, *args)).lower(params, *text).compile()
    assert made.memory_analysis().temp_size_in_bytes < 4096**2 * 2  # one of them


@pytest.mark.parametrize("preset, kernels", [("dp", True), ("cp", False), ("tp", False)])
def test_large_pictures_on_several_chips(preset, kernels):
    """Each chip convolves its own pictures by a kernel; where rows or channels are split, XLA does."""
    mesh = parallel.make_mesh(preset, chips.describe("v5e:2x2").devices)
    loss = lambda x, w: weights.conv(x, w, padding=((1, 1), (1, 1))).astype(jnp.float32).sum()
    on = lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh), unkept():
        made = jax.jit(jax.value_and_grad(loss)).lower(on((4, 512, 512, 128)), on((3, 3, 128, 128))).compile()
    assert ("tpu_custom_call" in made.as_text()) == kernels


def test_products_of_a_convolution_are_added_one_by_one():
    """Of a large picture's nine products, 42 MB each, a TPU keeps a sum, not all until the end."""
    place = jax.sharding.SingleDeviceSharding(chips.describe("v5e:1x1").devices[0])
    on = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    run = lambda x, w: jax.nn.silu(weights.conv(jax.nn.silu(x), w, padding=((1, 1), (1, 1))))
    with unkept():
        made = jax.jit(run).lower(on(2, 128, 128, 640), on(3, 3, 640, 320)).compile()
    assert "tpu_custom_call" not in made.as_text()  # its 320 channels would be filled up to 384
    assert made.memory_analysis().temp_size_in_bytes < 2.5 * 2 * 128 * 128 * 320 * 4


def test_collectives():
    """A product summed over a split side is one reduction of its result, split or not; a split weight is gathered."""
    product = lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.float32)
    ours, _ = costs(product, (256, 512), (512, 384), split=[PartitionSpec(None, "x"), PartitionSpec("x")])
    assert ours.collectives == {"all-reduce": [1, 256 * 384 * 4]}
    assert ours.flops == 2 * 256 * 512 * 384 / 2
    ours, _ = costs(product, (256, 512), (512, 384), split=[PartitionSpec(None, "x"), PartitionSpec("x")], out=["x"])
    assert ours.collectives == {"reduce-scatter": [1, 256 * 384 * 4]}
    ours, _ = costs(lambda w: w + 1, (512, 384), split=[PartitionSpec("x")])
    assert ours.collectives == {"all-gather": [1, 512 * 384 * 2]}


# --- presets and rules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "devices", "shape"),
    [
        ("dp", 8, {"data": 8}),
        ("fsdp", 256, {"fsdp": 256}),
        ("tp", 4, {"tensor": 4}),
        ("dp+fsdp", 8, {"data": 2, "fsdp": 4}),
        ("dp+fsdp", 256, {"data": 16, "fsdp": 16}),
        ("fsdp+tp=2", 6, {"fsdp": 3, "tensor": 2}),
        ("dp=2+fsdp+tp=2", 4, {"data": 2, "fsdp": 1, "tensor": 2}),
        ("dp+fsdp", 7, {"data": 1, "fsdp": 7}),
    ],
)
def test_preset(text, devices, shape):
    assert parallel.preset(text, devices) == shape
    assert list(parallel.preset(text, devices)) == list(shape)


def abstract_mesh(**axes):
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_model_splits(name):
    """Over eight devices each holds an eighth of the weights, to 5 %; rules by layer find their layers."""
    kind, config = COMPONENTS[name]
    params = flaxdiff.abstract(getattr(flaxdiff, kind).from_config(config))
    whole = sum(4 * a.size for a in params.values())
    assert weight(params, abstract_mesh(fsdp=8)) <= 1.05 * whole / 8
    assert weight(params, abstract_mesh(data=8)) == whole
    if kind != "AutoencoderKL":
        assert weight(params, abstract_mesh(tensor=4)) < 0.55 * whole
        assert weight(params, abstract_mesh(fsdp=2, tensor=4)) <= (1 / 8 + 0.1) * whole


def test_pairs_of_layers():
    """What the first of two layers splits on its way out, the second splits on its way in."""
    mesh, spec = abstract_mesh(tensor=2), flaxdiff.UNet2DConditionModel.from_config(NETWORKS["unet"][1])
    block = "mid_block.attentions.0.transformer_blocks.0"
    axes = {
        name: parallel.first_match(parallel.RULES, name)(a.shape, mesh) for name, a in flaxdiff.abstract(spec).items()
    }
    for name, spec in {
        f"{block}.attn1.to_q.weight": (None, "tensor"),
        f"{block}.attn2.to_out.0.weight": ("tensor", None),
        f"{block}.attn2.to_out.0.bias": (),
        f"{block}.ff.net.0.proj.weight": (None, "tensor"),
        f"{block}.ff.net.0.proj.bias": ("tensor",),
        f"{block}.ff.net.2.weight": ("tensor", None),
        "mid_block.resnets.0.conv1.weight": (None, None, None, "tensor"),
        "mid_block.resnets.0.conv2.weight": (None, None, "tensor", None),
        f"{block}.norm1.weight": (),
    }.items():
        assert axes[name] == PartitionSpec(*spec), name


def test_what_does_not_divide_is_copied_and_noted():
    mesh = abstract_mesh(tensor=3)
    params = {
        "attn1.to_q.weight": jax.ShapeDtypeStruct((8, 8), jnp.float32),
        "attn1.to_k.weight": jax.ShapeDtypeStruct((8, 9), jnp.float32),
    }
    assert parallel.unmet(params, mesh) == {"tensor": ["attn1.to_q.weight"]}
    assert weight(params, mesh) == 4 * (64 + 24)


# --- what it refuses, and what it advises ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--topology": "v5x:2x4"}, "no chip is called 'v5x'; did you mean v"),
        ({"--topology": "v5e"}, "a slice of v5e has 2 sides; write it as v5e:2x4"),
        ({"--topology": "v5p:2x4"}, "a slice of v5p has 3 sides; write it as v5p:2x2x1"),
        ({"--topology": "v5e:32x32"}, "has 1024 chips; a pod of v5e has 256"),
        ({"--preset": "fsdp=3"}, "Preset 'fsdp=3' needs 3 devices or a multiple, of 8 that there are"),
        ({"--preset": "fsdp=4"}, "Preset 'fsdp=4' needs 4 devices"),
        ({"--preset": "dp=16+fsdp"}, "Preset 'dp=16+fsdp' needs 16 devices"),
        ({"--preset": "zero"}, "'zero' is not known. Join dp, fsdp, tp, cp by +"),
        ({"--preset": "fsdp+fsdp"}, "each once"),
        ({"--batch": "12"}, "A batch of 12 does not divide among 8 parts (mesh of fsdp 8); use a multiple of 8"),
        ({"--batch": "0"}, "use a multiple of 8"),
        ({"--model": "sdxxl"}, "no model or folder 'sdxxl'; did you mean sdxl?"),
        ({"--dtype": "float16"}, "use one of bfloat16, float32"),
        ({"--height": "100", "--model": "sdxl"}, "needs positive multiples of 8"),
        ({"--steps": "0"}, "num_inference_steps=0"),
        ({"--steps": "3", "--train": None}, "leave it out to plan a training step"),
    ],
)  # fmt: skip
def test_refuses(options, message, capsys):
    given = {"--topology": "v5e:2x4"} | options
    assert cli.main(["plan", *(word for pair in given.items() for word in pair if word is not None)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("flaxdiff: ")


def test_refuses_a_folder_that_lacks_a_configuration(folder, tmp_path):
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    with pytest.raises(ValueError, match="has no .*/config.json; add it"):
        flaxdiff.plan(tmp_path, "v5e:2x4")


def test_without_libtpu(monkeypatch, capsys):
    """As where the package is missing: Python finds nothing under its name."""
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert cli.main(["plan", "--topology", "v5e:2x4"]) == 1
    error = capsys.readouterr().err
    assert "libtpu is not installed: pip install '.[tpu]'" in error and error.count("\n") == 1


def test_what_does_not_fit():
    """The compiler gives up on 20 GB in a chip of 16 GiB; the plan says so, and what would fit."""
    mesh = parallel.make_mesh({"data": 2}, chips.describe("v5e:1x2").devices)
    lies = NamedSharding(mesh, PartitionSpec())
    state = {"w.weight": jax.ShapeDtypeStruct((4, 1 << 20, 1280), jnp.float32, sharding=lies)}
    part = compiled(Program("step", 3, lambda p: p["w.weight"].sum(0), (state,), lies))
    assert part.memory is None and part.cost is None and part.needed > 4 * 4 * 1280 << 20
    report = Report("a run", chips.CHIPS["v5e"], 2, 2, {"data": 2}, 2, weight(state, mesh), (part,))
    assert not report.fits and report.seconds() is None
    assert advised(report, state, 2).advice[0].startswith("--preset fsdp: about ")
    text = str(advised(report, state, 2))
    assert "It does not fit: step needs" in text and "of 17.2 GB" in text and "nan" not in text
    json.dumps(report.to_json())


@pytest.mark.parametrize(
    ("weights", "working", "batch", "advice"),
    [
        (1e9, 40e9, 8, "--batch 3: about 16"),
        (15e9, 6e9, 1, "A larger slice: with --preset fsdp and one picture a device, from 2 devices"),
        (1e9, 40e9, 1, "Smaller pictures, or a chip with more memory: one picture works in 40 GB"),
    ],
)
def test_advice(weights, working, batch, advice):
    state = {"w.weight": jax.ShapeDtypeStruct((int(weights),), jnp.int8)}
    part = Part("step", 1, None, None, 0.0, int(weights + working))
    report = Report("a run", chips.CHIPS["v5e"], 1, 1, {"data": 1}, batch, int(weights), (part,))
    assert advised(report, state, 1).advice[-1].startswith(advice)


def test_planning_leaves_the_environment_alone():
    """What keeps libtpu off the machine's own TPUs does not outlast the description of a slice."""
    code = "import os; before = dict(os.environ); from flaxdiff.planning import chips; chips.describe('v5e:2x2')"
    code += "; print({k: v for k, v in os.environ.items() if before.get(k) != v and k.startswith(('TPU', 'ALLOW'))})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "{}", done.stderr
