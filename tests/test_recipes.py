"""Each recipe against PyTorch: one update of the same weights, on the same batch, with the same noise and times.

The loss agrees to 1e-5, and what the recipe writes is read by PyTorch's diffusers and agrees with its own updated
weights to 1e-4. Both update by AdamW after clipping.
"""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import safetensors.torch
import test_classic
import test_flux
import test_losses as taming
import test_sd3
import torch

from flaxdiff.training import noising, optimizers, recipes, run, state, timesteps, words
from flaxdiff.training.config import Adapter, Config, Data, Model, Objective, Optimizer, Run

KEY, RATE, EPS = jax.random.key(3), 1e-3, 1e-3
CAPTIONS = ["red", "a bed"]


def config(recipe: str, folder: str, **parts) -> Config:
    return Config(recipe, Data(resolution=16), Model(folder), **parts)


def latents(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def trained(recipe, data, steps=1, decay=0.999):
    """The state after some steps of ours, all on the same batch, and their losses."""
    tx, losses = optimizers.optimizer("adamw", RATE, eps=EPS), []
    with jax.numpy_dtype_promotion("standard"):
        now = state.create(recipe.params, tx, recipe.trainable)
        step = state.jitted(recipe.loss, tx, decay, target=recipe.target)
        for _ in range(steps):
            now, metrics = step(now, recipe.batch(data), KEY)
            losses.append(float(metrics["loss"]))
    return now, losses


def drawn(n=0, parts=2):
    """The keys of what the loss draws at a step: times, noise, …"""
    key, _ = jax.random.split(jax.random.fold_in(KEY, n))
    return jax.random.split(key, parts)


def updated(recipe, data, folder):
    """The loss of a step of ours, whose result is written to a folder; and the keys of what it drew."""
    after, [loss] = trained(recipe, data)
    recipe.export(folder, after.params)
    return (loss, *drawn())


def noised(scheduler, data, k_time, k_noise):
    """x_t, the time and the target, as the loss draws them, for PyTorch."""
    path, x0 = noising.path_of(scheduler), data["latents"]
    row = timesteps.sampler()(k_time, len(x0), len(path.time))
    x, target = path.noised(row, jnp.asarray(x0), jax.random.normal(k_noise, x0.shape))
    return peers.nchw(x), torch.tensor(path.time[np.asarray(row)]), peers.nchw(target)


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, eps=EPS, weight_decay=1e-2)


def step(parameters, loss: torch.Tensor, optimizer: torch.optim.Optimizer | None = None) -> float:
    """PyTorch's update."""
    parameters = list(parameters)
    optimizer = optimizer or adamw(parameters)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return loss.item()


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Two models with equal weights, to 1e-4 of the largest number of each."""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-4, msg=name)


def moved(before: torch.nn.Module, after: torch.nn.Module) -> None:
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(before.parameters(), after.parameters(), strict=True))


def text(pipe) -> torch.Tensor:
    ids = pipe.tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return pipe.text_encoder(ids)[0]


@pytest.mark.parametrize("build", [peers.stable_diffusion_1, peers.stable_diffusion_2], ids=["epsilon", "v"])
def test_text_to_image(build, tmp_path):
    recipe = recipes.RECIPES["text_to_image"](config("text_to_image", peers.saved(build)))
    data = {"latents": latents(2, 8, 8, 4), "caption": CAPTIONS}
    ours, *keys = updated(recipe, data, tmp_path)

    pipe = build()
    x, t, target = noised(recipe.pipe.scheduler, data, *keys)
    loss = torch.nn.functional.mse_loss(pipe.unet(x, t, text(pipe).detach()).sample, target)
    assert ours == pytest.approx(step(pipe.unet.parameters(), loss), rel=1e-5)
    read = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    same(read.unet, pipe.unet), same(read.text_encoder, pipe.text_encoder), moved(build().unet, read.unet)


def test_text_encoder_as_well(tmp_path):
    """DreamBooth: pictures of a subject beside pictures of its class, by one prompt each."""
    build = peers.stable_diffusion_1
    given = config(
        "text_to_image",
        peers.saved(build),
        adapter=Adapter(train_text_encoder=True),
        objective=Objective(with_prior_preservation=True, prior_loss_weight=0.3),
    )
    recipe = recipes.RECIPES["text_to_image"](given)
    data = {"latents": latents(2, 8, 8, 4), "caption": CAPTIONS}
    ours, *keys = updated(recipe, data, tmp_path)

    pipe = build()
    x, t, target = noised(recipe.pipe.scheduler, data, *keys)
    pred = pipe.unet(x, t, text(pipe)).sample
    mse = torch.nn.functional.mse_loss
    loss = mse(pred[:1], target[:1]) + 0.3 * mse(pred[1:], target[1:])
    both = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    assert ours == pytest.approx(step([p for p in both if p.requires_grad], loss), rel=1e-5)
    read = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    same(read.unet, pipe.unet), same(read.text_encoder, pipe.text_encoder)
    moved(build().text_encoder, read.text_encoder)


def test_sizes_that_xl_is_told(tmp_path):
    build = peers.stable_diffusion_xl
    recipe = recipes.RECIPES["text_to_image"](config("text_to_image", peers.saved(build)))
    sizes = {"original_size": np.int32([[40, 60], [16, 16]]), "crop_top_left": np.int32([[0, 8], [3, 0]])}
    data = {"latents": latents(2, 8, 8, 4), "caption": CAPTIONS, **sizes}
    ours, *keys = updated(recipe, data, tmp_path)

    pipe = build()
    x, t, target = noised(recipe.pipe.scheduler, data, *keys)
    embeds, _, pooled, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    ids = torch.tensor([[40, 60, 0, 8, 16, 16], [16, 16, 3, 0, 16, 16]])
    told = {"text_embeds": pooled.detach(), "time_ids": ids}
    loss = torch.nn.functional.mse_loss(pipe.unet(x, t, embeds.detach(), added_cond_kwargs=told).sample, target)
    assert ours == pytest.approx(step(pipe.unet.parameters(), loss), rel=1e-5)
    same(diffusers.UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet"), pipe.unet)


def lively(recipe, scale=0.25):
    """The recipe of a LoRA whose second factors, which begin at zero, are drawn."""
    draw = iter(jax.random.split(jax.random.key(9), 999))
    ups = state.select(recipe.params, r".*\.up")
    some = {path: scale * jax.random.normal(next(draw), a.shape) for path, a in ups.items()}
    return recipe._replace(params=state.replace(recipe.params, some))


def wearing(build, folder):
    """PyTorch's pipeline with the LoRA of a folder on, which alone learns."""
    pipe = build()
    pipe.load_lora_weights(folder)
    for name, parameter in pipe.unet.named_parameters():
        parameter.requires_grad_("lora" in name)
    return pipe, [p for p in pipe.unet.parameters() if p.requires_grad]


