"""The data of the small model that we ship: every emoji of one font, on white or on a colour, and what to call it.

A picture is one code point of Noto Color Emoji, drawn by Pillow from the font's own bitmap, scaled to 64 x 64 and
laid over a background. A caption is its Unicode name in lower case, alone or in everyday phrasing, with the
background named where it is a colour. `batch(seed, step)` is a pure function, so a run that stops and resumes sees
the same data as one that does not. A quarter of the (name, colour) pairs is never trained on; whether the model
composes is measured on those.

Font: Noto Color Emoji, SIL Open Font License 1.1 (Debian package fonts-noto-color-emoji).
"""

import functools
import unicodedata
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the one size at which the font has bitmaps: 136 x 128 pixels
SIZE = 64

# The CSS colours of these names.
COLOURS = {
    "red": (255, 0, 0),
    "orange": (255, 165, 0),
    "yellow": (255, 255, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "purple": (128, 0, 128),
    "pink": (255, 192, 203),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
}
BACKGROUNDS = {"white": (255, 255, 255), **COLOURS}  # white first: the background of a caption that names none

# Code points that Unicode 15 named, so that every Python agrees on the set (3.11 knows the names of Unicode 14).
UNICODE_15 = frozenset(
    [
        0x1F6DC,
        0x1FA75,
        0x1FA76,
        0x1FA77,
        0x1FA87,
        0x1FA88,
        0x1FAAD,
        0x1FAAE,
        0x1FAAF,
        0x1FABB,
        0x1FABC,
        0x1FABD,
        0x1FABF,
    ]
    + [0x1FACE, 0x1FACF, 0x1FADA, 0x1FADB, 0x1FAE8, 0x1FAF7, 0x1FAF8]
)

PLAIN = (
    "{a}",
    "the {name}",
    "a picture of {a}",
    "an emoji of {a}",
    "{name} emoji",
    "{name} on white",
    "{a} on a white background",
)
ON_COLOUR = (
    "{a} on {colour}",
    "the {name} on {colour}",
    "{name} on a {colour} background",
    "{a} on a {colour} background",
    "the {name} on a {colour} background",
    "a picture of {a} on {colour}",
    "a {colour} background with {a}",
)

# What people say, where it is far from the Unicode name.
EVERYDAY = {
    "red heart": "heavy black heart",
    "thumbs up": "thumbs up sign",
    "thumbs down": "thumbs down sign",
    "smiley": "smiling face with open mouth",
    "crying laughing face": "face with tears of joy",
    "poop": "pile of poo",
    "pizza": "slice of pizza",
    "burger": "hamburger",
    "cup of coffee": "hot beverage",
    "sun": "black sun with rays",
    "star": "white medium star",
    "beer": "beer mug",
    "ufo": "flying saucer",
    "cool face": "smiling face with sunglasses",
    "evergreen": "evergreen tree",
    "ladybug": "lady beetle",
    "easter island statue": "moyai",
}


class Emoji(NamedTuple):
    """All the emoji, in the order of their code points.

    Attributes:
      names: lower-case Unicode names.
      rgba: uint8 [N, 64, 64, 4], alpha not multiplied in.
    """

    names: tuple[str, ...]
    rgba: np.ndarray


@functools.cache
def load(font: Path = FONT) -> Emoji:
    """Render every single-code-point emoji of the font: 1,386 of them.

    Raises:
      FileNotFoundError: the font is not installed.
    """
    if not Path(font).exists():
        raise FileNotFoundError(f"{font}: no such font; install it with `apt-get install fonts-noto-color-emoji`.")
    face = ImageFont.truetype(str(font), STRIKE, layout_engine=ImageFont.Layout.BASIC)
    names, pictures = [], []
    for code in (*range(0x2190, 0x3300), *range(0x1F000, 0x1FB00)):
        name = unicodedata.name(chr(code), "")
        if not name or code in UNICODE_15:
            continue
        left, top, right, bottom = face.getbbox(chr(code))
        side = max(right - left, bottom - top)
        canvas = Image.new("RGBA", (side, side))
        corner = ((side - right - left) // 2, (side - bottom - top) // 2)
        ImageDraw.Draw(canvas).text(corner, chr(code), font=face, embedded_color=True)
        if canvas.getbbox() is not None:  # a glyph that the font lacks draws nothing
            names.append(name.lower())
            pictures.append(np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
    return Emoji(tuple(names), np.stack(pictures))


def over(rgba: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Lay pictures over a colour.

    Args:
      rgba: uint8 [..., H, W, 4].
      background: numbers in [0, 255], [..., 3].

    Returns:
      float32 [..., H, W, 3] in [-1, 1].
    """
    alpha = rgba[..., 3:].astype(np.float32) / 255
    colour = np.asarray(background, np.float32)[..., None, None, :]
    return (rgba[..., :3] * alpha + colour * (1 - alpha)) / np.float32(127.5) - 1


def held_out(name: str, colour: str) -> bool:
    """Whether the pair is kept from training; about a quarter are.

    >>> held_out("dog face", "blue"), held_out("dog face", "red")
    (False, False)
    """
    return zlib.crc32(f"{name} on {colour}".encode()) % 4 == 0


def caption(name: str, colour: str = "white") -> str:
    """The standard caption: the name, and the background unless it is white.

    >>> caption("dog face"), caption("dog face", "blue")
    ('dog face', 'dog face on blue')
    """
    return name if colour == "white" else f"{name} on {colour}"


def phrasings(name: str, colour: str = "white") -> list[str]:
    """Everyday ways to ask for the same picture.

    >>> phrasings("owl", "red")[:3]
    ['an owl on red', 'the owl on red', 'owl on a red background']
    """
    a = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    forms = PLAIN if colour == "white" else ON_COLOUR
    return [form.format(name=name, a=a, colour=colour) for form in forms]


@functools.cache
def nicknames(names: tuple[str, ...]) -> dict[str, list[str]]:
    """Shorter names, by name: words that carry nothing left out, where what remains is nobody else's name.

    >>> nicknames(("dog face", "dog", "cat face"))
    {'cat face': ['cat']}
    """
    short = {}
    for name in names:
        words = name.split()
        for cut in (words[1:] if words[0] in ("black", "white", "heavy") else words, words):
            while len(cut) > 1 and cut[-1] in ("face", "sign", "symbol", "mark", "button"):
                cut = cut[:-1]
            if cut != words:
                short.setdefault(" ".join(cut), []).append(name)
    taken = set(names)
    alone = {nick: owners[0] for nick, owners in short.items() if len(set(owners)) == 1 and nick not in taken}
    out: dict[str, list[str]] = {}
    for nick, name in (alone | {n: o for n, o in EVERYDAY.items() if o in taken and n not in taken}).items():
        out.setdefault(name, []).append(nick)
    return out


class Batch(NamedTuple):
    """Which pictures and what they are called.

    Attributes:
      emoji: indices of emoji [B].
      background: indices into BACKGROUNDS [B].
      captions: B strings.
    """

    emoji: np.ndarray
    background: np.ndarray
    captions: list[str]


def batch(
    names: tuple[str, ...], size: int, seed: int, step: int, *, composed: float = 0.5, phrased: float = 0.35
) -> Batch:
    """Draw a training batch: a pure function of the seed and the step.

    Emoji come in shuffled passes over the whole set, so that each is seen equally often.

    Args:
      names: all the names.
      size: how many pictures.
      seed, step: where in the stream.
      composed: the share of pictures on a colour; a pair that is held out goes on white instead.
      phrased: the share of captions in everyday words.
    """
    rng = np.random.default_rng((seed, step))
    place = np.arange(step * size, (step + 1) * size)
    passes = {p: np.random.default_rng((seed, p, 1)).permutation(len(names)) for p in set(place // len(names))}
    emoji = np.array([passes[i // len(names)][i % len(names)] for i in place])
    background = np.where(rng.random(size) < composed, rng.integers(1, len(BACKGROUNDS), size), 0)
    colours, captions = tuple(BACKGROUNDS), []
    for k, (e, b, u, v) in enumerate(zip(emoji, background, rng.random(size), rng.random(size))):
        name, colour = names[e], colours[b]
        if b and held_out(name, colour):
            background[k], colour = 0, "white"
        nicks = nicknames(names).get(name, [])
        if nicks and v < phrased / 2:
            name = nicks[int(2 * v / phrased * len(nicks))]
        forms = phrasings(name, colour)
        captions.append(forms[int(u / phrased * len(forms))] if u < phrased else caption(name, colour))
    return Batch(emoji, background, captions)


def pictures(size: int, seed: int, step: int, uncaptioned: float = 0.0) -> tuple[np.ndarray, list[str]]:
    """The pictures [B, 64, 64, 3] in [-1, 1] of a training batch, and their captions, of which a share is empty."""
    names, rgba = load()
    chosen, background, captions = batch(names, size, seed, step)
    dropped = np.random.default_rng((seed, step, 1)).random(size) < uncaptioned
    images = over(rgba[chosen], np.array(list(BACKGROUNDS.values()))[background])
    return images, ["" if d else c for c, d in zip(captions, dropped)]


def edges(images: np.ndarray) -> np.ndarray:
    """Where pictures [B, H, W, 3] in [-1, 1] change: white lines on black, [B, H, W, 3] in [0, 1]."""
    padded = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    across, down = (np.abs(np.diff(padded, axis=axis)).max(-1) for axis in (1, 2))
    change = np.clip(2 * np.maximum(across[:, :, :-1], down[:, :-1]), 0, 1)
    return np.repeat(change[..., None], 3, -1)


class Drawn:
    """All of it as a source of data (see data/sources.py): every emoji on every background but the pairs held out.

    A row has the picture, its caption, and its edges for what is to follow them.
    """

    columns, faults = ("image", "text", "conditioning_image"), ()

    def __init__(self) -> None:
        self.names, self.rgba = load()
        colours = tuple(BACKGROUNDS)
        pairs = [(e, b) for e in range(len(self.names)) for b in range(len(colours))]
        self.pairs = [(e, b) for e, b in pairs if not b or not held_out(self.names[e], colours[b])]

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, i: int) -> str:
        e, b = self.pairs[i]
        return caption(self.names[e], tuple(BACKGROUNDS)[b])

    def __getitem__(self, i: int) -> dict[str, Any]:
        e, b = self.pairs[i]
        image = over(self.rgba[e], tuple(BACKGROUNDS.values())[b])
        byte = lambda a: np.round(np.clip(a, 0, 255)).astype(np.uint8)
        edge = edges(image[None])[0]
        return {"image": byte(127.5 * (image + 1)), "text": self.name(i), "conditioning_image": byte(255 * edge)}


def corpus(names: tuple[str, ...]) -> list[str]:
    """Text for a tokenizer to learn from: the names above all, and the phrasings often enough to be single tokens."""
    nicks = [nick for short in nicknames(names).values() for nick in short]
    frames = [form.format(name="", a="a", colour=colour) for colour in COLOURS for form in PLAIN + ON_COLOUR]
    return [*names] * 10 + nicks * 3 + frames * 30
