"""LoRA and its kin: every format finds its place, what is put on computes what PyTorch's diffusers and PEFT compute."""

import copy
import dataclasses
import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import peers
import peft
import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from safetensors.numpy import save_file
from test_pipelines import KEY, compare, load

import flaxdiff
from flaxdiff import published, weights
from flaxdiff.adapters import formats, lora
from flaxdiff.checkpoint import convert, original
from flaxdiff.weights import LoRA

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
OPTIONS = dict(prompt=["a red dog"], negative_prompt=["ugly"], num_inference_steps=2, guidance_scale=4.0)
TARGETS = r"to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.[02](\.proj)?|[qkv]_proj|out_proj|fc[12]"
LOCON = TARGETS + r"|conv[12]|conv|conv_shortcut|time_emb_proj|conv_in|conv_out"


def modules(specs, targets=TARGETS):
    """(component, module, shape in a file) of what a LoRA updates."""
    for component, spec in specs.items():
        for name, leaf in flaxdiff.layout(spec).items():
            for own in convert.names_in_file(name, leaf):
                module = own.removesuffix(".weight")
                if leaf.kind in ("linear", "conv") and re.search(rf"\.({targets})$", f".{module}"):
                    yield component, module, convert.shape_in_file(leaf)


def pair(shape, rank, scale=0.3):
    """Random factors as PyTorch keeps them: down [rank, in, kh, kw], up [out, rank, 1, 1]."""
    return scale * normal(rank, *shape[1:]), scale * normal(shape[0], rank, *(1,) * (len(shape) - 2))


def write(folder, arrays):
    path = folder / "lora.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)
    return path


KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


def kohya(component, module, several=False):
    prefix = "lora_te1_" if several and component == "text_encoder" else KOHYA[component]
    return prefix + module.replace(".", "_")


def specs_of(name):
    """component -> spec, at full size."""
    _, components, _ = published.MODELS[name]
    described = {component: published.COMPONENTS[full] for component, full in components.items()}
    return {component: getattr(flaxdiff, cls).from_config(config) for component, (cls, config) in described.items()}


# --- formats ----------------------------------------------------------------------------------------------------------