@pytest.mark.parametrize(("prior", "use_dora"), [(False, True), (True, False)], ids=["dora", "prior"])
def test_lora(prior, use_dora, tmp_path):
    """An adapter that peft has, with numbers in both factors: with magnitudes, in whose norm no gradient flows; or
    without, beside pictures of a class."""
    build = peers.shallow_stable_diffusion_1
    objective = Objective(with_prior_preservation=prior, prior_loss_weight=0.3)
    given = config("lora", peers.saved(build), objective=objective, adapter=Adapter(use_dora=use_dora))
    recipe = lively(recipes.RECIPES["lora"](given))
    recipe.export(tmp_path / "before", recipe.params)
    data = {"latents": latents(2, 8, 8, 4), "caption": CAPTIONS}
    ours, *keys = updated(recipe, data, tmp_path / "after")

    pipe, learned = wearing(build, tmp_path / "before")
    x, t, target = noised(recipe.pipe.scheduler, data, *keys)
    assert any("magnitude" in name for name, _ in pipe.unet.named_parameters()) == use_dora
    pred, mse = pipe.unet(x, t, text(pipe).detach()).sample, torch.nn.functional.mse_loss
    loss = mse(pred[:1], target[:1]) + 0.3 * mse(pred[1:], target[1:]) if prior else mse(pred, target)
    assert ours == pytest.approx(step(learned, loss), rel=1e-5)
    after = wearing(build, tmp_path / "after")[0].unet
    same(after, pipe.unet), moved(wearing(build, tmp_path / "before")[0].unet, after)


def test_controlnet(tmp_path):
    build = peers.stable_diffusion_1
    made = recipes.RECIPES["controlnet"](config("controlnet", peers.saved(build)))
    start = diffusers.ControlNetModel.from_unet(build().unet, conditioning_embedding_out_channels=(16, 32))
    peers.lively(start).save_pretrained(tmp_path / "start")
    given = config("controlnet", peers.saved(build))
    given = given.__class__(
        **{**vars(given), "model": Model(peers.saved(build), controlnet_model_name_or_path=str(tmp_path / "start"))}
    )
    recipe = recipes.RECIPES["controlnet"](given)
    assert dict(made.pipe.specs)["controlnet"] == dict(recipe.pipe.specs)["controlnet"]
    picture = latents(2, 16, 16, 3).clip(-1, 1)
    data = {"latents": latents(2, 8, 8, 4), "caption": CAPTIONS, "conditioning_image": picture}
    ours, *keys = updated(recipe, data, tmp_path / "after")

    pipe, net = build(), diffusers.ControlNetModel.from_pretrained(tmp_path / "start").train()
    x, t, target = noised(recipe.pipe.scheduler, data, *keys)
    down, mid = net(x, t, text(pipe).detach(), peers.nchw((picture + 1) / 2), return_dict=False)
    more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    loss = torch.nn.functional.mse_loss(pipe.unet(x, t, text(pipe).detach(), **more).sample, target)
    assert ours == pytest.approx(step(net.parameters(), loss), rel=1e-5)
    read = diffusers.ControlNetModel.from_pretrained(tmp_path / "after")
    same(read, net), moved(diffusers.ControlNetModel.from_pretrained(tmp_path / "start"), read)


