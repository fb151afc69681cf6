"""What becomes of decoded pictures, against PyTorch's: the checker's flags, black pictures, the watermark."""

import functools
import re
import sys
import types

import diffusers
import flax
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.pipelines.stable_diffusion_xl import watermark
from transformers import CLIPConfig, CLIPImageProcessor

import flaxdiff
from flaxdiff.pipelines import afterwards

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
KEY = jax.random.key(0)
LATENTS = normal(2, 8, 8, 4)
CALL = dict(prompt=["red", "cat"], num_inference_steps=2, output_type="np")
EXTRACTOR = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def checker():
    """Thresholds that nothing reaches, but the special concept's."""
    torch.manual_seed(0)
    vision = peers.image_encoder().config.to_dict() | {"projection_dim": 7}  # not the one that is read
    made = peers.lively(StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=24)))
    made.concept_embeds_weights[:], made.special_care_embeds_weights[:] = 2, 2
    return made


def checking():
    """As published, and of the two pictures that `CALL` makes the second is one that the checker flags."""
    made, looks = peers.stable_diffusion_1(), checker()
    made.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pictures = made(**{**CALL, "output_type": "pil"}, latents=peers.nchw(LATENTS)).images
        embeds = looks.visual_projection(looks.vision_model(EXTRACTOR(pictures, return_tensors="pt").pixel_values)[1])
        looks.concept_embeds[3] = embeds[1]
        looks.concept_embeds_weights[3] = (1 + torch.cosine_similarity(embeds[0], embeds[1], 0)) / 2
    made.register_modules(safety_checker=looks, feature_extractor=EXTRACTOR)
    return made


@functools.cache
def loaded():
    pipe, params = flaxdiff.load(peers.saved(checking))
    return pipe.replace(progress=False), params