def older(component, module):
    """Names of diffusers before PEFT."""
    module = re.sub(r"\.to_out\.0$", ".to_out", re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", module))
    processed = re.sub(r"(attn[12])\.(to_\w+)$", r"\1.processor.\2_lora", module)
    if processed != module or "self_attn" in module:
        return f"{component}.{processed}" + ("_lora" if processed == module else "")
    return f"{component}.{module}." + ("lora_linear_layer" if component != "unet" else "lora")


FORMATS = {
    "diffusers": lambda c, m: (f"{c}.{m}.lora_A.weight", f"{c}.{m}.lora_B.weight"),
    "older": lambda c, m: (f"{older(c, m)}.down.weight", f"{older(c, m)}.up.weight"),
    "kohya": lambda c, m: (f"{kohya(c, m)}.lora_down.weight", f"{kohya(c, m)}.lora_up.weight"),
    "kohya for two encoders": lambda c, m: (
        f"{kohya(c, m, True)}.lora_down.weight",
        f"{kohya(c, m, True)}.lora_up.weight",
    ),
}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_key_at_full_size(form, name):
    specs = {c: s for c, s in specs_of(name).items() if c != "vae"}
    known, listed = lora.places(specs), list(modules(specs, TARGETS if form == "older" else LOCON))
    assert len(listed) > 250
    for component, module, _ in listed:
        for key in FORMATS[form](component, module):
            found, unknown = formats.modules({key: None})
            (place,) = known[next(iter(found))]
            assert not unknown and (place.component, place.module) == (component, module), key


def test_every_key_of_the_original_unet_at_full_size():
    """Kohya's SDXL files name the blocks of SGM; diffusers' own conversion says where they belong."""
    specs = specs_of("sdxl")
    known, spec = lora.places(specs), specs["unet"]
    listed = [module for component, module, _ in modules(specs) if component == "unet"]
    old = original.names(spec, [f"{module}.weight" for module in listed])
    keys = {"lora_unet_" + n.removesuffix(".weight").replace(".", "_") + ".lora_down.weight": m for m, n in old.items()}
    theirs = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(dict(keys), spec.config)
    assert len(theirs) == len(listed) > 700
    for key, weight in theirs.items():
        key = key.replace("input_b", "down_b").replace("middle_b", "mid_b").replace("output_b", "up_b")
        assert key.removesuffix(".lora_down.weight") == kohya("unet", weight.removesuffix(".weight"))
    for key, weight in keys.items():
        ((found, _),) = formats.modules({key: None})[0].items()
        assert known[found][0].module + ".weight" == weight


# --- against PyTorch --------------------------------------------------------------------------------------------------


def tiny(build):
    """A tiny pipeline, here and there; here with the encoders and the U-Net that a LoRA may update."""
    pipe, params, peer = load(build)
    return pipe, params, peer, {name: spec for name, spec in pipe.specs if name != "vae"}


def same(pipe, params, peer, **more):
    return compare(pipe, params, peer, OPTIONS, latents=LATENTS, **more)


LATENTS = normal(1, 8, 8, 4)
UNET = r"to_[qkv]|to_out\.0|proj_in|ff\.net\.2"


@pytest.mark.slow
def test_diffusers_file_and_weights(tmp_path):
    """Loaded there and here: whole, at half, by block, beside another, merged in and taken off."""
    pipe, params, peer, specs = tiny(peers.stable_diffusion_xl)
    paths = []
    for i, rank in enumerate((2, 3)):
        arrays = {}
        for component, module, shape in modules({"unet": specs["unet"]}, UNET):
            for key, array in zip(FORMATS["diffusers"](component, module), pair(shape, rank)):
                arrays[key] = array
        (tmp_path / str(i)).mkdir()
        paths.append(write(tmp_path / str(i), arrays))
        peer.load_lora_weights(str(paths[i]), adapter_name=f"a{i}")
    one, two = (flaxdiff.read_lora(pipe, path) for path in paths)
    plain = pipe(params, KEY, **OPTIONS, latents=LATENTS, output_type="np").images
    for names, scales in (
        (["a0"], [1.0]),
        (["a1"], [0.5]),
        (["a0", "a1"], [0.7, -0.4]),
        (["a0", "a1"], [{"down": 0.1, "up": {"block_0": [0.3, 0.9]}}, {"mid": 0.2}]),
    ):
        peer.set_adapters(names, [{"unet": s} if isinstance(s, dict) else s for s in scales])
        adapters = [{"a0": one, "a1": two}[name] for name in names]
        adapted = flaxdiff.set_adapters(params, adapters, scales)
        assert same(pipe, adapted, peer) < 1e-3
    assert np.abs(pipe(adapted, KEY, **OPTIONS, latents=LATENTS, output_type="np").images - plain).max() > 1e-3
    fused = flaxdiff.fuse_lora(adapted)
    assert not flaxdiff.adapter_of(fused) and same(pipe, fused, peer) < 1e-3
    back = flaxdiff.unfuse_lora(fused, flaxdiff.adapter_of(adapted))
    for name, weight in params["unet"].items():
        np.testing.assert_allclose(back["unet"][name], weight, atol=1e-5)
        assert flaxdiff.unload_lora(adapted)["unet"][name] is weight


def weights_of(spec, params):
    """Weights as a file has them, adapters merged in."""
    fused = flaxdiff.fuse_lora({"it": params})["it"]
    for name, leaf in flaxdiff.layout(spec).items():
        yield from convert.to_file(name, leaf, np.asarray(fused[name]))


def same_weights(pipe, adapted, peer):
    """Whether the weights of every network agree, once PyTorch's adapters are merged in."""
    peer.fuse_lora()
    peer.unload_lora_weights()
    for component, spec in pipe.specs:
        theirs = {k.removeprefix("text_model."): v for k, v in getattr(peer, component).state_dict().items()}
        for name, weight in weights_of(spec, adapted[component]):
            there = theirs[name.removeprefix("text_model.")].numpy()
            np.testing.assert_allclose(weight, there.reshape(weight.shape), atol=2e-5, err_msg=f"{component} {name}")


@pytest.mark.parametrize("build", [peers.stable_diffusion_1, peers.stable_diffusion_xl])
def test_kohya_file(build, tmp_path):
    """LoCon on convolutions and attentions, with alphas: the weights that PyTorch's diffusers gets."""
    pipe, params, peer, specs = tiny(build)
    arrays = {}
    for component, module, shape in modules({"unet": specs["unet"]}, LOCON):
        name = kohya(component, module)
        down, up = pair(shape, 4)
        arrays |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": np.float32(2)}
    path = write(tmp_path, arrays)
    peer.load_lora_weights(str(path))
    adapted = flaxdiff.load_lora(pipe, params, path)
    assert len(adapted["unet"]) == len(params["unet"])
    same_weights(pipe, adapted, peer)


def test_saved_loads_in_pytorch(tmp_path):
    """What we save: stacked layers of which some have no update, text encoders, scales that are not one."""
    pipe, params, peer, specs = tiny(peers.stable_diffusion_xl)
    arrays = {}
    for i, (component, module, shape) in enumerate(modules(specs, TARGETS)):
        if i % 3:
            down, up = pair(shape, 2 + i % 2)
            a, b = FORMATS["diffusers"](component, module)
            arrays |= {a: down, b: up}
    adapter = flaxdiff.read_lora(pipe, write(tmp_path, arrays))
    halved = flaxdiff.adapter_of(flaxdiff.set_adapters(params, [adapter], [0.5]))
    flaxdiff.save_lora(tmp_path / "saved", pipe, halved)
    del peer.text_encoder.__dict__["text_model"]  # by which diffusers tells transformers 4
    peer.load_lora_weights(str(tmp_path / "saved"))
    same_weights(pipe, flaxdiff.set_adapters(params, [adapter], [0.5]), peer)
    again = flaxdiff.read_lora(pipe, tmp_path / "saved")
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, again, adapter))


