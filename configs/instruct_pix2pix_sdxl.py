"""InstructPix2Pix: Stable Diffusion XL learns to change a picture as it is told.

    flaxdiff train configs/instruct_pix2pix_sdxl.py

Downloads model, autoencoder and data from the Hub.

In miniature, by train/in_miniature.py on a CPU, 2026-11-30, 100 updates bring the validation loss from 1.55 to 0.397.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "instruct_pix2pix",
    pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0",
    pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix",
    resolution=512,
    use_ema=True,
    output="runs/instruct_pix2pix_sdxl",
)
