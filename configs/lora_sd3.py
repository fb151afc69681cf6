"""DreamBooth as a LoRA of Stable Diffusion 3: one dog from five pictures.

    flaxdiff train configs/lora_sd3.py

Downloads a model that asks for consent (`hf auth login` first) and data from the Hub.

In miniature, by train/in_miniature.py on a CPU, 2026-11-30, 100 updates bring the validation loss from 1.29 to 0.532.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "dreambooth_lora",
    pretrained_model_name_or_path="stabilityai/stable-diffusion-3-medium-diffusers",
    weighting_scheme="logit_normal",
    learning_rate=4e-4,
    train_batch_size=4,
    gradient_accumulation_steps=4,
    output="runs/lora_sd3",
)
