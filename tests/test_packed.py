"""Weights that lie in a file as several tensors: those of bitsandbytes against what it unpacks, and scaled ones."""

import copy
import json

import bitsandbytes
import diffusers
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import safetensors.torch
import test_flux as flux
import torch
from test_single_file import as_original

import flaxdiff
from flaxdiff.checkpoint import files


def layer(kind: str, bias: bool = True) -> torch.nn.Module:
    """A packed layer of odd sizes."""
    torch.manual_seed(0)
    plain, where = torch.nn.Linear(130, 70, bias), bitsandbytes.nn
    if kind == "int8":
        made = where.Linear8bitLt(130, 70, bias, has_fp16_weights=False)
    else:
        made = where.Linear4bit(130, 70, bias, quant_type=kind[:3], compress_statistics=kind.endswith("nested"))
    made.load_state_dict(plain.state_dict())
    return made.to("cpu")


def dense(made: torch.nn.Module) -> torch.Tensor:
    """What its weight stands for: what it makes of the unit vectors."""
    if isinstance(made, bitsandbytes.nn.Linear8bitLt):
        return made.weight.data.float() * made.weight.SCB[:, None] / 127
    state = copy.copy(made.weight.quant_state)
    shape, state.shape = (
        state.shape,
        (1, made.weight.quant_state.shape.numel()),
    )  # on a CPU rows of less than a block fail
    return bitsandbytes.functional.dequantize_4bit(made.weight.data, state).float().reshape(shape)


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "fp4", "int8"])
def test_unpacked(kind, tmp_path):
    made = layer(kind)
    state = {f"a.{k}": v for k, v in made.state_dict().items() if isinstance(v, torch.Tensor)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    found = files.open_weights(tmp_path / "model.safetensors")
    assert set(found) == {"a.weight", "a.bias"} and found["a.weight"].shape == (70, 130)
    with found["a.weight"].view() as numbers:
        np.testing.assert_allclose(numbers, dense(made), atol=1e-6)


def test_into_a_kind_that_runs(tmp_path):
    """Whole numbers with a scale a row are what `Int8` is, so that packing them again gives them back."""
    made = layer("int8")
    safetensors.torch.save_file({f"a.{k}": v for k, v in made.state_dict().items()}, tmp_path / "model.safetensors")
    with files.open_weights(tmp_path / "model.safetensors")["a.weight"].view() as numbers:
        again = flaxdiff.weights.quantize(jnp.asarray(numbers.T))
        np.testing.assert_array_equal(again.q, made.weight.data.numpy().T)
        np.testing.assert_allclose(127 * again.scale, made.weight.SCB, rtol=1e-6)
        rounded = flaxdiff.weights.quantize(jnp.asarray(numbers.T, jnp.bfloat16))
        assert np.abs(np.int32(rounded.q) - np.int32(again.q)).max() == 1


def scaled(weight: torch.Tensor, rows: bool, kind: torch.dtype = torch.float8_e4m3fn) -> tuple:
    """A weight in eight bits and its scale, one or one for each row, and what they stand for."""
    peak = weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()
    scale = (peak / torch.finfo(kind).max).float()
    packed = (weight / scale).to(kind)
    return packed, scale, packed.float() * scale


@pytest.mark.parametrize("newer", [False, True])
def test_scaled_floats(newer, tmp_path):
    """Flux in the names of Black Forest Labs, queries, keys and values in one; with the marks of both generations."""
    spec, _ = flaxdiff.FluxTransformer2DModel.from_pretrained(flux.folder(), subfolder="transformer")
    own = flux.transformer(guidance_embeds=True).state_dict()
    state = {k: v.contiguous() for k, v in as_original(spec, own).items()}
    weight, read = ("weight_scale", "input_scale") if newer else ("scale_weight", "scale_input")
    dense, prefix = {}, "model.diffusion_model."
    packed = {prefix + "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for i, (name, value) in enumerate(state.items()):
        dense[name] = packed[prefix + name] = value
        if "blocks" in name and value.ndim == 2:
            at = prefix + name.removesuffix("weight")
            kind = torch.float8_e5m2 if i % 5 == 0 else torch.float8_e4m3fn
            packed[prefix + name], packed[at + weight], dense[name] = scaled(value, i % 2 == 0, kind)
            packed[at + read] = torch.ones(1)
            if newer:
                packed[at + "comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    for name, tensors in (("packed", packed), ("dense", {prefix + k: v for k, v in dense.items()})):
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    load = lambda name: flaxdiff.FluxTransformer2DModel.from_single_file(
        tmp_path / f"{name}.safetensors", axes_dims_rope=(4, 4, 4)
    )[1]
    found, wanted = load("packed"), load("dense")
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
    assert sum(k.endswith(weight) for k in packed) > 10


def test_a_network(tmp_path):
    """Of which all linear layers are packed: the one of what they stand for."""
    peer = peers.unet()
    peer.save_pretrained(tmp_path)
    config, state = json.loads((tmp_path / "config.json").read_text()), dict(peer.state_dict())
    for name, module in peer.named_modules():
        if isinstance(module, torch.nn.Linear):
            made = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, False, quant_type="nf4")
            made.load_state_dict({"weight": module.weight}, strict=False)
            made = made.to("cpu")
            module.weight.data = dense(made)
            state |= {f"{name}.{k}": v for k, v in made.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, params = flaxdiff.UNet2DConditionModel.from_pretrained(tmp_path)
    peer.save_pretrained(tmp_path / "dense")
    _, wanted = flaxdiff.UNet2DConditionModel.from_pretrained(tmp_path / "dense")
    assert isinstance(peer, diffusers.UNet2DConditionModel)
    far = {n: np.abs(params[n] - wanted[n]).max() for n in wanted if not np.allclose(params[n], wanted[n], atol=1e-6)}
    assert not far


def test_damaged(tmp_path):
    state = {f"a.{k}": v for k, v in layer("nf4 nested").state_dict().items()}
    path = tmp_path / "model.safetensors"

    def refused(changes, message):
        kept = {k: v for k, v in (state | changes).items() if v is not None}
        safetensors.torch.save_file(kept, path)
        with pytest.raises(ValueError, match=message):
            files.open_weights(path)

    said = "a.weight.quant_state.bitsandbytes__nf4"
    refused({said: torch.tensor(list(b"{}"), dtype=torch.uint8)}, "what is said of the packed weight 'a.weight' is not")
    refused({"a.weight.absmax": None}, "what is said of the packed weight 'a.weight' is not complete")
    refused({"a.weight": state["a.weight"][:5]}, "the parts of the packed weight 'a.weight' of shape .70, 130. do not")
    state.clear()
    eight = torch.ones(4, 2, dtype=torch.float8_e4m3fn)
    refused(
        {"a.scale_weight": torch.ones(()), "a.weight": torch.ones(4, 2)}, "scales one of float32; known are weights"
    )
    refused({"a.scale_weight": torch.ones(()), "a.weight": eight[0, 0]}, "the packed weight 'a.weight' has shape ")
    refused({"a.weight_scale": torch.ones(())}, "a.weight_scale scales no such weight")
    refused({"a.scale_weight": torch.ones(3), "a.weight": eight}, "a.scale_weight has shape .3,. for a weight of")
    refused({"a.scale_weight": torch.ones(2, 2), "a.weight": eight}, "a.scale_weight has shape .2, 2. for a weight of")
    refused({"a.SCB": torch.ones(3), "a.weight": torch.ones(4, 2)}, "a.SCB has shape .3,., and no weight with as many")
