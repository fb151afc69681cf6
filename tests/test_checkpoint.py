"""Checkpoints against PyTorch's own: what diffusers and transformers save loads here, computes the same, and back."""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
import transformers
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.torch import load_file, save_file

import flaxdiff
from flaxdiff.checkpoint import convert, load_model, pickles, safetensors, save_model
from flaxdiff.checkpoint.files import Weights, parse
from flaxdiff.weights import Int8, LoRA, dense, quantize

IMAGE = np.random.default_rng(0).standard_normal((1, 8, 8, 3)).astype(np.float32)
LATENT = np.random.default_rng(1).standard_normal((1, 8, 8, 4)).astype(np.float32)
TEXT = np.random.default_rng(2).standard_normal((1, 5, 16)).astype(np.float32)
IDS = np.array([[3, 7, 11, 2, 5]])


class Case(NamedTuple):
    """A model at a tiny size: PyTorch's, one call of it, and the same call of ours."""

    build: Callable[[], torch.nn.Module]
    theirs: Callable[[torch.nn.Module], torch.Tensor]
    inputs: tuple[Any, ...]
    ours: Callable[[Any], jax.Array] = lambda out: out


MODELS = {
    "AutoencoderKL": Case(peers.vae, lambda m: m(peers.nchw(IMAGE)).sample.permute(0, 2, 3, 1), (IMAGE,)),
    "UNet2DConditionModel": Case(
        lambda: peers.unet(transformer_layers_per_block=(3, 1), use_linear_projection=True),
        lambda m: m(peers.nchw(LATENT), 7, torch.tensor(TEXT)).sample.permute(0, 2, 3, 1),
        (LATENT, 7.0, TEXT),
    ),
    "CLIPTextModel": Case(
        peers.text_encoder,
        lambda m: m(torch.tensor(IDS)).last_hidden_state,
        (IDS,),
        lambda out: out.last_hidden_state,
    ),
    "CLIPTextModelWithProjection": Case(
        lambda: peers.text_encoder(projected=True),
        lambda m: m(torch.tensor(IDS)).text_embeds,
        (IDS,),
        lambda out: out.text_embeds,
    ),
}


def torch_class(name):
    return getattr(diffusers, name, None) or getattr(transformers, name)


def call_torch(name, model):
    with torch.no_grad():
        return MODELS[name].theirs(model.eval()).numpy()


def call(name, spec, params):
    return MODELS[name].ours(jax.jit(lambda p: flaxdiff.apply(spec, p, *MODELS[name].inputs))(params))


def same(a, b):
    return list(a) == list(b) and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (the PyTorch model, a folder that it was saved to)."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = MODELS[name].build()
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return get


