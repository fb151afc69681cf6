"""A U-Net that draws flowers of 64 x 64 pixels, from nothing and without text.

    flaxdiff train configs/unconditional.py

Downloads the data from the Hub, and sees each of its 8000 pictures a hundred times.

In miniature, by train/in_miniature.py on a CPU, 2026-11-29, 100 updates bring the validation loss from 1.07 to 0.193.
"""

from flaxdiff.training.config import Config, Data, Optimizer, Run

config = Config(
    recipe="unconditional",
    data=Data("huggan/flowers-102-categories", resolution=64, center_crop=True, random_flip=True),
    optimizer=Optimizer(lr_scheduler="cosine", lr_warmup_steps=500, adam_beta1=0.95, adam_weight_decay=1e-6),
    run=Run("runs/unconditional", max_train_steps=50_000, use_ema=True),
)
