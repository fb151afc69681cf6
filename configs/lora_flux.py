"""DreamBooth as a LoRA of Flux: one dog from five pictures; all devices share the weights.

    flaxdiff train configs/lora_flux.py

Downloads a model that asks for consent (`hf auth login` first) and data from the Hub.

In miniature, by train/in_miniature.py on a CPU, 2026-11-30, 100 updates bring the validation loss from 1.5 to 0.608.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "dreambooth_lora",
    pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev",
    weighting_scheme="none",
    guidance_scale=1.0,
    optimizer="prodigy",
    learning_rate=1.0,
    train_batch_size=8,
    mesh="fsdp",
    output="runs/lora_flux",
)