def vae(folder=None, **changes):
    """A tiny autoencoder of ours, saved if a folder is given."""
    spec = flaxdiff.AutoencoderKL.from_config({"block_out_channels": [8], "norm_num_groups": 4, **changes})
    params = flaxdiff.init(spec, jax.random.key(0))
    if folder is not None:
        save_model(folder, spec, params)
    return spec, params


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_loads_what_pytorch_saved_and_saves_what_pytorch_loads(name, scan, saved, tmp_path):
    model, folder = saved(name)
    spec, params = getattr(flaxdiff, name).from_pretrained(folder, scan_layers=scan)
    expected = call_torch(name, model)
    assert peers.relative(call(name, spec, params), expected) <= 1e-4
    if name != "AutoencoderKL":
        assert any(leaf.stack for leaf in flaxdiff.layout(spec).values()) == scan

    flaxdiff.save(tmp_path / "ours", spec, params)
    again, report = torch_class(name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    theirs = model.state_dict()
    assert all(torch.equal(weight, theirs[key]) for key, weight in again.state_dict().items())
    # to rounding: which kernels PyTorch takes depends on how weights lie in memory
    assert peers.relative(call_torch(name, again), expected) <= 1e-5


def test_config_survives_the_round_trip(saved, tmp_path):
    for name in MODELS:
        spec, params = getattr(flaxdiff, name).from_pretrained(saved(name)[1])
        flaxdiff.save(tmp_path / name, spec, params)
        assert getattr(flaxdiff, name).from_pretrained(tmp_path / name)[0] == spec


@pytest.mark.parametrize("name", ["AutoencoderKL", "CLIPTextModel"])
def test_every_container_holds_the_same(name, saved, tmp_path):
    model, folder = saved(name)
    library = getattr(flaxdiff, name).library
    stem, pickled = ("diffusion_pytorch_model",) * 2 if library == "diffusers" else ("model", "pytorch_model")
    expected = load_model(getattr(flaxdiff, name), folder)[1]
    state = model.state_dict()

    def made(sort):
        shutil.copytree(folder, tmp_path / sort, ignore=shutil.ignore_patterns("*.safetensors"))
        return tmp_path / sort

    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    torch.save(state, made("zip") / f"{pickled}.bin")
    torch.save(state, made("legacy") / f"{pickled}.bin", _use_new_zipfile_serialization=False)
    names, half = list(state), len(state) // 2
    pieces = {f"{pickled}-0000{i}-of-00002.bin": part for i, part in enumerate((names[:half], names[half:]), 1)}
    for file, part in (made("shards") and pieces).items():
        torch.save({key: state[key] for key in part}, tmp_path / "shards" / file)
    index = {"weight_map": {key: file for file, part in pieces.items() for key in part}}
    (tmp_path / "shards" / f"{pickled}.bin.index.json").write_text(json.dumps(index))
    for sort in ("sharded", "zip", "legacy", "shards"):
        assert same(load_model(getattr(flaxdiff, name), tmp_path / sort)[1], expected), sort


def test_scanned_and_unrolled_parameters_are_the_same_numbers(saved):
    _, folder = saved("UNet2DConditionModel")
    spec, scanned = load_model(flaxdiff.UNet2DConditionModel, folder)
    _, unrolled = load_model(flaxdiff.UNet2DConditionModel, folder, scan_layers=False)
    for name, leaf in flaxdiff.layout(spec).items():
        parts = [unrolled.pop(part) for part in convert.names_in_file(name, leaf)]
        assert np.array_equal(scanned[name], np.stack(parts) if leaf.stack else parts[0])
    assert not unrolled


# --- older files ----------------------------------------------------------------------------------------------------

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("convolved", [False, True])
def test_autoencoder_with_the_attention_names_of_2022(convolved, saved, tmp_path):
    model, folder = saved("AutoencoderKL")
    state = {}
    for key, weight in model.state_dict().items():
        for new, old in OLD.items():
            if f"attentions.0.{new}." in key:
                key = key.replace(new, old)
                weight = weight[:, :, None, None] if convolved and key.endswith("weight") else weight
        state[key] = weight.contiguous()
    assert any("proj_attn" in key for key in state)
    shutil.copy(folder / "config.json", tmp_path)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    assert same(load_model(flaxdiff.AutoencoderKL, tmp_path)[1], load_model(flaxdiff.AutoencoderKL, folder)[1])


def test_text_encoder_with_the_names_of_the_hub(saved, tmp_path):
    model, folder = saved("CLIPTextModel")
    state = {f"text_model.{key}": weight for key, weight in model.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]  # a buffer of older versions
    shutil.copy(folder / "config.json", tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    assert same(load_model(flaxdiff.CLIPTextModel, tmp_path)[1], load_model(flaxdiff.CLIPTextModel, folder)[1])


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
]


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_hold_any_tensor(legacy, tmp_path):
    """Dtypes, views that share one storage, parameters, empty ones and scalars; what is no tensor is left out."""
    table = torch.arange(24.0).reshape(4, 6)
    state = {str(dtype): table.to(dtype) for dtype in DTYPES}
    state |= {"transposed": table.T, "rows": table[1:3], "columns": table[:, 1::2], "broadcast": table[:1].expand(3, 6)}
    state |= {"parameter": torch.nn.Parameter(table), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3)}
    path = tmp_path / "some.ckpt"
    extra = {
        "epoch": 3,
        "state_dict": state | {"note": "text"},
        "callbacks": {torch.nn.Linear: {"best": [1.5, None, True]}},
    }
    torch.save(extra, path, _use_new_zipfile_serialization=not legacy)
    found = pickles.read(path)
    assert list(found) == list(state)
    for name, tensor in state.items():
        with found[name].view() as numbers:
            expected = tensor.detach().to(torch.float64).numpy()
            assert numbers.shape == expected.shape
            assert np.array_equal(numbers.astype(np.float64), expected), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_reads_and_writes_what_the_library_does(dtype, tmp_path):
    tensor = torch.arange(15).reshape(3, 5).to(dtype)
    save_file({"a": tensor, "b": torch.tensor(1.5), "c": torch.zeros(0)}, tmp_path / "theirs.safetensors")
    found = safetensors.read(tmp_path / "theirs.safetensors")
    with found["a"].view() as numbers:
        assert np.array_equal(numbers.astype(np.float64), tensor.to(torch.float64).numpy())
        shapes = {"x.y": (numbers.shape, numbers.dtype)}
        safetensors.write(tmp_path / "ours.safetensors", shapes, [numbers])
    again = load_file(tmp_path / "ours.safetensors")["x.y"]
    assert again.dtype == dtype and torch.equal(again.to(torch.float64), tensor.to(torch.float64))