# --- DoRA -------------------------------------------------------------------------------------------------------------


LAYERS = {"linear": torch.nn.Linear(6, 5), "conv": torch.nn.Conv2d(4, 6, 3, stride=2, padding=1)}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("kind", LAYERS)
def test_dora_as_peft_does(kind):
    """A DoRA, a LoRA, and a DoRA upon both, each at a scale of its own: results, gradients, and all merged in."""
    model = torch.nn.Sequential(copy.deepcopy(LAYERS[kind]))
    adapters, scales = {}, {"a": 0.7, "b": -0.4, "c": 1.3}
    for name in scales:
        options = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], use_dora=name != "b")
        peft.inject_adapter_in_model(options, model, name)
    layer = model[0]
    base, axes = layer.weight, (1, 0) if kind == "linear" else (2, 3, 1, 0)
    ours = lambda tensor: jnp.asarray(tensor.detach().numpy().transpose(axes))
    params = {"unet": {"w": ours(base)}}
    for name in scales:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        torch.nn.init.normal_(up)
        update = LoRA(None, ours(down), ours(up), jnp.ones(2))
        if name != "b":
            there = layer.lora_magnitude_vector[name].weight
            zero = dataclasses.replace(update, up=0 * update.up, magnitude=jnp.full(len(up), jnp.nan))
            begun = flaxdiff.set_adapters(params, [{"unet": {"w": zero}}])["unet"]["w"].magnitude
            np.testing.assert_allclose(begun, there.detach().reshape(-1), rtol=1e-6)  # the norms of the weight
            torch.nn.init.uniform_(there, 0.5, 2)
            update = dataclasses.replace(update, magnitude=jnp.asarray(there.detach().reshape(-1).numpy()))
        adapters[name] = {"unet": {"w": update}}
    layer.set_adapter(list(scales))
    for name, scale in scales.items():
        layer.set_scale(name, scale)
    x = normal(3, 6) if kind == "linear" else normal(2, 5, 5, 4)
    run = weights.dot if kind == "linear" else functools.partial(weights.conv, strides=(2, 2), padding=((1, 1),) * 2)
    theirs = model(torch.tensor(x) if kind == "linear" else peers.nchw(x))
    bias = layer.bias.detach().numpy()
    last = lambda y: y if kind == "linear" else y.permute(0, 2, 3, 1)
    adapted = flaxdiff.set_adapters(params, adapters, scales)
    w = adapted["unet"]["w"]
    np.testing.assert_allclose(run(x, w) + bias, last(theirs).detach(), atol=1e-5)
    # One after the other is the same, and so is what is on, put on again.
    again = flaxdiff.set_adapters(params, [flaxdiff.adapter_of(adapted)])["unet"]["w"]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, w))

    theirs.square().sum().backward()
    gradient = jax.grad(lambda w: jnp.sum((run(x, w) + bias) ** 2))(w)
    for name in ("c", "b", "a"):
        expected = [layer.lora_A[name].weight.grad, layer.lora_B[name].weight.grad]
        for got, grad in zip((gradient.down, gradient.up), expected):
            np.testing.assert_allclose(got, ours(grad), rtol=1e-4, atol=1e-4, err_msg=name)
        if name != "b":
            grad = layer.lora_magnitude_vector[name].weight.grad.reshape(-1)
            np.testing.assert_allclose(gradient.magnitude, grad, rtol=1e-4, atol=1e-4, err_msg=name)
        gradient = gradient.base

    layer.merge()
    fused = flaxdiff.fuse_lora(adapted)["unet"]["w"]
    np.testing.assert_allclose(fused, ours(layer.get_base_layer().weight), atol=1e-5)
    np.testing.assert_allclose(run(x, fused), run(x, w), atol=1e-5)
    for refused, fault in (
        (lambda: flaxdiff.unfuse_lora({"unet": {"w": fused}}, flaxdiff.adapter_of(adapted)), "keep the parameters"),
        (lambda: flaxdiff.merge_adapters([adapters["a"], adapters["b"]], [1.0, 1.0]), "do not add up"),
        (lambda: flaxdiff.set_adapters(params, [adapters["a"]], [[0.5, 1.0]]), "give it one weight"),
    ):
        with pytest.raises(ValueError, match=fault):
            refused()


