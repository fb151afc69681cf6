"""Flax checkpoints: what the removed Flax classes wrote loads, and what contradicts itself is refused.

The files are written by flax's own serialisation, under names taken from the structure of those classes' modules.
"""

import json
import shutil

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peers
import pytest
import torch

import flaxdiff
from flaxdiff.checkpoint import convert, files, msgpack, safetensors
from flaxdiff.checkpoint.convert import names_in_file
from flaxdiff.core import Leaf, layout

STEMS = {"unet": "diffusion_flax_model", "vae": "diffusion_flax_model", "text_encoder": "flax_model"}

# component -> (path in the Flax module, name of PyTorch): every kind of layer and of list, written down by hand
PATHS = {
    "unet": [
        ("conv_in/kernel", "conv_in.weight"),
        ("time_embedding/linear_1/kernel", "time_embedding.linear_1.weight"),
        ("time_embedding/linear_2/bias", "time_embedding.linear_2.bias"),
        ("down_blocks_0/downsamplers_0/conv/kernel", "down_blocks.0.downsamplers.0.conv.weight"),
        ("down_blocks_1/resnets_0/time_emb_proj/kernel", "down_blocks.1.resnets.0.time_emb_proj.weight"),
        ("down_blocks_1/resnets_0/conv_shortcut/kernel", "down_blocks.1.resnets.0.conv_shortcut.weight"),
        ("down_blocks_2/attentions_0/norm/scale", "down_blocks.2.attentions.0.norm.weight"),
        ("down_blocks_2/attentions_0/proj_in/kernel", "down_blocks.2.attentions.0.proj_in.weight"),
        (
            "mid_block/attentions_0/transformer_blocks_0/attn1/to_q/kernel",
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        ),
        (
            "mid_block/attentions_0/transformer_blocks_0/attn2/to_out_0/kernel",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.weight",
        ),
        (
            "mid_block/attentions_0/transformer_blocks_0/ff/net_0/proj/kernel",
            "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
        ),
        (
            "mid_block/attentions_0/transformer_blocks_0/ff/net_2/bias",
            "mid_block.attentions.0.transformer_blocks.0.ff.net.2.bias",
        ),
        (
            "mid_block/attentions_0/transformer_blocks_0/norm3/scale",
            "mid_block.attentions.0.transformer_blocks.0.norm3.weight",
        ),
        ("mid_block/resnets_1/norm2/bias", "mid_block.resnets.1.norm2.bias"),
        ("up_blocks_0/upsamplers_0/conv/bias", "up_blocks.0.upsamplers.0.conv.bias"),
        ("conv_norm_out/scale", "conv_norm_out.weight"),
    ],
    "vae": [
        ("encoder/conv_in/kernel", "encoder.conv_in.weight"),
        ("encoder/down_blocks_0/downsamplers_0/conv/kernel", "encoder.down_blocks.0.downsamplers.0.conv.weight"),
        ("decoder/up_blocks_0/resnets_1/conv1/kernel", "decoder.up_blocks.0.resnets.1.conv1.weight"),
        ("post_quant_conv/kernel", "post_quant_conv.weight"),
    ],
    "vae with attention": [
        ("encoder/mid_block/attentions_0/group_norm/scale", "encoder.mid_block.attentions.0.group_norm.weight"),
        ("encoder/mid_block/attentions_0/query/kernel", "encoder.mid_block.attentions.0.to_q.weight"),
        ("decoder/mid_block/attentions_0/key/bias", "decoder.mid_block.attentions.0.to_k.bias"),
        ("decoder/mid_block/attentions_0/value/kernel", "decoder.mid_block.attentions.0.to_v.weight"),
        ("decoder/mid_block/attentions_0/proj_attn/kernel", "decoder.mid_block.attentions.0.to_out.0.weight"),
    ],
    "text_encoder": [
        ("text_model/embeddings/token_embedding/embedding", "text_model.embeddings.token_embedding.weight"),
        ("text_model/embeddings/position_embedding/embedding", "text_model.embeddings.position_embedding.weight"),
        ("text_model/encoder/layers/3/self_attn/q_proj/kernel", "text_model.encoder.layers.3.self_attn.q_proj.weight"),
        ("text_model/encoder/layers/0/layer_norm1/scale", "text_model.encoder.layers.0.layer_norm1.weight"),
        ("text_model/encoder/layers/1/mlp/fc2/bias", "text_model.encoder.layers.1.mlp.fc2.bias"),
        ("text_model/final_layer_norm/scale", "text_model.final_layer_norm.weight"),
    ],
}


