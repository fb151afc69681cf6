"""Many devices: what is split, what travels between devices, and that the numbers are those of one device."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pyarrow
import pyarrow.parquet
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

import flaxdiff
from flaxdiff import parallel
from flaxdiff.checkpoint import convert, files, safetensors, tensors
from flaxdiff.core import Leaf
from flaxdiff.nn import context
from flaxdiff.nn.attention import attention
from flaxdiff.planning import chips, hlo
from flaxdiff.planning.plan import laid, unkept
from flaxdiff.training import run
from flaxdiff.training.config import override, read

KEY = jax.random.key(0)


def mesh_of(devices=None, **axes):
    return parallel.make_mesh(axes, (devices or jax.devices())[: int(np.prod(list(axes.values())))])


def lowered(function, *args, mesh):
    """A function compiled with the mesh in context, and what it costs one device."""
    with jax.set_mesh(mesh), unkept():
        made = jax.jit(function).lower(*args).compile()
    return made, hlo.Program(made.as_text()).cost()


def close(ours, wanted, atol):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


# --- what is split ---------------------------------------------------------------------------------------------------


def test_wishes():
    """First come first served; what is missing, taken or does not divide is passed over; without a mesh, nothing."""
    x = jnp.zeros((4, 8, 6))
    assert parallel.constrain(x, "batch", "rest") is x
    with jax.set_mesh(mesh_of(data=2, context=2, tensor=2)):
        assert parallel.splits((4, 8), ("batch", "context")) == (("data",), ("context",))
        assert parallel.splits((3, 8, 6), ("batch", "rest", "tensor")) == ((), ("context",), ("tensor",))
        assert parallel.splits((8, 8), (None, "fsdp")) == ((), ())
        laid = jax.jit(lambda x: parallel.constrain(2 * x, "batch", "context", "tensor"))(x)
        assert laid.sharding.spec == PartitionSpec("data", "context", "tensor")
        inside = lambda x: parallel.constrain(x, "batch", "rest") + 1  # whose axes are the function's own affair
        whole = PartitionSpec("data", "context", "tensor")
        close(jax.jit(jax.shard_map(inside, in_specs=whole, out_specs=whole))(x), x + 1, 0)
    with jax.set_mesh(mesh_of(data=2, fsdp=2, context=2)):
        assert parallel.splits((4, 8), ("batch", "rest")) == (("data", "fsdp"), ("context",))
        assert parallel.splits((2, 8), ("batch", "rest")) == (("data",), ("fsdp", "context"))
        assert parallel.splits((3, 6), ("batch", "rest")) == ((), ("data",))


def test_presets_with_context():
    assert parallel.preset("fsdp+cp=4", 8) == {"fsdp": 2, "context": 4}
    assert parallel.preset("cp", 8) == {"context": 8}
    mesh = mesh_of(fsdp=2, context=2, tensor=2)
    assert parallel.batch_axes(mesh) == ("fsdp",)
    assert flaxdiff.shard({"ids": np.zeros((2, 7))}, mesh)["ids"].sharding.spec == PartitionSpec(("fsdp",))


def test_what_stays_whole_is_told_once(caplog):
    params = {"to_q.weight": jnp.zeros((7, 5)), "to_k.weight": jnp.zeros((7, 11))}
    parallel.tell.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            placed = parallel.distribute(params, mesh_of(fsdp=4))
    assert [r.getMessage() for r in caplog.records] == [
        "4 divides no side of these, not split over fsdp: 2, e.g. to_k.weight."
    ]
    assert all(a.sharding.is_fully_replicated for a in placed.values())


# --- attention -------------------------------------------------------------------------------------------------------

BIAS = np.random.default_rng(1).standard_normal((2, 1, 128, 128)).astype(np.float32)


@pytest.mark.parametrize(
    ("keys", "long", "options", "split"),
    [
        (128, 128, {}, True),
        (128, 127, {}, True),  # around the ring
        (126, 4, {}, True),  # keys that do not divide stay whole
        (128, 4, {"bias": BIAS}, True),
        (128, 4, {"mask": BIAS[:1, :, :1] > 0}, True),
        (128, 4, {"causal": True}, False),
    ],
    ids=["gathered", "ring", "text", "bias", "mask", "causal"],
)
def test_attention_over_tokens_on_several_devices(monkeypatch, keys, long, options, split):
    """Values and gradients as on one device, whatever goes around."""
    monkeypatch.setattr(context, "LONG", long)
    monkeypatch.setattr(context, "KEYS", 12)  # does not divide a device's part
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 2, 16)), jnp.float32) for n in (128, keys, keys))
    run = lambda q, k, v: attention(q, k, v, **options)
    both = lambda *qkv: (run(*qkv), jax.grad(lambda *qkv: (run(*qkv) ** 2).sum(), (0, 1, 2))(*qkv))
    wanted, mesh = jax.jit(both)(q, k, v), mesh_of(data=2, context=4)
    made, cost = lowered(run, q, k, v, mesh=mesh)
    with jax.set_mesh(mesh):
        close(jax.jit(both)(q, k, v), wanted, 4e-6)
        batches = jax.vmap(run)(*(jnp.stack([a, -a]) for a in (q, k, v)))
    close(batches, jnp.stack([run(q, k, v), run(-q, -k, -v)]), 4e-6)
    assert made.output_shardings.spec == PartitionSpec("data", *["context"] * split)
    # keys and values go to the next of four devices three times
    assert cost.collectives == ({"collective-permute": [6, 3 * 2 * q.nbytes / 8]} if long == 127 else {})


def test_ring_holds_no_more_than_a_part():
    """On a TPU: a sixteenth of the keys at a time, forth and back, and no gathering."""
    mesh = mesh_of(chips.describe("v5e:4x4").devices, context=16)
    split = NamedSharding(mesh, PartitionSpec(None, "context"))
    x = jax.ShapeDtypeStruct((1, 2 * context.LONG, 2, 64), jnp.bfloat16, sharding=split)
    loss = lambda *qkv: attention(*qkv).astype(jnp.float32).sum()
    made, cost = lowered(jax.grad(loss, (0, 1, 2)), x, x, x, mesh=mesh)
    assert set(cost.collectives) == {"collective-permute"}
    part = 2 * context.LONG // 16 * 2 * 64 * 4  # bytes of float32
    assert made.memory_analysis().temp_size_in_bytes < 16 * part


def test_kernels_run_on_each_device():
    """On a TPU Pallas kernels take a device's own pictures, heads and queries, and all keys: four move the heads."""
    mesh = mesh_of(chips.describe("v5e:2x4").devices, data=2, context=2, tensor=2)
    split = NamedSharding(mesh, PartitionSpec("data", "context", "tensor"))
    x = jax.ShapeDtypeStruct((2, 4096, 4, 64), jnp.bfloat16, sharding=split)
    made, cost = lowered(attention, x, x, x, mesh=mesh)
    assert made.as_text().count("tpu_custom_call") == 5 and cost.kernel_flops == 2 * 2 * 2048 * 4096 * 64 * 2
    assert cost.collectives == {"all-gather": [2, 2 * 4096 * 2 * 64 * 2]}