# --- variants and dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AutoencoderKL", "CLIPTextModel"])
def test_variants_both_ways(name, saved, tmp_path):
    model, folder = saved(name)
    cls = getattr(flaxdiff, name)
    halved = MODELS[name].build().half()
    shutil.copytree(folder, tmp_path / "both")
    halved.save_pretrained(tmp_path / "both", variant="fp16")
    halved.save_pretrained(tmp_path / "sharded", variant="fp16", max_shard_size="20KB")
    plain = load_model(cls, tmp_path / "both")[1]
    half = load_model(cls, tmp_path / "both", variant="fp16")[1]
    assert same(plain, load_model(cls, folder)[1]) and not same(plain, half)
    assert all(np.array_equal(half[key], plain[key].astype(jnp.float16).astype(jnp.float32)) for key in plain)
    assert same(load_model(cls, tmp_path / "sharded", variant="fp16")[1], half)

    spec, params = load_model(cls, folder)
    for size in ("5GB", "20KB"):
        save_model(tmp_path / size, spec, params, variant="fp16", dtype=jnp.float16, max_shard_size=size)
        again = torch_class(name).from_pretrained(tmp_path / size, variant="fp16", torch_dtype=torch.float16)
        theirs = halved.state_dict()
        assert all(torch.equal(weight, theirs[key]) for key, weight in again.state_dict().items())
    assert len(list((tmp_path / "20KB").glob("*fp16-00001-of-*.safetensors"))) == 1


def test_names_of_weight_files():
    stem = "diffusion_pytorch_model"
    for name, expected in {
        "model.safetensors": ("model", None, "safetensors", "whole"),
        "pytorch_model.fp16.bin": ("pytorch_model", "fp16", "bin", "whole"),
        f"{stem}.non_ema.safetensors": (stem, "non_ema", "safetensors", "whole"),
        f"{stem}.safetensors.index.fp16.json": (stem, "fp16", "safetensors", "index"),
        f"{stem}.fp16.safetensors.index.json": (stem, "fp16", "safetensors", "index"),
        f"{stem}.safetensors.index.json": (stem, None, "safetensors", "index"),
        f"{stem}-00001-of-00002.fp16.safetensors": (stem, "fp16", "safetensors", "shard"),
        f"{stem}.fp16-00001-of-00002.safetensors": (stem, "fp16", "safetensors", "shard"),
        f"{stem}-00001-of-00002.safetensors": (stem, None, "safetensors", "shard"),
    }.items():
        assert parse(name) == Weights(*expected), name
    for name in ("../model.safetensors", "model.safetensors.exe", "a/model.bin", "vit.safetensors", "model.bin/..", ""):
        assert parse(name) is None, name


