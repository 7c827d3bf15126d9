"""The runs behind docs/results/language_model.md, at what two CPU cores allow.

    python -m examples.language_model.study --output runs/language_model_study

A very small network learns the source text of Python's standard library with several methods, at equal
steps and at equal gradients. Then the networks are trained on the English of Python's manual, which
shows how much of the source text they forget, and AdamW's to tell packages apart, by labels of which
40 % are wrong. Started again, it goes on where it was stopped.
"""

import csv
import dataclasses
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import tyro

from .checkpoints import CheckpointError
from .compare import read_run, write
from .config import Config
from .interrupts import leave
from .methods import gradients
from .output_folder import explain, held
from .train import TrainingDiverged, changed_settings, train

PROGRAM = "examples.language_model.study"

SMALL = Config(
    layers=2,
    width=32,
    heads=2,
    context=64,
    batch_size=16,
    precision="float32",  # nothing is gained by bfloat16 on a CPU
    steps=4000,
    learning_rate=1e-2,  # AdamW's: after half as many steps 3e-3 is worse, 3e-2 as good
    evaluate_every=400,
    checkpoint_every=2000,
    evaluation_windows=256,
    curvature=True,
)
TUNED = dataclasses.replace(
    SMALL, text="manual", steps=500, learning_rate=3e-3, evaluate_every=50, checkpoint_every=500
)

CLASSIFYING = dataclasses.replace(
    SMALL,
    task="classification",
    context=256,
    steps=2000,
    learning_rate=3e-3,
    evaluate_every=200,
    curvature=False,
)
Part = Literal["learning", "tuning", "classifying"]
BASES: dict[Part, Config] = {"learning": SMALL, "tuning": TUNED, "classifying": CLASSIFYING}

SAM = {"method": "sam"}
FUNCTIONAL = {"method": "functional_sam"}
ROWS = (
    ("learning", "AdamW", None, {}),
    ("learning", "AdamW, twice the steps", None, {"steps": 8000}),
    ("learning", "SAM, ρ = 0.05", None, SAM),
    ("learning", "Functional-SAM, ρ = 0.05", None, FUNCTIONAL),
    ("tuning", "AdamW", "AdamW", {}),
    ("tuning", "AdamW, twice the steps", "AdamW, twice the steps", {}),
    ("tuning", "SAM, ρ = 0.05", "SAM, ρ = 0.05", {}),
    ("tuning", "Functional-SAM, ρ = 0.05", "Functional-SAM, ρ = 0.05", {}),
    ("learning", "SAM, ρ = 0.2", None, SAM | {"rho": 0.2}),
    ("learning", "SAM, ρ = 0.2, the last quarter", None, SAM | {"rho": 0.2, "method_starts": 0.75}),
    ("tuning", "SAM, ρ = 0.2, the last quarter", "SAM, ρ = 0.2, the last quarter", {}),
    ("learning", "SAM, ρ = 0.2, normalization only", None, SAM | {"rho": 0.2, "perturb": "norms"}),
    ("learning", "Functional-SAM, ρ = 0.2", None, FUNCTIONAL | {"rho": 0.2}),
    (
        "learning",
        "Functional-SAM, ρ = 0.2, preconditioned",
        None,
        FUNCTIONAL | {"rho": 0.2, "preconditioned": True},
    ),
    ("tuning", "AdamW; adapters", "AdamW", {"adapter_rank": 4}),
    ("tuning", "AdamW; adapters by SAM, ρ = 0.05", "AdamW", {"adapter_rank": 4} | SAM),
    ("classifying", "AdamW", "AdamW", {}),
    ("classifying", "AdamW, half of the steps", "AdamW", {"steps": 1000}),
    ("classifying", "SAM, ρ = 0.05, half of the steps", "AdamW", SAM | {"steps": 1000}),
    ("classifying", "SAM, ρ = 0.2, half of the steps", "AdamW", SAM | {"rho": 0.2, "steps": 1000}),
    ("classifying", "SAM, ρ = 0.2", "AdamW", SAM | {"rho": 0.2}),
)
"""Part, name, the network to start from, and how the run differs from the settings of its part.

In the order of what one would like to know first; a row that others start from stands before them.
"""


