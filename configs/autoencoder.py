"""The autoencoder of Stable Diffusion, on the pictures of CIFAR-10.

    flaxdiff train configs/autoencoder.py

Downloads model, autoencoder and pictures from the Hub.

In miniature, by train/in_miniature.py on a CPU, 2026-11-30, 100 updates bring the validation loss from 0.082 to 0.056.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "text_to_image_sd15",
    recipe="autoencoder",
    pretrained_vae_model_name_or_path="stabilityai/sd-vae-ft-mse",
    train_data="cifar10",
    image_column="img",
    resolution=256,
    center_crop=False,
    random_flip=False,
    learning_rate=4.5e-6,
    lr_scheduler="cosine",
    train_batch_size=8,
    gradient_accumulation_steps=2,
    max_train_steps=100_000,
    use_ema=False,
    output="runs/autoencoder",
)
