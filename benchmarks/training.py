"""One update of Stable Diffusion 1.5's UNet: forward, backward, clipping and AdamW, ours against PyTorch's diffusers.

    python benchmarks/training.py --side 256 --batch 2

Random weights, float32, the same cores, latents and texts given; both sides load the same folder. `remat` in ours and
gradient checkpointing in the peer are off.
"""

import argparse

import common


def ours(args: argparse.Namespace) -> common.Figures:
    import jax
    import jax.numpy as jnp

    import flaxdiff
    from flaxdiff.training import losses, noising, optimizers, state

    folder = common.checkpoint("sd15", args.tiny)
    spec, params = flaxdiff.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    predict = lambda params, x, t, batch: flaxdiff.apply(spec, params, x, t, batch["text"])
    loss = losses.denoising(predict, noising.path_of(flaxdiff.DDPMScheduler()))
    tx = optimizers.optimizer("adamw", 1e-5)
    batch = {
        "latents": jnp.ones((args.batch, args.side // 8, args.side // 8, 4)),
        "text": jnp.zeros((args.batch, 77, spec.config.cross_attention_dim)),
    }
    step, now = state.jitted(loss, tx), [state.create(params, tx, average=False)]
    del params

    def update() -> None:
        new, metrics = step(now.pop(), batch, jax.random.key(0))
        now.append(new)
        metrics["loss"].block_until_ready()

    seconds = common.median(update, args.repeat)
    return {"time of an update, s": seconds, "peak memory, GB": common.peak_memory()}


def peer(args: argparse.Namespace) -> common.Figures:
    import diffusers
    import torch

    folder = common.checkpoint("sd15", args.tiny)
    model = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
    scheduler, tx = diffusers.DDPMScheduler(), torch.optim.AdamW(model.parameters(), 1e-5)
    x0 = torch.ones(args.batch, 4, args.side // 8, args.side // 8)
    text = torch.zeros(args.batch, 77, model.config.cross_attention_dim)

    def update() -> None:
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (args.batch,))
        prediction = model(scheduler.add_noise(x0, noise, t), t, text).sample
        torch.nn.functional.mse_loss(prediction, noise).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        tx.step()
        tx.zero_grad()

    seconds = common.median(update, args.repeat)
    return {"time of an update, s": seconds, "peak memory, GB": common.peak_memory()}


if __name__ == "__main__":
    parser = common.arguments(__doc__, side=256, batch=2)
    common.compare("SD 1.5 UNet, an update, float32, batch {batch}, {side} x {side}", parser, ours=ours, peer=peer)
