"""The command: `flaxdiff sample "dog face on blue" -o dog.png`, `flaxdiff plan --model sdxl --topology v5e:2x4`.

The first draws, with the shipped model by default, or any folder or Hub repository. The second says what a run would
cost on TPUs that need not exist. Programs that draw are kept between runs. `flaxdiff train configs/lora_sdxl.py` trains
what a file describes, and `flaxdiff precompute --data photographs --out encoded` encodes a data set once for that.
`flaxdiff evaluate pictures --prompts prompts.txt --clip openai/clip-vit-base-patch16` says what pictures are worth.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from flaxdiff.published import MODELS


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """What the command takes; the flags of `train`, a hundred, where that is the command."""
    top = argparse.ArgumentParser(prog="flaxdiff", description="Diffusion models in JAX.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sample = commands.add_parser("sample", help="draw a prompt", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = sample.add_argument
    add("prompt", help='what to draw, e.g. "dog face on blue"')
    add("-o", "--output", default="flaxdiff.png", type=Path, help="picture to write; several pictures become one sheet")
    add("--model", help="folder or Hub repository in diffusers' layout, emoji-flow, or emoji (default: emoji)")
    add("--negative", help="what to avoid")
    add("--steps", type=int, help="steps of the scheduler; the pipeline's own number if left out")
    add("--guidance", type=float, help="strength of the prompt; the pipeline's own if left out")
    add("--seed", type=int, default=0, help="same seed, same picture")
    add("--scheduler", help="e.g. EulerDiscreteScheduler; the checkpoint's own if left out")
    add("--num", type=int, default=1, help="how many pictures")

    plan = commands.add_parser("plan", help="memory, time and transfers of a run on TPUs that need not exist")
    add = plan.add_argument
    add("--model", default="emoji", help=f"emoji, emoji-flow, {', '.join(MODELS)}, or a folder with configurations")
    add("--topology", required=True, help="kind of chip and shape of the slice, e.g. v5e:2x4")
    add("--preset", default="fsdp", help="dp, fsdp, tp, cp, or a product such as dp+fsdp or fsdp+tp=4 (default: fsdp)")
    add("--batch", type=int, help="pictures in all; one for each part that a batch is split into if left out")
    add("--height", type=int, help="in pixels; what the model was trained on if left out")
    add("--width", type=int, help="in pixels; what the model was trained on if left out")
    add("--steps", type=int, help="steps of the scheduler; the model's own number if left out")
    add("--train", action="store_true", help="plan a training step, optimiser included")
    add(
        "--remat",
        default="none",
        help="what a training step computes again on the way back: none (default), dots, full",
    )
    add("--dtype", default="bfloat16", help="what networks compute in: bfloat16 (default) or float32")
    add("--json", action="store_true", help="print JSON")

    train = commands.add_parser(
        "train",
        help="train what a file of configs/ describes",
        usage="flaxdiff train CONFIG [--learning-rate 1e-5 --output runs/mine ...]",
        description="Every field of the configuration is a flag as well.",
    )
    train.add_argument("config", help="Python file that sets `config`; it is run, so take none from strangers")
    if command == "train":
        from flaxdiff.training.config import add_flags

        add_flags(train)

    judge = commands.add_parser(
        "evaluate", help="what pictures are worth: CLIP score, directional similarity, FID, KID"
    )
    add = judge.add_argument
    add("pictures", help="folder with the pictures")
    add("--prompts", type=Path, help="file with what they should show, a line for each in the order of their names")
    add("--reference", help="folder with pictures that they should look like")
    add("--before", help="folder with the pictures that they were made from")
    add("--before-prompts", type=Path, help="file with what those show, a line for each")
    add("--clip", help="folder or Hub repository of a CLIPModel, e.g. openai/clip-vit-base-patch16")
    add("--inception", help="file with the weights that FID is defined by, pt_inception-2015-12-05-6726825d.pth")
    add("--json", action="store_true", help="print JSON")

    ahead = commands.add_parser(
        "precompute",
        help="encode a data set once, for training",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = ahead.add_argument
    add("--model", help="folder or Hub repository in diffusers' layout; the shipped text-to-emoji model if left out")
    add("--data", required=True, help="folder of pictures, files, or a name on the Hub: see docs/data.md")
    add("--out", required=True, type=Path, help="folder to write; what it holds of an earlier run stays")
    add("--split", default="train", help="part of the data")
    add("--image-column", "--image_column", default="image", help="column of the pictures")
    add("--caption-column", "--caption_column", default="text", help="column of the captions")
    add("--prompt", help="caption of all pictures, where they have none of their own")
    add("--resolution", type=int, help="side of the square that is cut out; the model's own if left out")
    add("--buckets", action="store_true", help="keep pictures' proportions, in sizes of about as many pixels")
    add("--image-interpolation-mode", "--image_interpolation_mode", default="lanczos", help="how pictures are resized")
    add("--dtype", help="what the model computes in; its own if left out")
    add("--batch", type=int, default=8, help="pictures, or captions, encoded at once")
    add("--samples", type=int, default=1, help="latents drawn of each picture; 0 takes the mean")
    add("--seed", type=int, default=0, help="same seed, same latents")
    return top


def sample(args: argparse.Namespace) -> None:
    """Draw `args.prompt` and write the picture, beside first and then renamed."""
    from PIL import Image

    if args.output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{args.output} has no ending that names a kind of picture; use e.g. {args.output}.png.")
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"{args.output.parent} is not a folder; make it first.")
    if args.num < 1:
        raise ValueError(f"--num {args.num}: ask for at least one picture.")

    import jax

    import flaxdiff
    from flaxdiff import registry
    from flaxdiff.pipelines import ahead

    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    options = {name: value for name, value in given.items() if value is not None}
    folder = ahead.keep_compiled()
    compile = folder and {"batch": args.num, "folder": folder, **options}
    scheduler = args.scheduler and registry.find(args.scheduler, "scheduler")
    pipe, params = flaxdiff.load(args.model, compile=compile)
    if scheduler:
        pipe = pipe.replace(scheduler=scheduler.from_config(pipe.scheduler))
    key = jax.random.key(args.seed)
    options |= {"negative_prompt": args.negative} if args.negative is not None else {}
    images = pipe(params, key, prompt=args.prompt, num_images_per_prompt=args.num, **options).images
    cols = next(c for c in range(int(args.num**0.5), 0, -1) if args.num % c == 0)
    sheet = flaxdiff.make_image_grid(images, rows=cols, cols=args.num // cols)
    beside = args.output.with_name(f".{os.getpid()}-{args.output.name}")
    try:
        sheet.save(beside)
        os.replace(beside, args.output)
    finally:
        beside.unlink(missing_ok=True)
    print(args.output)


def plan(args: argparse.Namespace) -> None:
    """Print what the run that `args` describe would cost."""
    import jax

    import flaxdiff

    jax.config.update("jax_platforms", "cpu")  # an accelerator of this machine is left to others
    options = {name: value for name, value in vars(args).items() if name not in ("command", "json")}
    report = flaxdiff.plan(**options)
    print(json.dumps(report.to_json(), indent=1) if args.json else report)


def train(args: argparse.Namespace) -> None:
    """Run a configuration, from its last checkpoint if there is one."""
    from flaxdiff import parallel
    from flaxdiff.training import config, run

    parallel.start()
    given = {name: value for name, value in vars(args).items() if name not in ("command", "config")}
    run.train(config.override(config.read(args.config), given))


def evaluate(args: argparse.Namespace) -> None:
    """Print what the pictures in a folder are worth."""
    from flaxdiff import evaluation

    folder = lambda path: path and evaluation.Folder(path)
    lines = lambda path: path and path.read_text(encoding="utf-8").splitlines()
    found = evaluation.evaluate(
        folder(args.pictures),
        prompts=lines(args.prompts),
        before=folder(args.before),
        before_prompts=lines(args.before_prompts),
        reference=folder(args.reference),
        clip=args.clip,
        inception_weights=args.inception,
    )
    width = max(map(len, found))
    table = "\n".join(f"{name:{width}}  {value:9.4f}" for name, value in found.items())
    print(json.dumps(found, indent=1, ensure_ascii=False) if args.json else table)


def precompute(args: argparse.Namespace) -> None:
    """Write the latents and encoded captions of a data set; each process of a run on many hosts writes its share."""
    import jax

    import flaxdiff
    from flaxdiff import parallel
    from flaxdiff.pipelines.tasks import native_size, stride
    from flaxdiff.training import data

    source = data.open_source(args.data, split=args.split, images=(args.image_column,))
    parallel.start()
    pipe, params = flaxdiff.load(args.model, **({"dtype": args.dtype} if args.dtype else {}))
    resolution = args.resolution or min(native_size(pipe).height, native_size(pipe).width)
    examples = data.Examples(
        resolution=resolution,
        aspect_ratio_buckets=data.generate_aspect_ratio_buckets(resolution, stride(pipe)) if args.buckets else (),
        images={"image": args.image_column},
        texts={"caption": args.caption_column},
        prompt=args.prompt,
        center_crop=True,
        image_interpolation_mode=args.image_interpolation_mode,
    )
    report = data.precompute(
        pipe,
        params,
        source,
        examples,
        args.out,
        batch_size=args.batch,
        samples=args.samples,
        seed=args.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(f"{args.out}: {report}")


def main(argv: list[str] | None = None) -> int:
    """The entry point: 0 if all went well, 1 after an error of the user's, which is printed in one line."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(*argv[:1]).parse_args(argv)
    try:
        {"sample": sample, "plan": plan, "train": train, "evaluate": evaluate, "precompute": precompute}[args.command](
            args
        )
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"flaxdiff: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
