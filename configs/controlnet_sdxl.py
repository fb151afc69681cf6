"""A ControlNet of Stable Diffusion XL that fills circles with colours, as the text says.

    flaxdiff train configs/controlnet_sdxl.py

Downloads model, autoencoder and data from the Hub.

In miniature, by train/in_miniature.py on a CPU, 2026-11-30, 300 updates bring the validation loss from 0.291 to 0.281.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "controlnet_sd15",
    pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0",
    pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix",
    resolution=1024,
    max_train_steps=15_000,
    seed=42,
    output="runs/controlnet_sdxl",
)
