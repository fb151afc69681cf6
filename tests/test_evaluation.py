"""CLIP, InceptionV3 and the distances that pictures are judged by, against PyTorch, and the command."""

import json
import tempfile
import zlib

import numpy as np
import peers
import pytest
import safetensors.numpy
import torch
import transformers
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

import flaxdiff
from flaxdiff import cli, evaluation, images
from flaxdiff.checkpoint import convert
from flaxdiff.core import layout

rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a CLIPModel, and PyTorch's own."""
    folder = tmp_path_factory.mktemp("clip")
    narrow = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    text = dict(narrow, vocab_size=1000, max_position_embeddings=16, eos_token_id=999, bos_token_id=998)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=dict(narrow, image_size=16, patch_size=8), projection_dim=12
    )
    torch.manual_seed(0)
    model = peers.lively(transformers.CLIPModel(config).eval())
    model.save_pretrained(folder)
    peers.tokenizer().save_pretrained(folder)
    return str(folder), model


def noise(n, size=(20, 16), seed=0):
    draw = np.random.default_rng(seed)
    return [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(n)]


def test_clip(clip):
    folder, model = clip
    see, read = evaluation.clip_encoders(folder)
    pictures, words = noise(3), ["a cat", "a dog on a hill", ""]
    with torch.no_grad():
        pixels = peers.nchw(images.clip_pixels(pictures, 16))
        theirs = model.get_image_features(pixels).pooler_output
        assert peers.relative(see(pictures), theirs.numpy(), of="CLIPModel") < 1e-5
        ids = peers.tokenizer()(words, padding="max_length", max_length=16, return_tensors="pt").input_ids
        theirs = model.get_text_features(ids).pooler_output
        assert peers.relative(read(words), theirs.numpy(), of="CLIPModel") < 1e-5
    again = flaxdiff.CLIPModel.from_config(
        flaxdiff.CLIPModel.to_config(flaxdiff.CLIPModel.from_pretrained(folder)[0].config)
    )
    assert again == flaxdiff.CLIPModel.from_pretrained(folder)[0]


def inception_weights():
    """Numbers for every parameter of InceptionV3, by the names and shapes of the published file."""
    spec = flaxdiff.InceptionV3.from_config({})
    tensors = {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}
    for name, leaf in layout(spec).items():
        shape, draw = convert.shape_in_file(leaf), np.random.default_rng(zlib.crc32(name.encode()))
        if len(shape) == 4:
            drawn = draw.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            drawn = draw.uniform(0.8, 1.2, shape) - (1.0 if name.endswith(("bias", "mean")) else 0.0)
        tensors[name] = drawn.astype(np.float32)
    return tensors


def record():  # run once, where torch-fidelity 0.4.0 was; it needs torchvision, which has no build for this torch
    """What the PyTorch class that FID is measured with makes of these weights and a picture."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        counts = {
            f"{n[:-4]}num_batches_tracked": np.zeros((), int) for n in inception_weights() if n.endswith("bn.bias")
        }
        torch.save({n: torch.tensor(w) for n, w in (inception_weights() | counts).items()}, file.name)
        net = FeatureExtractorInceptionV3("fid", ["2048"], feature_extractor_weights_path=file.name)
    return net(torch.tensor(np.asarray(noise(1, (40, 56))[0])).permute(2, 0, 1)[None])[0].numpy()[0, ::128]


RECORDED = np.float32(
    [3.472825, 0.0263075, 0.04075604, 1.865957, 0, 2.42991, 0.01876993, 0.005484096]
    + [1.132342, 0.9174975, 2.104708, 0.3099335, 0, 0.3734934, 0.3520848, 0]
)


def test_inception(tmp_path):
    """The weights of a file give the features that torch-fidelity's network gave for them."""
    safetensors.numpy.save_file(inception_weights(), tmp_path / "inception.safetensors")
    features = evaluation.inception(tmp_path / "inception.safetensors")(noise(1, (40, 56)))
    assert features.shape == (1, 2048)
    assert peers.relative(features[0, ::128], RECORDED, of="InceptionV3") < 1e-4


