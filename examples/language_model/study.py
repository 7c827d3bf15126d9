"""The runs behind docs/results/language_model.md, at what two CPU cores allow.

    python -m examples.language_model.study --output runs/language_model_study

A very small network learns the source text of Python's standard library with several methods, at equal
steps and at equal gradients. Then the networks are trained on the English of Python's manual, which
shows how much of the source text they forget. Started again, it goes on where it was stopped.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import tyro

from .compare import read_run, write
from .config import Config
from .output_folder import held
from .train import train

SMALL = Config(
    layers=2,
    width=32,
    heads=2,
    context=64,
    batch_size=16,
    precision="float32",  # nothing is gained by bfloat16 on a CPU
    steps=200,
    learning_rate=1e-2,
    evaluate_every=50,
    checkpoint_every=200,
    evaluation_windows=256,
)
TUNED = dataclasses.replace(
    SMALL, text="manual", steps=50, learning_rate=3e-3, evaluate_every=25, checkpoint_every=50
)

LEARNING = {
    "AdamW": {},
    "AdamW, twice the steps": {"steps": 400},
    "SAM, ρ = 0.05": {"method": "sam", "rho": 0.05},
    "SAM, ρ = 0.2": {"method": "sam", "rho": 0.2},
    "Functional-SAM, ρ = 0.05": {"method": "jsam", "rho": 0.05},
    "Functional-SAM, ρ = 0.2": {"method": "jsam", "rho": 0.2},
    "SAM, ρ = 0.2, the last quarter": {"method": "sam", "rho": 0.2, "method_starts": 0.75},
    "SAM, ρ = 0.2, normalization only": {"method": "sam", "rho": 0.2, "perturb": "norms"},
}
"""Name -> how it differs from ``SMALL``."""

TUNING = {
    "AdamW": ("AdamW", {}),
    "AdamW, twice the steps": ("AdamW, twice the steps", {}),
    "SAM, ρ = 0.2": ("SAM, ρ = 0.2", {}),
    "Functional-SAM, ρ = 0.2": ("Functional-SAM, ρ = 0.2", {}),
    "SAM, ρ = 0.2, the last quarter": ("SAM, ρ = 0.2, the last quarter", {}),
    "AdamW; adapters": ("AdamW", {"adapter_rank": 4}),
    "AdamW; adapters, SAM, ρ = 0.05": ("AdamW", {"adapter_rank": 4, "method": "sam"}),
}
"""Name -> the network to start from, and how the training differs from ``TUNED``."""


@dataclasses.dataclass(frozen=True)
class Study:
    """The runs behind docs/results/language_model.md."""

    output: Path = Path("runs/language_model_study")
    """Folder of the runs."""

    tables: Path | None = None
    """Folder of the tables and figures; without it the same."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the initial network and of the order of the text."""

    steps: int | None = None
    """Try it out: every run takes so many steps."""


def runs(study: Study) -> Iterator[tuple[str, str, Config]]:
    """``(part, name, settings)`` of all runs, those that others start from first."""
    for seed in study.seeds:
        for part, base, rows in (("learning", SMALL, LEARNING), ("tuning", TUNED, TUNING)):
            for name, row in rows.items():
                start, changes = row if part == "tuning" else (None, row)
                changes = changes | {"seed": seed, "output": study.output / part / f"{name} {seed}"}
                if start is not None:
                    changes["start_from"] = study.output / "learning" / f"{start} {seed}"
                if study.steps is not None:
                    lengths = ("steps", "evaluate_every", "checkpoint_every")
                    changes |= dict.fromkeys(lengths, study.steps)
                config = dataclasses.replace(base, **changes)
                yield part, name, config


def run(study: Study) -> None:
    """Trains what is missing, and writes the tables."""
    groups: dict[str, dict[str, list]] = {"learning": {}, "tuning": {}}
    for part, name, config in runs(study):
        if not (config.output / "results.json").exists():
            resume = (config.output / "config.json").exists()
            config = dataclasses.replace(config, resume=resume)
            train(config)
        groups[part].setdefault(name, []).append(read_run(config.output))
    for part, named in groups.items():
        folder = (study.tables or study.output / "tables") / part
        with held(folder):
            write(folder, named)
        with contextlib.suppress(FileNotFoundError):
            (folder / ".lock").unlink()


if __name__ == "__main__":
    study = tyro.cli(Study, description=__doc__)
    # Runs that differ in the seed only, or in what stands in front of AdamW, share compiled programs.
    jax.config.update("jax_compilation_cache_dir", str(study.output.resolve() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    run(study)
