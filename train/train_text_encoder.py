"""Warm up a text encoder by letting it draw: the launch script of configs/emoji_text_encoder.json and emoji_t5.json.

Sixteen positions of every text have read the whole caption: the last ones of CLIP, which is causal and padded with the
end of the text; the marks before the words of T5, which reads both ways. Each is made to say, through one linear layer
that is thrown away afterwards, what one cell of a 4 x 4 grid over the picture looks like (principal components of its
pixels). A denoiser that attends to these positions finds the layout already there: without the warm-up, diffusion
learns to read text a hundred times more slowly.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.checkpoint import save_model
from flaxdiff.core import Model, Params, Spec, apply, init
from flaxdiff.models.clip import CLIPTextModel
from flaxdiff.models.t5 import T5EncoderModel
from flaxdiff.pipelines.text import Tokenizer
from flaxdiff.training import emoji, loop, optimizers, state, tokenizer


class Reader(NamedTuple):
    """A kind of text encoder: its class, its tokenizer's, how that is learned, how it reads, and where it draws."""

    model: type[Model]
    tokenizer: str
    learn: Callable[[list[str], Sequence[str], Mapping[str, Any], Path], None]  # captions, names, settings, folder
    read: Callable[[Spec, Params, jax.Array], jax.Array]  # ids [B, N] -> [B, N, D]
    marks: slice  # the places, of the N, that draw
    table: str | None = None  # embeddings that begin as what the pictures of a token have in common


READERS = {
    "clip": Reader(
        CLIPTextModel,
        "CLIPTokenizer",
        lambda captions, names, c, folder: tokenizer.train(
            captions, c["vocab_size"], c["max_position_embeddings"], folder
        ),
        lambda spec, params, ids: apply(spec, params, ids).last_hidden_state,
        slice(-16, None),
    ),
    "t5": Reader(
        T5EncoderModel,
        "PreTrainedTokenizerFast",
        lambda captions, names, c, folder: tokenizer.train_words(captions, names, 36, 16, folder),
        lambda spec, params, ids: apply(spec, params, ids, ids != 0),
        slice(16),
        "shared.weight",
    ),
}