def test_distances():
    """FID and KID of torchmetrics, from the same features; fewer pictures than features too."""

    class Given(nn.Module):
        num_features = 12

        def forward(self, x):
            return x[:, :12, 0, 0].double()

    def measure(metric, x, y):
        metric.set_dtype(torch.float64)
        for features, real in ((x, False), (y, True)):
            metric.update(torch.tensor(features)[..., None, None].expand(-1, -1, 2, 2), real=real)
        return metric.compute()

    for n, m in ((40, 50), (7, 9)):
        x, y = rng.standard_normal((n, 12)), rng.standard_normal((m, 12)) * 1.3 + 0.2
        theirs = measure(FrechetInceptionDistance(Given(), normalize=True), x, y).item()
        assert flaxdiff.frechet_distance(x, y) == pytest.approx(theirs, rel=1e-5)
    # With as many in a subset as there are, every subset is the whole.
    x, y = rng.standard_normal((20, 12)), rng.standard_normal((20, 12)) + 0.5
    kid = KernelInceptionDistance(Given(), subsets=3, subset_size=20, normalize=True)
    ours, deviation = flaxdiff.kernel_distance(x, y, subsets=3)
    assert ours == pytest.approx(measure(kid, x, y)[0].item(), rel=1e-5) and deviation < 1e-9
    scattered = flaxdiff.kernel_distance(x, y, subsets=200, subset_size=10)
    assert scattered[1] > 0 and abs(scattered[0] - ours) < 4 * scattered[1] / np.sqrt(200)


def test_directional_similarity():
    """The cosine between the changes of normalised embeddings, as the documentation computes it."""
    before, after, text, text_after = (torch.randn(5, 12) for _ in range(4))
    unit = lambda e: e / e.norm(dim=1, keepdim=True)
    theirs = nn.functional.cosine_similarity(unit(after) - unit(before), unit(text_after) - unit(text))
    ours = flaxdiff.directional_similarity(*(e.numpy() for e in (before, after, text, text_after)))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


def saved(folder, pictures):
    folder.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i:03}.png")
    return folder


def test_command(clip, tmp_path, capsys):
    """From folders to a table: the mean of CLIP scores, of directional similarities, and distances."""
    folder, model = clip
    pictures, others, words = noise(3), noise(3, seed=1), ["a cat", "a dog", "a hill"]
    saved(tmp_path / "made", pictures), saved(tmp_path / "others", others)
    (tmp_path / "prompts.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "before.txt").write_text("a\nb\nc\n")
    made, prompts, before = (str(tmp_path / name) for name in ("made", "prompts.txt", "before.txt"))
    asked = ["evaluate", made, "--prompts", prompts, "--clip", folder, "--reference", str(tmp_path / "others")]
    pairs = ["--before", str(tmp_path / "others"), "--before-prompts", before]
    assert cli.main([*asked, *pairs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        ids = peers.tokenizer()(words, padding="max_length", max_length=16, return_tensors="pt").input_ids
        shown = model.get_image_features(peers.nchw(images.clip_pixels(pictures, 16))).pooler_output
        score = 100 * nn.functional.cosine_similarity(shown, model.get_text_features(ids).pooler_output).clamp(0).mean()
    assert found["CLIP score"] == pytest.approx(score.item(), rel=1e-4)
    assert set(found) == {
        "CLIP score",
        "CLIP directional similarity",
        "CLIP Fréchet distance",
        "CLIP kernel distance",
        "CLIP kernel distance, deviation",
    }
    assert cli.main(["evaluate", made, "--reference", made, "--clip", folder]) == 0
    assert "CLIP Fréchet distance               0.0000\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompts", "two.txt", "--clip", "nowhere"], "3 pictures and 2 prompts; give one for each"),
        (["--prompts", "three.txt"], "Prompts are compared by CLIP; give one"),
        ([], "There is nothing to compare with"),
        (["--reference", "made", "--before", "made"], "needs the pictures before, and prompts before and after"),
        (["--reference", "empty", "--clip", "nowhere"], "empty is not a folder with pictures"),
        (["--reference", "damaged", "--inception", "none.pth"], "There is no file none.pth"),
    ],
)
def test_bad_input(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "made", noise(3))
    saved(tmp_path / "damaged", noise(1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "two.txt").write_text("a\nb\n"), (tmp_path / "three.txt").write_text("a\nb\nc\n")
    assert cli.main(["evaluate", "made", *options]) == 1
    assert message in capsys.readouterr().err


def test_damaged_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png cannot be read as a picture"):
        evaluation.Folder(tmp_path)[0]