def flax_path(component: str, name: str, rank: int) -> tuple[str, ...]:
    """Where a Flax module keeps the parameter that PyTorch calls so.

    Flax names the entries of a list by the list and their number, but transformers' text encoder names its layers by
    their number alone; the autoencoder's attention kept names of old.
    """
    path: list[str] = []
    for part in name.split("."):
        if part.isdigit() and component != "text_encoder":
            path[-1] += f"_{part}"
        else:
            path.append(part)
    if component == "vae" and "attentions_0" in path:
        path = [{"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}.get(p, p) for p in path]
    if path[-1] == "weight":
        path[-1] = "embedding" if "embeddings" in path else "kernel" if rank > 1 else "scale"
    return tuple(path)


def by_layer(own: str, leaf: Leaf, weight) -> list[tuple[str, np.ndarray]]:
    """A parameter under its names in a file, with our axes, which are Flax's too."""
    layers = np.asarray(weight) if leaf.stack else [np.asarray(weight)]
    return list(zip(names_in_file(own, leaf), layers, strict=True))


def flax_tree(component: str, spec: flaxdiff.Spec, params: dict) -> dict:
    """Parameters as the nested dictionary that the Flax class had."""
    tree: dict = {}
    for own, leaf in layout(spec).items():
        for name, array in by_layer(own, leaf, params[own]):
            *path, last = flax_path(component, name, array.ndim)
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[last] = array
    return tree


@pytest.fixture(scope="module")
def emoji():
    return flaxdiff.load(dtype=jnp.float32)


@pytest.fixture(scope="module")
def folder(emoji, tmp_path_factory):
    """The shipped model as the Flax pipeline would have saved it."""
    pipe, params = emoji
    root = tmp_path_factory.mktemp("flax") / "emoji"
    shutil.copytree(flaxdiff.EMOJI, root, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in (*root.glob("*/*config.json"), root / files.PIPELINE):
        config = json.loads(path.read_text())
        if "Tokenizer" not in str(config.get("tokenizer_class")) and "_class_name" in config:
            config["_class_name"] = "Flax" + config["_class_name"]
        if path.name == files.PIPELINE:
            for name in ("unet", "vae", "text_encoder", "scheduler"):
                config[name][1] = "Flax" + config[name][1]
            config["safety_checker"] = ["stable_diffusion", "FlaxStableDiffusionSafetyChecker"]
        if path.parent.name == "unet":
            config |= {"use_memory_efficient_attention": False, "split_head_dim": False}
        path.write_text(json.dumps(config))
    for name, spec in pipe.specs:
        encoded = flax.serialization.to_bytes(flax_tree(name, spec, params[name]))
        (root / name / f"{STEMS[name]}.msgpack").write_bytes(encoded)
    return root


@pytest.mark.parametrize("component", PATHS)
def test_names(component, emoji, tmp_path):
    """The hand-written list says where in the file a number lies and where it arrives."""
    pipe, params = emoji
    spec, weights = dict(pipe.specs).get(component), params.get(component)
    if spec is None:  # the shipped autoencoder has no attention, which Flax's always had
        spec = flaxdiff.AutoencoderKL.from_config({"block_out_channels": [8], "norm_num_groups": 4})
        weights = flaxdiff.init(spec, jax.random.key(0))
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(flax.serialization.to_bytes(flax_tree(component.partition(" ")[0], spec, weights)))
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    places = convert.match(spec, msgpack.read(path), str(path))
    loaded = {name: convert.read(name, place, np.dtype(np.float32)) for name, place in places.items()}
    found = {name: array for own, leaf in layout(spec).items() for name, array in by_layer(own, leaf, loaded[own])}
    for flax_name, torch_name in PATHS[component]:
        array = tree
        for part in flax_name.split("/"):
            array = array[part]
        np.testing.assert_array_equal(found[torch_name], array, err_msg=flax_name)


@pytest.mark.parametrize("cls", [flaxdiff.DiffusionPipeline, flaxdiff.FlaxStableDiffusionPipeline])
def test_whole_pipeline(cls, emoji, folder):
    pipe, params = emoji
    again, loaded = cls.from_pretrained(folder, dtype=jnp.float32, safety_checker=None)
    again = getattr(again, "pipe", again)
    assert type(again) is type(pipe) and again.specs == pipe.specs
    assert again.scheduler.option_values() == pipe.scheduler.option_values()
    for component in params:
        assert loaded[component].keys() == params[component].keys()
        for name, array in params[component].items():
            np.testing.assert_array_equal(loaded[component][name], array, err_msg=name)


def test_one_model_in_bfloat16(emoji, folder, tmp_path):
    """As on the Hub's bf16 branches; and into unrolled layers."""
    (_, params), target = emoji, shutil.copytree(folder / "text_encoder", tmp_path / "text_encoder")
    tree = flax.serialization.msgpack_restore((target / "flax_model.msgpack").read_bytes())
    halved = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), tree)
    (target / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(halved))
    _, loaded = flaxdiff.CLIPTextModel.from_pretrained(
        tmp_path, subfolder="text_encoder", revision="bf16", dtype=jnp.bfloat16, scan_layers=False
    )
    stacked = params["text_encoder"]["text_model.encoder.layers.mlp.fc1.weight"]
    ours = loaded["text_model.encoder.layers.2.mlp.fc1.weight"]
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, stacked[2].astype(jnp.bfloat16))


