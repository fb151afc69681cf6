"""Bad files: each gives one clear error that names the thing and the remedy, and runs nothing."""

import collections
import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import flaxdiff
from flaxdiff import registry
from flaxdiff.checkpoint import load_model, pickles, safetensors, save_model

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {"block_out_channels": [8], "norm_num_groups": 4}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    spec = flaxdiff.AutoencoderKL.from_config(TINY)
    save_model(folder, spec, flaxdiff.init(spec, jax.random.key(0)))
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A model that a test may damage."""
    return shutil.copytree(pristine, tmp_path / "vae")


def load(folder, **options):
    return load_model(flaxdiff.AutoencoderKL, folder, **options)


def numbers(path):
    """name -> the bytes of each tensor, when the file can be read."""
    found = {}
    for name, tensor in safetensors.read(path).items():
        with tensor.view() as view:
            found[name] = (view.dtype, view.shape, view.tobytes())
    return found


# --- safetensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 3, 8, 100, -1, -1000])
def test_truncated_file(left, folder):
    path = folder / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[:left])
    with pytest.raises(ValueError, match=f"{path}: .*damaged or incomplete; download or write it again"):
        load(folder)


def test_surplus_bytes(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load(folder)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Every bit of a file written here: an error that names the file, other names, or the same numbers."""
    path = tmp_path / "model.safetensors"
    arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    safetensors.write(path, {name: (a.shape, a.dtype) for name, a in arrays.items()}, arrays.values())
    data, expected = path.read_bytes(), numbers(path)
    caught = 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = numbers(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            caught += 1
        else:
            assert found == expected or set(found) != set(expected), bit
    start = 8 + int.from_bytes(data[:8], "little")
    assert caught > 8 * (len(data) - start)


def test_flipped_exponent_in_a_file_without_checksums(folder):
    path = folder / WEIGHTS
    arrays = load_file(path)
    arrays["decoder.conv_in.bias"][3] = np.inf
    save_file(arrays, path)
    with pytest.raises(ValueError, match=f"{path}: decoder.conv_in.bias holds infinities or NaNs"):
        load(folder)


def write_raw(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1}',
        b'{"a": {}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        {"a": entry("F99")},
        {"a": entry(["F32"])},
        {"a": entry(shape=(3,))},
        {"a": entry(shape="22")},
        {"a": entry(shape=(-1, -2))},
        {"a": entry(shape=(2.0,))},
        {"a": entry(shape=(True, 2))},
        {"a": entry(shape=(2**62, 4, 2**62))},
        {"a": entry(begin=-8, end=0)},
        {"a": entry(begin=8, end=0)},
        {"a": entry(), "b": entry()},  # overlap
        {
            "a": entry(shape=(1,), end=4),
            "b": entry(shape=(0,), begin=6, end=6),
            "c": entry(shape=(1,), begin=6, end=10),
        },
        {"a": entry(shape=(1,), end=4)},  # surplus
        {"a": entry(), "b": entry(begin=8, end=16)},  # beyond the end
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": entry() | {"data_offsets": [0]}},
        {"__metadata__": 3, "a": entry()},
        {"__metadata__": {"crc32": "["}, "a": entry()},
        {"__metadata__": {"crc32": 7}, "a": entry()},
    ],
    ids=str,
)
def test_header_that_lies(header, tmp_path):
    path = tmp_path / "model.safetensors"
    write_raw(path, {"a": entry()}, bytes(8))
    assert list(safetensors.read(path)) == ["a"]
    write_raw(path, header, bytes(8))
    with pytest.raises(ValueError, match=f"{path}: .*download or write it again"):
        safetensors.read(path)


