"""DreamBooth as a LoRA: Stable Diffusion 1.5 learns one dog, in a file of a few megabytes.

    flaxdiff train configs/dreambooth_lora.py

Downloads model and pictures from the Hub.

In miniature, by train/in_miniature.py on a CPU, 2026-11-29, 100 updates bring the validation loss from 1.6 to 0.477.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "dreambooth",
    recipe="lora",
    learning_rate=1e-4,
    max_train_steps=500,
    checkpointing_steps=100,
    validation_prompt="A photo of sks dog in a bucket",
    output="runs/dreambooth_lora",
)
