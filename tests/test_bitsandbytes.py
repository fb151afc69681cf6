"""Weights that bitsandbytes has packed, against what it unpacks itself."""

import copy
import json

import bitsandbytes
import diffusers
import numpy as np
import peers
import pytest
import safetensors.torch
import torch

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
    refused({"a.SCB": torch.ones(3), "a.weight": torch.ones(4, 2)}, "a.SCB has shape .3,., and no weight with as many")
