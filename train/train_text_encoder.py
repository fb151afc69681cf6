"""Warm up a text encoder by letting it draw: the launch script of configs/emoji_text_encoder.json.

Captions are short and padded with the end-of-text token, and the encoder is causal, so its last positions have read
the whole caption. Each of the last sixteen is made to say, through one linear layer that is thrown away afterwards,
what one cell of a 4 x 4 grid over the picture looks like (principal components of its pixels). A denoiser that
attends to these positions finds the layout already there: without the warm-up, diffusion learns to read text a
hundred times more slowly.
"""

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.checkpoint import save_model
from flaxdiff.core import apply, init
from flaxdiff.models.clip import CLIPTextModel
from flaxdiff.pipelines.text import Tokenizer
from flaxdiff.training import emoji, loop, optimizers, state, tokenizer


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
    settings = config["text_encoder"]
    tokenizer.train(emoji.corpus(names), settings["vocab_size"], settings["max_position_embeddings"], out / "tokenizer")
    encode = Tokenizer(str(out / "tokenizer"), "CLIPTokenizer")
    cells = Cells(rgba, config["grid"], config["components"])
    positions = config["grid"] ** 2

    spec = CLIPTextModel.from_config({**settings, "scan_layers": False})
    width = settings["hidden_size"]
    key = jax.random.key(config["seed"])
    params = {
        "text_encoder": init(spec, key),
        "head": jax.random.normal(key, (width, config["components"])) / width**0.5,
    }

    def predict(params, ids):
        return apply(spec, params["text_encoder"], ids).last_hidden_state[:, -positions:] @ params["head"]

    code = 4 * jnp.eye(positions)  # what the first components of each of the last positions are to be

    def loss(params, batch, key):
        """The cells of the picture, and a mark that tells the positions apart."""
        hidden = apply(spec, params["text_encoder"], batch["ids"]).last_hidden_state[:, -positions:]
        drawing = jnp.square(hidden @ params["head"] - batch["target"]).mean()
        marks = jnp.square(hidden[..., :positions] - code).mean()
        return drawing + 0.1 * marks, {"drawing": drawing, "marks": marks}

    def data(n: int) -> dict[str, np.ndarray]:
        chosen, background, captions = emoji.batch(names, config["batch_size"], config["seed"], n, composed=0.6)
        return {"ids": encode(captions), "target": cells.of(chosen, background)}

    tx = optimizers.adam(config["learning_rate"], config["steps"], b2=0.98, decay=0.01)
    step, start = state.jitted(loss, tx, config["decay"]), state.create(params, tx)
    folder = out / "checkpoints/text_encoder"
    final = loop.fit(step, start, data, key, config["steps"], directory=folder, save_every=500, log_every=50)
    save_model(out / "text_encoder", spec, state.averaged(final)["text_encoder"])
    drawn = jax.jit(lambda ids: predict(state.averaged(final), jnp.asarray(ids)))
    print(report(drawn, cells, names, encode))


if __name__ == "__main__":
    main()