def told_xl(pipe):
    """What Stable Diffusion XL is told of the captions, and of pictures of 16 pixels that were not cut."""
    embeds, _, pooled, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    ids = torch.tensor([[16, 16, 0, 0, 16, 16]] * 2)
    return embeds.detach(), {"text_embeds": pooled.detach(), "time_ids": ids}


def test_t2i_adapter(tmp_path):
    """The script's sigmas, and its error of what is denoised; the last of four features is for the middle block."""
    build = peers.stable_diffusion_xl
    given = config("t2i_adapter", peers.saved(build), objective=Objective(weighting_scheme="cubic"))
    recipe = recipes.RECIPES["t2i_adapter"](given)
    recipe.export(tmp_path / "before", recipe.params)
    picture = latents(2, 16, 16, 3).clip(-1, 1)
    data = {"latents": latents(2, 8, 8, 4), "caption": CAPTIONS, "conditioning_image": picture}
    ours, k_time, k_noise = updated(recipe, data, tmp_path / "after")

    pipe, net = build(), diffusers.T2IAdapter.from_pretrained(tmp_path / "before").train()
    assert net.config.channels == [16, 32, 32] and net.config.downscale_factor == 4
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    u = torch.tensor(np.asarray(jax.random.uniform(k_time, (2,))))
    t = ((1 - u**3) * 1000).long().to(scheduler.timesteps.dtype).clamp(0, 999)
    x0, noise = (peers.nchw(a) for a in (data["latents"], jax.random.normal(k_noise, data["latents"].shape)))
    noisy = scheduler.add_noise(x0, noise, t)
    sigma = scheduler.sigmas[[(scheduler.timesteps == one).nonzero().item() for one in t]][:, None, None, None]
    embeds, more = told_xl(pipe)
    added = net(peers.nchw((picture + 1) / 2))
    assert len(added) == 3
    pred = pipe.unet(
        noisy / (sigma**2 + 1) ** 0.5,
        t,
        embeds,
        added_cond_kwargs=more,
        down_intrablock_additional_residuals=list(added),
    ).sample
    loss = (sigma**-2.0 * (pred * -sigma + noisy - x0) ** 2).mean()
    assert ours == pytest.approx(step(net.parameters(), loss), rel=1e-5)
    read = diffusers.T2IAdapter.from_pretrained(tmp_path / "after")
    same(read, net), moved(diffusers.T2IAdapter.from_pretrained(tmp_path / "before"), read)


def test_unconditional(tmp_path):
    recipe = recipes.RECIPES["unconditional"](config("unconditional", peers.saved(peers.ddpm)))
    data = {"image": latents(2, 8, 8, 3)}
    ours, *keys = updated(recipe, data, tmp_path)

    net = peers.ddpm().unet
    x, t, target = noised(recipe.pipe.scheduler, {"latents": data["image"]}, *keys)
    assert ours == pytest.approx(
        step(net.parameters(), torch.nn.functional.mse_loss(net(x, t).sample, target)), rel=1e-5
    )
    same(diffusers.DDPMPipeline.from_pretrained(tmp_path).unet, net)


@pytest.mark.parametrize("kind", ["kl", "codebook", "critic"])
def test_autoencoder(kind, tmp_path):
    """By a Gaussian or by a codebook, and with a critic that learns at the same update, from the same pictures."""
    source = test_classic.super_resolution() if kind == "codebook" else peers.stable_diffusion_1()
    vae = (source.vqvae if kind == "codebook" else peers.sure(source.vae)).train()
    source.save_pretrained(tmp_path / "before")
    objective = Objective(rec_loss="l1", kl_scale=0.01, disc_scale=0.5 if kind == "critic" else 0.0)
    recipe = recipes.RECIPES["autoencoder"](config("autoencoder", str(tmp_path / "before"), objective=objective))
    data = {"image": latents(2, 32, 32, 3).clip(-1, 1)}
    after, [ours] = trained(recipe, data)
    recipe.export(tmp_path / "after", after.params)

    x, players = peers.nchw(data["image"]), list(vae.parameters())
    if kind == "codebook":
        made, bottleneck = vae(x, return_dict=False)
    else:
        posterior = vae.encode(x).latent_dist
        made, bottleneck = vae.decode(posterior.mean).sample, 0.01 * posterior.kl().sum() / x.numel()
    far = (made - x).abs().mean()
    loss = far + bottleneck
    if kind == "critic":
        critic, start = taming.TamingDiscriminator(64), recipe.params["discriminator"]
        theirs = {name: torch.tensor(np.asarray(w)) for name, w in start.items()}
        theirs = {name: w.permute(3, 2, 0, 1) if w.ndim == 4 else w for name, w in theirs.items()}
        critic.load_state_dict(theirs, strict=False)
        norm = lambda of: torch.autograd.grad(of, vae.decoder.conv_out.weight, retain_graph=True)[0].norm()
        fools = -critic(made).mean()
        loss = loss + 0.5 * (norm(far) / (norm(fools) + 1e-4)).detach() * fools
        cost = taming.CRITICS["hinge"](critic(x), critic(made.detach()))
        learned = list(critic.parameters())
        grads = torch.autograd.grad(loss, players, retain_graph=True) + torch.autograd.grad(cost, learned)
        players, loss = players + learned, loss + cost
        for player, grad in zip(players, grads, strict=True):
            player.grad = grad
    else:
        loss.backward()
    torch.nn.utils.clip_grad_norm_(players, 1.0)
    adamw(players).step()
    assert ours == pytest.approx(loss.item(), rel=1e-5)
    same(type(vae).from_pretrained(tmp_path / "after"), vae)
    if kind == "critic":
        now, here = after.params["discriminator"]["main.8.weight"], critic.main[8].weight.detach().permute(2, 3, 1, 0)
        assert peers.relative(now, here) < 1e-3 < peers.relative(now, start["main.8.weight"])


