"""Put the trained parts together: a float16 folder in diffusers' layout, which PyTorch's diffusers loads too.

python train/ship.py configs/emoji_text_to_image.json --model runs/emoji --out flaxdiff/assets/emoji
"""

import argparse
import json
import shutil
from pathlib import Path

import jax.numpy as jnp

import flaxdiff
from flaxdiff.pipelines.stable_diffusion import StableDiffusionPipeline
from flaxdiff.pipelines.text import Tokenizer

SETTINGS = (
    ("safety_checker", (None, None)),
    ("feature_extractor", (None, None)),
    ("requires_safety_checker", False),
    ("defaults", (("guidance_scale", 1.5), ("num_inference_steps", 12))),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="the configuration of the UNet, which names the scheduler")
    parser.add_argument("--model", required=True, help="the folder that the training scripts wrote")
    parser.add_argument("--out", required=True, help="where the pipeline goes")
    args = parser.parse_args()
    model, out = Path(args.model), Path(args.out)

    kinds = {
        "vae": flaxdiff.AutoencoderKL,
        "text_encoder": flaxdiff.CLIPTextModel,
        "unet": flaxdiff.UNet2DConditionModel,
    }
    parts = {name: kind.from_pretrained(model, subfolder=name) for name, kind in kinds.items()}
    pipe = StableDiffusionPipeline(
        specs=tuple((name, spec) for name, (spec, _) in parts.items()),
        scheduler=flaxdiff.DDIMScheduler(**json.load(open(args.config))["scheduler"]),
        tokenizers=(("tokenizer", Tokenizer(str(model / "tokenizer"), "CLIPTokenizer")),),
        settings=SETTINGS,
    )
    flaxdiff.save(out, pipe, {name: params for name, (_, params) in parts.items()}, dtype=jnp.float16)
    shutil.copytree(model / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    (out / "tokenizer/tokenizer.json").unlink()  # the same again, merged: vocab.json and merges.txt say it shorter


if __name__ == "__main__":
    main()