def test_header_that_lies_about_its_length(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(ValueError, match="header would take"):
        safetensors.read(path)


# --- shards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    spec = flaxdiff.AutoencoderKL.from_config(TINY)
    save_model(tmp_path / "sharded", spec, flaxdiff.init(spec, jax.random.key(0)), max_shard_size=20_000)
    return tmp_path / "sharded"


def edit(path, change):
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    ["../vae/" + WEIGHTS, "/etc/passwd", "..", "", "sub/" + WEIGHTS, WEIGHTS + ".index.json", "a\0b", "secret.bin"],
)
def test_index_that_points_elsewhere(name, sharded):
    index = sharded / f"{WEIGHTS}.index.json"
    edit(index, lambda i: i["weight_map"].update({"decoder.conv_in.bias": name}))
    with pytest.raises(ValueError, match=re.escape(f"{index} names the shard {name!r}")):
        load(sharded)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: i.clear(), "does not say which file"),
        (lambda i: i.update(weight_map=[1]), "does not say which file"),
        (lambda i: i["weight_map"].update(ghost=next(iter(i["weight_map"].values()))), "1 tensors are in none"),
        (lambda i: i["weight_map"].pop("decoder.conv_in.bias"), "decoder.conv_in.bias.*does not place there"),
        (lambda i: i["weight_map"].update({"decoder.conv_in.bias": 3}), "does not say which file"),
    ],
)
def test_index_that_does_not_agree_with_its_shards(change, message, sharded):
    edit(sharded / f"{WEIGHTS}.index.json", change)
    with pytest.raises(ValueError, match=message):
        load(sharded)


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*-00002-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}.*download"):
        load(sharded)


# --- a checkpoint that does not fit ---------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_listed_at_once(folder):
    path = folder / WEIGHTS
    arrays = load_file(path)
    lost = arrays.pop("encoder.conv_in.bias")
    arrays["decoder.conv_in.bias"] = np.zeros(3, np.float32)
    arrays["encoder.conv_in.weight"] = arrays["encoder.conv_in.weight"].transpose(1, 0, 2, 3).copy()
    arrays["decoder.conv_norm_out.weight"] = np.ones(8, np.int32)
    arrays |= {f"surplus.{i}": lost for i in range(40)}
    save_file(arrays, path)
    with pytest.raises(ValueError) as error:
        load(folder)
    text = str(error.value)
    for part in (
        str(path),
        "AutoencoderKL",
        "1 missing, 40 unexpected, 2 misshapen, 1 not of floating point",
        "- encoder.conv_in.bias [8]",
        "+ surplus.0 [8]",
        "… and 28 more",
        "± decoder.conv_in.bias is [3], the model has [8]",
        "± encoder.conv_in.weight is [3, 8, 3, 3], the model has [8, 3, 3, 3]",
        "± decoder.conv_norm_out.weight is int32",
        "take both from one folder",
    ):
        assert part in text
    assert text.count("\n") < 25


def test_two_names_for_one_parameter(folder):
    path = folder / WEIGHTS
    arrays = load_file(path)
    key = "decoder.mid_block.attentions.0.to_q.weight"
    save_file(arrays | {key.replace("to_q", "query"): arrays[key]}, path)
    with pytest.raises(ValueError, match=f"1 there twice.*\n.*± {key}"):
        load(folder)


def test_numbers_too_large_for_the_dtype(folder):
    path = folder / WEIGHTS
    arrays = load_file(path)
    arrays["decoder.conv_in.bias"][0] = 1e6
    save_file(arrays, path)
    with pytest.raises(
        ValueError, match="decoder.conv_in.bias has numbers too large for float16; load with dtype=bfloat16"
    ):
        load(folder, dtype=jnp.float16)
    assert load(folder, dtype=jnp.bfloat16)[1]["decoder.conv_in.bias"][0] > 9e5


@pytest.mark.parametrize("dtype", ["int8", "float64"])
def test_dtype_that_networks_do_not_run_in(dtype, folder):
    with pytest.raises(ValueError, match=f"{dtype}.*float32, bfloat16, float16"):
        load(folder, dtype=dtype)


def test_unknown_setting(folder):
    with pytest.raises(ValueError, match="no setting 'scan_layer'; did you mean.*scan_layers"):
        load(folder, scan_layer=False)


def test_sharding_that_leaves_parameters_out(folder):
    with pytest.raises(ValueError, match="sharding says nothing of decoder.conv_in.bias"):
        load(folder, sharding={})


# --- pickles --------------------------------------------------------------------------------------------------------