def test_dora_file(tmp_path):
    """On convolutions and attentions, some layers of a stack: read, weighed, saved, each time as PyTorch has it."""
    pipe, params, peer, specs = tiny(peers.stable_diffusion_xl)
    arrays = {}
    for i, (component, module, shape) in enumerate(modules({"unet": specs["unet"]}, r"to_[qv]|ff\.net\.2|conv1")):
        if i % 3:
            down, up = pair(shape, 2)
            a, b = FORMATS["diffusers"](component, module)
            magnitude = 1 + np.abs(normal(*((1, shape[0], 1, 1) if len(shape) > 2 else shape[:1])))
            arrays |= {a: down, b: up, f"{component}.{module}.lora_magnitude_vector": magnitude}
    path = write(tmp_path, arrays)
    adapted = flaxdiff.load_lora(pipe, params, path, scale=0.5)
    flaxdiff.save_lora(tmp_path / "saved", pipe, flaxdiff.adapter_of(adapted))
    peer.load_lora_weights(str(path), adapter_name="a")
    peer.set_adapters("a", 0.5)
    same_weights(pipe, adapted, peer)
    _, _, peer, _ = tiny(peers.stable_diffusion_xl)
    peer.load_lora_weights(str(tmp_path / "saved"))
    same_weights(pipe, adapted, peer)
    both = flaxdiff.load_lora(pipe, adapted, path)
    with pytest.raises(ValueError, match="save each alone"):
        flaxdiff.save_lora(tmp_path / "both", pipe, flaxdiff.adapter_of(both))