# --- networks --------------------------------------------------------------------------------------------------------

UNET = flaxdiff.UNet2DConditionModel.from_config(
    dict(
        block_out_channels=[32, 64],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
        layers_per_block=1,
    )
)
VAE = flaxdiff.AutoencoderKL.from_config(
    dict(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=8,
    )
)


def decode(params, z):
    return flaxdiff.apply(VAE, params, z, method="decode")


def test_rows_of_pictures_on_several_devices():
    """A UNet whose tokens are split: halos and the keys of self-attention travel, whole activations do not."""
    params, rng = flaxdiff.init(UNET, KEY), np.random.default_rng(0)
    x, text = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 16, 16, 4), (2, 7, 16)))
    run = lambda params, x, text: flaxdiff.apply(UNET, params, x, 7, text)
    wanted, mesh = jax.jit(run)(params, x, text), mesh_of(data=2, context=4)
    made, cost = lowered(run, params, x, text, mesh=mesh)
    with jax.set_mesh(mesh):
        close(jax.jit(run)(*flaxdiff.replicate((params, x, text), mesh)), wanted, 2e-5)
    assert set(cost.collectives) <= {"collective-permute", "all-gather", "all-reduce"}
    largest = 16 * 16 * 64 * 4  # bytes of an activation of one picture
    count, size = cost.collectives["all-gather"]
    assert size <= 2.05 * 5 * largest and "collective-permute" in cost.collectives  # keys and values, five times


