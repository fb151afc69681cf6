r"""Prompts whose words weigh more or less, blends of prompts, and prompts of any length, as embeddings for a call.

    (a cat)1.3   (a cat:1.3)     these words count 1.3 times as much
    cat++   (red ball)--         1.1 or 0.9 times for each sign
    (a (red+ ball):1.2)          weights multiply
    ("a cat", "a dog").blend(0.7, 0.3)        between prompts
    ("a cat", "in a hat").and(1, 0.5)         one behind the other, each read on its own
    \( \) \+ \- \"                            the signs themselves

A weight scales how far a token's embedding lies from that of an empty text. Below 1 the prompt moves towards itself
without these words as well: at 0.5 halfway. This is what compel does. What does not fit the text encoder at once is
read in pieces, cut between words, and their embeddings lie side by side.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import core
from flaxdiff.core import Params
from flaxdiff.models.clip import CLIPTextModel
from flaxdiff.pipelines.text import texts

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

PLUS, MINUS = 1.1, 0.9
_JOINED = re.compile(r"\s*[(\[](.*)[)\]]\s*\.(and|blend)\(([^()]*)\)\s*", re.DOTALL)
_QUOTED = re.compile(r'\s*"((?:[^"\\]|\\.)*)"\s*')
_PIECE = re.compile(r'\\.|[()"]|[+-]+|:\s*[^\s():]*\s*(?=\))|[^\\()"+\-:]+|.', re.DOTALL)
_END = re.compile(r'[\s(),."]|$')  # what may follow signs that weigh a word; within a word they are letters
_SIGNS = re.compile(r"\++|-+")
_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+")


class Fragment(NamedTuple):
    """Words, and how much they count."""

    text: str
    weight: float


@dataclasses.dataclass(frozen=True)
class Parsed:
    """Prompts to join: one, a blend of several, or several side by side."""

    prompts: tuple[tuple[Fragment, ...], ...]
    weights: tuple[float, ...]
    blend: bool


def parse(prompt: str) -> Parsed:
    """What a prompt says.

    Raises:
      ValueError: a parenthesis without its other half, a weight that is no number, not one for each prompt.

    >>> parse("a red cat++ on (a mat:0.5)").prompts[0]
    (Fragment(text='a red', weight=1.0), Fragment(text='cat', weight=1.21), Fragment(text='on', weight=1.0),
     Fragment(text='a mat', weight=0.5))
    """
    match = _JOINED.fullmatch(prompt)
    if match is None or not _QUOTED.match(match[1]):
        return Parsed((_fragments(prompt),), (1.0,), False)
    parts, at = [], 0
    while found := _QUOTED.match(match[1], at):
        parts.append(found[1])
        at = found.end() + (match[1][found.end() : found.end() + 1] == ",")
    if at < len(match[1]):
        raise ValueError(f"{prompt!r}: give prompts in double quotes with commas between, not {match[1][at:]!r}.")
    try:
        weights = tuple(float(w) for w in match[3].split(",") if w.strip()) or (1.0,) * len(parts)
    except ValueError:
        raise ValueError(f"{prompt!r}: .{match[2]}({match[3]}) takes numbers, one for each prompt.") from None
    if len(weights) != len(parts) or not all(map(math.isfinite, weights)):
        raise ValueError(f"{prompt!r}: .{match[2]} has {len(weights)} weights for {len(parts)} prompts.")
    if match[2] == "blend" and sum(weights) == 0:
        raise ValueError(f"{prompt!r}: the weights of a blend add up to nothing.")
    return Parsed(tuple(map(_fragments, parts)), weights, match[2] == "blend")


def _fragments(text: str) -> tuple[Fragment, ...]:
    """One prompt, without its signs."""
    open_at, stack = [], [[]]  # lists of (words, weight), the innermost last

    def weigh(weight: float, words: list) -> list:
        return [(word, weight * own) for word, own in words]

    at = 0
    while at < len(text):
        piece = _PIECE.match(text, at)
        sign, at = piece[0], piece.end()
        if sign == "(" or sign == '"' and not (open_at and open_at[-1][0] == '"'):
            open_at.append((sign, piece.start()))
            stack.append([])
        elif sign in (")", '"'):
            if not open_at or (open_at[-1][0] == "(") != (sign == ")"):
                raise ValueError(
                    f"{text!r}: {sign} at {piece.start()} closes nothing; write \\{sign} for the sign itself."
                )
            open_at.pop()
            inner = stack.pop()
            if number := _NUMBER.match(text, at):
                inner, at = weigh(float(number[0]), inner), number.end()
            elif signs := _SIGNS.match(text, at):
                inner, at = weigh(_power(signs[0]), inner), signs.end()
            stack[-1] += inner
        elif sign[0] == ":" and len(sign) > 1 and open_at and open_at[-1][0] == "(":
            if not _NUMBER.fullmatch(sign[1:].strip()):
                raise ValueError(
                    f"{text!r}: {sign[1:].strip()!r} is no weight; give a number, or write \\: for the sign."
                )
            stack[-1] = weigh(float(sign[1:]), stack[-1])
        elif (
            set(sign) in ({"+"}, {"-"})
            and _END.match(text, at)
            and stack[-1]
            and not stack[-1][-1][0].endswith((" ", "\n"))
        ):
            words, own = stack[-1].pop()
            head, _, last = words.rpartition(" ")
            stack[-1] += ([(head + " ", own)] if head else []) + [(last, own * _power(sign))]
        else:
            stack[-1].append((sign[1:] if sign[0] == "\\" and len(sign) > 1 else sign, 1.0))
    if open_at:
        sign, where = open_at[-1]
        raise ValueError(f"{text!r}: {sign} at {where} is never closed; write \\{sign} for the sign itself.")
    joined: list[list] = []
    for words, weight in stack[0]:
        if joined and joined[-1][1] == weight:
            joined[-1][0] += words
        else:
            joined.append([words, weight])
    kept = [Fragment(" ".join(words.split()), round(weight, 9)) for words, weight in joined if words.strip()]
    return tuple(kept) or (Fragment("", 1.0),)


def _power(signs: str) -> float:
    return (PLUS if signs[0] == "+" else MINUS) ** len(signs)


# --- embeddings ------------------------------------------------------------------------------------------------------


def encode_prompts(
    pipe: "DiffusionPipeline",
    params: Mapping[str, Params],
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None = None,
) -> dict[str, jax.Array]:
    """The embeddings of prompts with weights, of any length: options for a call, or to be kept in a file.

    Args:
      pipe, params: a pipeline whose text encoders are CLIP's, and its parameters.
      prompt, negative_prompt: see above; one text or several.

    Returns:
      `prompt_embeds` and `negative_prompt_embeds` [B, N, D], both of the same length; and `pooled_prompt_embeds`,
      `negative_pooled_prompt_embeds` [B, P] where a second text encoder has them.

    Raises:
      ValueError: prompts that do not parse, or a text encoder that is not CLIP's.

    >>> import flaxdiff, jax
    >>> pipe, params = flaxdiff.load()
    >>> embeds = encode_prompts(pipe, params, "(red apple)1.2 on blue--")
    >>> embeds["prompt_embeds"].shape == embeds["negative_prompt_embeds"].shape
    True
    """
    for name, _ in pipe.tokenizers:
        network = dict(pipe.specs)[name.replace("tokenizer", "text_encoder")].module
        if not issubclass(network, CLIPTextModel):
            raise ValueError(
                f"{type(pipe).__name__} reads prompts by {network.__name__}, and words are weighed for CLIP's text "
                "encoders alone; give the prompt itself."
            )
    encoders = [_Encoder(pipe, params, i) for i in range(len(pipe.tokenizers))]
    pairs = [("", texts(prompt)), ("negative_", texts(negative_prompt))]
    parsed = {prefix: [parse(text) for text in many] for prefix, many in pairs}
    rows = {prefix: [[_joined(encoder, p) for encoder in encoders] for p in many] for prefix, many in parsed.items()}
    pieces = max(len(z) for many in rows.values() for row in many for z in row)
    embeds = {}
    for prefix, many in rows.items():
        wide = [
            jnp.concatenate([e.padded(z, pieces).reshape(-1, z.shape[-1]) for e, z in zip(encoders, row)], -1)
            for row in many
        ]
        embeds[f"{prefix}prompt_embeds"] = jnp.stack(wide)
        if encoders[-1].projected:
            embeds[f"{prefix}pooled_prompt_embeds"] = jnp.stack([_pooled(encoders[-1], p) for p in parsed[prefix]])
    return embeds


class _Encoder:
    """One text encoder with its tokenizer, and what it makes of an empty text."""

    def __init__(self, pipe: "DiffusionPipeline", params: Mapping[str, Params], i: int):
        name, tokenizer = pipe.tokenizers[i]
        component = name.replace("tokenizer", "text_encoder")
        self.spec, self.params, self.words = dict(pipe.specs)[component], params[component], tokenizer.loaded
        self.length = tokenizer([""]).shape[1]
        self.penultimate = len(pipe.tokenizers) > 1 or component != "text_encoder"
        self.projected = self.penultimate and "text_projection.weight" in self.params
        self.empty = self(np.asarray(tokenizer([""])), np.ones((1, self.length), bool)).embeds

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> "_Read":
        out = _read(self.spec, self.params, np.asarray(ids, np.int32), mask)
        return _Read(out.hidden_states[-2] if self.penultimate else out.last_hidden_state, out.text_embeds)

    def pieces(self, fragments: Sequence[Fragment]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [P, N] in as many pieces as it takes, the weight of each, and the number of its fragment or -1."""
        ids, weights, owners = [], [], []
        for i, fragment in enumerate(fragments):
            tokens = self.words(fragment.text, add_special_tokens=False, truncation=False, verbose=False).input_ids
            ids, weights, owners = ids + tokens, weights + [fragment.weight] * len(tokens), owners + [i] * len(tokens)
        ends = [token.endswith("</w>") for token in self.words.convert_ids_to_tokens(ids)]
        start, end, pad = self.words.bos_token_id, self.words.eos_token_id, self.words.pad_token_id
        rows, at = [], 0
        while not rows or at < len(ids):
            stop = min(at + self.length - 2, len(ids))
            if stop < len(ids):  # between words, unless one is longer than all
                stop = next((j for j in range(stop, at, -1) if ends[j - 1]), stop)
            fill = self.length - 2 - (stop - at)
            row = lambda values, edge, last, rest, at=at, stop=stop, fill=fill: [
                edge,
                *values[at:stop],
                last,
                *[rest] * fill,
            ]
            rows.append((row(ids, start, end, pad), row(weights, 1.0, 1.0, 1.0), row(owners, -1, -1, -1)))
            at = stop
        return tuple(np.array([r[k] for r in rows]) for k in range(3))

    def padded(self, z: jax.Array, pieces: int) -> jax.Array:
        """Embeddings [P, N, D] with empty texts behind."""
        return jnp.concatenate([z, *[self.empty] * (pieces - len(z))])


