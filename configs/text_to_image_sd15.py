"""All of the U-Net of Stable Diffusion 1.5, on pictures of Naruto with captions.

    flaxdiff train configs/text_to_image_sd15.py

Downloads model and data from the Hub.

In miniature, by train/in_miniature.py on a CPU, 2026-11-29, 100 updates bring the validation loss from 1.61 to 0.379.
"""

from flaxdiff.training.config import Config, Data, Model, Optimizer, Run

config = Config(
    recipe="text_to_image",
    data=Data("lambdalabs/naruto-blip-captions", center_crop=True, random_flip=True),
    model=Model("stable-diffusion-v1-5/stable-diffusion-v1-5"),
    optimizer=Optimizer(learning_rate=1e-5),
    run=Run(
        "runs/text_to_image_sd15",
        max_train_steps=15_000,
        train_batch_size=4,
        gradient_accumulation_steps=4,
        mixed_precision="bf16",
        gradient_checkpointing=True,
        use_ema=True,
    ),
)