@pytest.mark.parametrize(("platform", "side", "attends"), [("cpu", 32, True), ("cpu", 32, False), ("tpu", 64, True)])
def test_pictures_are_decoded_in_rows(platform, side, attends):
    """One latent on eight devices: each convolution fetches rows from its neighbours; memory falls."""
    devices = jax.devices() if platform == "cpu" else chips.describe("v5e:2x4").devices
    spec, costs, memory = VAE.replace(mid_block_add_attention=attends), {}, {}
    run = lambda params, z: flaxdiff.apply(spec, params, z, method="decode")
    for n in (1, 8):
        mesh = mesh_of(devices, fsdp=n)
        args = (flaxdiff.abstract(spec), jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32))
        everywhere = parallel.shardings(args, mesh, [("", parallel.whole)])
        made, costs[n] = lowered(run, *laid(args, everywhere), mesh=mesh)
        memory[n] = made.memory_analysis().temp_size_in_bytes
    assert made.output_shardings.spec == PartitionSpec(None, "fsdp")
    assert memory[8] < memory[1] / 4, memory
    moved = costs[8].collectives
    # keys and values of the one attention, and no other whole activation
    size = 2 if platform == "tpu" else 4  # bytes of a number that a product reads
    assert moved.pop("all-gather", None) == ([2, 2 * side**2 * 64 * size] if attends else None)
    assert set(moved) == {"collective-permute", "all-reduce"}
    assert moved["collective-permute"][1] < 0.252 * (2 * side) ** 2 * 64 * 4  # a few rows, in doubling four times
    assert moved["all-reduce"][1] < 1e4  # moments of the normalisations


@pytest.mark.parametrize(
    "axes", [{"fsdp": 2, "context": 4}, {"data": 4, "fsdp": 2}, {"fsdp": 8}, {"tensor": 8}], ids=str
)
def test_rows_decode_to_the_same_picture(axes):
    """Also where weights are split."""
    params, z, mesh = flaxdiff.init(VAE, KEY), jax.random.normal(KEY, (2, 16, 16, 4)), mesh_of(**axes)
    with jax.set_mesh(mesh):
        rows = jax.jit(decode)(flaxdiff.distribute(params, mesh), flaxdiff.replicate(z, mesh))
    close(rows, jax.jit(decode)(params, z), 1e-5)