def test_a_word(tmp_path, monkeypatch):
    """Textual inversion: two vectors move, the rest of the table does not."""
    monkeypatch.setattr(words, "OBJECTS", ("a {}",))  # the tiny tokenizer has letters for words
    build = peers.stable_diffusion_1
    word = Adapter(placeholder_token="<x>", initializer_token="red", num_vectors=2)
    recipe = recipes.RECIPES["textual_inversion"](config("textual_inversion", peers.saved(build), adapter=word))
    recipe.export(tmp_path / "before", recipe.params)
    data = {"image": latents(2, 16, 16, 3), "caption": CAPTIONS}
    batch = recipe.batch(data)
    batch = {"latents": latents(2, 8, 8, 4), "conditions": batch["conditions"]}
    ours, *keys = updated(recipe._replace(batch=lambda data: batch), data, tmp_path / "after")

    fresh = lambda: diffusers.StableDiffusionPipeline.from_pretrained(peers.saved(build))  # a tokenizer of its own
    pipe = fresh()
    pipe.load_textual_inversion(tmp_path / "before")
    table = pipe.text_encoder.get_input_embeddings().weight
    x, t, target = noised(recipe.pipe.scheduler, batch, *keys)
    prompts = [pipe.maybe_convert_prompt(p, pipe.tokenizer) for p in words.said(config("", "", adapter=word), data)]
    ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    loss = torch.nn.functional.mse_loss(pipe.unet(x, t, pipe.text_encoder(ids)[0]).sample, target)
    rows = torch.autograd.grad(loss, table)[0][-2:]
    vectors = torch.nn.Parameter(table[-2:].detach().clone())
    assert ours == pytest.approx(loss.item(), rel=1e-5)
    step([vectors], (vectors * rows).sum())
    again = fresh()
    again.load_textual_inversion(tmp_path / "after")
    read = again.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(read[-2:], vectors, rtol=0, atol=1e-4)
    torch.testing.assert_close(read[:-2], table[:-2])


def test_keys_and_values(tmp_path):
    """Custom Diffusion: its file gives PyTorch's U-Net the weights that it has learned itself."""
    build = peers.stable_diffusion_1
    recipe = recipes.RECIPES["custom_diffusion"](config("custom_diffusion", peers.saved(build)))
    data = {"latents": latents(2, 8, 8, 4), "caption": CAPTIONS}
    ours, *keys = updated(recipe, data, tmp_path)

    pipe = build()
    learned = {n: p for n, p in pipe.unet.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n}
    for name, parameter in pipe.unet.named_parameters():
        parameter.requires_grad_(name in learned)
    x, t, target = noised(recipe.pipe.scheduler, data, *keys)
    loss = torch.nn.functional.mse_loss(pipe.unet(x, t, text(pipe).detach()).sample, target)
    assert ours == pytest.approx(step(learned.values(), loss), rel=1e-5)
    other = build().unet
    weights = safetensors.torch.load_file(tmp_path / "pytorch_custom_diffusion_weights.safetensors")
    other.set_attn_processor(other._process_custom_diffusion(weights))  # load_attn_procs of 0.42.1 forgets to
    read = {name: p.state_dict() for name, p in other.attn_processors.items() if isinstance(p, torch.nn.Module)}
    for name, parameter in learned.items():
        place, layer = name.removesuffix(".weight").rsplit(".", 1)
        weight = read[f"{place}.processor"][f"{layer}_custom_diffusion.weight"]
        torch.testing.assert_close(weight, parameter.detach(), rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("large", [False, True], ids=["1", "xl"])
def test_pictures_to_change(large, tmp_path):
    """InstructPix2Pix: the first layer sees the picture's latent as well; of the second example it is left out."""
    build = peers.shallow_stable_diffusion_xl if large else peers.shallow_stable_diffusion_1
    recipe = recipes.RECIPES["instruct_pix2pix"](config("instruct_pix2pix", peers.saved(build)))
    picture = latents(2, 16, 16, 3).clip(-1, 1)
    data = {
        "latents": latents(2, 8, 8, 4),
        "caption": CAPTIONS,
        "conditioning_image": picture,
        "conditioning": np.float32([1, 0]),
    }
    ours, *keys = updated(recipe, data, tmp_path)

    pipe = build()
    first, net = pipe.unet.conv_in, pipe.unet
    wide = torch.nn.Conv2d(8, first.out_channels, 3, padding=1)
    with torch.no_grad():
        wide.weight.zero_(), wide.weight[:, :4].copy_(first.weight), wide.bias.copy_(first.bias)
    net.conv_in = wide
    beside = (
        pipe.vae.encode(peers.nchw(picture)).latent_dist.mode().detach() * torch.tensor([1.0, 0])[:, None, None, None]
    )
    x, t, target = noised(recipe.pipe.scheduler, data, *keys)
    embeds, more = told_xl(pipe) if large else (text(pipe).detach(), None)
    pred = net(torch.cat([x, beside], 1), t, embeds, added_cond_kwargs=more).sample
    loss = torch.nn.functional.mse_loss(pred, target)
    assert ours == pytest.approx(step(net.parameters(), loss), rel=1e-5)
    read = getattr(diffusers, f"StableDiffusion{'XL' * large}InstructPix2PixPipeline").from_pretrained(tmp_path).unet
    same(read, net)
    assert read.conv_in.weight[:, 4:].abs().max() > 1e-4


def test_flow_of_stable_diffusion_3(tmp_path):
    """Velocities, at times that follow from the scheduler's shift; three encoders read the captions."""
    recipe = recipes.RECIPES["text_to_image"](config("text_to_image", test_sd3.folder()))
    data = {"latents": latents(2, 8, 8, 16), "caption": CAPTIONS}
    ours, *keys = updated(recipe, data, tmp_path)

    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(test_sd3.folder())
    x, t, target = noised(recipe.pipe.scheduler, data, *keys)
    embeds, _, pooled, _ = pipe.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False)
    told = {"encoder_hidden_states": embeds.detach(), "pooled_projections": pooled.detach()}
    loss = torch.nn.functional.mse_loss(pipe.transformer(x, timestep=t, **told).sample, target)
    assert ours == pytest.approx(step(pipe.transformer.parameters(), loss), rel=1e-5)
    same(diffusers.SD3Transformer2DModel.from_pretrained(tmp_path, subfolder="transformer"), pipe.transformer)