@dataclasses.dataclass(frozen=True)
class Study:
    """The runs behind docs/results/language_model.md."""

    output: Path = Path("runs/language_model_study")
    """Folder of the runs."""

    tables: Path | None = None
    """Folder of the tables and figures; by default in the folder of the runs."""

    parts: tuple[Part, ...] = get_args(Part)
    """Parts of the study; the runs that these start from are trained too."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the initial network and of the order of the text."""

    steps: int | None = None
    """Try it out: every run takes so many steps."""

    summary: bool = False
    """Write the tables of the runs that have finished, and train nothing."""

    def __post_init__(self):
        if not self.parts:
            raise ValueError(f"--parts: {self.parts!r} is not valid. Name one at least.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"--seeds: {self.seeds!r} is not valid. Name one at least, each one once."
            )


def runs(study: Study) -> Iterator[tuple[str, str, Config]]:
    """``(part, name, settings)`` of all runs, those that others start from first."""
    starts = {start for part, _, start, _ in ROWS if part in study.parts}
    for part, name, start, changes in ROWS:
        if part not in study.parts and not (part == "learning" and name in starts):
            continue
        for seed in study.seeds:
            settings = changes | {"seed": seed, "output": study.output / part / f"{name} {seed}"}
            if start is not None:
                settings["start_from"] = study.output / "learning" / f"{start} {seed}"
            if study.steps is not None:
                settings |= dict.fromkeys(
                    ("steps", "evaluate_every", "checkpoint_every"), study.steps
                )
            yield (
                part,
                name,
                dataclasses.replace(BASES[part], **settings),
            )


def finished(config: Config) -> dict[str, Any] | None:
    """What a run has left, if it has ended.

    Raises:
      ValueError: if it was run with other settings.
    """
    if not (config.output / "results.json").exists():
        return None
    found = read_run(config.output)
    if changed := changed_settings(found["config"], config):
        raise ValueError(
            f"--output: {config.output} is a run of another study ({changed}). Take its settings, or "
            "name another --output."
        )
    return found


def run(study: Study) -> None:
    """Trains what is missing, and writes the tables of what has finished.

    A table that is there already keeps its rows of runs whose folders are not.
    """
    with held(study.output):
        _run(study)


def _run(study: Study) -> None:
    groups: dict[str, dict[str, list]] = {part: {} for part in BASES}
    for *_, config in runs(study):
        finished(config)  # before hours of training: it refuses what is of another study
    _check_tables(study)
    for part, name, config in runs(study):
        found = finished(config)
        if found is None and not study.summary:
            begun = (config.output / "config.json").exists()
            train(dataclasses.replace(config, resume=begun))
            found = finished(config)
        if found is not None and part in study.parts:
            groups[part].setdefault(name, []).append(found)
    for part, named in groups.items():
        if named:
            path = _table(study, part)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path.parent, named, _rows_of_others(path, part, named))


def _table(study: Study, part: str) -> Path:
    return (study.tables or study.output / "tables") / part / "table.csv"


def _check_tables(study: Study) -> None:
    """Refuses tables of other steps: a line is the mean of all seeds, and tells one number of steps."""
    for part, name, config in runs(study):
        path, now = _table(study, part), (config.steps, gradients(config))
        for row in _rows(path):
            then = row["steps"], row["gradients"]
            if row["run"] == name and then != now:
                raise ValueError(
                    f"--tables: {path} has {name} with {then[0]} steps and {then[1]} gradients; it "
                    f"has {now[0]} and {now[1]} now. Name another folder, or delete the file."
                )


def _rows_of_others(path: Path, part: str, named: dict[str, list]) -> list[dict]:
    at_hand = {(name, run["config"]["seed"]) for name, runs in named.items() for run in runs}
    known = {name for of, name, *_ in ROWS if of == part}
    rows = _rows(path)
    return [row for row in rows if row["run"] in known and (row["run"], row["seed"]) not in at_hand]


def _rows(path: Path) -> list[dict]:
    """The rows of a table, if it is there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            {title: value if title == "run" else float(value) for title, value in row.items()}
            for row in csv.DictReader(file)
        ]
    for row in rows:
        row |= {title: int(row[title]) for title in ("seed", "steps", "gradients")}
    return rows


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    again = shlex.join([sys.executable, "-m", PROGRAM, *arguments])
    try:
        study = tyro.cli(Study, args=arguments, prog=f"python -m {PROGRAM}", description=__doc__)
        # Runs that differ in the seed only share their compiled programs.
        jax.config.update("jax_compilation_cache_dir", str(study.output.resolve() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        run(study)
    except KeyboardInterrupt:
        leave(again)
    except OSError as error:
        sys.exit(f"error: {explain(error, again)}")
    except (ValueError, CheckpointError, TrainingDiverged) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
