"""Any file of configs/ in miniature: the same recipe and fields on a shipped model and the emoji.

python train/in_miniature.py configs/lora_sd15.py ...

What is learned is to draw emoji as white lines on black, or from those. It prints what the header of the file says.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from flaxdiff.training.config import Config, override, read
from flaxdiff.training.run import train

STEPS = 100
SMALL = {
    "pretrained_model_name_or_path": "emoji",
    "pretrained_vae_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "train_data": "emoji",
    "dataset_config_name": None,
    "streaming": False,
    "max_train_samples": None,
    "resolution": 64,
    "aspect_ratio_buckets": False,
    "image_column": "conditioning_image",
    "caption_column": "text",
    "dataloader_num_workers": 0,
    "optimizer": "adamw",
    "learning_rate": 3e-4,
    "scale_lr": False,
    "lr_warmup_steps": 10,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "mixed_precision": "no",
    "use_ema": False,
    "max_train_steps": STEPS,
    "checkpointing_steps": STEPS,
    "logging_steps": STEPS,
    "validation_batches": 16,
    "validation_steps": STEPS,
    "validation_prompt": None,
    "validation_image": None,
    "report_to": ("jsonl",),
    "best": None,
    "push_to_hub": None,
}
COMPONENTS = {  # recipe -> the network that begins from nothing
    "unconditional": {
        "sample_size": 64,
        "block_out_channels": [16, 32, 64],
        "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8,
        "layers_per_block": 1,
    },
    "t2i_adapter": {"channels": [64, 96, 128, 128], "adapter_type": "full_adapter_xl", "downscale_factor": 8},
}
DRAWN_FROM_LINES = {  # and without words, which tell all
    "image_column": "image",
    "conditioning_image_column": "conditioning_image",
    "proportion_empty_prompts": 1.0,
}
FEW_STEPS = {  # told what to draw the model needs no more than one; and validation asks the teacher for all its steps
    "image_column": "image",
    "proportion_empty_prompts": 1.0,
    "w_min": 0.0,
    "w_max": 0.0,
    "validation_batches": 4,
}
# recipe -> what else it needs of the emoji
OWN: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 2e-3},
    "controlnet": {
        **DRAWN_FROM_LINES,
        "learning_rate": 5e-4,
        "train_batch_size": 16,
        "max_train_steps": 300,
        "validation_steps": 300,
    },
    "t2i_adapter": {**DRAWN_FROM_LINES, "learning_rate": 1e-3},
    "instruct_pix2pix": {"conditioning_image_column": "image"},
    "textual_inversion": {"initializer_token": "picture", "learning_rate": 3e-2},
    "custom_diffusion": {"initializer_token": "picture", "num_class_images": 8, "class_prompt": "owl"},
    "unconditional": {"image_column": "image", "pretrained_model_name_or_path": None, "learning_rate": 1e-3},
    "lcm": FEW_STEPS,
    "lcm_lora": {**FEW_STEPS, "max_train_steps": 300, "validation_steps": 300},
    "ddpo_lora": {"num_inference_steps": 8, "sample_batch_size": 16, "train_batch_size": 16, "validation_batches": 0},
}


def small(config: Config, folder: str) -> Config:
    """A configuration that runs in some minutes."""
    given = SMALL | OWN.get(config.recipe, {}) | {"output": folder}
    if config.recipe in ("text_to_image", "lora") and re.search("stable-diffusion-3|FLUX", str(config.model)):
        given["pretrained_model_name_or_path"] = "emoji-flow"
    if component := COMPONENTS.get(config.recipe):
        given["component"] = f"{folder}/component.json"
        Path(given["component"]).write_text(json.dumps(component))
    if config.objective.with_prior_preservation:
        given["class_data"] = f"{folder}/class"
    return override(config, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="files of configs/")
    for path in parser.parse_args().configs:
        with tempfile.TemporaryDirectory() as folder:
            config = small(read(path), folder)
            train(config)
            lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        name = "reward" if config.recipe == "ddpo_lora" else "validation_loss"
        first, *_, last = [line[name] for line in lines if name in line]
        print(
            f"{path}: {name} {first:.3g} -> {last:.3g} in {config.run.max_train_steps} updates",
            file=sys.stdout,
            flush=True,
        )


if __name__ == "__main__":
    main()