def test_flow_of_flux(tmp_path):
    """Tokens of packed latents, and a network that is told the strength of guidance."""
    recipe = recipes.RECIPES["text_to_image"](config("text_to_image", test_flux.folder()))
    data = {"latents": latents(2, 8, 8, 4), "caption": CAPTIONS}
    ours, *keys = updated(recipe, data, tmp_path)

    pipe = diffusers.FluxPipeline.from_pretrained(test_flux.folder())
    x, t, target = noised(recipe.pipe.scheduler, data, *keys)
    pack = lambda a: pipe._pack_latents(a, 2, a.shape[1], *a.shape[2:])
    embeds, pooled, text_ids = pipe.encode_prompt(CAPTIONS, None)
    where = pipe._prepare_latent_image_ids(2, 4, 4, None, torch.float32)
    told = {"encoder_hidden_states": embeds.detach(), "pooled_projections": pooled.detach(), "txt_ids": text_ids}
    pred = pipe.transformer(pack(x), timestep=t / 1000, guidance=torch.full((2,), 3.5), img_ids=where, **told).sample
    loss = torch.nn.functional.mse_loss(pred, pack(target))
    assert ours == pytest.approx(step(pipe.transformer.parameters(), loss), rel=1e-5)
    same(diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer"), pipe.transformer)


def led(folder, net, tmp_path, **settings):
    """The recipe of a ControlNet of a flow, which begins as `net`; ours begins as PyTorch's does."""
    (tmp_path / "sizes.json").write_text(json.dumps(settings))
    build = recipes.RECIPES["controlnet"]
    made = build(Config("controlnet", Data(resolution=16), Model(folder, component=str(tmp_path / "sizes.json"))))
    made.export(tmp_path / "made", made.params)
    same(type(net).from_pretrained(tmp_path / "made"), net)
    peers.lively(net).save_pretrained(tmp_path / "before")
    return build(
        Config("controlnet", Data(resolution=16), Model(folder, controlnet_model_name_or_path=str(tmp_path / "before")))
    )


def test_controlnet_of_flux(tmp_path):
    """Tokens of the picture's latent, and as many of the transformer's blocks as are asked for."""
    pipe = diffusers.FluxPipeline.from_pretrained(test_flux.folder())
    sizes = {"num_layers": 1, "num_single_layers": 2}
    heads = {"attention_head_dim": 12, "num_attention_heads": 2}
    net = diffusers.FluxControlNetModel.from_transformer(pipe.transformer, **sizes, **heads)
    recipe = led(test_flux.folder(), net, tmp_path, **sizes)
    picture = latents(2, 16, 16, 3).clip(-1, 1)
    data = {"latents": latents(2, 8, 8, 4), "caption": CAPTIONS, "conditioning_image": picture}
    ours, *keys = updated(recipe, data, tmp_path / "after")

    x, t, target = noised(recipe.pipe.scheduler, data, *keys)
    pack = lambda a: pipe._pack_latents(a, 2, a.shape[1], *a.shape[2:])
    embeds, pooled, text_ids = pipe.encode_prompt(CAPTIONS, None)
    where = pipe._prepare_latent_image_ids(2, 4, 4, None, torch.float32)
    told = {"encoder_hidden_states": embeds.detach(), "pooled_projections": pooled.detach(), "txt_ids": text_ids}
    told |= {"timestep": t / 1000, "guidance": torch.full((2,), 3.5), "img_ids": where}
    seen = (pipe.vae.encode(peers.nchw(picture)).latent_dist.sample().detach() - 0.1) * 0.4
    blocks, singles = net(hidden_states=pack(x), controlnet_cond=pack(seen), return_dict=False, **told)
    more = {"controlnet_block_samples": blocks, "controlnet_single_block_samples": singles}
    loss = torch.nn.functional.mse_loss(pipe.transformer(pack(x), **more, **told).sample, pack(target))
    assert ours == pytest.approx(step(net.parameters(), loss), rel=1e-5)
    read = diffusers.FluxControlNetModel.from_pretrained(tmp_path / "after")
    same(read, net), moved(diffusers.FluxControlNetModel.from_pretrained(tmp_path / "before"), read)


def test_controlnet_of_stable_diffusion_3(tmp_path):
    """A shifted latent and a pooled state, which the pipeline gives a net that says so."""
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(test_sd3.folder())
    net = diffusers.SD3ControlNetModel.from_transformer(pipe.transformer, 2, 0)
    net.register_to_config(force_zeros_for_pooled_projection=False)
    recipe = led(test_sd3.folder(), net, tmp_path, num_layers=2)
    made = diffusers.SD3ControlNetModel.from_pretrained(tmp_path / "made")
    assert not made.config.force_zeros_for_pooled_projection
    picture = latents(2, 16, 16, 3).clip(-1, 1)
    data = {"latents": latents(2, 8, 8, 16), "caption": CAPTIONS, "conditioning_image": picture}
    ours, *keys = updated(recipe, data, tmp_path / "after")

    x, t, target = noised(recipe.pipe.scheduler, data, *keys)
    embeds, _, pooled, _ = pipe.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False)
    told = {"encoder_hidden_states": embeds.detach(), "pooled_projections": pooled.detach(), "timestep": t}
    seen = (pipe.vae.encode(peers.nchw(picture)).latent_dist.sample().detach() - 0.1) * 0.4
    added = net(hidden_states=x, controlnet_cond=seen, return_dict=False, **told)[0]
    pred = pipe.transformer(x, block_controlnet_hidden_states=added, **told).sample
    loss = torch.nn.functional.mse_loss(pred, target)
    assert ours == pytest.approx(step(net.parameters(), loss), rel=1e-5)
    read = diffusers.SD3ControlNetModel.from_pretrained(tmp_path / "after")
    same(read, net), moved(diffusers.SD3ControlNetModel.from_pretrained(tmp_path / "before"), read)