def test_pytorch_weights_come_first(emoji, folder, tmp_path):
    """Where a folder has both, safetensors are read; a variant of Flax's file has its own name."""
    target = shutil.copytree(folder / "vae", tmp_path / "vae")
    assert files.weight_file(target, "diffusers").name == "diffusion_flax_model.msgpack"
    shutil.copy(flaxdiff.EMOJI / "vae" / "diffusion_pytorch_model.safetensors", target)
    assert files.weight_file(target, "diffusers").suffix == ".safetensors"
    (target / "diffusion_flax_model.msgpack").rename(target / "diffusion_flax_model.bf16.msgpack")
    assert files.weight_file(target, "diffusers", "bf16").suffix == ".msgpack"
    assert files.patterns("transformers", "msgpack") == [
        "flax_model-?????-of-?????.msgpack",
        "flax_model.msgpack",
        "flax_model.msgpack.index.json",
    ]


def test_layers_mean_the_same(tmp_path):
    """What linen's layers compute, PyTorch computes with the tensors that are read from linen's file."""
    x = np.random.default_rng(0).standard_normal((2, 5, 7, 6)).astype(np.float32)
    layers = {"conv": nn.Conv(4, (3, 2), padding="VALID"), "dense": nn.Dense(3), "norm": nn.GroupNorm(num_groups=2)}
    tree, outputs = {}, {}
    for i, (name, layer) in enumerate(layers.items()):
        variables = layer.init(jax.random.key(i), x)
        tree[name] = jax.tree.map(lambda a: a + 0.1, variables["params"])
        outputs[name] = layer.apply({"params": tree[name]}, x)
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(flax.serialization.to_bytes(tree))
    weights = {}
    for name, tensor in msgpack.read(path).items():
        with tensor.view() as numbers:
            weights[name] = torch.tensor(numbers.copy())
    channels_first = peers.nchw(x)
    theirs = {
        "conv": torch.conv2d(channels_first, weights["conv.weight"], weights["conv.bias"]).permute(0, 2, 3, 1),
        "dense": torch.nn.functional.linear(torch.tensor(x), weights["dense.weight"], weights["dense.bias"]),
        "norm": torch.group_norm(channels_first, 2, weights["norm.weight"], weights["norm.bias"], 1e-6).permute(
            0, 2, 3, 1
        ),
    }
    for name in layers:
        assert peers.relative(theirs[name], outputs[name]) < 1e-5, name


# --- damaged and hostile files ---------------------------------------------------------------------------------------