def test_convolutions_refuse_what_xla_gets_wrong():
    with jax.set_mesh(mesh_of(tensor=2, context=2)):
        with pytest.raises(ValueError, match="tensor and context at once.*use fsdp"):
            jax.eval_shape(decode, flaxdiff.abstract(VAE), jnp.zeros((1, 8, 8, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fsdp=2+cp", "fsdp=2+tp"])
def test_gradients_with_everything_split(preset):
    """Weights over some axes, rows and heads over others: a UNet and its gradients as on one device.

    Its levels are those of the shipped UNet, narrower: two and three heads do not divide by four devices.
    """
    peer = peers.unet(
        block_out_channels=(16, 24, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 3, 4),
    )
    spec = flaxdiff.UNet2DConditionModel.from_config(dict(peer.config))
    params, mesh = flaxdiff.init(spec, KEY), flaxdiff.make_mesh(preset)
    rng = np.random.default_rng(0)
    x, text = (rng.standard_normal(s).astype(np.float32) for s in ((2, 16, 16, 4), (2, 7, 16)))

    def both(params, x, text):
        def loss(params):
            out = flaxdiff.apply(spec, params, x, 7, text)
            return jnp.square(out).mean(), out

        return jax.grad(loss, has_aux=True)(params)

    wanted = jax.jit(both)(params, x, text)
    with jax.set_mesh(mesh):
        ours = jax.jit(both)(flaxdiff.distribute(params, mesh), *flaxdiff.shard((x, text), mesh))
    close(ours, wanted, 1e-5)


def test_each_branch_of_guidance_on_its_own_device():
    """One picture on two devices: half the arithmetic each, and the same picture."""
    pipe, params = flaxdiff.load()
    inputs = pipe.prepare_inputs(prompt="dog face on blue", num_inference_steps=2)
    program, mesh = pipe.program, mesh_of(data=2)
    conditions, state = jax.jit(program.begin)(params, KEY, inputs)
    wanted = jax.jit(program.step)(params, conditions, state)
    _, alone = lowered(program.step, params, conditions, state, mesh=mesh_of(data=1))
    _, shared = lowered(program.step, *flaxdiff.replicate((params, conditions, state), mesh), mesh=mesh)
    assert shared.flops < 0.55 * alone.flops
    assert shared.collectives == {"all-gather": [1, 2 * state.sampler.sample.nbytes]}  # what the branches came to
    with jax.set_mesh(mesh):
        both = jax.jit(program.step)(*flaxdiff.replicate((params, conditions, state), mesh))
    close(both.sampler.sample, wanted.sampler.sample, 1e-5)


def test_a_layer_within_a_norm_is_split():
    """The norms of some networks are told the time or a picture by layers of their own."""
    shapes = {"norm1.linear.weight": jax.ShapeDtypeStruct((64, 128), jnp.float32)}
    shapes |= {"norm1.weight": jax.ShapeDtypeStruct((64,), jnp.float32)}
    places = flaxdiff.shardings(shapes, mesh_of(fsdp=8))
    assert not places["norm1.linear.weight"].is_fully_replicated and places["norm1.weight"].is_fully_replicated


# --- weights split over eight ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji():
    """The shipped model on eight devices, loaded there."""
    mesh = mesh_of(fsdp=8)
    return *flaxdiff.load(mesh=mesh), mesh


def test_loaded_into_shards(emoji):
    """The same numbers as loaded plainly; each device has an eighth, to 5 %."""
    pipe, params, mesh = emoji
    same, plain = flaxdiff.load()
    assert same == pipe
    close(params, plain, 0)
    whole = sum(a.nbytes for a in jax.tree.leaves(plain))
    for d in range(8):
        assert sum(a.addressable_shards[d].data.nbytes for a in jax.tree.leaves(params)) <= 1.05 * whole / 8
    assert jax.tree.map(lambda a: a.sharding, params) == parallel.shardings(plain, mesh)
    rules = [("conv_in", parallel.whole), ("", parallel.Split({"fsdp": None}))]
    spec, unet = flaxdiff.UNet2DConditionModel.from_pretrained(flaxdiff.EMOJI, subfolder="unet", mesh=mesh, rules=rules)
    assert spec == pipe.unet and unet["conv_in.weight"].sharding.is_fully_replicated
    assert not unet["conv_out.weight"].sharding.is_fully_replicated


def test_damage_is_found_on_the_way_into_shards(tmp_path):
    """Each device reads its part, but the checksum is of the whole tensor."""
    flaxdiff.save(tmp_path, VAE, flaxdiff.init(VAE, KEY))
    file, mesh = tmp_path / "diffusion_pytorch_model.safetensors", mesh_of(fsdp=8)
    flaxdiff.AutoencoderKL.from_pretrained(tmp_path, mesh=mesh)
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="do not have their checksum"):
        flaxdiff.AutoencoderKL.from_pretrained(tmp_path, mesh=mesh)


@pytest.mark.slow
def test_what_travels_in_a_step(emoji):
    """Weights are gathered once, and besides them only small activations move; pictures as on one device."""
    pipe, params, mesh = emoji
    things = ["red apple", "dog face on blue", "rocket", "blue book", "cat", "an owl", "cactus", "slice of pizza"]
    inputs = pipe.prepare_inputs(prompt=things, num_inference_steps=2)
    program, split = pipe.program, flaxdiff.shard(inputs, mesh)
    with jax.set_mesh(mesh):
        conditions, state = jax.jit(program.begin)(params, flaxdiff.replicate(KEY, mesh), split)
        made = jax.jit(program.step).lower(params, conditions, state).compile()
        many = jax.jit(pipe.generate)(params, flaxdiff.replicate(KEY, mesh), split)
    moved = hlo.Program(made.as_text()).cost().collectives
    weights = sum(a.nbytes for a in params["unet"].values())
    assert "reduce-scatter" not in moved, moved
    assert 0.5 * weights < moved["all-gather"][1] <= 1.05 * weights, moved
    rest = sum(size for kind, (_, size) in moved.items() if kind != "all-gather")
    assert rest < 0.05 * weights, moved  # where XLA moves a layer's output instead of its larger weight
    close(many, jax.jit(pipe.generate)(flaxdiff.load()[1], KEY, inputs), 1e-5)


# --- loading ---------------------------------------------------------------------------------------------------------


def resident(path: Path) -> int:
    """Bytes of a mapped file in this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
    return 1024 * int(next(line for line in lines[at:] if line.startswith("Rss:")).split()[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="counts pages as Linux tells them")
@pytest.mark.parametrize(("kind", "shape"), [("linear", (2048, 8192)), ("embedding", (8192, 2048))])
def test_only_the_pages_of_a_part_are_read(tmp_path, monkeypatch, kind, shape):
    """An eighth of a weight along its longest side is an eighth of the file."""
    file, leaf = tmp_path / "w.safetensors", Leaf(shape, kind, None)
    array = np.random.default_rng(0).standard_normal(convert.shape_in_file(leaf)).astype(np.float32)
    safetensors.write(file, {"w": (array.shape, array.dtype)}, [array])
    seen, forget = [], tensors.Mapped.forget
    count = lambda mapped, *span: seen.append(resident(file)) or forget(mapped, *span)
    monkeypatch.setattr(tensors.Mapped, "forget", count)
    where = NamedSharding(mesh_of(fsdp=8), parallel.Split({"fsdp": None})(shape, mesh_of(fsdp=8)))
    place = convert.Place(leaf, ("w",), (safetensors.read(file)["w"],))
    for index in where.devices_indices_map(shape).values():
        part = convert.read("w", place, np.dtype(np.float32), index)
        assert np.array_equal(part, (array.T if kind == "linear" else array)[index])
    assert len(seen) == 8 and max(seen) <= array.nbytes / 8 + 2**22, seen  # pages of up to 2 MiB


# --- many processes --------------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).parent / "processes.py"


def started(*commands):
    """Run Python with so many lists of arguments at once, each told its place among them; all have to end well."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    place = lambda i: dict(zip(parallel.PLACE, (address, str(len(commands)), str(i)))) if len(commands) > 1 else {}
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], env=common | cache | place(i), stderr=subprocess.PIPE, text=True
        )
        for i, command in enumerate(commands)
    ]
    for process in running:
        _, errors = process.communicate(timeout=1800)
        assert process.returncode == 0, errors[-3000:]


