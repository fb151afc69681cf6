"""The same as `flaxdiff train CONFIG ...`, for clusters whose launchers start files: alike in each process.

python train/launch.py configs/lora_sdxl.py          # on all hosts of a TPU pod, which know of each other
srun python train/launch.py configs/lora_sdxl.py     # SLURM says who is who
JAX_COORDINATOR_ADDRESS=first:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 python train/launch.py configs/lora_sdxl.py
"""

import sys

from flaxdiff.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    sys.exit(main())
