"""Programs ahead of time: equal to those compiled when called, kept in a folder, replaced when anything is amiss."""

import functools
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

import flaxdiff
from flaxdiff import guidance, registry
from flaxdiff.pipelines import ahead, keeping

SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def loaded():
    pipe, params = flaxdiff.load(peers.saved(peers.stable_diffusion_1))
    return pipe.replace(progress=False), params


@pytest.fixture(scope="module")
def kept(loaded, tmp_path_factory) -> Path:
    """A folder with one set of programs; copied before it is touched."""
    folder = tmp_path_factory.mktemp("kept")
    compile_anew(*loaded, folder)
    return folder


@pytest.fixture
def copy(kept, tmp_path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "copy"))


def compile_anew(pipe, params, folder, **options) -> ahead.Executables:
    """As another process would: nothing is ready."""
    ahead._ready.clear()
    return pipe.compile(params, folder=folder, **SIZE, **options)


class Events:
    """What JAX says that it does."""

    def __init__(self):
        self.seen: list[str] = []
        jax.monitoring.register_event_listener(lambda name, **_: self.seen.append(name))
        jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: self.seen.append(name))

    def count(self, part: str) -> int:
        return sum(part in name for name in self.seen)


EVENTS = Events()


@pytest.fixture(scope="module")
def right(loaded):
    """Whether programs, of a pipeline that does the same, make the picture that `generate` makes."""
    pipe, params = loaded
    run = lambda pipe, generate: np.asarray(
        generate(params, jax.random.key(3), pipe.prepare_inputs(prompt="red", num_inference_steps=3, **SIZE))
    )
    expected = run(pipe, jax.jit(pipe.generate))
    return lambda programs, pipe=pipe: np.abs(run(pipe, programs.generate) - expected).max() < 1e-5


def test_programs_from_the_folder(loaded, kept, right):
    """Read, not compiled: each of the three is found in the cache of the folder."""
    EVENTS.seen.clear()
    with warnings.catch_warnings(action="error"):
        programs = compile_anew(*loaded, kept)
    assert EVENTS.count("cache_hits") == 3 and EVENTS.count("cache_misses") == 0
    assert right(programs)


def test_calls_use_them(loaded, kept):
    pipe, params = loaded
    compile_anew(pipe, params, kept)
    call = lambda: pipe(params, jax.random.key(0), prompt="red", num_inference_steps=3, output_type="np", **SIZE).images
    call()  # what is computed between the parts is compiled once
    EVENTS.seen.clear()
    ours = call()
    assert EVENTS.count("backend_compile") == EVENTS.count("trace") == 0
    ahead._ready.clear()
    assert np.abs(ours - call()).max() < 1e-6
    assert EVENTS.count("trace") > 0  # without them, the call traces


def test_shapes_will_do(loaded, kept, right):
    pipe, params = loaded
    programs = compile_anew(pipe, {name: flaxdiff.abstract(spec) for name, spec in pipe.specs}, kept)
    assert right(programs)


def test_other_arguments_are_refused(loaded, kept):
    pipe, params = loaded
    programs = compile_anew(pipe, params, kept)
    two = pipe.prepare_inputs(prompt=["red"] * 2, **SIZE)
    with pytest.raises(ValueError, match="other shapes"):
        programs.generate(params, jax.random.key(0), two)
    assert pipe(params, jax.random.key(0), prompt=["red"] * 2, num_inference_steps=2, output_type="np", **SIZE)


@pytest.mark.parametrize("put", ["replicate", "distribute"])
def test_on_several_devices(put, loaded, tmp_path):
    """Split arguments: kept and read again, and the pictures are those of one device."""
    pipe, params = loaded
    mesh, key = flaxdiff.make_mesh(), jax.random.key(0)
    inputs = pipe.prepare_inputs(prompt=["red"] * mesh.size, num_inference_steps=3, **SIZE)
    expected = jax.jit(pipe.generate)(params, key, inputs)
    laid = getattr(flaxdiff, put)(params, mesh)
    for hits in (0, 3):
        ahead._ready.clear()
        EVENTS.seen.clear()
        programs = pipe.compile(laid, flaxdiff.shard(inputs, mesh), folder=tmp_path)
        assert EVENTS.count("cache_hits") == hits
        images = programs.generate(laid, key, flaxdiff.shard(inputs, mesh))
        assert len(images.sharding.device_set) == mesh.size
        assert jnp.abs(images - expected).max() < 1e-5


def described(folder: Path) -> tuple[Path, dict]:
    """Where its only programs lie, and what for."""
    (manifest,) = folder.glob("*/manifest.json")
    return manifest.parent, json.loads(manifest.read_text())["conditions"]


def damage(path: Path, harm: str) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    match harm:
        case "cut":
            path.write_bytes(raw[: len(raw) // 2])
        case "bit":
            path.write_bytes(raw)
        case "gone":
            path.unlink()
        case "empty":
            path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("step.stablehlo", "bit"),
        ("begin.stablehlo", "gone"),
        ("*-cache", "bit"),
        ("*-cache", "cut"),
        ("*-cache", "gone"),
        ("manifest.json", "cut"),
        ("manifest.json", "gone"),
        ("manifest.json", "empty"),
    ],
)
def test_damage(name, harm, copy):
    """Whatever is damaged is noticed before it is used, said, and taken away."""
    place, conditions = described(copy)
    assert keeping._intact(place, conditions)
    damage(next(place.glob(name)), harm)
    with pytest.warns(UserWarning, match="is damaged"):
        assert not keeping._intact(place, conditions)
    assert not place.exists()