def test_numbers_are_converted_to_the_dtype_asked_for(saved):
    _, folder = saved("CLIPTextModel")
    plain = load_model(flaxdiff.CLIPTextModel, folder)[1]
    for dtype in (jnp.bfloat16, "float16", np.float32):
        cast = load_model(flaxdiff.CLIPTextModel, folder, dtype=dtype)[1]
        assert all(a.dtype == jnp.dtype(dtype) for a in cast.values())
        assert same(cast, {key: a.astype(dtype) for key, a in plain.items()})


# --- devices and memory ---------------------------------------------------------------------------------------------


def test_parameters_go_straight_to_their_shards(saved):
    _, folder = saved("CLIPTextModel")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))

    def shardings(shapes):  # the last axis over one mesh axis, the first over the other where it divides
        axes = lambda s: [("data" if s.shape[0] % 4 == 0 else None), *[None] * (len(s.shape) - 2), "model"]
        spec = lambda s: PartitionSpec(*axes(s)) if len(s.shape) > 1 else PartitionSpec()
        return {name: NamedSharding(mesh, spec(s)) for name, s in shapes.items()}

    plain_spec, plain = load_model(flaxdiff.CLIPTextModel, folder)
    wanted = shardings(flaxdiff.abstract(plain_spec))
    for sharding in (shardings, wanted):
        placed = load_model(flaxdiff.CLIPTextModel, folder, sharding=sharding)[1]
        assert same(placed, plain)
        assert all(placed[name].sharding == wanted[name] for name in placed)
    assert len({str(s.index) for s in placed["text_model.embeddings.token_embedding.weight"].addressable_shards}) == 8


def test_loaded_parameters_can_be_donated(saved):
    spec, params = load_model(flaxdiff.CLIPTextModel, saved("CLIPTextModel")[1])
    before = {name: np.array(a) for name, a in params.items()}
    after = jax.jit(lambda p: jax.tree.map(lambda a: 2 * a, p), donate_argnums=0)(params)
    assert all(np.array_equal(after[name], 2 * before[name]) for name in before)


