"""Pipelines that draw a class and not a prompt, against PyTorch's with the same noise."""

import json
import shutil

import diffusers
import jax
import numpy as np
import peers
import pytest
import torch

import flaxdiff
from flaxdiff.pipelines.tasks import blank_inputs

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
KEY = jax.random.key(0)


def consistency(**options):
    """As published for ImageNet, in small: stages that attend resample by residual blocks, and there are classes."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 16, 32),
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "norm_num_groups": 8,
            "attn_norm_num_groups": 8,
            "layers_per_block": 1,
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "num_class_embeds": 10,
            **options,
        }
    ).eval()
    return diffusers.ConsistencyModelPipeline(net, diffusers.CMStochasticIterativeScheduler())


def plain_consistency():
    return consistency(num_class_embeds=None)


def load(build):
    peer = build()
    peer.set_progress_bar_config(disable=True)
    pipe, params = flaxdiff.DiffusionPipeline.from_pretrained(peers.saved(build))
    assert type(pipe).__name__ == type(peer).__name__
    return pipe.replace(progress=False), params, peer


def test_unet_2d_with_classes():
    pipe, params, peer = load(consistency)
    x, t, labels = normal(2, 8, 8, 3), np.float32([3, 981]), np.int32([7, 0])
    with torch.no_grad():
        theirs = peer.unet(peers.nchw(x), torch.tensor(t), torch.tensor(labels)).sample
    ours = flaxdiff.apply(pipe.unet, params["unet"], x, t, labels)
    assert peers.relative(ours, peers.nhwc(theirs), of="UNet2DModel") < 1e-4
    with pytest.raises(ValueError, match="conditioned on one of 10 classes: give class_labels"):
        flaxdiff.apply(pipe.unet, params["unet"], x, t)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (consistency, dict(class_labels=[3, 8], num_inference_steps=1)),
        (consistency, dict(class_labels=[3, 8], num_inference_steps=None, timesteps=[22, 0])),
        (plain_consistency, dict(num_inference_steps=None, timesteps=[17, 5, 0])),
    ],
)
def test_consistency_models(build, options, monkeypatch):
    pipe, params, peer = load(build)
    latents, draws = normal(2, 8, 8, 3), [normal(2, 8, 8, 3) for _ in range(3)]
    queue = iter(draws)
    module = diffusers.schedulers.scheduling_consistency_models
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: peers.nchw(next(queue)))
    with torch.no_grad():
        theirs = peer(**options, batch_size=2, latents=peers.nchw(latents), output_type="np").images
    inputs = pipe.prepare_inputs(**options, batch_size=2, latents=latents)
    made = peers.with_noise(pipe, params, inputs, draws)
    assert peers.relative(made, theirs, of="ConsistencyModelPipeline") < 1e-3


def test_any_class_is_the_key_s():
    """One for each picture, from the whole range; a program of its own is not needed."""
    pipe, params, _ = load(consistency)
    made = lambda **options: pipe(params, KEY, batch_size=4, output_type="np", **options).images
    drawn = made()
    labels = [pipe.program.begin(params, KEY, pipe.prepare_inputs(batch_size=64))[0].branches["positive"]]
    labels = np.asarray(labels[0]["class_labels"])
    assert set(labels) == set(range(10))
    np.testing.assert_allclose(drawn, made(class_labels=labels[:4]), atol=2e-6)
    sizes = peers.programs()
    made(class_labels=[3])
    assert peers.programs() == sizes


@pytest.mark.parametrize("labels", [[3, 10], [-1], [0.5], [], "cat"])
def test_bad_classes(labels):
    with pytest.raises(ValueError, match="give whole numbers from 0 to 9, one a picture"):
        load(consistency)[0].prepare_inputs(class_labels=labels)


def test_no_classes():
    with pytest.raises(ValueError, match="knows no classes; leave out class_labels"):
        load(plain_consistency)[0].prepare_inputs(class_labels=3)


# --- RePaint ---------------------------------------------------------------------------------------------------------


def repaint():
    return diffusers.RePaintPipeline(peers.ddpm().unet, diffusers.RePaintScheduler(clip_sample=False))


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_repaint(eta, monkeypatch):
    pipe, params, peer = load(repaint)
    latents, image = normal(1, 8, 8, 3), rng.random((1, 8, 8, 3)).astype(np.float32)
    known = np.tri(8, dtype=np.float32)[None, ..., None]
    options = dict(num_inference_steps=6, jump_length=2, jump_n_sample=2, eta=eta)
    inputs = pipe.prepare_inputs(image=image, mask_image=known, latents=latents, **options)
    plan, draws = inputs["plan"], normal(int(inputs["plan"].steps), 2, 1, 8, 8, 3)
    assert (plan.keep[: len(draws)] < 1).sum() == 2
    queue, at, there = [latents], {"step": -1, "kept": 1.0}, peer.scheduler
    for module in (there.__module__, type(peer).__module__):
        patched = __import__(module, fromlist=["randn_tensor"])
        monkeypatch.setattr(patched, "randn_tensor", lambda *a, **k: peers.nchw(queue.pop(0)))
    step, undo = there.step, there.undo_step

    def down(*args):
        at.update(step=at["step"] + 1, kept=1.0)
        queue[:] = [draws[at["step"], 0]]
        return step(*args)

    def up(x, *args):
        """PyTorch's adds many small noises on the way back up; here one stands for all of them."""
        queue[:] = [np.zeros_like(latents)] * 2000
        at["kept"] *= float(undo(torch.ones_like(x), *args).flatten()[0])
        x, kept = undo(x, *args), at["kept"]
        all_of_it = np.isclose(kept, plan.keep[at["step"]], rtol=1e-5)
        return x + (1 - kept**2) ** 0.5 * peers.nchw(draws[at["step"], 1]) if all_of_it else x

    monkeypatch.setattr(there, "step", down)
    monkeypatch.setattr(there, "undo_step", up)
    with torch.no_grad():
        theirs = peer(peers.nchw(2 * image - 1), peers.nchw(known), **options, output_type="np").images
    made = peers.with_noise(pipe, params, inputs, draws)
    assert peers.relative(made, theirs, of="RePaintPipeline") < 1e-3
    np.testing.assert_allclose(made[0][np.tri(8) > 0], image[0][np.tri(8) > 0], atol=1e-5)