# --- preferences -----------------------------------------------------------------------------------------------------


def test_preferences(tmp_path):
    """Diffusion-DPO: the first picture of each pair is preferred, and both have the same noise, time and caption."""
    build = peers.shallow_stable_diffusion_1
    given = config("dpo_lora", peers.saved(build), objective=Objective(beta_dpo=20.0))
    recipe = lively(recipes.RECIPES["dpo_lora"](given))
    recipe.export(tmp_path / "before", recipe.params)
    picture = latents(2, 16, 16, 3).clip(-1, 1)
    batch = recipe.batch({"image": picture, "rejected": picture, "caption": CAPTIONS})
    both = latents(4, 8, 8, 4)
    batch = {"latents": both, "conditions": batch["conditions"]}
    ours, *keys = updated(recipe._replace(batch=lambda data: batch), batch, tmp_path / "after")

    pipe, learned = wearing(build, tmp_path / "before")
    pairs = [noised(recipe.pipe.scheduler, {"latents": half}, *keys) for half in np.split(both, 2)]
    x, t, target = (torch.cat(halves) for halves in zip(*pairs))
    words = text(pipe).detach().repeat(2, 1, 1)

    def ahead():
        each = torch.nn.functional.mse_loss(pipe.unet(x, t, words).sample, target, reduction="none")
        return torch.sub(*each.mean((1, 2, 3)).chunk(2))

    own = ahead()
    pipe.unet.disable_adapters()
    with torch.no_grad():
        reference = ahead()
    pipe.unet.enable_adapters()
    loss = -torch.nn.functional.logsigmoid(20.0 * (reference - own)).mean()
    assert ours == pytest.approx(step(learned, loss), rel=1e-5)
    after = wearing(build, tmp_path / "after")[0].unet
    same(after, pipe.unet), moved(wearing(build, tmp_path / "before")[0].unet, after)


