"""Whole pipelines: saved here and loaded by PyTorch, loaded in part, and fetched from a Hub that runs in the test."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch

import flaxdiff

BUILDS = [peers.stable_diffusion_1, peers.stable_diffusion_xl, peers.stable_diffusion_xl_refiner]


@pytest.mark.parametrize("build", BUILDS)
def test_pytorch_loads_what_we_saved_and_computes_the_same(build, tmp_path):
    pipe, params = flaxdiff.load(peers.saved(build))
    flaxdiff.save(tmp_path / "ours", pipe, params)
    original, again = (diffusers.DiffusionPipeline.from_pretrained(f) for f in (peers.saved(build), tmp_path / "ours"))
    assert type(again) is type(original)
    for name, component in original.components.items():
        ours = again.components[name]
        assert type(ours) is type(component), name
        if isinstance(component, torch.nn.Module):
            state = component.state_dict()
            assert all(torch.equal(weight, state[key]) for key, weight in ours.state_dict().items())
        elif component is not None and name.startswith("tokenizer"):
            assert ours("A red dog, ré-éd").input_ids == component("A red dog, ré-éd").input_ids
            assert ours.model_max_length == component.model_max_length
    options = {"prompt": "a red dog", "num_inference_steps": 2, "output_type": "np"}
    if "XLImg2Img" in type(again).__name__:
        options |= {"image": torch.zeros(1, 4, 8, 8), "denoising_start": 0.5}
    else:
        options["latents"] = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = []
    for peer in (original, again):
        peer.set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        pictures.append(peer(**options).images)
    assert peers.relative(*pictures) <= 1e-5  # to rounding: PyTorch's kernels depend on how weights lie in memory

    back, loaded = flaxdiff.load(tmp_path / "ours")
    parts = lambda p: (type(p), p.specs, p.scheduler, p.settings)
    assert parts(back) == parts(pipe)
    assert all(np.array_equal(loaded[n][k], params[n][k]) for n in params for k in params[n])


def test_components_given_left_out_and_set():
    folder = peers.saved(peers.stable_diffusion_1)
    vae = flaxdiff.AutoencoderKL.from_config({"block_out_channels": [8], "norm_num_groups": 4})
    vae_params = flaxdiff.init(vae, jax.random.key(0))
    euler = flaxdiff.EulerDiscreteScheduler()
    pipe, params = flaxdiff.StableDiffusionPipeline.from_pretrained(
        folder, vae=(vae, vae_params), scheduler=euler, safety_checker=None, attention="sliced", dtype=jnp.bfloat16
    )
    assert pipe.vae is vae and params["vae"] is vae_params and pipe.scheduler is euler
    assert pipe.unet.config.attention == pipe.text_encoder.config.attention == "sliced"
    assert {a.dtype for n in ("unet", "text_encoder") for a in params[n].values()} == {jnp.dtype(jnp.bfloat16)}
    pipe, params = flaxdiff.load(folder, text_encoder=None, tokenizer=None)
    assert sorted(params) == ["unet", "vae"] and not pipe.tokenizers
    for wrong, message in (
        ({"vea": None}, "no setting 'vea'"),
        ({"scheduler": None}, "needs a scheduler"),
        ({"vae": vae}, r"give \(spec, params\)"),
    ):
        with pytest.raises(ValueError, match=message):
            flaxdiff.load(folder, **{"unet": (vae, vae_params), "text_encoder": None} | wrong)


def test_variant_where_there_is_one(tmp_path):
    """As on the Hub, where some components have files of a variant and others have not."""
    folder = shutil.copytree(peers.saved(peers.stable_diffusion_1), tmp_path / "sd")
    peers.stable_diffusion_1().unet.half().save_pretrained(folder / "unet", variant="fp16")
    _, plain = flaxdiff.load(folder)
    _, half = flaxdiff.load(folder, variant="fp16")
    assert all(np.array_equal(half["vae"][k], plain["vae"][k]) for k in plain["vae"])
    assert all(np.array_equal(half["unet"][k], a.astype(jnp.float16).astype(a.dtype)) for k, a in plain["unet"].items())
    assert any(not np.array_equal(half["unet"][k], a) for k, a in plain["unet"].items())
    with pytest.raises(FileNotFoundError, match="no files of variant 'bf16'; leave variant out"):
        flaxdiff.load(folder, variant="bf16")


def test_a_failed_save_of_a_pipeline_changes_nothing(tmp_path):
    pipe, params = flaxdiff.load(peers.saved(peers.ddpm))
    flaxdiff.save(tmp_path / "ddpm", pipe, params)
    everything = lambda: {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    before = everything()
    broken = {"unet": params["unet"] | {"conv_out.bias": params["unet"]["conv_out.bias"] * jnp.inf}}
    with pytest.raises(ValueError, match="params lacks unet"):
        flaxdiff.save(tmp_path / "ddpm", pipe, {})
    for target in ("ddpm", "new"):
        with pytest.raises(ValueError, match="conv_out.bias holds infinities or NaNs"):
            flaxdiff.save(tmp_path / target, pipe, broken)
    assert everything() == before


# --- the Hub --------------------------------------------------------------------------------------------------------

COMMITS = {"main": "a" * 40, "old": "b" * 40}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: revisions, trees and files of one repository, "some/model"."""

    folders: dict[str, Path] = {}  # commit -> its files
    served: list[str] = []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        commit = COMMITS.get(rest[1], rest[1]) if len(rest) > 1 else COMMITS["main"]
        if repo == "some/gated":
            return self.send(403, b"", body, {"X-Error-Code": "GatedRepo"})
        if repo != "some/model":
            return self.send(404, b"", body, {"X-Error-Code": "RepoNotFound"})
        if commit not in self.folders:
            return self.send(404, b"", body, {"X-Error-Code": "RevisionNotFound"})
        root = self.folders[commit]
        files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        oid = lambda data: hashlib.sha1(data).hexdigest()
        if api and rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": n, "size": len(d), "oid": oid(d)} for n, d in files.items()]
            return self.send(200, json.dumps(tree).encode(), body)
        if api:
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self.send(200, json.dumps(info).encode(), body)
        name = "/".join(rest[2:])
        if body:
            self.served.append(name)
        self.send(200, files[name], body, {"ETag": f'"{oid(files[name])}"', "X-Repo-Commit": commit})

    def send(self, status, data, body, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_): ...


