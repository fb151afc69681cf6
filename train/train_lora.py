"""Train a LoRA of a style, emoji in two colours: the launch script of configs/emoji_lora.json.

The shipped model stays as it is; what is learned is a file of a megabyte that any of its pipelines can put on.
"""

import jax
import numpy as np

import flaxdiff
from flaxdiff.core import apply
from flaxdiff.training import emoji, loop, losses, noising, optimizers, state


def duotone(images: np.ndarray, dark: list[int], light: list[int]) -> np.ndarray:
    """Pictures [B, H, W, 3] in [-1, 1] by their luminance alone, between two colours in [0, 255]."""
    luminance = (images @ np.float32([0.299, 0.587, 0.114]))[..., None] / 2 + 0.5
    ends = np.float32([dark, light]) / 127.5 - 1
    return (1 - luminance) * ends[0] + luminance * ends[1]


def main() -> None:
    config, out = loop.arguments(__doc__)
    pipe, params = flaxdiff.load()
    key = jax.random.key(config["seed"])
    params = flaxdiff.set_adapters(params, [flaxdiff.init_lora(pipe, key, config["rank"], config["targets"])])
    encode = jax.jit(lambda image: apply(pipe.vae, params["vae"], image, method="encode").mean)

    def predict(params, x, t, batch):
        text = apply(pipe.text_encoder, params["text_encoder"], batch["ids"]).last_hidden_state
        return apply(pipe.unet, params["unet"], x, t, text)

    def data(n: int) -> dict[str, np.ndarray]:
        images, captions = emoji.pictures(config["batch_size"], config["seed"], n, config["uncaptioned"])
        return {"latents": encode(duotone(images, **config["style"])), "ids": pipe.tokenizer(captions)}

    loss = losses.denoising(predict, noising.path_of(pipe.scheduler))
    tx = optimizers.adam(config["learning_rate"], config["steps"])
    step, first = state.jitted(loss, tx, config["decay"]), state.create(params, tx, trainable=r".*\.(down|up)")
    folder = out / "checkpoints/lora"
    final = loop.fit(step, first, data, key, config["steps"], directory=folder, save_every=250, log_every=50)
    flaxdiff.save_lora(out / "lora", pipe, flaxdiff.adapter_of(state.averaged(final)))


if __name__ == "__main__":
    main()