def test_damaged_programs_are_written_anew(loaded, copy, right):
    damage(next(copy.glob("*/*-cache")), "bit")
    with pytest.warns(UserWarning, match="is damaged"):
        assert right(compile_anew(*loaded, copy))
    EVENTS.seen.clear()
    compile_anew(*loaded, copy)
    assert EVENTS.count("cache_hits") == 3


@pytest.mark.parametrize(
    "manifest", ["[]", "[" * 100_000, '{"conditions": 3}', '{"conditions": {"jax": [[]]}, "sha256": 1}']
)
def test_hostile_manifest(manifest, copy):
    """In the place of the programs, and beside it."""
    place, conditions = described(copy)
    (copy / "other").mkdir()
    for folder in (place, copy / "other"):
        (folder / "manifest.json").write_text(manifest)
    with pytest.warns(UserWarning, match="is damaged"):
        assert not keeping._intact(place, conditions)
    with warnings.catch_warnings(action="error"):
        assert not keeping._intact(place, conditions)


def test_a_file_too_many(copy):
    """A compiled program that the manifest does not list is not run."""
    place, conditions = described(copy)
    (place / "jit_call-0-cache").write_bytes(b"machine code")
    with pytest.warns(UserWarning, match="is damaged"):
        assert not keeping._intact(place, conditions)


@pytest.mark.parametrize(
    ("change", "message"), [({"jax": "0.0.1"}, r"jax 0\.0\.1 \(here"), ({"platform": "tpu v0"}, "platform tpu v0")]
)
def test_other_conditions(change, message, copy):
    """Programs for another version or platform are left alone, and named."""
    place, conditions = described(copy)
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps(manifest | {"conditions": conditions | change}))
    other = place.rename(copy / "0123456789abcdef")
    with pytest.warns(UserWarning, match=message):
        assert not keeping._intact(place, conditions)
    assert (other / "manifest.json").exists()


def test_another_size_is_kept_beside(loaded, copy):
    pipe, params = loaded
    with warnings.catch_warnings(action="error"):
        compile_anew(pipe, params, copy, batch=2)
    assert len(list(copy.iterdir())) == 2


@pytest.mark.parametrize("name", [name for name in registry.names("pipeline") if name != "DiffusionPipeline"])
def test_every_family_can_be_named(name):
    """All that a family holds, functions and data, has words for the manifest."""
    parts = [part for part in registry.find(name).family if part is not None]
    assert all(json.loads(json.dumps(keeping._named(part))) for part in parts)


@pytest.mark.parametrize(
    "rule",
    [
        lambda guidance_scale: guidance.cfg(guidance_scale),
        functools.partial(guidance.standard),
    ],
)
def test_functions_of_ones_own_are_not_kept(rule, loaded, right, tmp_path):
    """Their code may change under the same name."""
    pipe, params = loaded
    pipe = pipe.replace(guidance=rule)
    with pytest.warns(UserWarning, match="a function of your own"):
        assert right(compile_anew(pipe, params, tmp_path), pipe)
    assert not list(tmp_path.iterdir())


def test_no_room(loaded, right, tmp_path):
    """A folder that cannot be written costs the keeping, not the run."""
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept in"):
        assert right(compile_anew(*loaded, tmp_path / "file"))


def test_settings_are_put_back(loaded, tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = [getattr(jax.config, name) for name in names]
    compile_anew(*loaded, tmp_path)
    assert [getattr(jax.config, name) for name in names] == before


def test_compiled_while_loading(kept):
    ahead._ready.clear()
    folder = peers.saved(peers.stable_diffusion_1)
    pipe, params = flaxdiff.load(folder, dtype=jnp.float32, compile=SIZE | {"folder": kept})
    inputs = pipe.prepare_inputs(prompt="red", **SIZE)
    assert ahead.find(pipe.program, params, jax.random.key(0), inputs) is not None
    with pytest.raises(ValueError, match="multiples"):
        flaxdiff.load(folder, compile={"height": 17})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_CACHE_HOME": "{folder}"}, "{folder}/flaxdiff/compiled"),
        ({"JAX_COMPILATION_CACHE_DIR": "{folder}"}, "{folder}"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "0"}, "None"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "None"),
    ],
)
def test_compiled_programs_are_kept_by_default(environment, expected, tmp_path):
    """From the first use of a pipeline on, unless JAX was told otherwise; importing changes nothing."""
    code = (
        "import os, jax, flaxdiff; told = os.environ.get('JAX_COMPILATION_CACHE_DIR');"
        "assert jax.config.jax_compilation_cache_dir == told; pipe, _ = flaxdiff.load();"
        "pipe.prepare_inputs(prompt='cat'); print(jax.config.jax_compilation_cache_dir)"
    )
    environment = os.environ | {name: value.format(folder=tmp_path) for name, value in environment.items()}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.stdout.strip() == expected.format(folder=tmp_path), ran.stderr
