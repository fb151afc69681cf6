"""Data for training: sources of every kind, pictures of every kind, batches that resume, and what is of no use."""

import collections
import dataclasses
import importlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zlib

import jax
import numpy as np
import peers
import pytest
from diffusers import training_utils
from PIL import Image

import flaxdiff
from flaxdiff import cli
from flaxdiff.core import apply
from flaxdiff.pipelines.generate import Networks
from flaxdiff.pipelines.tasks import native_size
from flaxdiff.training import data
from flaxdiff.training.data import batches as batching
from flaxdiff.training.data import order, pictures, stored, tables, tars
from flaxdiff.training.data.encoders import repeated
from flaxdiff.training.data.precompute import as_json, write

SMALL = data.Examples(resolution=8, center_crop=True)


def noise(width=12, height=10, seed=0, mode="RGB"):
    numbers = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(numbers).convert(mode)


def packed(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rows(n, **columns):
    """So many rows, whose pictures and captions say which they are."""
    picture = lambda i: Image.new("RGB", (12, 10), (i % 256, i // 256, 0))
    return data.Listed(
        [{"image": picture(i), "text": str(i)} | {k: f(i) for k, f in columns.items()} for i in range(n)]
    )


def same(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[k], b[k]) for k in a)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_of_every_mode_become_rgb():
    levels = np.linspace(0, 65535, 80).astype(np.uint16).reshape(8, 10)
    deep = data.decode(packed(Image.fromarray(levels)))
    assert deep.mode == "RGB" and np.abs(np.asarray(deep)[..., 0] - levels / 257).max() <= 0.51
    real = data.decode(packed(Image.fromarray((levels / 65535).astype(np.float32)), "TIFF"))
    assert np.array_equal(np.asarray(real), np.asarray(deep))

    grey = noise(mode="L")
    for mode in ("L", "1", "P"):
        image = grey.convert(mode)
        assert np.array_equal(np.asarray(data.decode(packed(image))), np.asarray(image.convert("RGB")))
    cmyk = data.decode(packed(noise(mode="CMYK"), "TIFF"))
    assert np.array_equal(np.asarray(cmyk), np.asarray(noise(mode="CMYK").convert("RGB")))

    rgba = noise(mode="RGBA")
    rgba.putalpha(Image.fromarray(np.resize(np.uint8([0, 51, 255]), (10, 12))))
    alpha = np.asarray(rgba)[..., 3:] / 255
    over_white = np.asarray(rgba)[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(data.decode(packed(rgba)), np.float64) - over_white).max() <= 1
    palette = Image.new("RGB", (9, 9), (10, 20, 30)).convert("P")
    keyed = packed(palette, transparency=palette.getpixel((0, 0)))
    assert data.decode(keyed).getpixel((4, 4)) == (255, 255, 255)
    assert data.decode(packed(Image.new("LA", (9, 9), (0, 128)))).getpixel((4, 4)) in {(127,) * 3, (128,) * 3}


def test_pictures_are_turned_by_their_tag():
    turned = noise(12, 10)
    for tag, shape in ((1, (10, 12)), (3, (10, 12)), (6, (12, 10)), (8, (12, 10))):
        exif = Image.Exif()
        exif[0x0112] = tag
        raw = packed(turned, exif=exif)
        assert np.asarray(data.decode(raw)).shape[:2] == pictures.size_of(raw) == shape
    assert np.array_equal(np.asarray(data.decode(raw)), np.rot90(np.asarray(turned)))


def torchvision_s(image, resolution, top_left=None, flip=False, filter=Image.Resampling.LANCZOS):
    """What the training scripts do by torchvision: Resize of the shorter side, flip, CenterCrop or crop, [-1, 1]."""
    short, long = sorted(image.size)
    scaled = int(resolution * long / short)
    size = (resolution, scaled) if image.width <= image.height else (scaled, resolution)
    image = image.resize(size, filter)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    middle = int(round((image.height - resolution) / 2)), int(round((image.width - resolution) / 2))
    top, left = middle if top_left is None else top_left
    cut = image.crop((left, top, left + resolution, top + resolution))
    return (np.asarray(cut, np.float32) / 255 - 0.5) / 0.5, (top, left)


@pytest.mark.parametrize("size", [(40, 30), (30, 47), (33, 33), (90, 32)])
def test_pictures_are_cut_as_by_the_training_scripts(size):
    image = noise(*size)
    for mode in ("nearest", "bilinear", "bicubic", "lanczos"):
        theirs, corner = torchvision_s(image, 16, filter=Image.Resampling[mode.upper()])
        ours, ours_corner = pictures.fit(image, (16, 16), pictures.Cut(), mode)
        assert ours_corner == corner and np.abs(ours - theirs).max() < 1e-6
    seen = set()
    for seed in range(12):
        examples = dataclasses.replace(SMALL, resolution=16, center_crop=False, random_flip=True)
        chances = batching.draw(0, seed)
        made = examples.make({"image": image, "text": "a"}, chances, (16, 16))
        theirs, _ = torchvision_s(image, 16, made["crop_top_left"].tolist(), chances.flip < 0.5)
        assert np.abs(made["image"] - theirs).max() < 1e-6
        assert made["original_size"].tolist() == [size[1], size[0]]
        seen.add((*made["crop_top_left"].tolist(), chances.flip < 0.5))
    assert len(seen) > (4 if size[0] != size[1] else 1)


def test_pictures_beside_are_cut_and_flipped_alike():
    examples = data.Examples(
        images={"image": "image", "conditioning_image": "edges"}, random_flip=True, conditioning_dropout_prob=0.0
    )
    image = noise(40, 30)
    same_size, smaller = {"image": image, "edges": image, "text": "a"}, image.resize((20, 15), Image.Resampling.BOX)
    for seed in range(8):
        made = examples.make(same_size, batching.draw(seed), (16, 16))
        assert np.array_equal(made["image"], made["conditioning_image"])
        made = examples.make({**same_size, "edges": smaller}, batching.draw(seed), (16, 16))
        assert np.corrcoef(made["image"].ravel(), made["conditioning_image"].ravel())[0, 1] > 0.7


def test_unusable_pictures_say_why(tmp_path):
    def reason(picture):
        with pytest.raises(data.BadExample) as error:
            data.decode(picture)
        return str(error.value)

    jpeg = packed(noise(64, 64), "JPEG")
    assert reason(jpeg[: len(jpeg) // 2]) == "a picture that cannot be decoded"
    assert (
        reason(b"\xff\xd8\xff")
        == reason(b"")
        == reason(b"%!PS-Adobe-3.0 EPSF-3.0\n")
        == ("not a picture that can be read")
    )
    assert reason(Image.new("RGB", (1, 1))) == "smaller than 8 pixels"
    assert reason(Image.new("RGB", (2000, 10))) == "more than 16 times as long as wide"
    assert reason(tmp_path / "none.png") == "a missing file"
    assert reason(None) == "without a picture" and reason("a.png") == "not a picture but str"
    # a PNG of 40000 x 40000 pixels in a few bytes
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    header = (40000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )
    assert reason(bomb) == "of too many pixels"
    infinite = np.full((8, 8), np.inf, np.float32)
    assert reason(Image.fromarray(infinite)) == "a picture that cannot be decoded"


# --- captions ---------------------------------------------------------------------------------------------------------


def test_captions_are_drawn_dropped_and_replaced():
    several = rows(1, text=lambda i: ["a", "b", "c"])
    every = lambda examples: [
        caption for n in range(40) for caption in data.Batches.of(several, examples, 8)[n]["caption"]
    ]
    count = collections.Counter(every(SMALL))
    assert set(count) == {"a", "b", "c"} and min(count.values()) > 70
    dropped = every(dataclasses.replace(SMALL, proportion_empty_prompts=0.25)).count("")
    assert 50 < dropped < 110
    assert set(every(dataclasses.replace(SMALL, prompt="a photo of sks dog"))) == {"a photo of sks dog"}

    p = 0.2
    examples = dataclasses.replace(SMALL, conditioning_dropout_prob=p)
    seen = collections.Counter()
    for n in range(50):
        batch = data.Batches.of(several, examples, 16)[n]
        seen.update((caption == "", bool(keep)) for caption, keep in zip(batch["caption"], batch["conditioning"]))
    for pair, share in {(True, True): p, (True, False): p, (False, False): p, (False, True): 1 - 3 * p}.items():
        assert abs(seen[pair] / 800 - share) < 0.06


def test_numbers_and_pairs_of_captions():
    source = rows(4, label=lambda i: i, score=lambda i: [0.5, i], before=lambda i: f"before {i}")
    examples = dataclasses.replace(
        SMALL, texts={"caption": "text", "source": "before"}, numbers={"label": "label", "score": "score"}
    )
    batch = data.Batches.of(source, examples, 4, shuffle=False)[0]
    assert batch["label"].tolist() == [0, 1, 2, 3] and batch["label"].dtype == np.int32
    assert batch["score"].shape == (4, 2) and batch["score"].dtype == np.float32
    assert batch["source"] == [f"before {i}" for i in range(4)]


# --- the order --------------------------------------------------------------------------------------------------------


def test_every_example_comes_once_in_each_pass():
    batches = data.Batches.of(rows(10), SMALL, 4, seed=3)
    captions = [caption for n in range(15) for caption in batches[n]["caption"]]
    passes = [captions[10 * i : 10 * (i + 1)] for i in range(6)]
    assert all(sorted(one, key=int) == [str(i) for i in range(10)] for one in passes)
    assert len(set(map(tuple, passes))) == 6
    other = data.Batches.of(rows(10), SMALL, 4, seed=4)
    assert other[0]["caption"] != batches[0]["caption"]
    in_order = data.Batches.of(rows(10), SMALL, 4, shuffle=False)
    assert [c for n in range(5) for c in in_order[n]["caption"]] == [str(i) for i in range(10)] * 2


def test_the_order_by_groups_is_complete_and_fair():
    groups = np.arange(5), np.arange(5, 8), np.arange(8, 9), np.arange(9, 40)
    stream = order.Order(groups, 4, seed=1)
    places = [stream.place(n) for n in range(400)]
    for group in range(4):
        assert [before for g, before in places if g == group] == list(range(sum(g == group for g, _ in places)))
    shown = collections.Counter(stream.example(g, 4 * before + row) for g, before in places for row in range(4))
    assert len(shown) == 40 and set(shown.values()) <= {39, 40, 41}, "1600 places, 40 examples"
    for group, members in enumerate(groups):
        one_pass = [stream.example(group, 3 * len(members) + i) for i in range(len(members))]
        assert sorted(one_pass) == members.tolist()


def test_processes_share_each_batch():
    whole = data.Batches.of(rows(10), SMALL, 6, seed=2)
    parts = [data.Batches.of(rows(10), SMALL, 6, seed=2, process_index=i, process_count=3) for i in range(3)]
    for n in (0, 1, 7):
        together = [part[n] for part in parts]
        assert sum((part["caption"] for part in together), []) == whole[n]["caption"]
        assert np.array_equal(np.concatenate([part["image"] for part in together]), whole[n]["image"])
    with pytest.raises(ValueError, match="does not divide among 4 processes"):
        data.Batches.of(rows(10), SMALL, 6, process_index=0, process_count=4)


def test_max_train_samples():
    batches = data.Batches.of(rows(30), SMALL, 7, max_train_samples=7)
    first = sorted(batches[0]["caption"], key=int)
    assert batches.num_examples == 7 and len(set(first)) == 7 and sorted(batches[5]["caption"], key=int) == first
    assert first != [str(i) for i in range(7)], "drawn, not the first"


# --- buckets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [256, 512, 1000, 1024])
def test_buckets_are_those_of_diffusers(resolution):
    for divisibility in (8, 16, 64):
        theirs = training_utils.generate_aspect_ratio_buckets(resolution, divisibility)
        assert list(data.generate_aspect_ratio_buckets(resolution, divisibility)) == theirs
    sizes = data.generate_aspect_ratio_buckets(resolution, 64)
    off = lambda size, i: abs(np.log(size[0] / size[1]) - np.log(sizes[i][0] / sizes[i][1]))
    for size in np.random.default_rng(0).integers(200, 2000, (50, 2)):
        theirs = training_utils.find_nearest_bucket(*size, sizes)  # by a difference that grows with the width
        assert off(size, order.find_nearest_bucket(size, sizes)) <= off(size, theirs)
    for i, size in enumerate(sizes):
        assert order.find_nearest_bucket((3 * size[0], 3 * size[1]), sizes) == i


def test_batches_of_one_bucket():
    shapes = [(40, 40)] * 5 + [(40, 80)] * 7 + [(80, 42)] * 3 + [(1, 1)]
    source = rows(16, image=lambda i: Image.new("RGB", shapes[i][::-1], (i, 0, 0)))
    sizes = data.generate_aspect_ratio_buckets(32, 8)
    batches = data.Batches.of(source, dataclasses.replace(SMALL, aspect_ratio_buckets=sizes), 4)
    assert batches.num_examples == 15 and [fault.name for fault in batches.faults] == ["row 15"]
    shown, found = collections.Counter(), set()
    for n in range(75):  # 20 passes
        batch = batches[n]
        found.add(batch["image"].shape)
        shown.update(batch["caption"])
        assert {order.find_nearest_bucket(shapes[int(caption)], sizes) for caption in batch["caption"]} == {
            sizes.index(batch["image"].shape[1:3])
        }
    assert found == {(4, *size, 3) for size in ((32, 32), (24, 48), (48, 24))}
    assert len(shown) == 15 and set(shown.values()) <= {19, 20, 21}


# --- loaders ----------------------------------------------------------------------------------------------------------


def test_a_loader_goes_on_where_it_was():
    source, examples = rows(23), dataclasses.replace(SMALL, random_flip=True, center_crop=False)
    batches = data.Batches.of(source, examples, 5, seed=1)
    loader = data.DataLoader(batches)
    first = [next(loader) for _ in range(6)]
    state = json.loads(json.dumps(loader.get_state()))
    after = [next(loader) for _ in range(6)]
    assert all(same(batch, batches[n]) for n, batch in enumerate(first + after))
    again = data.DataLoader(data.Batches.of(source, examples, 5, seed=1))
    again.set_state(state)
    assert all(same(next(again), batch) for batch in after)
    again.set_state({**state, "batch": 0})
    assert same(next(again), first[0])
    for changed in ({"seed": 2}, {"examples": 22}, {"batch": None}):
        with pytest.raises(ValueError, match="not one in this data"):
            again.set_state({k: v for k, v in (state | changed).items() if v is not None})
    loader.close(), again.close()


@pytest.mark.slow
def test_any_number_of_workers_makes_the_same(tmp_path):
    for i in range(7):
        noise(20, 16, i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(str(i))
    (tmp_path / "broken.png").write_bytes(b"x")
    (tmp_path / "broken.txt").write_text("x")
    batches = data.Batches.of(data.open_source(tmp_path), SMALL, 3, seed=1)
    loader = data.DataLoader(batches, num_workers=2)
    made = [next(loader) for _ in range(5)]
    assert all(same(batch, batches[n]) for n, batch in enumerate(made))
    assert loader.report.names == {"not a picture that can be read": ["broken.png"]}
    state = loader.get_state()
    loader.close()
    fewer = data.DataLoader(batches, num_workers=1)
    fewer.set_state(state)
    assert same(next(fewer), batches[5])
    fewer.close()


def test_a_subject_and_its_class():
    subject, prior = rows(3), data.Listed([{"image": noise(seed=i)} for i in range(5)])
    of = lambda prompt: dataclasses.replace(SMALL, prompt=prompt)
    pairs = data.PriorPreservation(
        data.Batches.of(subject, of("a sks dog"), 2), data.Batches.of(prior, of("a dog"), 2, seed=5)
    )
    batch = pairs[4]
    assert batch["caption"] == ["a sks dog"] * 2 + ["a dog"] * 2 and batch["image"].shape == (4, 8, 8, 3)
    assert np.array_equal(batch["image"][:2], pairs.instance[4]["image"])
    assert np.array_equal(batch["image"][2:], pairs.prior[4]["image"])
    loader = data.DataLoader(pairs)
    assert same(next(loader), pairs[0])
    state = loader.get_state()
    assert same(next(loader), pairs[1])
    loader.set_state(state)
    assert same(next(loader), pairs[1])
    with pytest.raises(ValueError, match="must be alike"):
        data.PriorPreservation(pairs.instance, data.Batches.of(prior, dataclasses.replace(of("a"), resolution=9), 2))


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path):
    """A folder with a metadata.jsonl, of whose lines three can be used."""
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    for i in range(3):
        noise(seed=i).save(folder / "more" / f"{i}.png")
        noise(seed=10 + i).save(folder / "more" / f"{i}.edges.png")
    noise(seed=9).save(tmp_path / "secret.png")
    line = lambda name, text="a", edges="more/0.edges.png": {
        "file_name": name,
        "text": text,
        "conditioning_image": edges,
    }
    lines = [line(f"more/{i}.png", f"caption {i}", f"more/{i}.edges.png") for i in range(3)]
    lines += [
        line("../secret.png"),
        line(str(tmp_path / "secret.png")),
        line("gone.png"),
        line("x" * 5000),
        {"text": "a"},
    ]
    lines += [line("more/0.png", edges="../secret.png"), [1], line("a\0b.png")]
    text = "\n".join([json.dumps(one) for one in lines] + ["{", "", "[" * 100_000])
    (folder / "metadata.jsonl").write_text(text)
    return folder


def test_folder_with_metadata(listed):
    source = data.open_source(listed, images=("image", "conditioning_image"))
    assert len(source) == 3 and set(source.columns) == {"image", "text", "conditioning_image"}
    reasons = collections.Counter(fault.reason for fault in source.faults)
    assert reasons == {
        "outside of the folder": 4,
        "a missing file": 2,
        "without a file name": 1,
        "a line that is no JSON object": 3,
    }
    assert any(name.startswith("metadata.jsonl line 4 (../secret.png") for name, _ in source.faults)
    examples = dataclasses.replace(
        SMALL, images={"image": "image", "conditioning_image": "conditioning_image"}, resolution=10
    )
    batch = data.Batches.of(source, examples, 3, shuffle=False)[0]
    assert batch["caption"] == [f"caption {i}" for i in range(3)]
    for i in range(3):
        for name, seed in (("image", i), ("conditioning_image", 10 + i)):
            assert np.abs(batch[name][i] - torchvision_s(noise(seed=seed), 10)[0]).max() < 1e-6


def test_folder_with_texts_or_without(tmp_path):
    with pytest.raises(ValueError, match="holds no picture"):
        data.open_source(tmp_path)
    (tmp_path / "in").mkdir()
    noise(seed=1).save(tmp_path / "b.png")
    noise(seed=0).save(tmp_path / "in" / "a.jpg")
    noise(seed=0).save(tmp_path / ".hidden.png")
    (tmp_path / "notes.md").write_text("not a picture")
    bare = data.open_source(str(tmp_path))
    assert [bare.name(i) for i in range(2)] == ["b.png", "in/a.jpg"] and bare.columns == ("image",)
    with pytest.raises(ValueError, match="no column 'text'; it has 'image'"):
        data.Batches.of(bare, SMALL, 2)
    assert data.Batches.of(bare, dataclasses.replace(SMALL, texts={}), 2)[0].keys() == {
        "image",
        "original_size",
        "crop_top_left",
    }
    (tmp_path / "b.txt").write_text(" a cat \n", encoding="utf-8")
    (tmp_path / "in" / "a.txt").write_bytes(b"\xff\xfe")
    loader = data.DataLoader(data.Batches.of(data.open_source(tmp_path), SMALL, 2))
    assert next(loader)["caption"] == ["a cat"] * 2
    assert loader.report.names == {"with a caption that cannot be read": ["in/a.jpg"]}
    with pytest.raises(ValueError, match="is no folder"):
        data.open_source(tmp_path / "none")


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, body in members:
            info = tarfile.TarInfo(name)
            if body is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                info.size = len(body)
            archive.addfile(info, None if body is None else io.BytesIO(body))


def test_webdataset(tmp_path):
    for shard in range(2):
        members = []
        for i in range(3):
            n = 3 * shard + i
            members += [(f"{n:03}.png", packed(noise(seed=n))), (f"{n:03}.edges.png", packed(noise(seed=10 + n)))]
            members += [(f"{n:03}.json", json.dumps({"score": n}).encode()), (f"{n:03}.txt", f"caption {n}".encode())]
        write_tar(tmp_path / f"data-{shard:02}.tar", members)
    source = data.open_source(str(tmp_path / "data-{00..01}.tar"))
    assert len(source) == 6 and {"image", "text", "png", "edges.png", "score"} <= set(source.columns)
    assert source.name(4) == "data-01.tar:004" and len(data.open_source(tmp_path)) == 6
    examples = dataclasses.replace(
        SMALL, images={"image": "image", "edges": "edges.png"}, numbers={"score": "score"}, resolution=10
    )
    batch = data.Batches.of(source, examples, 6, shuffle=False)[0]
    assert batch["caption"] == [f"caption {n}" for n in range(6)] and batch["score"].tolist() == list(range(6))
    for n in range(6):
        assert np.abs(batch["image"][n] - torchvision_s(noise(seed=n), 10)[0]).max() < 1e-6
        assert np.abs(batch["edges"][n] - torchvision_s(noise(seed=10 + n), 10)[0]).max() < 1e-6


def test_hostile_tars(tmp_path):
    good = packed(noise(30, 30))
    members = [("../../escape.png", good), ("../../escape.txt", b"out"), ("link.png", None), ("link.txt", b"link")]
    members += [("word.png", good), ("word.txt", b"\xff"), ("json.png", good), ("json.json", b"[1]")]
    members += [("fine.png", good), ("fine.txt", b"fine"), ("last.png", good)]
    write_tar(tmp_path / "bad.tar", members)
    whole = (tmp_path / "bad.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(whole[: whole.rfind(good) + 40])  # the last picture is cut off
    source = data.open_source(tmp_path / "bad.tar")
    assert {fault.reason for fault in source.faults if "png" in fault.name} == {
        "not a regular file",
        "cut off at the end of its file",
    }
    loader = data.DataLoader(data.Batches.of(source, SMALL, 5, shuffle=False))
    assert next(loader)["caption"] == ["out", "fine", "fine", "fine", "fine"], "each is replaced by what follows it"
    assert {"without a picture", "with a caption that cannot be read", "with JSON that is no object"} <= set(
        loader.report.counts
    )
    assert not (tmp_path.parent.parent / "escape.png").exists()
    for junk in (b"x" * 2000, bytes(1024), b""):
        (tmp_path / "junk.tar").write_bytes(junk)
        with pytest.raises(ValueError, match="no example"):
            data.open_source(tmp_path / "junk.tar")
    with pytest.raises(ValueError, match="No such file"):
        data.open_source(tmp_path / "none-{0..1}.tar")


def table(tmp_path, n=6):
    import datasets

    rows = {
        "image": [packed(noise(seed=i)) for i in range(n)],
        "text": [[f"caption {i}", f"other {i}"] for i in range(n)],
        "label": list(range(n)),
    }
    rows["image"][1] = b"broken"
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.to_parquet(str(tmp_path / "part.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    return tmp_path


def test_datasets(tmp_path):
    folder = table(tmp_path)
    examples = dataclasses.replace(SMALL, resolution=10, numbers={"label": "label"})
    for where in (folder / "part.parquet", folder / "saved"):
        source = data.open_source(where)
        assert len(source) == 6 and source.columns == ("image", "text", "label")
        loader = data.DataLoader(data.Batches.of(source, examples, 6, shuffle=False))
        batch = next(loader)
        assert batch["label"].tolist() == [0, 2, 2, 3, 4, 5], "what is broken is replaced by what follows it"
        assert list(loader.report.counts.values()) == [1]
        for row, label in enumerate(batch["label"]):
            assert batch["caption"][row] in (f"caption {label}", f"other {label}")
            assert np.abs(batch["image"][row] - torchvision_s(noise(seed=int(label)), 10)[0]).max() < 1e-6
    with pytest.raises(ValueError, match="cannot be had"):
        data.open_source("nobody/nothing-of-this-name")


def test_streams(tmp_path):
    folder = table(tmp_path, 11)
    examples = dataclasses.replace(SMALL, numbers={"label": "label"})
    files = data.open_source(folder / "part.parquet", streaming=True)
    assert files.columns == ("image", "text", "label")
    source = data.open_source(folder / "saved", streaming=True)  # which waits less at the end of a pass
    of = lambda **options: data.Stream.of(source, examples, 4, seed=3, **options)
    loader = data.DataLoader(of())
    made = [next(loader) for _ in range(5)]
    labels = np.concatenate([batch["label"] for batch in made])
    first, second = labels[:10].tolist(), labels[10:].tolist()
    assert sorted(first) == sorted(second) == [0, *range(2, 11)] and first != second, "each pass has an order"
    assert loader.report.counts == {"not a picture that can be read": 2}
    for at in (0, 1, 3):
        loader.close()
        loader = data.DataLoader(of())
        for _ in range(at):
            next(loader)
        again = data.DataLoader(of(), num_workers=1)
        again.set_state(json.loads(json.dumps(loader.get_state())))
        assert all(same(next(again), batch) for batch in made[at:])
        again.close()
    loader.close()
    halves = [data.DataLoader(of(process_index=i, process_count=2)) for i in range(2)]
    seen = [np.concatenate([next(half)["label"] for _ in range(2)]).tolist() for half in halves]
    assert all(len(set(labels)) == 4 for labels in seen) and not set(seen[0]) & set(seen[1])
    with pytest.raises(ValueError, match="not one in this data"):
        halves[0].set_state(again.get_state())
    few = data.DataLoader(of(max_train_samples=3, shuffle=False))
    assert next(few)["label"].tolist() == [0, 2, 0, 2]
    for one in (*halves, few):
        one.close()
    with pytest.raises(ValueError, match="no column 'txt'; it has 'image', 'text', 'label'"):
        data.Stream.of(source, dataclasses.replace(SMALL, texts={"caption": "txt"}), 4)


TINY = """
import io
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class TinyPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "text": tfds.features.Text()}
        features["label"] = tfds.features.Scalar(np.int64)
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))
    def _split_generators(self, manager):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(5):
            file = io.BytesIO()
            Image.new("RGB", (9, 9), (40 * i, 0, 0)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "text": f"caption {i}", "label": i}
"""


def test_tensorflow_datasets(tmp_path, monkeypatch):
    (tmp_path / "tiny_pictures").mkdir()
    (tmp_path / "tiny_pictures" / "tiny_pictures_builder.py").write_text(TINY)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("tiny_pictures.tiny_pictures_builder")
    source = data.open_source("tfds:tiny_pictures", data_dir=tmp_path / "kept")
    assert len(source) == 5 and set(source.columns) == {"image", "text", "label"}
    examples = dataclasses.replace(SMALL, numbers={"label": "label"})
    batch = data.Batches.of(source, examples, 5)[0]
    assert sorted(batch["caption"]) == [f"caption {i}" for i in range(5)]
    assert np.allclose(batch["image"][:, 0, 0, 0], 40 * batch["label"] / 127.5 - 1)
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="tensorflow-datasets cannot give 'no_such_data'"):
        data.open_source("tfds:no_such_data", data_dir=tmp_path / "kept")


def tf_example(**features):
    """An example as TensorFlow's own code writes it."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    kinds = {bytes: "bytes_list", float: "float_list", int: "int64_list"}
    for name, values in features.items():
        feature = example.features.feature[name]
        if values:
            getattr(feature, kinds[type(values[0])]).value.extend(values)
    return example


def test_array_records(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    file = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for i in range(4):
        example = tf_example(image=[packed(noise(seed=i))], text=[f"caption {i}".encode()], label=[i])
        file.write(b"\xff\xff broken" if i == 2 else example.SerializeToString())
    file.close()
    source = data.open_source(tmp_path)
    loader = data.DataLoader(
        data.Batches.of(source, dataclasses.replace(SMALL, numbers={"label": "label"}), 4, shuffle=False)
    )
    batch = next(loader)
    assert len(source) == 4 and batch["label"].tolist() == [0, 1, 3, 3] and batch["caption"][1] == "caption 1"
    assert loader.report.names == {"not a tf.train.Example": ["a.array_record[2]"]}
    (tmp_path / "b.array_record").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no array records"):
        data.open_source(tmp_path / "b.array_record")


def test_records_are_read_as_tensorflow_writes_them():
    values = {"a": [1.5, -2.0], "b": [-1, 2**63 - 1, -(2**63), 300], "c": [b"x", b""], "one": [0.25], "none": []}
    read = tables.parse_example(tf_example(**values).SerializeToString())
    assert read == {**values, "one": 0.25}
    for junk in (b"\x0a\xff", b"\x08\x01", b"\x0a\x03\x0a\x01\x0a"):
        with pytest.raises(data.BadExample, match="not a tf.train.Example"):
            tables.parse_example(junk)


# --- what is of no use ------------------------------------------------------------------------------------------------


def test_what_is_of_no_use_is_replaced_counted_and_told(caplog):
    wrong = {3: b"broken", 4: Image.new("RGB", (1, 1)), 7: None}
    source = rows(
        10, image=lambda i: wrong.get(i, noise(seed=i)), text=lambda i: " " if i == 8 else None if i == 9 else str(i)
    )
    batches = data.Batches.of(source, SMALL, 5, seed=1)
    loader = data.DataLoader(batches)
    captions = [caption for _ in range(2) for caption in next(loader)["caption"]]
    assert len(captions) == 10 and set(captions) == {"0", "1", "2", "5", "6"}
    assert captions == [caption for n in range(2) for caption in batches[n]["caption"]], "by a fixed rule"
    assert set(loader.report.counts) == {
        "not a picture that can be read",
        "smaller than 8 pixels",
        "without a picture",
        "with an empty caption",
    }
    assert sorted(loader.report.names["with an empty caption"]) == ["row 8", "row 9"]
    told = [record.getMessage() for record in caplog.records if "Left out" in record.getMessage()]
    assert len(told) == 4 and any("row 3, not a picture" in line for line in told)
    assert "x with an empty caption: row" in str(loader.report)
    loader.close()


def test_data_of_no_use_ends_at_once():
    broken = rows(5, image=lambda i: b"broken")
    with pytest.raises(ValueError, match="None of 5 examples in a row is of use:\n5 x not a picture"):
        data.Batches.of(broken, SMALL, 2)
    buckets = dataclasses.replace(SMALL, aspect_ratio_buckets=((8, 8),))
    with pytest.raises(ValueError, match="No example is of use:\n5 x not a picture"):
        data.Batches.of(broken, buckets, 2)
    with pytest.raises(ValueError, match="no column 'edges'; it has 'image', 'text'"):
        data.Batches.of(rows(2), dataclasses.replace(SMALL, images={"image": "image", "c": "edges"}), 2)
    for wrong in ({"image_interpolation_mode": "cubic"}, {"proportion_empty_prompts": 2}, {"resolution": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            data.Examples(**wrong)


# --- encoded once -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return flaxdiff.load()


def test_precomputed_is_what_the_model_says(model, tmp_path):
    pipe, params = model
    source = rows(7, image=lambda i: b"broken" if i == 4 else noise(70, 90 - i, i), text=lambda i: f"red apple {i % 2}")
    examples = data.Examples(resolution=64, center_crop=True)
    run = lambda out, **options: data.precompute(
        pipe, params, source, examples, out, **({"batch_size": 4, "shard_size": 3} | options)
    )
    report = run(tmp_path / "one")
    assert report.names == {"not a picture that can be read": ["row 4"]}
    found = data.open_source(tmp_path / "one")
    assert len(found) == 6 and [fault.name for fault in found.faults] == ["row 4"]
    batch = data.Batches.of(found, data.Stored(), 6, shuffle=False)[0]
    kept = [0, 1, 2, 3, 5, 6]
    assert batch["caption"] == [f"red apple {i % 2}" for i in kept] and batch["latents"].shape == (6, 16, 16, 8)
    assert batch["original_size"].tolist() == [[90 - i, 70] for i in kept]
    pixels = np.stack([torchvision_s(noise(70, 90 - i, i), 64)[0] for i in kept])
    posterior = apply(pipe.vae, params["vae"], pixels, method="encode")
    mean, deviation = (
        np.asarray(a) * pipe.vae.config.scaling_factor for a in (posterior.mean, np.exp(0.5 * posterior.logvar))
    )
    assert 0.8 < ((batch["latents"] - mean) / deviation).std() < 1.2, "drawn from the posterior"
    text = apply(pipe.text_encoder, params["text_encoder"], pipe.tokenizer(batch["caption"])).last_hidden_state
    assert np.abs(batch["prompt_embeds"] - np.asarray(text)).max() < 1e-4
    nothing = apply(pipe.text_encoder, params["text_encoder"], pipe.tokenizer([""])).last_hidden_state
    dropped = data.Batches.of(found, data.Stored(proportion_empty_prompts=1.0), 6)[0]
    assert dropped["caption"] == [""] * 6
    assert np.abs(dropped["prompt_embeds"] - np.asarray(nothing)).max() < 1e-4

    # by two processes, one of which was stopped and started again: the same bits
    run(tmp_path / "two", process_index=1, process_count=2)
    with pytest.raises(ValueError, match="lacks shard-00000.safetensors, shard-00002.safetensors; run"):
        data.open_source(tmp_path / "two")
    run(tmp_path / "two", process_index=0, process_count=2)
    (tmp_path / "two" / "shard-00002.safetensors").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("shard*")}
    run(tmp_path / "two", process_index=0, process_count=2)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    for name in ("empty.safetensors", *stored.shards({"examples": 7, "shard_size": 3})):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with pytest.raises(ValueError, match="was written otherwise: seed was 0 and is 1"):
        run(tmp_path / "two", seed=1)
    stranger = {**params, "text_encoder": {k: v * 1.5 for k, v in params["text_encoder"].items()}}
    with pytest.raises(ValueError, match="another model"):
        data.precompute(pipe, stranger, source, examples, tmp_path / "two", batch_size=4, shard_size=3)
    with pytest.raises(ValueError, match="takes multiples of"):
        data.precompute(pipe, params, source, dataclasses.replace(examples, resolution=30), tmp_path / "three")


@pytest.mark.parametrize("build", [peers.stable_diffusion_xl, peers.pixart_sigma])
def test_encoded_texts_stand_for_prompts(build, tmp_path):
    pipe, params = flaxdiff.load(peers.saved(build))
    size, prompts = native_size(pipe), ["a cat", "a dog on a hill"]
    source = rows(2, image=lambda i: noise(70, 70, i), text=lambda i: prompts[i])
    data.precompute(pipe, params, source, data.Examples((size.height, size.width)), tmp_path, batch_size=4)
    batch = data.Batches.of(data.open_source(tmp_path), data.Stored(), 2, shuffle=False)[0]
    names = {"prompt_embeds", "pooled_prompt_embeds", "prompt_mask"} & batch.keys()
    assert len(names) == 2 and batch["caption"] == prompts

    @jax.jit
    def encode(params, inputs):
        return pipe.family.encode(Networks(dict(pipe.specs), params), {**inputs, "size": size})["positive"]

    given = repeated(pipe.family.prepare(pipe, size, False, prompt=prompts), 2)
    stored = {k: v for k, v in given.items() if not k.startswith("prompt_ids")} | {k: batch[k] for k in names}
    ours, theirs = jax.tree.leaves(encode(params, stored)), jax.tree.leaves(encode(params, given))
    assert len(ours) == len(theirs) > 2
    for a, b in zip(ours, theirs):
        assert np.abs(np.float64(a) - np.float64(b)).max() <= 1e-5 * max(np.abs(np.float64(b)).max(), 1)


def test_the_command_precomputes(model, tmp_path, capsys):
    pipe, params = model
    (tmp_path / "photographs").mkdir()
    for i, size in enumerate([(60, 60), (90, 45), (60, 60), (45, 90)]):
        noise(*size, i).save(tmp_path / "photographs" / f"{i}.png")
    out = str(tmp_path / "encoded")
    given = ["precompute", "--data", str(tmp_path / "photographs"), "--out", out, "--buckets", "--samples", "0"]
    assert cli.main(["precompute", "--data", str(tmp_path / "none"), "--out", out]) == 1
    assert "none is no folder" in capsys.readouterr().err
    for more, code, said in (
        ([], 1, "no column 'text'"),
        (["--prompt", "a dog", "--batch", "2"], 0, "no example was left"),
    ):
        command = [sys.executable, "-m", "flaxdiff.cli", *given, *more]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == code and said in run.stdout + run.stderr, run.stderr
    found = data.open_source(out)
    batches = data.Batches.of(found, data.Stored(), 2)
    shapes = {batches[n]["latents"].shape for n in range(6)}
    assert len(shapes) == 3 and len(found) == 4
    square = data.Batches.of(found, data.Stored(), 2, shuffle=False)
    group = square.sizes.index((64, 64))
    row = square.example(group, 0, [])
    pixels = torchvision_s(noise(60, 60, 0), 64)[0][None]
    mean = apply(pipe.vae, params["vae"], pixels, method="encode").mean * pipe.vae.config.scaling_factor
    assert np.abs(row["latents"] - np.asarray(mean)[0]).max() < 1e-4


def test_damaged_shards_are_told(model, tmp_path):
    pipe, params = model
    data.precompute(
        pipe, params, rows(2, image=lambda i: noise(64, 64, i)), data.Examples(resolution=64), tmp_path, batch_size=4
    )
    path = tmp_path / "shard-00000.safetensors"
    raw = bytearray(path.read_bytes())
    where = raw.rfind(b'["0", "1"]')
    path.write_bytes(raw[:where] + b'["0", {1"]' + raw[where + 10 :])
    stored.opened.cache_clear()
    with pytest.raises(ValueError, match="checksum|JSON"):
        data.open_source(tmp_path)[0]
    path.write_bytes(raw[: len(raw) // 2])
    stored.opened.cache_clear()
    with pytest.raises(ValueError, match="damaged"):
        data.open_source(tmp_path)


def precomputed(folder, sizes=(2, 2, 1), **options):
    """A folder such as `precompute` writes, without a model: examples 0, 1, … of the data, by twos."""
    manifest = {"examples": sum(sizes), "shard_size": 2}
    texts = lambda n: {"text/prompt_embeds": np.ones((n, 3, 4), np.float32)}
    write(folder / stored.EMPTY, texts(1))
    (folder / stored.MANIFEST).write_text(json.dumps(manifest))
    for s, (name, n) in enumerate(zip(stored.shards(manifest), sizes)):
        arrays = {"index": 2 * s + np.arange(n), "latents": np.ones((n, 1, 2, 2, 4)), "text": np.arange(n)}
        arrays = {f"16x16/{column}": a for column, a in arrays.items()} | texts(n)
        lists = {"captions": [f"{s} {i}" for i in range(n)], "faults": []}
        arrays |= {name: as_json(list_) for name, list_ in lists.items()}
        write(folder / name, {**arrays, **options} if s == 1 else arrays)
    stored.opened.cache_clear(), stored.empty.cache_clear()
    return folder / "shard-00001.safetensors"


def test_files_that_are_not_of_the_folder(tmp_path):
    """Whatever is wrong is told before training, with the file and what to do."""
    file = precomputed(tmp_path)
    found = data.open_source(tmp_path)
    assert [found[i]["caption"] for i in range(5)] == ["0 0", "0 1", "1 0", "1 1", "2 0"]
    assert found.columns == ("caption", "latents", "prompt_embeds")
    raw, other = file.read_bytes(), (tmp_path / "shard-00000.safetensors").read_bytes()
    noise = np.random.default_rng(0).bytes(1000)
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    foreign = len(header).to_bytes(8, "little") + header + bytes(4)
    for path, junk, said in (
        (file, raw[:-9], "the header describes"),
        (file, raw[:200], "its header would take"),
        (file, b"", "it is empty"),
        (file, noise, "its header would take"),
        (file, foreign, "not what precompute writes"),
        (file, other, "its examples are not those from 2 to 3 of the data"),
        (tmp_path / stored.EMPTY, noise, "its header would take"),
        (tmp_path / stored.EMPTY, foreign, "its arrays text/… are not 2 rows"),
    ):
        kept = path.read_bytes()
        path.write_bytes(junk)
        stored.opened.cache_clear(), stored.empty.cache_clear()
        with pytest.raises(ValueError, match=said) as told:
            data.open_source(tmp_path)
        assert re.search(r"/(shard-0000\d|empty)\.safetensors: ", str(told.value)), told.value
        assert str(told.value).endswith(
            "Delete this file, then run the command that wrote the folder: it makes what is missing."
        )
        path.write_bytes(kept)
    for name in (file, tmp_path / stored.EMPTY):
        kept = name.read_bytes()
        name.unlink()
        with pytest.raises(ValueError, match=f"lacks {name.name}; run the command that writes it again"):
            data.open_source(tmp_path)
        name.write_bytes(kept)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"16x16/text": np.int64([0, 2])}, "16x16/text is of texts that it does not hold"),
        ({"16x16/index": np.int64([2, 2])}, "not those from 2 to 3"),
        ({"16x16/latents": np.ones((3, 1, 2, 2, 4))}, "16x16/… are not 2 rows of what the files beside it hold"),
        ({"16x16/latents": np.ones((2, 1, 2, 2, 8))}, "16x16/… are not 2 rows of what the files beside it hold"),
        ({"text/prompt_embeds": np.ones((2, 9, 4), np.float32)}, "text/… are not 2 rows"),
        ({"8x8/index": np.int64([]), "8x8/text": np.int64([])}, "other columns"),
        ({"wide/index": np.int64([]), "wide/text": np.int64([])}, "not what precompute writes"),
        ({"captions": np.uint8([255, 254])}, "no JSON"),
        ({"faults": as_json(["a"])}, "not what precompute writes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_shards_that_contradict_themselves(options, said, tmp_path):
    file = precomputed(tmp_path, **options)
    with pytest.raises(ValueError, match=said) as told:
        data.open_source(tmp_path)
    assert str(told.value).startswith(f"{file}: ") and "Delete this file" in str(told.value)


def test_numbers_that_are_not_finite_are_replaced(tmp_path):
    broken = np.ones((2, 3, 4), np.float32)
    broken[1, 2, 3] = np.nan
    precomputed(
        tmp_path, **{"16x16/latents": np.float64([1, np.inf])[:, None, None, None, None] * np.ones((1, 2, 2, 4))}
    )
    source = data.open_source(tmp_path)
    loader = data.DataLoader(data.Batches.of(source, data.Stored(), 4, shuffle=False))
    assert next(loader)["caption"] == ["0 0", "0 1", "1 0", "2 0"]
    assert loader.report.names == {"with latents that are not finite": ["shard-00001.safetensors:16x16[1]"]}
    loader.close()
    precomputed(tmp_path, **{"text/prompt_embeds": broken})
    loader = data.DataLoader(data.Batches.of(data.open_source(tmp_path), data.Stored(), 4, shuffle=False))
    assert next(loader)["caption"] == ["0 0", "0 1", "1 0", "2 0"]
    assert list(loader.report.counts) == ["with prompt_embeds that are not finite"]
    loader.close()


def test_patterns_of_files():
    assert [p.name for p in tars.expand("a{0..1}-{08..09}.tar")] == ["a0-08.tar", "a0-09.tar", "a1-08.tar", "a1-09.tar"]