# --- students of few steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_run_keeps_what_its_loss_follows(use_ema, tmp_path, monkeypatch):
    """The average is there whether or not it is what is written."""
    seen = {}

    def recipe(config):
        pipe, params = recipes.load(config)
        w = lambda params: params["w"]["w"]
        follow = lambda params, batch, key: (jnp.square(w(params) - w(params["averaged"]) - 1).sum(), {})
        export = lambda folder, params: seen.update(params["w"])
        return recipes.Recipe(pipe, {"w": {"w": jnp.zeros(1)}}, ".*", follow, lambda batch: {}, export, target=True)

    monkeypatch.setitem(recipes.RECIPES, "follow", recipe)
    plain = Optimizer("sgd", 0.1, adam_beta1=0.0, adam_weight_decay=0.0, max_grad_norm=9.0)
    given = Run(str(tmp_path), max_train_steps=2, train_batch_size=8, use_ema=use_ema, ema_decay=0.5)
    with jax.numpy_dtype_promotion("standard"):
        run.train(Config("follow", Data("emoji", resolution=32), optimizer=plain, run=given))
    w = [0.0, 0.2, 0.2 + 0.2 * 0.9]  # gradients of (w - average - 1)², the average being 0, then 0.1
    np.testing.assert_allclose(seen["w"], [(0.1 + w[2]) / 2 if use_ema else w[2]], rtol=1e-5)


def consistency_loss(scheduler, student, teacher, target, x0, keys, huber_c=None):
    """That of the scripts for latent consistency.

    `student` and `target` are asked about (x, t, w), `teacher` about (x, t) with and without the text.
    """
    scheduler = diffusers.DDPMScheduler.from_config(scheduler.config)
    power, column = scheduler.alphas_cumprod, lambda a: a[:, None, None, None]
    k_time, k_noise, k_w = keys
    ddim = torch.arange(1, 51) * (1000 // 50) - 1
    before = torch.cat([power[:1], power[ddim[:-1]]])
    index = torch.tensor(np.asarray(timesteps.sampler()(k_time, len(x0), 50)))
    w = torch.tensor(np.asarray(jax.random.uniform(k_w, (len(x0),), minval=5.0, maxval=15.0)))
    start = ddim[index]
    end = (start - 1000 // 50).clamp(min=0)
    noisy = scheduler.add_noise(peers.nchw(x0), peers.nchw(jax.random.normal(k_noise, x0.shape)), start)

    def denoised(output, t, x):
        return (x - column((1 - power[t]).sqrt()) * output) / column(power[t].sqrt())

    def consistent(net, x, t):
        scaled = 10.0 * t
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return column(skip) * x + column(out) * denoised(net(x, t, w), t, x)

    with torch.no_grad():
        told, untold = teacher(noisy, start)
        clean, empty = denoised(told, start, noisy), denoised(untold, start, noisy)
        pred_x0, pred_noise = clean + column(w) * (clean - empty), told + column(w) * (told - untold)
        last = column(before[index])
        goal = consistent(target, last.sqrt() * pred_x0 + (1 - last).sqrt() * pred_noise, end)
    error = consistent(student, noisy, start) - goal
    return (error**2).mean() if huber_c is None else (torch.sqrt(error**2 + huber_c**2) - huber_c).mean()


def test_latent_consistency(tmp_path):
    """Two steps of a student that is told the guidance; the network that it follows is its average at one pace."""
    build = peers.shallow_stable_diffusion_1
    given = config("lcm", peers.saved(build), objective=Objective(loss_type="huber", huber_c=0.01))
    recipe = recipes.RECIPES["lcm"](given)
    recipe.export(tmp_path / "before", recipe.params)
    data = {"latents": latents(2, 8, 8, 4), "caption": CAPTIONS}
    after, ours = trained(recipe, data, steps=2, decay=0.95)

    pipe = build()
    read = lambda folder: diffusers.UNet2DConditionModel.from_pretrained(tmp_path / folder, subfolder="unet")
    student, target, words = read("before"), read("before"), text(pipe).detach()
    ids = pipe.tokenizer([""] * 2, padding="max_length", return_tensors="pt").input_ids
    empty, optimizer = pipe.text_encoder(ids)[0].detach(), adamw(student.parameters())

    def told(net):
        embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        return lambda x, t, w: net(x, t, words, timestep_cond=embed(None, w, 256)).sample

    teacher = lambda x, t: (pipe.unet(x, t, words).sample, pipe.unet(x, t, empty).sample)
    for n in range(2):
        nets = told(student), teacher, told(target)
        loss = consistency_loss(pipe.scheduler, *nets, data["latents"], drawn(n, 3), huber_c=0.01)
        assert ours[n] == pytest.approx(step(student.parameters(), loss, optimizer), rel=1e-5)
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), student.parameters(), strict=True):
                slow.mul_(0.95).add_(fast, alpha=0.05)
    recipe.export(tmp_path / "after", after.params), recipe.export(tmp_path / "average", state.averaged(after))
    same(read("after"), student), same(read("average"), target), moved(read("before"), student)