def test_bad_input_of_repaint():
    pipe, _, _ = load(repaint)
    with pytest.raises(ValueError, match="give mask_image= as well"):
        pipe.prepare_inputs(image=np.ones((16, 16, 3)))
    with pytest.raises(ValueError, match=r"mask_image is \(8, 8\), and image \(16, 16\)"):
        pipe.prepare_inputs(image=np.ones((16, 16, 3)), mask_image=np.ones((8, 8)))


# --- DiT -------------------------------------------------------------------------------------------------------------

WORDS = {"0": "tench, Tinca tinca", "2": "white shark"}


def dit(out_channels=8):
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=8, out_channels=out_channels
    )
    return diffusers.DiTPipeline(peers.lively(net), peers.vae(), diffusers.DDIMScheduler(), id2label=WORDS)


def plain_dit():
    return dit(out_channels=4)


@pytest.mark.parametrize("scan", [True, False])
def test_dit_transformer(scan):
    peer = dit().transformer
    folder = f"{peers.saved(dit)}/transformer"
    spec, params = flaxdiff.DiTTransformer2DModel.from_pretrained(folder, scan_layers=scan)
    for side in (8, 12):  # places beyond the grid that it was trained on lie closer
        x, t, labels = normal(2, side, side, 4), np.float32([3, 981]), np.int32([207, 1000])
        with torch.no_grad():
            theirs = peer(peers.nchw(x), torch.tensor(t), torch.tensor(labels)).sample
        ours = flaxdiff.apply(spec, params, x, t, labels)
        assert peers.relative(ours, peers.nhwc(theirs), of="DiTTransformer2DModel") < 1e-4
    with pytest.raises(ValueError, match="Latents of 8 x 7 do not divide into patches of 2 x 2"):
        flaxdiff.apply(spec, params, normal(1, 8, 7, 4), 3, labels)


@pytest.mark.parametrize(("build", "scale"), [(dit, 4.0), (dit, 1.0), (plain_dit, 3.0)])
def test_dit(build, scale, monkeypatch):
    pipe, params, peer = load(build)
    latents, options = normal(2, 8, 8, 4), dict(class_labels=[2, 999], num_inference_steps=4, guidance_scale=scale)
    module = diffusers.pipelines.dit.pipeline_dit
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: peers.nchw(latents))
    with torch.no_grad():
        theirs = peer(**options, output_type="np").images
    made = pipe(params, KEY, **options, latents=latents, output_type="np").images
    assert peers.relative(made, theirs, of="DiTPipeline") < 1e-3


def test_dit_knows_words(tmp_path):
    """The published index has them; PyTorch's own pipeline reads but does not write it."""
    folder = tmp_path / "named"
    shutil.copytree(peers.saved(dit), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": WORDS}))
    pipe, params = flaxdiff.load(folder)
    assert pipe.labels == dit().labels
    assert pipe.get_label_ids(["Tinca tinca", "white shark"]) == dit().get_label_ids(["Tinca tinca", "white shark"])
    with pytest.raises(ValueError, match="no class 'wite shark' among the 3 words.*did you mean white shark"):
        pipe.get_label_ids("wite shark")
    flaxdiff.save(tmp_path / "saved", pipe, params)
    again = flaxdiff.load(tmp_path / "saved")[0]
    assert diffusers.DiTPipeline.from_pretrained(tmp_path / "saved").labels == again.labels == pipe.labels


def test_dit_of_older_folders(tmp_path):
    """The published folders have the class by its former name."""
    folder = tmp_path / "older"
    shutil.copytree(peers.saved(dit), folder)
    index = (folder / "model_index.json").read_text()
    (folder / "model_index.json").write_text(index.replace("DiTTransformer2DModel", "Transformer2DModel"))
    pipe, params = flaxdiff.load(folder)
    assert pipe.transformer == load(dit)[0].transformer
    options = dict(batch=2, num_inference_steps=2)
    made = pipe.compile(params, **options).generate(params, KEY, blank_inputs(pipe, **options))
    assert made.shape == (2, 16, 16, 3)


def test_bad_classes_of_dit():
    with pytest.raises(ValueError, match="class_labels=None; give whole numbers from 0 to 999"):
        load(dit)[0].prepare_inputs()
