"""What every test runs under: eight fake devices, strict dtype promotion, a kept compilation cache."""

import gc
import importlib.metadata
import os
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compile times dominate: ask XLA for little optimisation, and for its older way to write loops, which takes half of
# the time where there still is a choice. Eight devices let any test shard.
flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags += " --xla_cpu_use_fusion_emitters=false"
# Fake devices wait for each other, on few and busy cores for longer than XLA has patience.
flags += " --xla_cpu_collective_timeout_seconds=600 --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402
import pytest  # noqa: E402

from flaxdiff import memory  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "flaxdiff-test-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Traces make millions of small objects; looking for garbage among them took a tenth of the time.
gc.set_threshold(200_000, 20, 100)

collect_ignore = ["processes.py", "training_processes.py"]  # scripts that test_parallel.py runs


@pytest.fixture(autouse=True)
def parity(record_property):
    """What the test compared with PyTorch, class by class, in its report: docs/coverage.py reads it there."""
    yield
    if "peers" in sys.modules:
        for name, share in sys.modules["peers"].compared.items():
            record_property(f"parity {name}", share)
        sys.modules["peers"].compared.clear()


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Compiled programs go with the module that they were for, and what compiling took goes back to the system.

    Kept by glibc, in the heaps of its threads, it comes to ten gigabytes in a process.
    """
    yield
    jax.clear_caches()
    memory.returned()
