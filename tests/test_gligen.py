"""GLIGEN: objects in boxes, against PyTorch's networks and pipelines with the same noise."""

import diffusers
import jax
import numpy as np
import peers
import pytest
import torch
from diffusers.pipelines.stable_diffusion import CLIPImageProjection
from test_tasks import EXTRACTOR, compare, made, pillow, vision
from transformers import CLIPProcessor, CLIPVisionModelWithProjection

import flaxdiff
from flaxdiff.nn.attention import seen
from flaxdiff.pipelines.beside import KNOWN
from flaxdiff.pipelines.tasks import blank_inputs
from flaxdiff.schedulers import tables

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
KEY = jax.random.key(0)
BOXES = [(0.1, 0.2, 0.6, 0.75), (0.5, 0.0, 1.0, 0.5)]
CALL = dict(
    prompt="cat", num_inference_steps=4, guidance_scale=3.0, gligen_phrases=["red", "a dog"], gligen_boxes=BOXES
)


def gated(kind="gated", **options):
    """Its gates are open, and what stands for no object is something: both begin at zero."""
    net = peers.unet(attention_type=kind, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "alpha_" in name:
                p.fill_(0.8)
            if "null_" in name:
                p.normal_()
    return net


def text(**options):
    return made(peers.stable_diffusion_1, "StableDiffusionGLIGENPipeline", "DDIMScheduler", unet=gated(**options))


def text_image(**options):
    torch.manual_seed(0)
    parts = dict(
        unet=gated("gated-text-image", **options),
        image_encoder=CLIPVisionModelWithProjection(vision(2)).eval(),
        image_project=CLIPImageProjection(16),
        processor=CLIPProcessor(EXTRACTOR, peers.tokenizer()),
    )
    return made(peers.stable_diffusion_1, "StableDiffusionGLIGENTextImagePipeline", "DDIMScheduler", **parts)


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gated", "gated-text-image"])
@pytest.mark.parametrize("scan", [True, False])
def test_unet(kind, scan, tmp_path):
    peer = gated(kind, transformer_layers_per_block=2)
    peer.save_pretrained(tmp_path)
    spec, params = flaxdiff.UNet2DConditionModel.from_pretrained(tmp_path, scan_layers=scan)
    x, context, boxes, t = normal(2, 8, 8, 4), normal(2, 5, 16), np.float32(rng.uniform(size=(2, 3, 4))), 7
    masks = np.float32([[1, 1, 0], [0, 1, 0]])
    kinds = ("positive",) if kind == "gated" else ("phrases", "image")
    features = {k: (normal(2, 3, 16), masks if k == "positive" else masks * np.float32([0, 1, 1])) for k in kinds}
    told = dict(boxes=boxes, masks=masks)
    for name, (feature, there) in features.items():
        told |= {f"{name}_embeddings": feature} | ({} if name == "positive" else {f"{name}_masks": there})
    told = {k: torch.tensor(v) for k, v in told.items()}
    with torch.no_grad():
        run = lambda **more: peers.nhwc(peer(peers.nchw(x), t, torch.tensor(context), **more).sample)
        theirs, plain = run(cross_attention_kwargs={"gligen": told}), run()
    objects = flaxdiff.apply(spec, params, boxes, masks, *features.values(), method="grounded")
    weighed = lambda weight: tuple((k, v, np.full(k.shape[:2], weight, np.float32)) for k, v in objects)
    ours = flaxdiff.apply(spec, params, x, t, context, objects=weighed(1))
    assert peers.relative(ours, theirs, of="UNet2DConditionModel") < 1e-5
    assert peers.relative(theirs, plain) > 1e-2
    for off in (dict(objects=weighed(0)), {}):
        assert peers.relative(flaxdiff.apply(spec, params, x, t, context, **off), plain) < 1e-5
    with seen() as pairs:  # whoever watches attention sees it as it is without objects
        flaxdiff.apply(spec, params, x, t, context, objects=weighed(1))
    assert len(pairs) == 2 * sum(map(len, spec.module(spec.config).blocks))


def test_other_networks_know_no_boxes():
    spec, params = flaxdiff.UNet2DConditionModel.from_pretrained(
        peers.saved(peers.stable_diffusion_1), subfolder="unet"
    )
    with pytest.raises(ValueError, match="knows no objects in boxes: its attention_type is 'default'"):
        flaxdiff.apply(spec, params, np.zeros((1, 3, 4)), np.ones((1, 3)), method="grounded")


def test_image_projection(tmp_path):
    torch.manual_seed(0)
    peer, x = CLIPImageProjection(16), normal(3, 16)
    peer.save_pretrained(tmp_path)
    spec, params = flaxdiff.CLIPImageProjection.from_pretrained(tmp_path)
    with torch.no_grad():
        theirs = peer(torch.tensor(x))
    assert peers.relative(flaxdiff.apply(spec, params, x), theirs, of="CLIPImageProjection") < 1e-6


# --- the pipelines ---------------------------------------------------------------------------------------------------


def test_phrases(monkeypatch, tmp_path):
    """In no, some and all of the steps, with guidance and without; and these are values."""
    pipe, params, peer = text()
    plain = pipe(params, KEY, **CALL, gligen_scheduled_sampling_beta=0.0, latents=normal(1, 8, 8, 4), output_type="np")
    sizes = peers.programs()
    for beta, scale in ((0.0, 3.0), (0.5, 3.0), (1.0, 2.0), (0.3, 1.0)):
        options = CALL | dict(gligen_scheduled_sampling_beta=beta, guidance_scale=scale)
        assert compare(monkeypatch, pipe, params, peer, options, normal(1, 8, 8, 4)) < 1e-3
        if scale > 1:
            assert peers.programs() == sizes
    assert np.isfinite(plain.images).all()
    options = CALL | dict(prompt=["cat", "red"], gligen_phrases=["cat"], gligen_boxes=BOXES[:1])
    assert compare(monkeypatch, pipe, params, peer, options, normal(2, 8, 8, 4)) < 1e-3
    flaxdiff.save(tmp_path / "saved", pipe, params)
    again = diffusers.StableDiffusionGLIGENPipeline.from_pretrained(tmp_path / "saved", requires_safety_checker=False)
    there = peer.unet.state_dict()
    assert all(torch.equal(there[k], v) for k, v in again.unet.state_dict().items())
    assert blank_inputs(pipe, batch=2)["gligen_boxes"].shape == (2, 30, 4)


@pytest.mark.parametrize(
    "given",
    [
        dict(gligen_phrases=["red", "a dog"], gligen_images=[pillow(40, 50, 3), pillow(32, 32, 3)]),
        dict(gligen_phrases=None, gligen_images=[pillow(40, 50, 3), None]),
        dict(gligen_phrases=["red", None], gligen_images=None),
        dict(
            gligen_phrases=["red", "x"],
            gligen_images=[pillow(40, 50, 3)] * 2,
            gligen_boxes=[BOXES[0], (0.0, 1.0, 0.0, 1.0)],
            input_phrases_mask=[1, 0],
            input_images_mask=[0, 1],
            gligen_normalize_constant=5.0,
        ),
    ],
)
def test_phrases_and_pictures(given, monkeypatch):
    pipe, params, peer = text_image()
    assert compare(monkeypatch, pipe, params, peer, CALL | given, normal(1, 8, 8, 4)) < 1e-3


@pytest.mark.parametrize("build", [text, text_image])
def test_painting_into_a_picture(build, monkeypatch):
    """The noise that each step puts over what is kept is the key's."""
    pipe, params, peer = build(in_channels=9)
    keys = jax.vmap(jax.random.split)(tables.image_keys(KEY, 1, np.arange(1)))[:, 0]
    own = lambda i: jax.random.normal(jax.random.fold_in(jax.random.fold_in(keys[0], KNOWN), i), (1, 8, 8, 4))
    draws = iter([own(i) for i in range(4)])
    for shape in ((16, 16, 3), (24, 31, 3)):
        options = CALL | dict(gligen_inpaint_image=pillow(*shape), gligen_scheduled_sampling_beta=1.0)
        draws = iter([own(i) for i in range(4)])
        monkeypatch.setattr(torch, "randn_like", lambda like, draws=draws: peers.nchw(next(draws)))
        assert compare(monkeypatch, pipe, params, peer, options, normal(1, 8, 8, 4)) < 1e-3
    with pytest.raises(ValueError, match="4 channels of the sample and 0 beside it, but it takes 9"):
        pipe.prepare_inputs(**CALL)
    with pytest.raises(ValueError, match="is a Pillow picture into whose gligen_boxes objects are painted"):
        pipe.prepare_inputs(prompt="cat", gligen_inpaint_image=pillow(16, 16, 3))
    with pytest.raises(ValueError, match="is a Pillow picture"):
        pipe.prepare_inputs(**CALL, gligen_inpaint_image="it.png")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(gligen_phrases=["red"]), "gligen_phrases has 1 entries for 2 gligen_boxes; give one for each"),
        (dict(gligen_boxes=BOXES[:1]), "gligen_phrases has 2 entries for 1 gligen_boxes"),
        (dict(gligen_boxes=[BOXES[0], (0.5, 0, 1.2, 1)]), r"\(0.5, 0.0, 1.2, 1.0\) leaves the picture.*from 0 to 1"),
        (dict(gligen_boxes=[BOXES[0], (-0.1, 0, 1, 1)]), "leaves the picture"),
        (dict(gligen_boxes=[BOXES[0], (0.6, 0, 0.6, 1)]), r"has nothing inside; left < right and top < bottom"),
        (dict(gligen_boxes=[BOXES[0], (0, 0.7, 1, 0.2)]), r"has nothing inside"),
        (dict(gligen_boxes=[BOXES[0], (0, 1, 0, 1)]), r"has nothing inside"),  # a style is of a picture
        (dict(gligen_boxes=[BOXES[0], (0, 0, 1)]), r"\(0, 0, 1\) is no box; give four numbers"),
        (dict(gligen_boxes=[BOXES[0], (0, 0, float("nan"), 1)]), "is no box"),
        (dict(gligen_boxes=BOXES * 16, gligen_phrases=["x"] * 32), "32 boxes; there is room for 30"),
        (dict(gligen_phrases=["red", 3]), "phrases are texts, but 3 is a int"),
        (dict(gligen_scheduled_sampling_beta=1.5), "beta=1.5 is the share of the steps with objects: from 0 to 1"),
    ],
)
def test_bad_objects(given, message):
    pipe = flaxdiff.StableDiffusionGLIGENPipeline.from_pipe(flaxdiff.load()[0])
    plain = pipe.replace(unet=pipe.unet.replace(in_channels=pipe.vae.config.latent_channels))
    with pytest.raises(ValueError, match=message):
        plain.prepare_inputs(**CALL | given)


def test_bad_pictures():
    pipe, _, _ = text_image()
    with pytest.raises(ValueError, match="gligen_images has 1 entries for 2 gligen_boxes"):
        pipe.prepare_inputs(**CALL, gligen_images=[pillow(8, 8, 3)])
    with pytest.raises(ValueError, match="input_images_mask has 3 entries for 2 gligen_boxes"):
        pipe.prepare_inputs(**CALL, gligen_images=[pillow(8, 8, 3)] * 2, input_images_mask=[1, 0, 1])