# --- the checker -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_checker(old, tmp_path):
    """The flags of many pictures at many thresholds, some lowered by a special concept."""
    peer, pixels = checker(), normal(48, 32, 32, 3)
    pixels[:, :, :, 0] *= np.linspace(-3, 3, 48, dtype=np.float32)[:, None, None]
    peer.special_care_embeds_weights[1] = 0.3
    peer.save_pretrained(tmp_path)
    if old:  # the names of the published files
        tensors = {re.sub(r"^vision_model\.", "vision_model.vision_model.", k): v for k, v in peer.state_dict().items()}
        tensors["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        (tmp_path / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    spec, params = flaxdiff.StableDiffusionSafetyChecker.from_pretrained(tmp_path)
    assert spec.config.projection_dim == 24
    run, marks = jax.jit(functools.partial(flaxdiff.apply, spec)), set()
    for threshold in np.linspace(0, 0.6, 25, dtype=np.float32):
        peer.concept_embeds_weights[:] = float(threshold)
        theirs = peer(peers.nchw(pixels), [np.ones(1)] * len(pixels))[1]
        ours = run(params | {"concept_embeds_weights": jnp.full(17, threshold)}, pixels)
        assert peers.relative(ours, np.float32(theirs) + 1e-9, of="StableDiffusionSafetyChecker") < 1e-8
        marks |= set(theirs)
    assert marks == {True, False}


def test_checker_of_flax(tmp_path):
    """transformers' Flax class had the names of the published files."""
    peer, tree = checker(), {}
    for name, tensor in peer.state_dict().items():
        *path, last = re.sub(r"^vision_model\.", "vision_model.vision_model.", name).split(".")
        array = tensor.numpy()
        if last == "weight":
            last = {1: "scale", 2: "embedding" if "position_embedding" in path else "kernel", 4: "kernel"}[array.ndim]
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if last == "kernel" else array
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = array
    peer.config.save_pretrained(tmp_path)
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    _, ours = flaxdiff.StableDiffusionSafetyChecker.from_pretrained(tmp_path)
    peer.save_pretrained(tmp_path / "pytorch")
    _, theirs = flaxdiff.StableDiffusionSafetyChecker.from_pretrained(tmp_path / "pytorch")
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_flagged_pictures_are_black(output_type):
    (pipe, params), peer = loaded(), checking()
    call = CALL | {"output_type": output_type}
    with torch.no_grad():
        theirs = peer(**call, latents=peers.nchw(LATENTS))
    with pytest.warns(UserWarning, match="1 of 2 pictures were flagged by the safety checker and are black"):
        ours = pipe(params, KEY, **call, latents=LATENTS)
    assert ours.nsfw_content_detected == theirs.nsfw_content_detected == [False, True]
    images, there = (np.stack([np.float32(image) for image in out.images]) for out in (ours, theirs))
    assert not images[1].any() and images[0].any()
    if output_type == "np":
        assert peers.relative(images, there, of="StableDiffusionPipeline") < 1e-3
    assert np.abs(images - there).max() <= 1
    latent = pipe(params, KEY, **{**call, "output_type": "latent"}, latents=LATENTS)
    assert latent.nsfw_content_detected is None


def test_without_a_checker(tmp_path):
    pipe, params = loaded()
    off, own = flaxdiff.load(peers.saved(checking), safety_checker=None)
    assert "safety_checker" not in own and "safety_checker" not in dict(off.specs)
    assert type(pipe).from_pipe(pipe, safety_checker=None).replace(progress=True) == off
    out = off.replace(progress=False)(own, KEY, **CALL, latents=LATENTS)
    assert out.nsfw_content_detected is None and out.images[1].any()
    plain = peers.saved(peers.stable_diffusion_1)  # a folder that has none
    given, there = flaxdiff.load(plain, safety_checker=(pipe.safety_checker, params["safety_checker"]))
    assert dict(given.specs) == dict(pipe.specs) and there["safety_checker"] is params["safety_checker"]
    with pytest.raises(ValueError, match="params lacks safety_checker, by which .*safety_checker=None"):
        pipe({k: v for k, v in params.items() if k != "safety_checker"}, KEY, **CALL)


def test_saved_with_its_checker(tmp_path):
    """PyTorch's pipeline loads it, its feature extractor included, and flags as ours."""
    pipe, params = loaded()
    flaxdiff.save(tmp_path / "saved", pipe, params)
    peer = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    peer.set_progress_bar_config(disable=True)
    assert peer(**CALL, latents=peers.nchw(LATENTS)).nsfw_content_detected == [False, True]
    again, own = flaxdiff.load(tmp_path / "saved")
    assert dict(again.specs) == dict(pipe.specs)
    assert all(np.array_equal(own["safety_checker"][k], v) for k, v in params["safety_checker"].items())


@pytest.mark.parametrize("jit", [False, True])
def test_checked_as_flax_did(jit):
    pipeline, params = flaxdiff.FlaxStableDiffusionPipeline.from_pretrained(peers.saved(checking))
    ids, latents = pipeline.prepare_text_inputs(CALL["prompt"]), jnp.moveaxis(LATENTS, -1, 1)
    key = jax.random.key(0)
    if jit:
        devices = jax.devices()[:1]
        params = jax.tree.map(lambda a: a[None], params)
        ids, latents, key = ids[None], latents[None], jax.random.split(key, len(devices))
    with pytest.warns(UserWarning, match="1 of 2 pictures were flagged"):
        out = pipeline(ids, params, key, num_inference_steps=2, latents=latents, jit=jit)
    assert out.nsfw_content_detected == [False, True] and out.images.shape == (1,) * jit + (2, 16, 16, 3)
    assert not out.images.reshape(2, -1)[1].any()


def test_a_damaged_configuration():
    with pytest.raises(ValueError, match=r"vision_config=\['x'\] is no object of settings"):
        flaxdiff.StableDiffusionSafetyChecker.from_config({"vision_config": ["x"]})


# --- the watermark ---------------------------------------------------------------------------------------------------


class Encoder:
    """In place of the package's: what it does to a pixel depends on the bits and on which channel is blue."""

    def set_watermark(self, kind, bits):
        assert kind == "bits"
        self.shift = np.float32(np.cumsum(bits)[-3:])

    def encode(self, image, method="dwtDct"):
        assert method == "dwtDct" and image.dtype == np.float32 and image.shape[-1] == 3
        return image + self.shift * np.float32([1, 2, 4])


@pytest.fixture
def package(monkeypatch):
    monkeypatch.setitem(sys.modules, "imwatermark", types.SimpleNamespace(WatermarkEncoder=Encoder))
    monkeypatch.setattr(watermark, "WatermarkEncoder", Encoder, raising=False)
    afterwards.encoder.cache_clear()
    yield
    afterwards.encoder.cache_clear()


def test_watermark(package):
    there = watermark.StableDiffusionXLWatermarker()
    for width in (248, 264):
        images = np.float32(rng.uniform(size=(2, 8, width, 3)))
        theirs = peers.nhwc(there.apply_watermark(2 * peers.nchw(images) - 1)) / 2 + 0.5
        np.testing.assert_allclose(flaxdiff.invisible_watermark(images), theirs, atol=1e-6)


def test_a_pipeline_marks_its_pictures(package, monkeypatch):
    pipe, params = flaxdiff.load(peers.saved(peers.stable_diffusion_xl), add_watermarker=True)
    assert pipe.watermark is flaxdiff.invisible_watermark
    plain, call = pipe.replace(progress=False, watermark=None), dict(prompt="red", num_inference_steps=1)
    images = plain(params, KEY, **call, output_type="np").images
    marked = plain.replace(watermark=lambda images: 1 - images)
    assert marked.program is plain.program
    np.testing.assert_allclose(marked(params, KEY, **call, output_type="np").images, 1 - images, atol=1e-6)
    assert np.asarray(marked(params, KEY, **call).images[0]).shape == (16, 16, 3)
    monkeypatch.setattr(afterwards, "SMALLEST", 8)
    out = plain.replace(watermark=pipe.watermark)(params, KEY, **call, output_type="np").images
    np.testing.assert_allclose(out, flaxdiff.invisible_watermark(images), atol=1e-6)


def test_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    afterwards.encoder.cache_clear()
    with pytest.raises(ImportError, match="pip install invisible-watermark"):
        flaxdiff.load(add_watermarker=True)
    with pytest.raises(ImportError, match="or give watermark= a function of your own"):
        flaxdiff.invisible_watermark(np.zeros((1, 256, 256, 3), np.float32))