class Shell:
    """Pickles as a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Evaluated(Shell):
    """Pickles as a call of eval."""

    def __reduce__(self):
        return eval, (f"__import__('os').system({self.command!r})",)


class Attribute(Shell):
    """Pickles as a class of ours with a state that would be given to it."""

    def __reduce__(self):
        return collections.Counter, (), {"a": Shell(self.command)}


@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "kind, named", [(Shell, "os.system"), (Evaluated, "builtins.eval"), (Attribute, "collections.Counter")]
)
def test_pickle_that_wants_to_run_something(kind, named, protocol, container, folder):
    (folder / WEIGHTS).unlink()
    path, proof = folder / "diffusion_pytorch_model.bin", folder / "proof"
    state = {"a": torch.ones(2), "b": kind(f"touch {proof}")}
    if container == "bare":
        path.write_bytes(pickle.dumps(state["b"], protocol))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=container == "zip", pickle_protocol=protocol)
    with pytest.raises(ValueError, match=f"{path} wants to call (__builtin__|{named}).*safetensors"):
        load(folder)
    assert not proof.exists()
    # The test itself must bite: the ordinary reader runs what is inside.
    pickle.loads(path.read_bytes()) if container == "bare" else torch.load(path, weights_only=False)
    assert proof.exists()


def archive(path, code, storages=()):
    """PyTorch's container around a hand-written pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", code)
        for key, data in storages:
            file.writestr(f"archive/data/{key}", data)


def tensor_code(offset=0, shape=(2,), stride=(1,), numel=2, storage="FloatStorage"):
    """{"a": a tensor}, as PyTorch pickles it, with any numbers."""

    class Stored:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", getattr(torch, storage), "0", "cpu", numel) if isinstance(value, Stored) else None

        def reducer_override(self, value):
            if isinstance(value, Described):
                return torch._utils._rebuild_tensor_v2, (
                    Stored(),
                    offset,
                    shape,
                    stride,
                    False,
                    collections.OrderedDict(),
                )
            return NotImplemented

    class Described:
        pass

    out = io.BytesIO()
    Pickler(out, 2).dump({"a": Described()})
    return out.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"numel": 2**40},
        {"shape": (3,)},
        {"offset": 1},
        {"offset": -1},
        {"shape": (2,), "stride": (2,)},
        {"shape": (2,), "stride": (-1,), "offset": 1},
        {"shape": (2, 1)},
        {"shape": ("2",)},
        {"shape": (2**62, 2**62), "stride": (1, 1)},
        {"storage": "QInt8Storage"},
    ],
    ids=str,
)
def test_pickled_tensor_that_lies(options, tmp_path):
    path = tmp_path / "model.bin"
    data = np.arange(2, dtype=np.float32).tobytes()
    archive(path, tensor_code(), [("0", data)])
    assert list(pickles.read(path)) == ["a"]
    archive(path, tensor_code(**options), [("0", data)])
    with pytest.raises(ValueError, match=f"{path}: it is not a PyTorch file of tensors"):
        pickles.read(path)


# Tuples of twice the same tuple, thirty deep: to use one as a key, Python would hash a thousand million.
TUPLES = b"\x80\x02)q\x000" + b"h\0h\0\x86q\x000" * 30 + b"}h\0Ns."


@pytest.mark.parametrize(
    "code",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02}.",
        b"\x80\x02N.",
        b"\x80\x02R.",
        b"\x80\x02t.",
        b"\x80\x02h\x07.",
        b"\x80\x02](]e.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02}]N s.",
        b"\x80\x02K\x01K\x02Q.",
        b"\x80\x02cos\nsystem\n.",  # named, and never called
        b"\xff\xff\xff",
        b"I" + b"9" * 5000 + b"\n.",
        # Tuples of tuples, thirty deep: as a key they would be hashed a thousand million times.
        b"\x80\x02})" + b"2\x86" * 30 + b"Ns.",
    ],
)
def test_pickle_that_is_none(code, tmp_path):
    archive(tmp_path / "model.bin", code)
    if code == b"\x80\x02}.":
        assert pickles.read(tmp_path / "model.bin") == {}
    else:
        with pytest.raises(ValueError, match="not a PyTorch file of tensors|uses the pickle instruction"):
            pickles.read(tmp_path / "model.bin")


