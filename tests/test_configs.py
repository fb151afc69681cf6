"""The files of configs/, the flags of `flaxdiff train`, and what docs/training.md says of both."""

import argparse
import re
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from flaxdiff import cli
from flaxdiff.checkpoint import hub
from flaxdiff.training import run
from flaxdiff.training.config import Config, add_flags, based_on, fields, override, read
from flaxdiff.training.recipes import RECIPES

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
PAGE = (ROOT / "docs" / "training.md").read_text()

# the flags of the training scripts of diffusers, those for video apart
FLAGS = """
adam_beta1 adam_beta2 adam_epsilon adam_weight_decay adam_weight_decay_text_encoder adapter_model_name_or_path
allow_tf32 cache_dir cache_latents caption_column cast_teacher_unet center_crop checkpointing_steps
checkpoints_total_limit class_data_dir class_labels_conditioning class_prompt concepts_list conditioning_dropout_prob
conditioning_image_column controlnet_model_name_or_path crops_coords_top_left_h crops_coords_top_left_w
dataloader_num_workers dataset_config_name dataset_name dataset_preprocess_batch_size ddpm_beta_schedule
ddpm_num_inference_steps ddpm_num_steps detection_resolution disc_loss disc_scale disc_start discr_learning_rate
discr_lr_scheduler discriminator_config_name_or_path dream_detail_preservation dream_training edit_prompt_column
edited_image_column ema_decay ema_inv_gamma ema_max_decay ema_power enable_model_cpu_offload
enable_npu_flash_attention enable_xformers_memory_efficient_attention encode_batch_size eval_batch_size foreach_ema
freeze_model gpu_ids gradient_accumulation_steps gradient_checkpointing guidance_scale hflip hub_model_id
hub_private_repo hub_token huber_c image_column image_interpolation_mode initializer_token input_perturbation
instance_data_dir instance_prompt interpolation_type jsonl_for_train kl_scale learnable_property learning_rate
local_rank log_grad_norm_steps log_steps logger logging_dir logit_mean logit_std lora_alpha lora_blocks lora_dropout
lora_layers lora_rank lora_target_modules loss_type lr_num_cycles lr_power lr_scheduler lr_warmup_steps max_grad_norm
max_sequence_length max_train_samples max_train_steps mixed_precision mode_scale model_config_name_or_path
modifier_token multi_gpu no_safe_serialization noaug noise_offset non_ema_revision num_class_images num_ddim_timesteps
num_double_layers num_epochs num_extra_conditioning_channels num_single_layers num_train_epochs num_validation_images
num_vectors offload_ema offset_noise optimizer original_image_column output_dir overwrite_output_dir placeholder_token
pre_compute_text_embeddings precondition_outputs prediction_type preserve_input_precision
pretrained_model_name_or_path pretrained_teacher_model pretrained_vae_model_name_or_path prior_generation_precision
prior_loss_weight prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup prodigy_use_bias_correction
proportion_empty_prompts push_to_hub random_flip rank real_prior rec_loss repeats report_to resolution
resume_from_checkpoint revision sample_batch_size save_as_full_pipeline save_images_epochs save_model_epochs
save_steps save_weight_dtype scale_lr seed set_grads_to_none skip_save_text_encoder snr_gamma streaming
teacher_revision text_encoder_lr text_encoder_use_attention_mask timestep_bias_begin timestep_bias_end
timestep_bias_multiplier timestep_bias_portion timestep_bias_strategy timestep_scaling_factor timm_model_backend
timm_model_layers timm_model_offset tokenizer_max_length tokenizer_name tracker_project_name train_batch_size
train_data_dir train_shards_path_or_url train_text_encoder upcast_before_saving upcast_vae use_8bit_adam use_adafactor
use_dora use_ema use_fix_crop_and_size vae_encode_batch_size vae_loss val_image_url validation_epochs validation_image
validation_images validation_prompt validation_prompts validation_scheduler validation_steps variant w_max w_min
weighting_scheme with_prior_preservation
"""


def flags(*given: str) -> dict:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(given))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file(path):
    """It names a recipe, writes to a folder of its own, and says by which command it runs, in few lines."""
    config, text = read(path), path.read_text()
    assert config.recipe in RECIPES
    assert config.run.output == f"runs/{path.stem}"
    assert f"\n    flaxdiff train configs/{path.stem}.py\n" in text and len(text.splitlines()) <= 32
    size = config.run.train_batch_size
    assert size % (config.run.gradient_accumulation_steps * (1 + config.objective.with_prior_preservation)) == 0


def test_every_file_says_what_differs():
    """A file repeats nothing of the one that it is based on."""
    for path in FILES:
        if base := re.search(r'__file__,\n    "(\w+)"', path.read_text()):
            own, other = (vars_of(read(path.with_name(f"{name}.py"))) for name in (path.stem, base[1]))
            said = re.findall(r"^    (\w+)=", path.read_text(), re.M)
            assert [name for name in said if own[name] == other[name]] == [], path


def vars_of(config: Config) -> dict:
    own = {field.name: getattr(getattr(config, part), field.name) for part, field, _ in fields()}
    return {"recipe": config.recipe, **own}


