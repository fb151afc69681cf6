"""Latent consistency: Stable Diffusion 1.5 learns to draw in four steps, on captioned pictures of the web.

    flaxdiff train configs/lcm_sd15.py

In miniature, by train/in_miniature.py on a CPU, 2026-12-01, 100 updates bring the validation loss from 0.725 to 0.411.
"""

from flaxdiff.training.config import based_on

config = based_on(
    __file__,
    "text_to_image_sd15",
    recipe="lcm",
    train_data="laion/conceptual-captions-12m-webdataset",
    streaming=True,
    image_column="jpg",
    caption_column="txt",
    max_train_samples=4_000_000,
    dataloader_num_workers=8,
    loss_type="huber",
    optimizer="adamw8bit",
    learning_rate=1e-6,
    adam_weight_decay=0.0,
    ema_decay=0.95,
    max_train_steps=1000,
    train_batch_size=12,
    gradient_accumulation_steps=1,
    checkpointing_steps=200,
    checkpoints_total_limit=10,
    seed=453645634,
    output="runs/lcm_sd15",
)