class Cells:
    """Pictures as principal components of the cells of a grid, each divided by the root of its deviation."""

    def __init__(self, rgba: np.ndarray, grid: int, components: int):
        self.rgba, self.grid, self.colours = rgba, grid, np.array(list(emoji.BACKGROUNDS.values()))
        sample = self.cut(
            emoji.over(rgba, self.colours[np.arange(len(rgba)) * 7 % 20 * (np.arange(len(rgba)) * 7 % 20 < 11)])
        )
        sample = sample.reshape(-1, sample.shape[-1])
        self.mean = sample.mean(0)
        variance, axes = np.linalg.eigh(np.cov((sample - self.mean).T))
        order = np.argsort(-variance)[:components]
        self.axes, self.damping = axes[:, order].astype(np.float32), variance[order].astype(np.float32) ** 0.25

    def cut(self, image: np.ndarray) -> np.ndarray:
        """[B, H, W, 3] -> [B, grid², pixels of a cell]."""
        b, h, w, c = image.shape
        g = self.grid
        cells = image.reshape(b, g, h // g, g, w // g, c).transpose(0, 1, 3, 2, 4, 5)
        return cells.reshape(b, g * g, -1)

    def of(self, chosen: np.ndarray, background: np.ndarray) -> np.ndarray:
        """Emoji and backgrounds by index -> [B, grid², components]."""
        cells = self.cut(emoji.over(self.rgba[chosen], self.colours[background]))
        return (cells - self.mean) @ self.axes / self.damping

    def psnr(self, error: np.ndarray) -> float:
        """Mean PSNR, in dB, of pictures drawn from components that are off by `error`, others ignored."""
        mse = np.square(error * self.damping).sum((1, 2)) / (emoji.SIZE**2 * 3)
        return float(np.mean(10 * np.log10(4 / mse)))


def in_common(rgba: np.ndarray, ids: np.ndarray, table: jax.Array) -> jax.Array:
    """Embeddings [V, D] of which those in the ids of N names point to the mean picture of their names.

    Ids are [N, L], or several readings of the names one after the other. A picture is its D principal components. All
    embeddings get about the same length, so that no token outshouts the others; one that every name has stays.
    """
    small = emoji.over(rgba, emoji.BACKGROUNDS["white"]).reshape(len(rgba), 16, 4, 16, 4, 3).mean((2, 4))
    u, s, _ = np.linalg.svd((small - small.mean(0)).reshape(len(rgba), -1), full_matrices=False)
    codes = (u * s**0.5)[:, : table.shape[1]]  # half way to equal deviations: details count, and less than the whole
    has = np.zeros((len(rgba), table.shape[0]))
    has[np.arange(len(ids))[:, None] % len(rgba), ids] = 1
    mean = has.T @ codes / np.maximum(has.sum(0), 1)[:, None]
    told = (has.sum(0) > 0) & (has.sum(0) < len(rgba))
    size = np.sqrt(np.square(mean).mean(1) + 1e-3 * np.square(codes).mean())
    return jnp.where(told[:, None], mean / size[:, None], table)


def report(predict, cells: Cells, names: tuple[str, ...], encode) -> str:
    """How well captions retrieve pictures: all names on white, and held-out pairs among all names on that colour."""
    draw = lambda captions: np.concatenate(
        [predict(encode(captions[i : i + 128])) for i in range(0, len(captions), 128)]
    )
    everyone, lines = np.arange(len(names)), []
    for colour in ("white", "blue", "pink"):
        background = np.full(len(names), list(emoji.BACKGROUNDS).index(colour))
        truth = cells.of(everyone, background)
        asked = np.array([i for i in everyone if colour == "white" or emoji.held_out(names[i], colour)])
        drawn = draw([emoji.caption(names[i], colour) for i in asked] + [""] * (-len(asked) % 128))[: len(asked)]
        flat = lambda a: (a * cells.damping).reshape(len(a), -1)
        a, b = flat(drawn), flat(truth)
        nearest = np.argmin((b**2).sum(1) - 2 * a @ b.T, 1)
        lines.append(f"{colour}: R@1 {np.mean(nearest == asked):.3f} PSNR {cells.psnr(drawn - truth[asked]):.2f} dB")
    return "  ".join(lines)


def main() -> None:
    config, out = loop.arguments(__doc__)

    names, rgba = emoji.load()
    settings, reader = config["text_encoder"], READERS[config["reader"]]
    readings = [("tokenizer", names)] + [("checkpoints/words", ())] * (config["spelled"] > 0)
    for folder, phrases in readings:
        reader.learn(emoji.corpus(names), phrases, settings, out / folder)
    encodes = [Tokenizer(str(out / folder), reader.tokenizer) for folder, _ in readings]  # the second word by word
    encode, spell = encodes[0], encodes[-1]
    cells = Cells(rgba, config["grid"], config["components"])
    positions = config["grid"] ** 2

    spec = reader.model.from_config({**settings, "scan_layers": False})
    key = jax.random.key(config["seed"])
    text = init(spec, key)
    if reader.table:
        every = np.concatenate([read(names) for read in encodes])
        text = {**text, reader.table: in_common(rgba, every, text[reader.table])}
    width = jax.eval_shape(functools.partial(reader.read, spec), text, encode([""])).shape[-1]
    params = {
        "text_encoder": text,
        "head": jax.random.normal(key, (width, config["components"])) / width**0.5,
    }

    def drawn_at(params, ids):
        """The states of the places that draw, [B, 16, D]."""
        return reader.read(spec, params["text_encoder"], ids)[:, reader.marks]

    def predict(params, ids):
        return drawn_at(params, ids) @ params["head"]

    code = 4 * jnp.eye(positions)  # what the first components of each of the last positions are to be

    def loss(params, batch, key):
        """The cells of the picture, and a mark that tells the positions apart."""
        hidden = drawn_at(params, batch["ids"])
        drawing = jnp.square(hidden @ params["head"] - batch["target"]).mean()
        marks = jnp.square(hidden[..., :positions] - code).mean()
        return drawing + 0.1 * marks, {"drawing": drawing, "marks": marks}

    def data(n: int) -> dict[str, np.ndarray]:
        size, seed = config["batch_size"], config["seed"]
        chosen, background, captions = emoji.batch(names, size, seed, n, composed=0.6)
        ids = encode(captions)
        if config["spelled"]:
            spelled = np.random.default_rng((seed, n, 1)).random((size, 1)) < config["spelled"]
            ids = np.where(spelled, spell(captions), ids)
        return {"ids": ids, "target": cells.of(chosen, background)}

    rate = optimizers.schedule("cosine", config["learning_rate"], config["steps"], warmup=100)
    tx = optimizers.optimizer(config["optimizer"], rate, b2=0.98, decay=0.01)
    step, start = state.jitted(loss, tx, config["decay"]), state.create(params, tx)
    folder = out / "checkpoints/text_encoder"
    final = loop.fit(step, start, data, key, config["steps"], directory=folder, save_every=500, log_every=50)
    save_model(out / "text_encoder", spec, state.averaged(final)["text_encoder"])
    drawn = jax.jit(lambda ids: predict(state.averaged(final), jnp.asarray(ids)))
    for (folder, _), read in zip(readings, encodes):
        print(f"{folder}:", report(drawn, cells, names, read))


if __name__ == "__main__":
    main()
