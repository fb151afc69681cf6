"""Train a ControlNet that draws emoji along given edges: the launch script of configs/emoji_controlnet.json.

The shipped model stays as it is. Half of the captions are empty, so that the net must read the edges.
"""

import jax
import numpy as np

import flaxdiff
from flaxdiff.core import apply
from flaxdiff.training import emoji, loop, losses, noising, optimizers, state


def main() -> None:
    config, out = loop.arguments(__doc__)
    pipe, params = flaxdiff.load()
    key = jax.random.key(config["seed"])
    spec, start = flaxdiff.ControlNetModel.from_unet(pipe.unet, params["unet"], key, **config["controlnet"])
    params = {**params, "controlnet": start}
    encode = jax.jit(lambda image: apply(pipe.vae, params["vae"], image, method="encode").mean)

    def predict(params, x, t, batch):
        text = apply(pipe.text_encoder, params["text_encoder"], batch["ids"]).last_hidden_state
        down, mid = apply(spec, params["controlnet"], x, t, text, batch["edges"])
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return apply(pipe.unet, params["unet"], x, t, text, **residuals)

    def data(n: int) -> dict[str, np.ndarray]:
        images, captions = emoji.pictures(config["batch_size"], config["seed"], n, config["uncaptioned"])
        return {"latents": encode(images), "edges": emoji.edges(images), "ids": pipe.tokenizer(captions)}

    loss = losses.denoising(predict, noising.path_of(pipe.scheduler))
    tx = optimizers.adam(config["learning_rate"], config["steps"])
    step, first = state.jitted(loss, tx, config["decay"]), state.create(params, tx, trainable=r"controlnet\..*")
    folder = out / "checkpoints/controlnet"
    final = loop.fit(step, first, data, key, config["steps"], directory=folder, save_every=250, log_every=50)
    flaxdiff.save(out / "controlnet", spec, state.averaged(final)["controlnet"])


if __name__ == "__main__":
    main()
