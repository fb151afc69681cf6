"""docs/schedulers.md: its example runs, and its table is the registry's.

`python tests/test_schedulers_docs.py` writes the table anew.
"""

import pathlib

import numpy as np

from flaxdiff import schedulers
from flaxdiff.schedulers import tables

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "schedulers.md"
START, END = "<!-- coverage -->\n", "<!-- end -->"


def coverage():
    """A row a scheduler: what it is, what `plan` takes, and whether it swaps with the usual ones."""
    rows = ["| scheduler | what it is | `plan` takes | swaps |", "|--|--|--|--|"]
    for name, cls in sorted(schedulers.SCHEDULERS.items()):
        if cls.__module__.startswith("flaxdiff."):
            takes = ", ".join([*sorted(cls.accepts), *cls.options]) if cls.plan is schedulers.Scheduler.plan else "own"
            rows.append(f"| `{name}` | {cls.__doc__.splitlines()[0]} | {takes} | {'yes' if cls.swaps else ''} |")
    return "\n".join(rows) + "\n"


def parts():
    text = PAGE.read_text()
    before, rest = text.split(START)
    table, after = rest.split(END)
    return before, table, after


def test_coverage_table_is_the_registry_s():
    assert parts()[1] == coverage()


def test_the_solver_of_the_page_works():
    known = dict(schedulers.SCHEDULERS)
    space = {}
    exec(parts()[0].split("```python")[3].split("```")[0], space)
    schedulers.SCHEDULERS.pop("AdamsScheduler")
    assert schedulers.SCHEDULERS == known
    errors = []
    for n in (40, 80):  # data N(0, 1): the exact path is known
        plan = space["AdamsScheduler"](prediction_type="sample", use_exponential_sigmas=True).plan(n)
        slots = np.zeros((tables.SLOTS, 1))
        slots[0] = np.hypot(1, plan.sigma[0])
        for i in range(n - 1):
            x0 = slots[0] / (1 + float(plan.sigma[i]) ** 2)
            slots = plan.mix[i].astype(float) @ np.concatenate([slots, [x0, x0, 0 * x0]])
        errors.append(abs(slots[0] - np.hypot(1, plan.sigma[n - 1]))[0])
    assert errors[1] < errors[0] / 2.8  # of order two


if __name__ == "__main__":
    before, _, after = parts()
    PAGE.write_text(before + START + coverage() + END + after)
