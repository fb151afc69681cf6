"""Write coverage.md: what of diffusers is here, and how far each class is from PyTorch's.

    pytest -n 2 --junitxml=results.xml && python docs/coverage.py results.xml

The classes are those of the registry. The numbers are what the tests that passed have seen (`peers.relative`): tiny
networks with random weights, the same noise on both sides, the largest difference of any element as a share of the
largest value.
"""

import argparse
import datetime
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from flaxdiff import registry

PAGE = Path(__file__).parent / "coverage.md"
SORTS = {"pipeline": "Pipelines", "model": "Networks", "scheduler": "Schedulers", "flax": "Flax classes"}
PROPERTIES = "`test_schedulers_properties.py::test_{}`"
# compared in another way than by one number, or with what stands in this table
OTHERWISE = {
    "AmusedScheduler": PROPERTIES.format("amused_as_diffusers"),
    "DPMSolver2SAncestralScheduler": "no class of diffusers: " + PROPERTIES.format("dpm_2s_ancestral_as_published"),
    "DPMSolverAdaptiveScheduler": "no class of diffusers: "
    + PROPERTIES.format("dpm_adaptive_finds_the_exact_solution"),
    "DPMSolverFastScheduler": "no class of diffusers: " + PROPERTIES.format("order_of_convergence"),
    "DiffusionPipeline": "hands out the others",
    "IPAdapter": "no class of diffusers: `test_ip_adapter.py::test_pictures`",
    "KarrasVeScheduler": PROPERTIES.format("karras_ve_as_diffusers"),
    "RePaintScheduler": PROPERTIES.format("repaint_as_diffusers"),
    "SD3IPAdapter": "two classes of diffusers: `test_ip_adapter.py::test_stable_diffusion_3`",
    "ScoreSdeVeScheduler": PROPERTIES.format("score_sde_ve_as_diffusers"),
    "ScoreSdeVpScheduler": PROPERTIES.format("score_sde_vp_as_diffusers"),
    "StableDiffusionKDiffusionPipeline": "names of schedulers: `test_tasks.py::test_k_diffusion_names_schedulers`",
    "StableDiffusionXLKDiffusionPipeline": "names of schedulers, as the one before",
    "VQDiffusionScheduler": PROPERTIES.format("vq_diffusion_as_diffusers"),
} | dict.fromkeys(registry.names("flax"), "what it stands for, with the calls of old: `test_flax_api.py`")
HEAD = """# What is here

Each class with the largest difference from PyTorch's class of the same name that the tests have seen: tiny networks
with random weights, the same noise on both sides, as a share of the largest value. Written on {date} by

    pytest -n 2 --junitxml=results.xml && python docs/coverage.py results.xml
"""


def read(results: Path) -> dict[str, tuple[float, list[str]]]:
    """class -> (largest difference, the tests that compared it), of the tests that passed."""
    found: dict[str, tuple[float, set[str]]] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        if case.get("classname") is None or any(case.find(o) is not None for o in ("failure", "error", "skipped")):
            continue
        test = f"{case.get('classname').split('.')[-1]}.py::{case.get('name').split('[')[0]}"
        for told in case.iter("property"):
            if told.get("name").startswith("parity "):
                share, tests = found.get(name := told.get("name").removeprefix("parity "), (0.0, set()))
                found[name] = max(share, float(told.get("value"))), tests | {test}
    return {name: (share, sorted(tests)) for name, (share, tests) in found.items()}


def page(found: dict[str, tuple[float, list[str]]]) -> str:
    """The page as Markdown. Raises ValueError if a class was compared by no test that passed."""
    if absent := [n for sort in SORTS for n in registry.names(sort) if n not in found and n not in OTHERWISE]:
        raise ValueError(f"No test that passed compares {', '.join(absent)}; run all of them, or say why in OTHERWISE.")
    lines = [HEAD.format(date=datetime.date.today())]
    for sort, title in SORTS.items():
        lines += [f"\n## {title}\n", "| class | difference | tests |", "|---|---|---|"]
        for name in sorted(registry.names(sort)):
            if name in OTHERWISE:
                lines.append(f"| `{name}` | | {OTHERWISE[name]} |")
            else:
                share, tests = found[name]
                lines.append(f"| `{name}` | {share:.0e} | {', '.join(f'`{test}`' for test in tests)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what pytest --junitxml wrote")
    PAGE.write_text(page(read(parser.parse_args().results)))
