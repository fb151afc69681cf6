"""What pictures are worth, in numbers: whether they show what was asked for, and whether they look like others.

CLIP score and directional similarity ask CLIP about texts and pictures; the distances of Fréchet and by kernel compare
the features of two sets of pictures, by InceptionV3 (FID, KID) or by CLIP. The arithmetic is on the host in float64.
`evaluate`, and the command `flaxdiff evaluate`, go from folders of pictures to a table.
"""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, UnidentifiedImageError

from flaxdiff import images
from flaxdiff.core import apply

Pictures = Sequence[Image.Image]


def clip_score(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """How well pictures fit texts: 100 · max(cos(picture, text), 0), [B].

    Args:
      pictures, texts: CLIP's embeddings [B, P].

    >>> clip_score(np.eye(2), np.array([[1.0, 1.0], [0.0, -1.0]])).round(1)
    array([70.7,  0. ])

    Reference: Hessel et al., CLIPScore: A Reference-free Evaluation Metric for Image Captioning, 2021.
    """
    return 100 * np.maximum(_cosine(pictures, texts), 0)


def directional_similarity(
    before: np.ndarray, after: np.ndarray, text_before: np.ndarray, text_after: np.ndarray
) -> np.ndarray:
    """Whether pictures changed as their texts did: cos(after - before, text after - text before), [B].

    Args:
      before, after, text_before, text_after: CLIP's embeddings [B, P], brought to length one here.

    >>> directional_similarity(*np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[2.0, 0.0]], [[0.0, 3.0]]]))
    array([1.])

    Reference: Gal et al., StyleGAN-NADA: CLIP-Guided Domain Adaptation of Image Generators, 2021.
    """
    return _cosine(_unit(after) - _unit(before), _unit(text_after) - _unit(text_before))


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (_unit(x) * _unit(y)).sum(-1)


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The distance of the normal distributions that fit two sets of features best; FID, if they are InceptionV3's.

    |μ_x - μ_y|² + tr(Σ_x + Σ_y - 2 (Σ_x Σ_y)^½)

    Args:
      x, y: features [N, D] and [M, D], at least two of each.

    >>> frechet_distance(np.array([[0.0], [2.0]]), np.array([[3.0], [5.0]]))
    9.0

    Reference: Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, 2017.
    """
    x, y = _features(x, y, 2)
    a, b = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (x, y))
    a, b = (np.linalg.qr(f, "r") if len(f) > f.shape[1] else f for f in (a, b))  # aᵀa stays what it is
    # tr (Σ_x Σ_y)^½ sums the roots of the eigenvalues of aᵀa bᵀb, which are the singular values of a bᵀ: no more than
    # there are pictures or channels, and exact where the covariances have no inverse.
    together = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    spread = np.square(a).sum() + np.square(b).sum() - 2 * together
    return float(np.square(x.mean(0) - y.mean(0)).sum() + max(spread, 0))


def kernel_distance(
    x: np.ndarray, y: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The squared mean discrepancy of two sets of features under (x·y / D + 1)³: mean and deviation over subsets; KID.

    Args:
      x, y: features [N, D] and [M, D].
      subsets: how many are drawn of each.
      subset_size: how many features each has; no more are taken than there are.
      seed: of the draw.

    >>> same = np.random.default_rng(0).standard_normal((64, 8))
    >>> round(kernel_distance(same, same + 1, subset_size=32)[0], 1)
    7.3

    Reference: Bińkowski et al., Demystifying MMD GANs, 2018.
    """
    x, y = _features(x, y, 2)
    size, draw = min(subset_size, len(x), len(y)), np.random.default_rng(seed)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    found = []
    for _ in range(subsets):
        a, b = (f[draw.choice(len(f), size, replace=False)] for f in (x, y))
        own = [(k.sum() - np.trace(k)) / (size * (size - 1)) for k in (kernel(a, a), kernel(b, b))]
        found.append(sum(own) - 2 * kernel(a, b).mean())
    return float(np.mean(found)), float(np.std(found))


def _features(x: np.ndarray, y: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise ValueError(f"Features of shapes {x.shape} and {y.shape}; give [N, D] and [M, D] of {least} or more each.")
    return x, y


# --- from pictures to features ----------------------------------------------------------------------------------------


def _in_parts(read: Callable[[Any], np.ndarray], things: Sequence[Any], run: Callable, most: int = 16) -> np.ndarray:
    """`run` on what `read` makes of so many things at a time, the last of them as often as it takes to fill a part."""
    found, size = [], min(most, len(things))
    for start in range(0, len(things), size):
        part = list(things[start : start + size])
        found.append(np.asarray(run(read(part + part[-1:] * (size - len(part)))), np.float32)[: len(part)])
    return np.concatenate(found)


def clip_encoders(repo: str | os.PathLike[str]) -> tuple[Callable[[Pictures], np.ndarray], Callable]:
    """CLIP from a folder or a Hub repository: pictures -> [B, P], and texts -> [B, P]."""
    from flaxdiff.checkpoint import hub
    from flaxdiff.models.clip_model import CLIPModel
    from flaxdiff.pipelines.text import Tokenizer

    spec, params = CLIPModel.from_pretrained(repo)
    folder = hub.locate(repo, ("tokenizer_config.json",), "vocab.json", "merges.txt", "tokenizer.json").parent
    tokenizer = Tokenizer(str(folder), "CLIPTokenizer")
    side, length = spec.config.vision_config.image_size, spec.config.text_config.max_position_embeddings
    run = {
        name: jax.jit(functools.partial(apply, spec, method=name))
        for name in ("get_image_features", "get_text_features")
    }
    see = functools.partial(images.clip_pixels, size=side)
    pictures = lambda given: _in_parts(see, given, functools.partial(run["get_image_features"], params))
    read = lambda given: tokenizer(given, length)
    return pictures, lambda given: _in_parts(read, given, functools.partial(run["get_text_features"], params))


def inception(path: str | os.PathLike[str]) -> Callable[[Pictures], np.ndarray]:
    """The network of FID from its published weights, `pt_inception-2015-12-05-6726825d.pth`: pictures -> [B, 2048]."""
    from flaxdiff.models.inception_v3 import InceptionV3

    spec, params = InceptionV3.from_single_file(path)
    run = functools.partial(jax.jit(functools.partial(apply, spec)), params)
    return lambda given: _in_parts(images.inception_pixels, given, run)


class Folder(Sequence):
    """The pictures in a folder, in the order of their names, opened when they are asked for."""

    def __init__(self, path: str | os.PathLike[str]):
        kinds = Image.registered_extensions()
        there = sorted(Path(path).iterdir()) if Path(path).is_dir() else []
        self.files = [file for file in there if file.suffix.lower() in kinds]
        if not self.files:
            raise ValueError(f"{path} is not a folder with pictures; give one.")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        try:
            with Image.open(self.files[at]) as image:
                return image.convert("RGB")
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as damaged:
            raise ValueError(f"{self.files[at]} cannot be read as a picture; remove or replace it.") from damaged


def evaluate(
    pictures: Pictures,
    *,
    prompts: Sequence[str] | None = None,
    before: Pictures | None = None,
    before_prompts: Sequence[str] | None = None,
    reference: Pictures | None = None,
    clip: str | os.PathLike[str] | None = None,
    inception_weights: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Everything that can be said of pictures with what is given.

    Args:
      pictures: Pillow's, or a `Folder`.
      prompts: one for each picture: the CLIP score.
      before, before_prompts: the pictures that these were made from, and what those show: directional similarity.
      reference: pictures that these should look like: distances, by the features of each network given.
      clip: a folder or Hub repository with a `CLIPModel`, e.g. "openai/clip-vit-base-patch16".
      inception_weights: a file, see `inception`.

    Raises:
      ValueError: a number of prompts or pictures that does not fit, or a network that is needed and not given.

    >>> evaluate([Image.new("RGB", (8, 8))], prompts=["a", "b"], clip="unused")
    Traceback (most recent call last):
    ValueError: 1 pictures and 2 prompts; give one for each.
    """
    if not len(pictures):
        raise ValueError("There are no pictures; give some.")
    for name, given in {"prompts": prompts, "pictures before": before, "prompts before": before_prompts}.items():
        if given is not None and len(given) != len(pictures):
            raise ValueError(f"{len(pictures)} pictures and {len(given)} {name}; give one for each.")
    pairs = before is not None or before_prompts is not None
    if pairs and (before is None or before_prompts is None or prompts is None):
        raise ValueError("Directional similarity needs the pictures before, and prompts before and after; give all.")
    if prompts is not None and clip is None:
        raise ValueError('Prompts are compared by CLIP; give one, e.g. "openai/clip-vit-base-patch16".')
    if prompts is None and (reference is None or clip is None and inception_weights is None):
        raise ValueError("There is nothing to compare with; give prompts and CLIP, or a reference and a network.")

    found: dict[str, float] = {}
    see, read = clip_encoders(clip) if clip is not None else (None, None)
    if prompts is not None:
        shown, asked = see(pictures), read(prompts)
        found["CLIP score"] = float(clip_score(shown, asked).mean())
        if pairs:
            similarity = directional_similarity(see(before), shown, read(before_prompts), asked)
            found["CLIP directional similarity"] = float(similarity.mean())
    if reference is not None:
        networks = {"CLIP": see, "Inception": inception(inception_weights) if inception_weights is not None else None}
        for name, network in networks.items():
            if network is not None:
                x, y = network(pictures), network(reference)
                found[f"{name} Fréchet distance"] = frechet_distance(x, y)
                found[f"{name} kernel distance"], found[f"{name} kernel distance, deviation"] = kernel_distance(x, y)
    return found