def test_dora_scale(tmp_path):
    """Kohya's and LyCORIS' magnitudes, of outputs; those of inputs are refused."""
    pipe, params, _, _ = tiny(peers.stable_diffusion_1)
    module = "mid_block.resnets.0.conv1"
    key, weight = kohya("unet", module), dict(weights_of(pipe.unet, params["unet"]))[f"{module}.weight"]
    (down, up), magnitude = pair(weight.shape, 2), 1 + np.abs(normal(len(weight), 1, 1, 1))
    factors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": np.float32(1)}
    path = write(tmp_path, factors | {f"{key}.dora_scale": magnitude})
    whole = weight + np.einsum("rikl,or->oikl", down, up[..., 0, 0]) / 2
    expected = magnitude * whole / np.sqrt((whole**2).sum((1, 2, 3), keepdims=True))
    adapted = flaxdiff.load_lora(pipe, params, path)["unet"]
    np.testing.assert_allclose(dict(weights_of(pipe.unet, adapted))[f"{module}.weight"], expected, atol=1e-5)
    write(tmp_path, factors | {f"{key}.dora_scale": magnitude.transpose(1, 0, 2, 3)})
    with pytest.raises(ValueError, match=r"magnitudes of \[1, 32, 1, 1\], not one for each of its 32 outputs"):
        flaxdiff.read_lora(pipe, path)


# --- LyCORIS' kinds, and what is wrong with a file --------------------------------------------------------------------