def test_latent_consistency_of_a_lora(tmp_path):
    """Stable Diffusion XL, whose teacher reads zeros in place of an empty text; convolutions learn as well."""
    build = peers.shallow_stable_diffusion_xl
    recipe = lively(recipes.RECIPES["lcm_lora"](config("lcm_lora", peers.saved(build))), scale=0.05)
    recipe.export(tmp_path / "before", recipe.params)
    sizes = {"original_size": np.int32([[40, 60], [16, 16]]), "crop_top_left": np.int32([[0, 8], [3, 0]])}
    data = {"latents": latents(2, 8, 8, 4), "caption": CAPTIONS, **sizes}
    after, [ours] = trained(recipe, data)
    recipe.export(tmp_path / "after", after.params)

    pipe, learned = wearing(build, tmp_path / "before")
    words, _, pooled, _ = (a if a is None else a.detach() for a in pipe.encode_prompt(CAPTIONS, None, None, 1, False))
    ids = torch.tensor([[40, 60, 0, 8, 16, 16], [16, 16, 3, 0, 16, 16]])
    # a small difference of large numbers, by much noise and guidance up to 15: one of both is not to round it
    pipe.unet.double()

    def asked(x, t, words, pooled):
        x, words, pooled = x.double(), words.double(), pooled.double()
        return pipe.unet(x, t, words, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample

    def teacher(x, t):
        pipe.unet.disable_adapters()
        both = asked(x, t, words, pooled), asked(x, t, 0 * words, 0 * pooled)
        pipe.unet.enable_adapters()
        return both

    student = lambda x, t, w: asked(x, t, words, pooled)
    loss = consistency_loss(pipe.scheduler, student, teacher, student, data["latents"], drawn(0, 3))
    assert ours == pytest.approx(step(learned, loss), rel=1e-5)
    read = wearing(build, tmp_path / "after")[0].unet
    same(read, pipe.unet.float()), moved(wearing(build, tmp_path / "before")[0].unet, read)


def test_layers_that_learn_few_steps(tmp_path):
    """Those of the script, where its LoRA is not told which."""
    recipe = recipes.RECIPES["lcm_lora"](config("lcm_lora", peers.saved(peers.stable_diffusion_xl)))
    recipe.export(tmp_path, recipe.params)
    pipe, _ = wearing(peers.stable_diffusion_xl, tmp_path)
    modules = {name.split(".lora")[0] for name in pipe.unet.state_dict() if "lora" in name}
    layers = "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut time_emb_proj"
    ends = (*layers.split(), "downsamplers.0.conv", "upsamplers.0.conv")
    plain = peers.stable_diffusion_xl().unet
    assert modules == {name for name, _ in plain.named_modules() if name.endswith(ends)}


def test_the_scheduler_follows_what_is_predicted():
    given = config("lora", peers.saved(peers.stable_diffusion_1), objective=Objective(prediction_type="v_prediction"))
    assert recipes.RECIPES["lora"](given).pipe.scheduler.prediction_type == "v_prediction"
    flow = config("lora", test_sd3.folder(), objective=Objective(prediction_type="epsilon"))
    with pytest.raises(ValueError, match="is of a flow"):
        recipes.RECIPES["lora"](flow)


def test_what_a_run_refuses(tmp_path):
    """Before any work: what cannot go together, and rounds that are longer than the run."""
    folder = peers.saved(peers.stable_diffusion_1)

    def train(recipe, data=None, objective=None, **options):
        data = {"train_data": "emoji", "resolution": 16, **(data or {})}
        run.train(Config(recipe, Data(**data), Model(folder), objective=objective or Objective(), run=Run(**options)))

    with pytest.raises(ValueError, match="recipe='dream' is not known"):
        train("dream")
    with pytest.raises(ValueError, match="stream cannot be asked"):
        train("lora", {"streaming": True}, validation_batches=1)
    with pytest.raises(ValueError, match="no other weighting"):
        train("lora", objective=Objective(weighting_scheme="cosmap", snr_gamma=5.0))
    with pytest.raises(ValueError, match="half of it pictures"):
        train("lora", objective=Objective(with_prior_preservation=True), train_batch_size=3, mesh="tp")
    with pytest.raises(ValueError, match="train_batch_size=12 does not divide among the 8 devices .* e.g. 16, or"):
        train("lora", train_batch_size=12)
    short = Objective(num_inference_steps=4, sample_batch_size=4)
    with pytest.raises(ValueError, match="max_train_steps=1: a round has"):
        train("ddpo_lora", objective=short, train_batch_size=4, max_train_steps=1, output=str(tmp_path))
    with pytest.raises(ValueError, match="without use_ema"):
        train("ddpo_lora", objective=short, train_batch_size=4, use_ema=True, output=str(tmp_path))
    decoder, critic = Model(folder, trainable=r"vae\.decoder\..*"), Objective(disc_scale=1.0)
    with pytest.raises(ValueError, match=r"leaves the critic .*; give 'vae.*\|discriminator"):
        recipes.RECIPES["autoencoder"](Config("autoencoder", Data(), decoder, objective=critic))
    with pytest.raises(ValueError, match="trains AutoencoderKL or VQModel; this pipeline has none"):
        recipes.RECIPES["autoencoder"](config("autoencoder", peers.saved(peers.ddpm)))
    with pytest.raises(ValueError, match="reward='nothing:at_all'"):
        recipes.reward("nothing:at_all")