class _Read(NamedTuple):
    embeds: jax.Array
    pooled: jax.Array | None


@functools.partial(jax.jit, static_argnums=0)
def _read(spec: core.Spec, params: Params, ids: jax.Array, mask: jax.Array) -> Any:
    return core.apply(spec, params, ids, mask=mask)


def _weighted(encoder: _Encoder, fragments: Sequence[Fragment]) -> jax.Array:
    """One prompt [P, N, D]."""
    ids, weights, owners = encoder.pieces(fragments)
    scale = lambda z: encoder.empty + (z - encoder.empty) * jnp.asarray(weights, z.dtype)[..., None]
    whole = np.ones(ids.shape, bool)
    light = [i for i, fragment in enumerate(fragments) if fragment.weight < 1]
    masks = [whole, *(owners != i for i in light)]
    shares = [1.0, *(math.tan((1 - max(fragments[i].weight, 1e-5)) * math.pi / 2) for i in light)]
    return sum(share * scale(encoder(ids, mask).embeds) for share, mask in zip(shares, masks)) / sum(shares)


def _joined(encoder: _Encoder, parsed: Parsed) -> jax.Array:
    """All prompts of a text [P, N, D]."""
    each = [_weighted(encoder, fragments) for fragments in parsed.prompts]
    if parsed.blend:
        pieces, total = max(map(len, each)), sum(parsed.weights)
        return sum(w / total * encoder.padded(z, pieces) for w, z in zip(parsed.weights, each))
    return jnp.concatenate([encoder.empty + (z - encoder.empty) * w for w, z in zip(parsed.weights, each)])


def _pooled(encoder: _Encoder, parsed: Parsed) -> jax.Array:
    """The pooled state of a text without its weights, of its first piece; of a blend the mean, else of the first."""
    plain = lambda fragments: [Fragment(" ".join(f.text for f in fragments), 1.0)]
    read = lambda fragments: encoder.pieces(plain(fragments))[0][:1]
    of = lambda fragments: encoder(read(fragments), np.ones((1, encoder.length), bool)).pooled[0]
    if not parsed.blend:
        return of(parsed.prompts[0])
    return sum(w * of(fragments) for w, fragments in zip(parsed.weights, parsed.prompts)) / sum(parsed.weights)