LOAD = """
    import sys
    import jax
    import flaxdiff
    from flaxdiff.checkpoint import load_model

    def memory(key):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))

    small, folder, dtype, devices = sys.argv[1:]
    mesh = jax.sharding.Mesh(jax.devices()[: int(devices)], "x")
    split = lambda s: jax.sharding.PartitionSpec(*[None] * (len(s.shape) - 1), "x")
    place = lambda shapes: {n: jax.sharding.NamedSharding(mesh, split(s)) for n, s in shapes.items()}
    options = dict(dtype=dtype, sharding=place if int(devices) > 1 else None)
    load_model(flaxdiff.CLIPTextModel, small, **options)  # imports, and what is made once
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins now
    before = memory("VmRSS")
    spec, params = load_model(flaxdiff.CLIPTextModel, folder, **options)
    jax.block_until_ready(params)
    print(memory("VmHWM") - before - sum(a.nbytes for a in params.values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory as Linux tells it")
@pytest.mark.parametrize(
    "form, dtype, devices", [("whole", "float32", 1), ("shards", "bfloat16", 1), ("bin", "float32", 4)]
)
def test_peak_memory_beyond_the_parameters_is_at_most_twice_the_largest_tensor(form, dtype, devices, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 4096}
    spec = flaxdiff.CLIPTextModel.from_config(sizes)
    assert max(leaf.shape[0] for leaf in flaxdiff.layout(spec).values() if leaf.stack) == 10
    largest = 4096 * 256 * 4  # bytes of the token embedding; a stack of layers has five times as many
    params = {n: jnp.full(s.shape, 0.5) for n, s in flaxdiff.abstract(spec).items()}
    save_model(tmp_path / "large", spec, params, max_shard_size="20MB" if form == "shards" else "5GB")
    if form == "bin":
        file = tmp_path / "large" / "model.safetensors"
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    small = flaxdiff.CLIPTextModel.from_config(sizes | {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32})
    save_model(tmp_path / "small", small, flaxdiff.init(small, jax.random.key(0)))
    del params
    command = [sys.executable, "-c", textwrap.dedent(LOAD), str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run([*command, dtype, str(devices)], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 2 * largest, f"{int(done.stdout) / 2**20:.1f} MiB, the largest tensor {largest / 2**20}"


# --- saving ---------------------------------------------------------------------------------------------------------


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_save_changes_nothing(tmp_path):
    folder = tmp_path / "model"
    spec, params = vae(folder)
    before = snapshot(tmp_path)
    name = list(params)[-1]
    with pytest.raises(ValueError, match=f"{name} holds infinities or NaNs"):
        save_model(folder, spec, {k: 2 * v for k, v in params.items()} | {name: params[name] * jnp.nan})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # a disk that is full after 30 kB
    try:
        for target in (folder, tmp_path / "new"):
            with pytest.raises(OSError):
                save_model(target, spec, {k: 2 * v for k, v in params.items()})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(FileExistsError, match="is a file; give the folder"):
        save_model(folder / "config.json", spec, params)
    assert snapshot(tmp_path) == before
    assert {path.name for path in tmp_path.rglob("*")} == {
        "model",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


def test_a_save_replaces_the_weights_before_it_and_nothing_else(tmp_path):
    spec, params = vae(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    save_model(tmp_path, spec, params, variant="fp16", dtype=jnp.float16)
    doubled = {name: 2 * a for name, a in params.items()}
    save_model(tmp_path, spec, doubled, max_shard_size=20_000)
    assert same(load_model(flaxdiff.AutoencoderKL, tmp_path)[1], doubled)
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    save_model(tmp_path, spec, params, max_shard_size="5GB")
    assert same(load_model(flaxdiff.AutoencoderKL, tmp_path)[1], params)
    names = {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
    }
    assert set(os.listdir(tmp_path)) == names


def test_adapters_and_quantised_weights_are_saved_dense(saved, tmp_path):
    spec, params = load_model(flaxdiff.CLIPTextModel, saved("CLIPTextModel")[1], dtype=jnp.bfloat16)
    fc1, fc2 = (f"text_model.encoder.layers.mlp.{n}.weight" for n in ("fc1", "fc2"))
    layers, fan_in, fan_out = params[fc1].shape
    down, up = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(layers, fan_in, 2), (layers, 2, fan_out)])
    )
    special = params | {fc1: LoRA(params[fc1], down, up, jnp.full(layers, 0.5)), fc2: quantize(params[fc2])}
    assert isinstance(special[fc2], Int8)
    save_model(tmp_path, spec, special)
    again = load_model(flaxdiff.CLIPTextModel, tmp_path, dtype=jnp.bfloat16)[1]
    assert same(again, {name: dense(weight) for name, weight in special.items()})
    assert not np.array_equal(again[fc1], params[fc1])


def test_parameters_that_are_not_those_of_the_spec_are_refused(tmp_path):
    spec, params = vae()
    first, *others = params
    wrong = {name: params[name] for name in others} | {"extra": jnp.zeros(1), "encoder.conv_in.bias": jnp.zeros(3)}
    with pytest.raises(ValueError) as error:
        save_model(tmp_path / "model", spec, wrong)
    for part in (f"- {first}", "+ extra", "± encoder.conv_in.bias is [3], the model has [8]"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="dtype int8 are not supported; use one of float32, bfloat16, float16"):
        save_model(tmp_path / "model", spec, params, dtype="int8")
    for size in ("5 parsecs", 0, "0GB"):
        with pytest.raises(ValueError, match="is no size; give bytes"):
            save_model(tmp_path / "model", spec, params, max_shard_size=size)
    assert not os.listdir(tmp_path)
