"""Runs every cell and writes ``docs/composition.md``: ``python -m tests.composition.page``."""

import os
import platform
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import optax

from tests.composition.by_hand import METHODS
from tests.composition.cells import TOLERANCE, evaluate, is_slow, turns_around
from tests.composition.inventory import OPTIMIZERS, ROWS, SCHEDULES, TRANSFORMATIONS, WRAPPERS
from tests.composition.verdicts import NOTES, columns, mismatch, notes, verdict

PAGE = Path(__file__).parents[2] / "docs" / "composition.md"

# One method with nothing but a climb, one with a combination, with another evaluation, with a state.
ONE_OF_EACH_KIND = ("sam", "saner", "jsam", "vasso")
# Their first stages need the parameters, and the loss.
ASKING = ("asam", "ncsam")
WITH_EVERY_METHOD = ("adam", "trace", *WRAPPERS, *SCHEDULES)

TABLES = {
    "Optimizers": list(OPTIMIZERS),
    "Transformations": list(TRANSFORMATIONS),
    "Wrappers": list(WRAPPERS),
    "Schedules": list(SCHEDULES),
}

HEADER = """# Composition matrix

Everything that makes, wraps or schedules a gradient transformation in `optax` and `optax.contrib`, in
every place where it can meet a method. In short: put the method first and the optimizer behind it; what the
tables call backwards would turn the climb into a descent.

| place | written |
|---|---|
| before | `chain(x, method, sgd(0.1))`: x shapes the gradient of the climb |
| behind | `chain(method, x)`: x acts on the method's direction |
| around | `x(chain(method, sgd(0.1)))` |
| stage 1 | `sharpness_aware(chain(perturbation, x))`, or a wrapper `x(perturbation)` |
| combination | `method(combination=x)`, or a wrapper `x(down_weight(0.5))` |

- **right**: both steps equal those written by hand to {tolerance}: gradients and ε from slow, obvious references
  of the methods, and x called by hand with what belongs into it. Wrappers before and behind go around
  `trace(0.9)`.
- **refused**: a message that names the remedy, as the note says.
- **backwards**, **undefined**: what the note says.
- **–**: there is no such place.

The incoming gradient is also the g that SANER, GSAM, WSAM, Stable SAM and LookSAM compare g' with. Where
something before them changes it, and that is not meant, pass the clean gradient as `clean_grads=` to `update`.
`multi_transform` is another name of `partition`.
"""  # noqa: E501

FOOTER = """
## How it was made

```bash
python -m tests.composition.page
```

with optax {optax}, jax {jax} and Python {python}: {cells} cells, {runs} runs of two steps, in
float64 on a network of twelve numbers. Wrappers and schedules, which can touch a method, were run with
{methods} named methods; optimizers and transformations, which see only what stands in front of them,
with {some}, and {every} with all. The parts that loop or branch
({slow})
were run with the first two, and wrappers of that kind, as stage 1, also with {asking},
whose first stages need more than a gradient.
"""


def cells(names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Every name, position and method that is run."""
    for name in names:
        for position in columns(name):
            for method in methods_for(name, position):
                yield name, position, method


def methods_for(name: str, position: str) -> tuple[str, ...]:
    """The methods with which a cell is run."""
    if is_slow(name):
        asks = name in WRAPPERS and position == "stage 1"
        return ONE_OF_EACH_KIND[:2] + (ASKING if asks else ())
    return tuple(METHODS) if name in WITH_EVERY_METHOD else ONE_OF_EACH_KIND


def check(name: str, position: str, method: str) -> str | None:
    """Why a cell is not what is expected; empty if it is, None if it does not exist."""
    result = evaluate(name, position, method)
    return None if result is None else mismatch(name, position, method, result)


def is_direction_as_said(name: str) -> bool:
    """Whether the cell before a method says backwards exactly where the gradient is turned around."""
    if name not in ROWS or name in WRAPPERS or is_slow(name):
        return True
    return turns_around(name) == (verdict(name, "before")[0] == "backwards")


def numbering() -> dict[str, int]:
    """The notes in the order in which the tables mention them."""
    keys = [
        key
        for names in TABLES.values()
        for name in names
        for position in columns(name)
        for key in notes(name, position)
    ]
    return {key: number for number, key in enumerate(dict.fromkeys(keys), start=1)}


def text_of(name: str, position: str) -> str:
    """A cell of a table."""
    if name == "MultiSteps" and position != "around":
        return "–"
    word, _ = verdict(name, position)
    numbers = [str(numbering()[key]) for key in notes(name, position)]
    return f"{word} ({', '.join(numbers)})" if numbers else word


def tables() -> str:
    """All tables and notes."""
    lines = []
    for title, names in TABLES.items():
        heads = columns(names[0])
        lines += [f"\n## {title}\n", " | ".join(["| optax", *heads]) + " |"]
        lines.append("|---" * (len(heads) + 1) + "|")
        for name in names:
            cells_of_row = [text_of(name, position) for position in heads]
            lines.append(" | ".join([f"| `{name}`", *cells_of_row]) + " |")
    lines.append("\n## Notes\n")
    lines += [f"{number}. {NOTES[key].text}" for key, number in numbering().items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the matrix; writes the page if every cell is as expected."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("error")
    wrong, seen, runs, start = [], set(), 0, time.monotonic()
    for title, names in TABLES.items():
        for name in names:
            if not is_direction_as_said(name):
                wrong.append(f"{name} | before | backwards, or it should not say so")
            for cell in cells([name]):
                reason = check(*cell)
                if reason is None:
                    continue
                runs += 1
                seen.add(cell[:2])
                if reason:
                    wrong.append(" | ".join([*cell, reason]))
        print(f"{title}: {runs} runs, {time.monotonic() - start:.0f} s", flush=True)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    slow = sorted(f"`{name}`" for names in TABLES.values() for name in names if is_slow(name))
    made = FOOTER.format(
        optax=optax.__version__,
        jax=jax.__version__,
        python=platform.python_version(),
        cells=len(seen),
        methods=len(METHODS),
        some=", ".join(f"`{name}`" for name in ONE_OF_EACH_KIND),
        every=" and ".join(f"`{name}`" for name in WITH_EVERY_METHOD[:2]),
        asking=" and ".join(f"`{name}`" for name in ASKING),
        runs=runs,
        slow=", ".join(slow),
    )
    header = HEADER.format(tolerance=f"{TOLERANCE:.0e}".replace("e-0", "e-"))
    PAGE.write_text(header + tables() + made, encoding="utf-8")
    print(f"wrote {os.path.relpath(PAGE)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