ARRAYS = {
    "a_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(1, ml_dtypes.bfloat16)},
    "norm": {"scale": np.zeros((), np.float64), "bias": np.zeros((0, 4), np.float16)},
    "long": {"embedding": np.zeros((300, 70), np.int32)},
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(flax.serialization.to_bytes(ARRAYS))
    return path


def test_every_size_of_array(path):
    """Flax's reader and ours agree, from no number to more than fit a short length."""
    found = {}
    for name, tensor in msgpack.read(path).items():
        with tensor.view() as numbers:
            found[name] = numbers.copy()
    assert sorted(found) == ["a_0.bias", "a_0.weight", "long.weight", "norm.bias", "norm.weight"]
    np.testing.assert_array_equal(found["a_0.weight"], ARRAYS["a_0"]["kernel"].T)
    for name, array in (("a_0.bias", ARRAYS["a_0"]["bias"]), ("long.weight", ARRAYS["long"]["embedding"])):
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert found["norm.weight"].shape == () and found["norm.bias"].shape == (0, 4)


def test_cut_short(path):
    """Every length shorter than the whole is told, by one error that names the file and the remedy."""
    whole = path.read_bytes()
    for length in [*range(200), *range(200, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="flax_model.msgpack.*download or write it again"):
            msgpack.read(path)
    path.write_bytes(whole + b"\x00")
    with pytest.raises(ValueError, match="it ends at byte"):
        msgpack.read(path)


def test_changed_bytes(path):
    """Whatever a byte of the structure becomes, the file is refused or describes tensors inside it."""
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for at in rng.integers(0, 220, 600):
        path.write_bytes(whole[:at] + bytes([rng.integers(256)]) + whole[at + 1 :])
        try:
            tensors = msgpack.read(path)
        except ValueError as error:
            assert "flax_model.msgpack" in str(error)
            continue
        for tensor in tensors.values():
            assert tensor.offset + tensor.nbytes <= len(whole)
            with tensor.view() as numbers:
                assert numbers.shape == tensor.shape and numbers.nbytes == tensor.nbytes


def array(shape=(2,), dtype="float32", numbers=bytes(8), code=1, after=b"") -> bytes:
    """An entry for an array, as Flax packs one."""
    sizes = b"".join(b"\xcf" + n.to_bytes(8, "big") for n in shape)
    packed = b"\x93" + bytes([0x90 + len(shape)]) + sizes + text(dtype) + b"\xc4" + bytes([len(numbers)]) + numbers
    packed += after
    return b"\xc7" + bytes([len(packed), code]) + packed


def text(value: str) -> bytes:
    return bytes([0xA0 + len(value)]) + value.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "int where map should be"),
        (b"\x80", None),
        (b"\xdf\xff\xff\xff\xff", "ends at byte 5"),
        (b"\x81" + text("a") + array(), None),
        (b"\x81" + text("a") + array(shape=(3,)), r"shape \(3,\) and dtype float32 has 8 bytes"),
        (b"\x81" + text("a") + array(shape=(1 << 63, 1 << 63)), "has 8 bytes"),
        (b"\x81" + text("a") + array(after=b"\xc0"), "has 8 bytes in an entry of 30"),
        (b"\x81" + text("a") + array(dtype="object"), "a is of dtype 'object'"),
        (b"\x81" + text("a") + array(dtype="V8"), "a is of dtype 'V8'"),
        (b"\x81" + text("a") + array(code=3), "a is neither an array nor a map"),
        (b"\x81" + text("a") + b"\xc0", "begins with 0xc0"),
        (b"\x81" + text("a") + b"\x07", "a is neither an array nor a map"),
        (b"\x81" + b"\x07" + array(), "int where str should be"),
        (b"\x81" + b"\xa1\xff" + array(), "can't decode byte"),
        (b"\x82" + (text("a") + array()) * 2, "a comes twice"),
        (b"\x82" + text("net_0.b") + array() + text("net.0.b") + array(), "net.0.b comes twice"),
        (b"\x81" + text("a") + b"\xc9\xff\xff\xff\xff\x01\x93", "it ends at byte"),
        ((b"\x81" + text("a")) * 10_000 + array(), "more than 32 deep"),
    ],
)
def test_contents(content, message, path):
    path.write_bytes(content)
    if message is None:
        assert len(msgpack.read(path)) == content[0] - 0x80
    else:
        with pytest.raises(ValueError, match=message):
            msgpack.read(path)


def test_a_file_of_another_model(folder, tmp_path):
    """Names in the report are PyTorch's, whichever library wrote the file."""
    target = shutil.copytree(folder / "vae", tmp_path / "vae")
    shutil.copy(folder / "unet" / "diffusion_flax_model.msgpack", target)
    with pytest.raises(ValueError, match=r"(?s)does not fit AutoencoderKL.*\+ .*conv_norm_out.weight"):
        flaxdiff.AutoencoderKL.from_pretrained(target)
    (target / "diffusion_flax_model.msgpack").unlink()
    with pytest.raises(FileNotFoundError, match=r"a \.bin or a \.msgpack"):
        flaxdiff.AutoencoderKL.from_pretrained(target)


def test_round_trip_to_pytorch(emoji, folder, tmp_path):
    """A Flax checkpoint saved again is the PyTorch file that ours came from, number by number."""
    spec, params = flaxdiff.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=jnp.float32)
    flaxdiff.save(tmp_path, spec, params)
    name = "diffusion_pytorch_model.safetensors"
    saved, ours = safetensors.read(tmp_path / name), safetensors.read(flaxdiff.EMOJI / "unet" / name)
    assert saved.keys() == ours.keys()
    for key in saved:
        with saved[key].view() as numbers, ours[key].view() as before:
            np.testing.assert_array_equal(numbers, before.astype(np.float32))
