"""The files of a checkpoint folder: which of them hold the weights, and how new ones get there.

Weights lie in one file or in shards with an index, as safetensors, as older pickles or as Flax wrote them, perhaps in a
variant such as fp16. `weight_file` picks what to read by name alone; `open_weights` reads it. `staged` writes a folder
beside its place and moves it there when it is complete.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flaxdiff.checkpoint import gguf, msgpack, pickles, safetensors
from flaxdiff.checkpoint.packed import unpacked
from flaxdiff.checkpoint.tensors import Tensor, damaged

CONFIG, PIPELINE = "config.json", "model_index.json"
STEMS = {  # library -> format, the first that is there being read -> what the files are called
    "diffusers": {
        "safetensors": "diffusion_pytorch_model",
        "bin": "diffusion_pytorch_model",
        "msgpack": "diffusion_flax_model",
    },
    "transformers": {"safetensors": "model", "bin": "pytorch_model", "msgpack": "flax_model"},
}
READERS = {"safetensors": safetensors.read, "bin": pickles.read, "msgpack": msgpack.read}
# Libraries of different age put the variant at different places, and the index of a variant at three.
_NAME = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model|diffusion_flax_model|flax_model)(\.(?P<v1>[A-Za-z]\w*))??"
    r"(-(?P<part>\d{5}-of-\d{5})(\.(?P<v2>[A-Za-z]\w*))?)?"
    r"\.(?P<format>safetensors|bin|msgpack)(?P<index>\.index(\.(?P<v3>[A-Za-z]\w*))?\.json)?"
)


class Weights(NamedTuple):
    """What the name of a weight file says."""

    stem: str
    variant: str | None
    format: str
    role: str  # "whole", "index" or "shard"


def parse(name: str) -> Weights | None:
    """What the name of a file says of the weights in it; None when it holds none.

    >>> parse("model.fp16-00001-of-00002.safetensors")
    Weights(stem='model', variant='fp16', format='safetensors', role='shard')
    >>> parse("README.md")
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    role = "index" if found["index"] else "shard" if found["part"] else "whole"
    return Weights(found["stem"], found["v1"] or found["v2"] or found["v3"], found["format"], role)


def weight_file(folder: Path, library: str, variant: str | None = None) -> Path:
    """The file to open: the weights or their index, safetensors before pickles before Flax's.

    Args:
      folder: where to look.
      library: whose names the files have, "diffusers" or "transformers".
      variant: e.g. "fp16"; None for the plain files.

    Raises:
      FileNotFoundError: there is none; names what there is.
    """
    there = {path.name: parse(path.name) for path in sorted(folder.iterdir())}
    for format, stem in STEMS[library].items():
        for role in ("whole", "index"):
            for name, weights in there.items():
                if weights == Weights(stem, variant, format, role):
                    return folder / name
    variants = {w.variant for w in there.values() if w and w.role != "shard" and w.stem in STEMS[library].values()}
    choices = " or ".join(f"variant={v!r}" for v in sorted(variants, key=str)) or "a folder with weights"
    wanted = f"{STEMS[library]['safetensors']}{'.' + variant if variant else ''}.safetensors"
    raise FileNotFoundError(
        f"{folder} has no {wanted} (nor shards, a .bin or a .msgpack); it has {sorted(there)}. Use {choices}."
    )


def patterns(library: str, format: str, variant: str | None = None) -> list[str]:
    """Shell patterns of the files that `weight_file` may pick and of the shards behind it."""
    stem, v = STEMS[library][format], f".{variant}" if variant else ""
    part = "-?????-of-?????"
    weights = [f"{stem}{v}.{format}", f"{stem}{v}{part}.{format}", f"{stem}{part}{v}.{format}"]
    return sorted({*weights, f"{stem}{v}.{format}.index.json", f"{stem}.{format}.index{v}.json"})


def open_alone(path: Path) -> dict[str, Tensor]:
    """What a weight file that stands for itself holds, by its ending; no number is read yet. Raises as its reader."""
    return unpacked({".safetensors": safetensors.read, ".gguf": gguf.read}.get(path.suffix, pickles.read)(path))


def open_weights(path: Path) -> dict[str, Tensor]:
    """What a weight file, or all the shards behind an index, hold; no number is read yet.

    Raises:
      FileNotFoundError: a shard is missing.
      ValueError: a file is damaged, or the index and the shards do not agree or name files elsewhere.
    """
    weights = parse(path.name)
    read = READERS[weights.format]
    if weights.role != "index":
        return unpacked(read(path))
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise damaged(path, "its weight_map does not say which file holds which tensor")
    shards = sorted(set(index.values()))
    for shard in shards:
        named = parse(shard)  # a path to anywhere else does not parse
        if named is None or named.format != weights.format or named.role == "index":
            raise ValueError(
                f"{path} names the shard {shard!r}, which is not a weight file beside it; do not trust this folder."
            )
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(f"{path} names the shard {shard!r}, which is not there; download the folder again.")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        there = read(path.parent / shard)
        if wrong := [name for name in there if index.get(name) != shard]:
            raise damaged(path, f"{shard} holds {wrong[:3]}, which the index does not place there")
        tensors |= there
    if missing := [name for name in index if name not in tensors]:
        raise damaged(path, f"{len(missing)} tensors are in none of the shards, e.g. {missing[:3]}")
    return unpacked(tensors)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise damaged(path, "it does not hold a JSON object")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON with a final newline; complete on disk when this returns."""
    with open(path, "w", encoding="utf-8") as f:
        f.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
        f.flush()
        os.fsync(f.fileno())


def local(folder: str | os.PathLike[str]) -> Path:
    """A folder to write to, which has to be one of this machine.

    Raises:
      ValueError: it is a URL.
    """
    if scheme := re.match(r"(\w\w+):/", os.fspath(folder)):  # of what is a Path already one slash is gone
        raise ValueError(
            f"{folder} is no folder of this machine, and nothing is written to {scheme[1]}:// directly. Give a folder, "
            "e.g. where the bucket is mounted (gcsfuse, s3fs), or copy the result there afterwards."
        )
    return Path(folder)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder on the same disk as `folder`, whose files move into it at the end, or vanish when anything fails.

    A folder that does not exist appears in one step. In one that does, files of the same name are replaced one by one,
    each in one step, and weights that the new ones supersede are removed; everything else stays.

    Raises:
      FileExistsError: `folder` is a file.
      ValueError: it is a URL.
    """
    folder = Path(os.path.abspath(local(folder)))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give the folder to save in.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    near = folder if folder.exists() else folder.parent
    stage = near / f".{folder.name}.{secrets.token_hex(4)}.partial"
    stage.mkdir()
    try:
        yield stage
        _move(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    if not target.exists():
        os.rename(source, target)
        return
    new = {path.name for path in source.iterdir()}
    for name in sorted(new, key=lambda name: name.endswith(".json")):  # weights first, what names them last
        if (source / name).is_dir():
            _move(source / name, target / name)
        else:
            os.replace(source / name, target / name)
    written = {weights._replace(role="") for name in new if (weights := parse(name))}
    for path in target.iterdir():
        weights = parse(path.name)
        if path.name not in new and weights and weights._replace(role="") in written:
            path.unlink()


def listed(names: Iterable[str]) -> str:
    """Names in a sentence, shortened when there are many."""
    names = sorted(names)
    return ", ".join(names[:12]) + (f" … and {len(names) - 12} more" if len(names) > 12 else "")