def test_damaged_pickles(tmp_path):
    path = tmp_path / "model.bin"
    for legacy in (True, False):
        torch.save({"a": torch.arange(1000.0)}, path, _use_new_zipfile_serialization=not legacy)
        data = path.read_bytes()
        for left in (0, 10, 500, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:left])
            with pytest.raises(ValueError, match=f"{path}: "):
                pickles.read(path)
    count = struct.pack("<Q", 1000)
    legacy = io.BytesIO()
    torch.save({"a": torch.arange(1000.0)}, legacy, _use_new_zipfile_serialization=False)
    path.write_bytes(legacy.getvalue().replace(count, struct.pack("<Q", 999)))
    with pytest.raises(ValueError, match="999 numbers where 1,000 should be"):
        pickles.read(path)
    at = data.index(np.arange(1000, dtype=np.float32)[500:502].tobytes())
    path.write_bytes(data[:at] + b"\1" + data[at + 1 :])
    with pytest.raises(ValueError, match=f"{path}: .*checksum"), pickles.read(path)["a"].view():
        pass
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", tensor_code())
    with pytest.raises(ValueError, match="compressed"):
        pickles.read(path)


# --- folders and configurations -------------------------------------------------------------------------------------


def test_neither_a_folder_nor_a_repository(tmp_path):
    for name in (tmp_path / "nowhere", "no such/repository!", "some/repository-that-was-never-downloaded"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{str(name)!r} is no folder here")):
            load(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
        load(tmp_path / "file")


def test_missing_component(folder):
    with pytest.raises(FileNotFoundError, match="subfolder 'unet', has no config.json"):
        load(folder, subfolder="unet")
    with pytest.raises(FileNotFoundError, match=r"no config.json; give subfolder= one of \['vae'\]"):
        load(folder.parent)


def test_missing_weights(folder):
    with pytest.raises(FileNotFoundError, match=r"has no diffusion_pytorch_model.fp16.safetensors.*Use variant=None"):
        load(folder, variant="fp16")
    (folder / WEIGHTS).rename(folder / WEIGHTS.replace(".safe", ".fp16.safe"))
    with pytest.raises(FileNotFoundError, match="Use variant='fp16'"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '"text"'])
def test_configuration_that_is_none(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(folder / "config.json"))):
        load(folder)


def test_configuration_with_an_unknown_key(folder):
    edit(folder / "config.json", lambda c: c.update(blok_out_channels=[8]))
    with pytest.raises(ValueError, match="no option 'blok_out_channels'.*did you mean block_out_channels"):
        load(folder)


# --- names ----------------------------------------------------------------------------------------------------------


def test_unknown_class_name():
    with pytest.raises(
        ValueError, match="no model or scheduler or pipeline called 'UNet2DConditionModle'; did you mean UNet2DC"
    ):
        registry.find("UNet2DConditionModle")
    with pytest.raises(ValueError, match="It has .*AutoencoderKL"):
        registry.find("os.system")
    with pytest.raises(ValueError, match="no model called 'load'"):
        registry.find("load", "model")
    with pytest.raises(AttributeError, match="flaxdiff has no 'FluxPipelin'"):
        _ = flaxdiff.FluxPipelin


def test_every_public_name_is_there():
    for name in flaxdiff.__all__:
        assert getattr(getattr(flaxdiff, name), "__name__", name) == name


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"_class_name": "NoSuchPipeline"}, ValueError, "no pipeline called 'NoSuchPipeline'"),
        ({"_class_name": None}, ValueError, "no pipeline called 'None'"),
        ({"_defaults": [3]}, ValueError, "_defaults is no object"),
        ({"unet": ["os", "system"]}, ValueError, "no model or scheduler or tokenizer called 'system'"),
        ({"unet": ["diffusers", "DDPMPipeline"]}, ValueError, "called 'DDPMPipeline'"),
        ({"../unet": ["diffusers", "UNet2DModel"]}, ValueError, "'../unet', which cannot be a subfolder"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, FileNotFoundError, "subfolder 'vae', has no config.json"),
        ({"scheduler_2": ["diffusers", "DDIMScheduler"]}, FileNotFoundError, "no scheduler_config.json"),
        ({"tokenizer": ["transformers", "CLIPTokenizer"]}, FileNotFoundError, "no subfolder 'tokenizer'"),
    ],
)
def test_pipeline_index_that_lies(change, error, message, tmp_path):
    import peers

    folder = shutil.copytree(peers.saved(peers.ddpm), tmp_path / "ddpm")
    edit(folder / "model_index.json", lambda index: index.update(change))
    with pytest.raises(error, match=re.escape(message)):
        flaxdiff.load(folder)


def test_model_in_place_of_a_pipeline(folder):
    with pytest.raises(FileNotFoundError, match="no model_index.json and so no pipeline; it holds one model"):
        flaxdiff.load(folder)