def test_values_are_those_of_the_documentation():
    """Some that its commands give, and what files inherit over two steps."""
    lora, adapter = read(ROOT / "configs" / "lora_sd15.py"), read(ROOT / "configs" / "t2i_adapter_sdxl.py")
    assert (lora.optimizer.learning_rate, lora.optimizer.lr_scheduler, lora.adapter.rank) == (1e-4, "cosine", 4)
    assert (lora.run.max_train_steps, lora.run.use_ema, lora.data.center_crop) == (15_000, False, True)
    assert (adapter.recipe, adapter.data.train_data, adapter.data.resolution) == ("t2i_adapter", "fusing/fill50k", 1024)
    assert adapter.model.pretrained_vae_model_name_or_path == "madebyollin/sdxl-vae-fp16-fix"


def test_fields_are_flags():
    names = [field.name for _, field, _ in fields()]
    assert len(set(names)) == len(names), "a flag stands for one field"
    assert flags() == {}
    given = flags(
        "--learning-rate", "1e-5", "--max_train_steps", "7", "--use-ema", "--no-random-flip", "--profile", "3", "5"
    )
    assert given == {
        "learning_rate": 1e-5,
        "max_train_steps": 7,
        "use_ema": True,
        "random_flip": False,
        "profile": [3, 5],
    }
    made = override(Config("lora"), given | flags("--report-to", "jsonl", "wandb"))
    assert (made.optimizer.learning_rate, made.run.max_train_steps, made.run.use_ema) == (1e-5, 7, True)
    assert (made.run.profile, made.run.report_to, made.recipe) == ((3, 5), ("jsonl", "wandb"), "lora")


def test_flags_of_a_wrong_type(capsys):
    with pytest.raises(SystemExit):
        flags("--max-train-steps", "many")
    assert "invalid int value: 'many'" in capsys.readouterr().err


def test_unknown_names_types_and_files(tmp_path):
    with pytest.raises(ValueError, match=r"no field 'learning_rat'; use one of \['learning_rate'"):
        override(Config("lora"), {"learning_rat": 1e-5})
    for wrong in (
        {"rank": "8"},
        {"rank": True},
        {"rank": 0.5},
        {"use_ema": 1},
        {"report_to": "wandb"},
        {"profile": (1,)},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            override(Config("lora"), wrong)
    assert override(Config("lora"), {"learning_rate": 1, "lora_alpha": None}).optimizer.learning_rate == 1
    with pytest.raises(ValueError, match="Python file that sets"):
        read(tmp_path / "none.py")
    with pytest.raises(ValueError, match="Python file that sets"):
        based_on(tmp_path / "mine.py", "none")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="sets no `config`"):
        read(tmp_path / "empty.py")
    text = "from flaxdiff.training.config import Config, Run\nconfig = Config('lora', run=Run(seed='1'))"
    (tmp_path / "typed.py").write_text(text)
    with pytest.raises(ValueError, match="seed='1': give int"):
        read(tmp_path / "typed.py")
    with pytest.raises(ValueError, match="recipe='lore' is not known"):
        run.train(Config("lore"))


def test_the_launcher_is_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch.py", "configs/lora_sd15.py", "--rank", "8"])
    seen = []
    monkeypatch.setattr(cli, "train", lambda args: seen.append((args.config, args.rank)))
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "train" / "launch.py"), run_name="__main__")
    assert seen == [("configs/lora_sd15.py", 8)]


def test_flags_of_diffusers_have_a_field_or_a_word():
    fields_, told = {field.name for _, field, _ in fields()}, set(re.findall(r"`--(\w+)", PAGE))
    assert [name for name in FLAGS.split() if name not in fields_ | told] == []


def test_the_page_knows_recipes_files_and_fields():
    assert [name for name in RECIPES if f"`{name}`" not in PAGE] == []
    assert [path.stem for path in FILES if f"`{path.stem}`" not in PAGE] == []
    names, used = {field.name for _, field, _ in fields()}, re.findall(r"--([a-z][a-z0-9_-]+)", PAGE)
    known = FLAGS.split() + ["help", "model", "topology", "preset", "batch", "train", "remat", "worker", "command"]
    assert [name for name in used if name.replace("-", "_") not in names and name not in known] == []


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    space = {}
    with jax.numpy_dtype_promotion("standard"):  # as optax needs it
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
            exec(block, space)
    assert (
        np.isfinite(float(space["metrics"]["loss"]))
        and (tmp_path / "runs/mine/pytorch_lora_weights.safetensors").is_file()
    )


def test_pictures_of_a_word_need_no_captions(tmp_path):
    for n in range(2):
        Image.fromarray(np.full((64, 64, 3), 60 * n, np.uint8)).save(tmp_path / f"{n}.png")
    given = {"train_data": str(tmp_path), "resolution": 64, "train_batch_size": 2}
    config = override(
        Config("textual_inversion"), {**given, "placeholder_token": "<toy>", "initializer_token": "apple"}
    )
    recipe = RECIPES["textual_inversion"](config)
    made = recipe.batch(next(run.batches(config, recipe)))
    assert made["image"].shape == (2, 64, 64, 3) and made["conditions"]["prompt_ids"].shape[0] == 2


def test_what_is_written_to_the_hub(tmp_path, monkeypatch):
    """The result without checkpoints and log, and only where a repository is named."""
    sent = []
    monkeypatch.setattr(hub, "upload", lambda repo, folder, *_: sent.append((repo, [p.name for p in folder.iterdir()])))
    (tmp_path / "checkpoints").mkdir()
    recipe = type("Made", (), {"export": staticmethod(lambda folder, params: (folder / "result").write_text(params))})
    for repo in (None, "me/mine"):
        config = override(Config("lora"), {"output": str(tmp_path), "push_to_hub": repo})
        run.written(config, recipe, "weights")
    assert sent == [("me/mine", ["result"])] and (tmp_path / "result").read_text() == "weights"