def test_start_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="has {'JAX_NUM_PROCESSES': '2'}; set JAX_COORDINATOR_ADDRESS, JAX_NUM"):
        parallel.start()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(ValueError, match="two numbers"):
        parallel.start()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    """Each loads its shards, samples and trains with the other: the same pictures, losses and weights, to 1e-5."""
    started([SCRIPT, tmp_path / "one.npz", "8"])
    started(*([SCRIPT, tmp_path / f"two{i}.npz", "4"] for i in range(2)))
    one, two = dict(np.load(tmp_path / "one.npz")), dict(np.load(tmp_path / "two0.npz"))
    assert not (tmp_path / "two1.npz").exists()  # only the first writes
    facts = lambda results: [
        int(results.pop(name)) for name in ("processes", "devices", "local", "read", "bytes", "held")
    ]
    alone, shared = facts(one), facts(two)
    assert alone[:3] == [1, 8, 8] and shared[:3] == [2, 8, 4]
    assert alone[3] == alone[4] == shared[4] and alone[5] == shared[5] <= 1.05 * alone[4] / 8
    assert shared[3] <= 1.05 * shared[4] / 2  # each reads what its devices hold
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_command_in_two_processes_ends_as_one(tmp_path):
    """`flaxdiff train` with weights and their moments split over both: losses, also of validation, and what is exported
    agree to 1e-5, and so do pictures. A run over a stream is stopped and goes on: each process at its own place."""
    random = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    pictures = [Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(8)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "pictures" / f"{i}.png")
    ends = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "add_attention": False}
    sizes = {"sample_size": 16, "block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
    (tmp_path / "unet.json").write_text(json.dumps(ends | sizes))
    (tmp_path / "config.py").write_text(CONFIG.format(pictures=tmp_path / "pictures", unet=tmp_path / "unet.json"))
    png = (tmp_path / "pictures" / "0.png").read_bytes()
    rows = {"image": [b"broken" if i in (1, 5) else png for i in range(12)]}
    pyarrow.parquet.write_table(pyarrow.table(rows | {"text": list(map(str, range(12)))}), tmp_path / "stream.parquet")

    with jax.numpy_dtype_promotion("standard"):
        run.train(override(read(tmp_path / "config.py"), {"output": str(tmp_path / "one")}))
    started(*[[SCRIPT.with_name("training_processes.py"), tmp_path, "1"]] * 2)

    def told(name):
        """What the log says of each step."""
        found = {}
        for line in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines()):
            found.setdefault(line["step"], {}).update(line)
        return found

    one, two = told("one"), told("two")
    assert one.keys() == two.keys() == {0, 1, 2, 3}
    for name in ("loss", "grad_norm", "validation_loss"):
        got, expected = ([step[name] for step in log.values() if name in step] for log in (two, one))
        assert len(expected) >= 2, "at the beginning or at each step, and at the end"
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)
    weights = [
        files.open_alone(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("two", "one")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[1]:
        with weights[0][name].view() as got, weights[1][name].view() as expected:
            np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=name)

    pipe, params = flaxdiff.load(tmp_path / "one")
    expected = pipe(params, jax.random.key(0), batch_size=4, num_inference_steps=2, output_type="np").images
    for i in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"images{i}.npy"), expected, atol=1e-4)
    streams = [json.loads((tmp_path / f"stream{i}.json").read_text()) for i in range(2)]
    assert streams[0]["places"][1] != streams[1]["places"][1], "where the run was stopped"
    assert all(len(stream["seen"]) == 4 and stream["seen"] == stream["expected"] for stream in streams)
    steps = [1, 1.9, 2.71, 3.439]  # with momentum
    np.testing.assert_allclose([stream["w"] for stream in streams], np.full((2, 4, 2), -0.1 * sum(steps)), rtol=1e-6)


CONFIG = """
from flaxdiff.training.config import Config, Data, Model, Optimizer, Run

config = Config(
    "unconditional",
    Data("{pictures}", resolution=16),
    Model(component="{unet}"),
    optimizer=Optimizer(learning_rate=1e-3),
    run=Run(
        max_train_steps=3,
        train_batch_size=8,
        mesh="fsdp",
        use_ema=True,
        validation_batches=1,
        validation_steps=2,
        logging_steps=1,
        checkpointing_steps=2,
    ),
)
"""
