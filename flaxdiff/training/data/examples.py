"""From a row of a source to an example that a network trains on: pixels, captions, numbers, and how it was cropped."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxdiff.training.data.faults import BadExample, Fault
from flaxdiff.training.data.order import find_nearest_bucket
from flaxdiff.training.data.pictures import MODES, Cut, Size, decode, fit, size_of


class Draw(NamedTuple):
    """What is left to chance in one example: numbers in [0, 1)."""

    across: float
    down: float
    flip: float
    caption: float
    empty: float
    dropout: float


def draw(*seed: int) -> Draw:
    """The chances of an example, a function of the seed and of where it is in the stream."""
    return Draw(*np.random.default_rng(seed).random(len(Draw._fields)))


@dataclasses.dataclass(frozen=True)
class Examples:
    """What an example is made of; each part is a name in the batch, and the column that it comes from.

    Attributes:
      resolution: (height, width) in pixels, or one number for both.
      aspect_ratio_buckets: sizes that pictures may have instead: each takes the one nearest to its proportions. All
        headers are read beforehand.
      images: pictures. All are cut and flipped as the first is; each is float32 [H, W, 3] in [-1, 1].
      texts: captions; of several in one cell one is drawn.
      numbers: labels and the like.
      prompt: a caption for all examples in place of texts, e.g. "a photo of sks dog".
      center_crop: cut out the middle instead of some part.
      random_flip: every other picture left to right.
      image_interpolation_mode: nearest, box, bilinear, hamming, bicubic or lanczos.
      proportion_empty_prompts: the share of examples whose texts are empty, for guidance.
      conditioning_dropout_prob: p in [0, 1/3]: as InstructPix2Pix is trained, a share p has neither text nor
        conditioning, p only no text, p only no conditioning; `conditioning` says where it counts, 1 or 0.

    >>> from PIL import Image
    >>> examples = Examples(center_crop=True)
    >>> made = examples.make({"image": Image.new("RGB", (60, 40), "white"), "text": ["a", "b"]}, draw(0, 0), (32, 32))
    >>> made["image"].shape, made["caption"], made["original_size"].tolist(), made["crop_top_left"].tolist()
    ((32, 32, 3), 'a', [40, 60], [0, 8])

    Reference: Podell et al., SDXL, 2023 (sizes and corners); Brooks et al., InstructPix2Pix, 2022 (dropout).
    """

    resolution: int | Size = 512
    aspect_ratio_buckets: Sequence[Size] = ()
    images: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"image": "image"})
    texts: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"caption": "text"})
    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prompt: str | None = None
    center_crop: bool = False
    random_flip: bool = False
    image_interpolation_mode: str = "lanczos"
    proportion_empty_prompts: float = 0.0
    conditioning_dropout_prob: float = 0.0

    def __post_init__(self):
        if self.image_interpolation_mode not in MODES:
            raise ValueError(
                f"image_interpolation_mode={self.image_interpolation_mode!r} is not known; use {', '.join(MODES)}."
            )
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(f"proportion_empty_prompts={self.proportion_empty_prompts}: give a share from 0 to 1.")
        if not 0 <= self.conditioning_dropout_prob <= 1 / 3:
            raise ValueError(f"conditioning_dropout_prob={self.conditioning_dropout_prob}: give a share up to 1/3.")
        if min(self.size) < 1:
            raise ValueError(f"resolution={self.resolution}: give pixels, one number or (height, width).")

    @property
    def size(self) -> Size:
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else tuple(self.resolution)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a source must have."""
        texts = self.texts if self.prompt is None else {}
        return tuple(dict.fromkeys((*self.images.values(), *texts.values(), *self.numbers.values())))

    def grouped(self, source: Any, chosen: Iterable[int], faults: list[Fault]) -> dict[Size, list[int]]:
        """Which of the chosen examples of a source are made at which size; those of no use go to `faults`."""
        if not self.aspect_ratio_buckets:
            return {self.size: list(chosen)}
        sizes = [tuple(size) for size in self.aspect_ratio_buckets]
        groups: dict[Size, list[int]] = {size: [] for size in sizes}
        column = next(iter(self.images.values()))
        for i in map(int, chosen):
            try:
                groups[sizes[find_nearest_bucket(size_of(source[i].get(column)), sizes)]].append(i)
            except BadExample as error:
                faults.append(Fault(source.name(i), str(error)))
        return {size: group for size, group in groups.items() if group}

    def make(self, row: Mapping[str, Any], chances: Draw, size: Size) -> dict[str, Any]:
        """The example of a row.

        Args:
          row: its cells, by column.
          chances: from `draw`.
          size: (height, width) of its pictures.

        Returns:
          What `images`, `texts` and `numbers` name; `original_size` and `crop_top_left`, int32 [2], of the first
          picture, height and top first; and `conditioning` where that is dropped.

        Raises:
          BadExample: a picture or a caption that cannot be used.
        """
        made: dict[str, Any] = {}
        cut = Cut(flip=self.random_flip and chances.flip < 0.5)
        cut = cut if self.center_crop else cut._replace(across=chances.across, down=chances.down)
        for name, column in self.images.items():
            image = decode(row.get(column))
            pixels, corner = fit(image, size, cut, self.image_interpolation_mode)
            if not made:
                made |= {"original_size": np.int32([image.height, image.width]), "crop_top_left": np.int32(corner)}
            made[name] = pixels
        p, u = self.conditioning_dropout_prob, chances.dropout
        empty = chances.empty < self.proportion_empty_prompts or u < 2 * p
        for name, text in self.captions(row, chances.caption).items():
            made[name] = "" if empty else text
        if p:
            made["conditioning"] = np.float32(not p <= u < 3 * p)
        for name, column in self.numbers.items():
            made[name] = _number(row.get(column))
        return made

    def captions(self, row: Mapping[str, Any], chance: float = 0.0) -> dict[str, str]:
        """The texts of a row; of several the one that a chance in [0, 1) falls on. Raises BadExample for an empty one.

        >>> Examples().captions({"text": b" a cat "})
        {'caption': 'a cat'}
        """
        if self.prompt is not None:
            return dict.fromkeys(self.texts or ("caption",), self.prompt)
        return {name: _text(row.get(column), chance) for name, column in self.texts.items()}


def _text(cell: Any, chance: float) -> str:
    """A caption, or one of several. Raises BadExample where there is none."""
    if isinstance(cell, np.ndarray):
        cell = cell.tolist()
    if isinstance(cell, Sequence) and not isinstance(cell, str | bytes):
        cell = cell[int(chance * len(cell))] if cell else None
    if isinstance(cell, bytes):
        try:
            cell = cell.decode()
        except UnicodeDecodeError:
            raise BadExample("with a caption that cannot be read") from None
    if cell is not None and not isinstance(cell, str):
        raise BadExample(f"with a caption that is no text but {type(cell).__name__}")
    if cell is None or not cell.strip():
        raise BadExample("with an empty caption")
    return cell.strip()


def _number(cell: Any) -> np.ndarray:
    """A number or several: whole ones in int32, others in float32. Raises BadExample where there is none."""
    try:
        array = np.asarray(cell)
        wide = np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_
        if not (wide or np.issubdtype(array.dtype, np.floating)):
            raise ValueError
        return array.astype(np.int32 if wide else np.float32)
    except ValueError:
        raise BadExample("with a number that is none") from None
