"""Put a trained model in its place: a float16 folder in diffusers' layout, which PyTorch's diffusers loads too.

python train/ship.py --model runs/emoji --out flaxdiff/assets/emoji
"""

import argparse
import shutil
from pathlib import Path

import jax.numpy as jnp

import flaxdiff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="the folder that the training scripts wrote")
    parser.add_argument("--out", required=True, type=Path, help="where the pipeline goes")
    args = parser.parse_args()

    pipe, params = flaxdiff.load(args.model)
    flaxdiff.save(args.out, pipe, params, dtype=jnp.float16)
    shutil.copytree(args.model / "tokenizer", args.out / "tokenizer", dirs_exist_ok=True)
    if (args.out / "tokenizer/merges.txt").exists():  # with vocab.json says what tokenizer.json does, shorter
        (args.out / "tokenizer/tokenizer.json").unlink()


if __name__ == "__main__":
    main()