FETCH = """
    import sys
    import flaxdiff

    def attempt(load, repo, **options):
        try:
            pipe, params = load(repo, **options)
            print(type(pipe).__name__, float(params["unet"]["conv_in.bias"].sum()))
        except FileNotFoundError as error:
            print(str(error).replace("\\n", " "))

    if sys.argv[1] == "online":
        attempt(flaxdiff.load, "some/model")
        attempt(flaxdiff.load, "some/model", revision="old")
        attempt(flaxdiff.load, "some/model", revision="none")
        attempt(flaxdiff.load, "some/gated")
        attempt(flaxdiff.load, "some/other")
    else:
        attempt(flaxdiff.load, "some/model", local_files_only=True)
        attempt(flaxdiff.load, "some/model")
        attempt(flaxdiff.load, "some/other")
"""


def fetch(mode, home, address, offline):
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": str(int(offline))}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", textwrap.dedent(FETCH), mode]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_hub(tmp_path):
    """Only what is needed is fetched, from one commit; without a network it is found again; errors are clear."""
    expected = []
    for seed, commit in enumerate(COMMITS.values()):
        folder = shutil.copytree(peers.saved(peers.stable_diffusion_1), tmp_path / commit)
        net = peers.unet(seed=seed)
        net.save_pretrained(folder / "unet")
        net.half().save_pretrained(folder / "unet", variant="fp16")
        torch.save(net.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
        bias = flaxdiff.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")[1]["conv_in.bias"]
        expected.append(f"StableDiffusionPipeline {float(bias.sum())}")
        vae = folder / "vae" / "diffusion_pytorch_model.safetensors"  # an older component, of pickles only
        torch.save(peers.vae().state_dict(), vae.with_suffix(".bin"))
        vae.unlink()
        (folder / "README.md").write_text("not needed")
        Hub.folders[commit] = folder
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        main, old, none, gated, other = fetch("online", tmp_path / "home", address, offline=False)
        server.shutdown()
    assert [main, old] == expected and main != old
    assert "'some/model' has no revision 'none'" in none
    assert "'some/gated' is gated: accept its terms" in gated
    assert "'some/other' is no folder here" in other and "the Hub has no repository of this name" in other
    twice = {name for name in Hub.served if Hub.served.count(name) > 1}
    assert twice == {"unet/diffusion_pytorch_model.safetensors"}  # what differs between the commits
    assert not {name for name in Hub.served if "fp16" in name or "README" in name}
    assert {n for n in Hub.served if n.endswith((".bin", ".safetensors"))} == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
    }
    for offline in (True, False):  # asked not to use the network, and a network that is down
        local, again, other = fetch("later", tmp_path / "home", address, offline)
        assert local == again == main
        assert "'some/other' is no folder here" in other and "cannot be reached now" in other


def test_what_the_hub_refuses():
    """A repository that is no id, and one that cannot be reached: said, and nothing left behind."""
    spec = flaxdiff.AutoencoderKL.from_config({"block_out_channels": [8], "norm_num_groups": 4})
    params = flaxdiff.init(spec, jax.random.key(0))
    for repo in ("no id at all", "owner/name"):
        with pytest.raises(ValueError, match=f"Nothing was written to the Hub repository '{repo}'.*hf auth login"):
            flaxdiff.push_to_hub(repo, spec, params, token="hf_none")
    pipe, params = flaxdiff.load()
    with pytest.raises(ValueError, match="Nothing was written"):
        pipe.push_to_hub("owner/name", params, token="hf_none")
