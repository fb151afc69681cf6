"""Latent consistency as a LoRA, with which Stable Diffusion XL and its offspring draw in four steps.

    flaxdiff train configs/lcm_lora_sdxl.py

Downloads model and autoencoder from the Hub and reads the data from there as they are needed.

In miniature, by train/in_miniature.py on a CPU, 2026-12-01, 300 updates bring the validation loss, how far its single
step is from where the fifty of its teacher lead, from 0.67 to 0.346. There are no words there and no guidance: told
what to draw, the small model needs no more than one step to begin with.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "lcm_sd15",
    recipe="lcm_lora",
    pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0",
    pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix",
    resolution=1024,
    rank=64,
    w_min=3.0,
    learning_rate=1e-4,
    use_ema=False,
    output="runs/lcm_lora_sdxl",
)