def lycoris(kind, shape):
    """The tensors of one module, and the update that they stand for by the formulas of the paper."""
    (out, inside), kernel = shape[:2], shape[2:]
    size, r, alpha = inside * int(np.prod(kernel)), 3, np.float32(2)
    if kind == "loha":
        t = {"w1_a": normal(out, r), "w1_b": normal(r, size), "w2_a": normal(out, r), "w2_b": normal(r, size)}
        return _keys("hada", t, alpha), (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"]) * alpha / r
    if kind == "locon with a core":
        down, mid, up = normal(r, inside, 1, 1), normal(r, r, *kernel), normal(out, r, 1, 1)
        t = {".lora_down.weight": down, ".lora_mid.weight": mid, ".lora_up.weight": up, ".alpha": alpha}
        dense = np.einsum("pi,ijkl,jc->pckl", up[..., 0, 0], mid, down[..., 0, 0]) * alpha / r
        return t, dense.reshape(out, -1)
    a, b = 4, 2
    w1 = normal(a, b)
    if kind == "lokr":
        t = {"w1": w1, "w2_a": normal(out // a, r), "w2_b": normal(r, size // b)}
        w2, scale = t["w2_a"] @ t["w2_b"], alpha / r
    elif kind == "lokr, both in factors":
        t = {"w1_a": normal(a, r), "w1_b": normal(r, b), "w2_a": normal(out // a, r), "w2_b": normal(r, size // b)}
        w1, w2, scale = t["w1_a"] @ t["w1_b"], t["w2_a"] @ t["w2_b"], alpha / r
    else:
        t = {"w1": w1, "w2": normal(out // a, inside // b, *kernel)}
        w2, scale = t["w2"].reshape(out // a, -1), 1  # alpha means nothing without a rank
    return _keys("lokr", t, alpha), np.kron(w1, w2) * scale


def _keys(prefix, tensors, alpha):
    return {f".{prefix}_{k}": v for k, v in tensors.items()} | {".alpha": alpha}


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr, both in factors", "lokr, both whole", "locon with a core"])
def test_lycoris(kind, tmp_path):
    pipe, params, _, _ = tiny(peers.stable_diffusion_1)
    files = {name: leaf for name, leaf in flaxdiff.layout(pipe.unet).items()}
    linear = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"
    for name in ["mid_block.resnets.0.conv1.weight"] + [linear] * ("core" not in kind):
        tensors, update = lycoris(kind, convert.shape_in_file(files[name]))
        key = kohya("unet", name.removesuffix(".weight"))
        adapted = flaxdiff.load_lora(pipe, params, write(tmp_path, {key + k: v for k, v in tensors.items()}), scale=0.5)
        ours = dict(weights_of(pipe.unet, adapted["unet"]))[name] - dict(weights_of(pipe.unet, params["unet"]))[name]
        assert peers.relative(ours.reshape(len(ours), -1), 0.5 * update) < 1e-4


def test_peft_folder_with_its_configuration(tmp_path):
    """PEFT keeps alpha beside the weights, by pattern too; diffusers in the header."""
    pipe, params, _, _ = tiny(peers.stable_diffusion_1)
    module = "mid_block.attentions.0.transformer_blocks.0.attn2.to_"
    shape = flaxdiff.layout(pipe.unet)[f"{module}k.weight"].shape
    down, up = normal(4, shape[0]), normal(shape[1], 4)
    arrays = {}
    for x in "kv":
        arrays |= {
            f"base_model.model.{module}{x}.lora_A.weight": down,
            f"base_model.model.{module}{x}.lora_B.weight": up,
        }
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8, "alpha_pattern": {"attn2.to_v": 2}, "r": 4}')
    adapter = flaxdiff.read_lora(pipe, tmp_path)["unet"]
    assert [float(adapter[f"{module}{x}.weight"].scale[0]) for x in "kv"] == [2, 0.5]
    (tmp_path / "header").mkdir()
    arrays = {k.replace("base_model.model.", "unet."): v for k, v in arrays.items()}
    notes = {"lora_adapter_metadata": '{"unet.lora_alpha": 6, "unet.r": 4, "unet.use_rslora": true}'}
    save_file(arrays, tmp_path / "header" / "x.safetensors", metadata=notes)
    adapter = flaxdiff.read_lora(pipe, tmp_path / "header" / "x.safetensors")["unet"]
    assert float(adapter[f"{module}k.weight"].scale[0]) == 3  # 6 / √4


def test_a_file_that_does_not_fit(tmp_path):
    """Each fault is listed; with strict=False the rest is loaded and the faults come back."""
    pipe, params, _, specs = tiny(peers.stable_diffusion_1)
    fits = "unet.mid_block.attentions.0.proj_in.lora_"
    arrays = {f"{fits}A.weight": normal(2, 32), f"{fits}B.weight": normal(32, 2)}
    wrong = {
        "unet.mid_block.attentions.0.proj_out.lora_A.weight": normal(2, 99),
        "unet.mid_block.attentions.0.proj_out.lora_B.weight": normal(32, 2),
        "unet.conv_in.lora_A.weight": normal(2, 4, 3, 3),
        "unet.transformer.nowhere.lora_A.weight": normal(2, 4),
        "lora_unet_mid_block_attentions_0_proj_in.dora_scale": normal(2),
    }
    path = write(tmp_path, arrays | wrong)
    with pytest.raises(ValueError, match="1 unexpected, 3 misshapen") as error:
        flaxdiff.load_lora(pipe, params, path)
    for part in (
        "updates a weight of [32, 99]",
        "[32, 32]",
        "conv_in has no up",
        "nowhere",
        "has no down beside ['dora_scale']",
        "strict=False",
    ):
        assert part in str(error.value), part
    adapter, report = flaxdiff.read_lora(pipe, path, strict=False)
    assert list(adapter["unet"]) == ["mid_block.attentions.0.proj_in.weight"]
    assert len(report.unexpected) == 1 and len(report.misshapen) == 3
    with pytest.raises(ValueError, match="another base model"):
        xl = tiny(peers.stable_diffusion_xl)
        flaxdiff.set_adapters(xl[1], [adapter])
    with pytest.raises(ValueError, match="infinities"):
        flaxdiff.read_lora(pipe, write(tmp_path, {k: np.inf * v for k, v in arrays.items()}))
    with pytest.raises(FileNotFoundError, match="weight_name="):
        flaxdiff.read_lora(pipe, tmp_path)
    with pytest.raises(ValueError, match="2 weights"):
        flaxdiff.set_adapters(params, [adapter], [1.0, 2.0])
    with pytest.raises(ValueError, match="name the same"):
        flaxdiff.set_adapters(params, {"a": adapter}, {"b": 1.0})


# --- values -----------------------------------------------------------------------------------------------------------


def random_adapter(specs, rank, targets=UNET):
    """An adapter on every target, stacked layers too."""
    made = {}
    for component, spec in specs.items():
        for name, leaf in flaxdiff.layout(spec).items():
            if leaf.kind in ("linear", "conv") and re.search(rf"\.({targets})\.weight$", f".{name}"):
                lead = leaf.shape[:1] if leaf.stack else ()
                down, up = (
                    (*leaf.shape[:-1], rank),
                    (*lead, *(1,) * (len(leaf.shape) - 2 - len(lead)), rank, leaf.shape[-1]),
                )
                update = LoRA(
                    None, jnp.asarray(0.2 * normal(*down)), jnp.asarray(0.2 * normal(*up)), jnp.ones((*lead, rank))
                )
                made.setdefault(component, {})[name] = update
    return made


@pytest.mark.slow
def test_swapping_and_weighing_compile_nothing():
    """Eight adapters of a rank, weights, weights by block: one compiled step."""
    pipe, params, _, specs = tiny(peers.stable_diffusion_xl)
    spec, count = specs["unet"], 0
    text, added = normal(2, 5, 32), {"text_embeds": normal(2, 24), "time_ids": normal(2, 6)}

    @jax.jit
    def run(own):
        nonlocal count
        count += 1
        return flaxdiff.apply(spec, own, normal_in, jnp.float32(3), text, added)

    normal_in = normal(2, 8, 8, 4)
    adapters = [random_adapter(specs, 4, LOCON.replace("|time_emb_proj", "")) for _ in range(8)]
    results = [run(flaxdiff.set_adapters(params, [a])["unet"]) for a in adapters]
    results += [run(flaxdiff.set_adapters(params, [adapters[0]], [w])["unet"]) for w in (0.0, 0.5, {"up": 0.3})]
    assert count == 1 and len({float(r.sum()) for r in results}) == 11
    assert peers.relative(results[8], run(params["unet"])) < 1e-5  # which compiles: there is no adapter
    # A weight for each image, two branches in the batch: what each image gives alone.
    each = flaxdiff.set_adapters(params, [adapters[0], adapters[1]], [np.float32([0.0, 0.8]), 0.5])["unet"]
    own = run(each)
    for i, w in enumerate((0.0, 0.8)):
        alone = run(flaxdiff.set_adapters(params, adapters[:2], [w, 0.5])["unet"])
        assert peers.relative(own[i], alone[i]) < 1e-5
    name = "down_blocks.0.resnets.0.conv1.weight"
    x = normal(2, 6, 6, 16)
    twice = weights.conv(np.repeat(x, 2, 0), each[name])  # both branches of an image
    assert peers.relative(twice[1::2], weights.conv(x, each[name])) < 1e-6
    with pytest.raises(ValueError, match="2 images, and the batch is 3"):
        weights.conv(normal(3, 6, 6, 16), each[name])
    with pytest.raises(ValueError, match="for each image"):
        weights.dense(each[name])
    times = random_adapter(specs, 2, "time_emb_proj")
    with pytest.raises(ValueError, match="all images at once"):
        flaxdiff.set_adapters(params, [times], [[0.1, 0.2]])


@pytest.mark.slow
def test_per_image_in_a_whole_pipeline():
    """One batch, one prompt, two strengths of an adapter: each picture is what it is alone."""
    pipe, params, _, specs = tiny(peers.stable_diffusion_1)
    adapter = random_adapter(specs, 2, TARGETS)
    options = dict(prompt=["red", "red"], num_inference_steps=2, output_type="np", latents=np.repeat(LATENTS, 2, 0))
    both = pipe(flaxdiff.set_adapters(params, [adapter], [[0.0, 0.7]]), KEY, **options).images
    programs = []
    for i, w in enumerate((0.0, 0.7)):
        alone = pipe(flaxdiff.set_adapters(params, [adapter], [w]), KEY, **options).images
        np.testing.assert_allclose(both[i], alone[i], atol=1e-4)
        programs.append(peers.programs())
    pipe(flaxdiff.set_adapters(params, [random_adapter(specs, 2, TARGETS)]), KEY, **options)
    programs.append(peers.programs())
    assert programs[0] == programs[1] == programs[2]  # another weight and another adapter compile nothing
    assert np.abs(both[0] - both[1]).max() > 1e-3


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cat", "linear", "ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_merged_as_peft_does(kind, monkeypatch):
    """PEFT's own functions on the same factors; where entries are dropped at random, the same ones."""
    from peft.utils import merge_utils

    one, two = (
        {"unet": {"w": LoRA(None, *map(jnp.asarray, (normal(6, 3), normal(3, 5), np.full(3, s, np.float32))))}}
        for s in (2, 0.5)
    )
    loras, given, density, key = [a["unet"]["w"] for a in (one, two)], [0.8, -0.6], 0.5, jax.random.key(3)
    merged = flaxdiff.merge_adapters([one, two], given, kind, density=density, key=key)["unet"]["w"]
    delta = lambda lora: (np.asarray(lora.down) * np.asarray(lora.scale)) @ np.asarray(lora.up)
    if kind == "cat":
        expected = sum(w * delta(lora) for w, lora in zip(given, loras))
        np.testing.assert_allclose(delta(merged), expected, atol=1e-5)
        return
    scaled = torch.tensor([w * float(lora.scale[0]) for w, lora in zip(given, loras)])
    options = {} if kind == "linear" else {"density": density}
    function = getattr(merge_utils, "task_arithmetic" if kind == "linear" else kind)
    monkeypatch.setattr(torch, "bernoulli", lambda like: masks.pop(0))
    for name, sign, own in (("down", scaled.sign(), 0), ("up", 1, 1)):
        arrays = [np.asarray(getattr(lora, name)) for lora in loras]
        folded = jax.random.split(jax.random.fold_in(key, zlib.crc32(b"unet.w")))[own]
        masks = [torch.tensor(np.float32(m)) for m in jax.random.bernoulli(folded, density, (2, *arrays[0].shape))]
        theirs = function([torch.tensor(a) for a in arrays], scaled.abs().sqrt() * sign, **options)
        np.testing.assert_allclose(getattr(merged, name), theirs.numpy(), atol=1e-6)


def test_merging_layer_by_layer_and_its_faults():
    """A stack is merged as its layers are, each on its own; what cannot be merged is said."""
    stacks = [
        LoRA(None, *map(jnp.asarray, (normal(2, 6, 3), normal(2, 3, 5), np.ones((2, 3), np.float32)))) for _ in "ab"
    ]
    whole = flaxdiff.merge_adapters([{"u": {"w": s}} for s in stacks], [0.5, 0.7], "ties", density=0.3)["u"]["w"]
    for i in range(2):
        layers = [{"u": {"w": jax.tree.map(lambda a, i=i: a[i], s)}} for s in stacks]
        alone = flaxdiff.merge_adapters(layers, [0.5, 0.7], "ties", density=0.3)["u"]["w"]
        np.testing.assert_allclose(whole.up[i], alone.up, atol=1e-6)
        np.testing.assert_allclose(whole.down[i], alone.down, atol=1e-6)
    small = {"u": {"w": LoRA(None, jnp.ones((6, 2)), jnp.ones((2, 5)), jnp.ones(2))}}
    for options, fault in (
        ({"combination_type": "svd"}, "not known"),
        ({"combination_type": "ties", "density": 0.0}, "density"),
        ({"combination_type": "dare_ties"}, "PRNG key"),
        ({"weights": [1.0]}, "give one for each"),
        ({"combination_type": "linear"}, "needs equal ranks"),
    ):
        with pytest.raises(ValueError, match=fault):
            flaxdiff.merge_adapters([layers[0], small], **{"weights": [1.0, 1.0], **options})
