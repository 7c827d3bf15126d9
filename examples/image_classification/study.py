"""Spends a given number of minutes on comparing methods on CIFAR-10, the most telling runs first.

    python -m examples.image_classification.study DATA --minutes 14 --output runs/study

DATA is what ``train --data`` takes. It is meant for an accelerator: ResNet-18 in bfloat16, batch 128.
First come short runs with the human labels of CIFAR-10N, which also tell how fast each method is, then
40 % symmetric noise, then more seeds, and the long runs last. At the end of its time it stops after an
epoch; the same command goes on there. The tables of what has finished are written every time.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats  # type: ignore[import-untyped]
import tyro

from . import train
from .checkpoints import CheckpointError, CheckpointNotSaved
from .compare import FinishedRun, read_run
from .config import Augmentation, Config
from .data import Dataset, load
from .interrupts import INTERRUPTED
from .logs import write_json
from .output_folder import explain, held, write_atomically

PROGRAM = "python -m examples.image_classification.study"

METHODS: dict[str, dict] = {
    "SGD": {"method": "sgd"},
    "SAM": {"method": "sam", "rho": 0.1, "method_starts": 0.1},
    "1-SAM": {"method": "sam", "rho": 0.02, "group_size": 1, "method_starts": 0.1},
    "SANER": {"method": "saner", "rho": 0.1, "method_starts": 0.1},
    "J-SAM": {"method": "jsam", "rho": 0.1, "method_starts": 0.1},
    "NCSAM": {"method": "ncsam", "rho": 0.05, "method_starts": 0.25},
}
"""Contenders at the usual weight decay; the radii are the papers', of 1-SAM a fifth of SAM's.

They begin after some epochs of SGD, or the first steps, far from any minimum, only climb.
"""

RATE = ("learning rate", "learning_rate")
"""What a method without a radius is tried with several of: its name in a table, and in Config."""

HEADER = (
    *("run", "seeds", "test [%]", "minus SGD", "memorized [%]", "held-out noisy [%]"),
    *("images / s", "time / SAM's"),
)


@dataclasses.dataclass(frozen=True)
class Study:
    """Spends a given number of minutes on the comparison of methods, the most telling runs first."""

    data: tyro.conf.Positional[str]
    """The images, as --data of the training program takes them, such as a folder or a .npz file."""

    minutes: float = 14.0
    """Time to spend, the start and compilation included; an epoch that has begun is finished."""

    output: Path = Path("runs/study")
    """Folder of the runs and of the tables; what is finished in it is not done again."""

    noises: tuple[str, ...] = ("human:worse", "symmetric")
    """Kinds of label noise, as --noise of the training program takes them."""

    noise_rate: float = 0.4
    """Share of wrong labels of synthetic noise."""

    decays: tuple[float, ...] = (2e-3, 5e-3)
    """Weight decays that the tuned methods are tried with besides 5e-4."""

    factors: tuple[float, ...] = ()
    """Multiples of the radius, of SGD of the learning rate, that they are tried with besides 1."""

    tuned: tuple[str, ...] = ("SGD", "SAM")
    """Methods whose weight decay and radius are chosen, by the held-out noisy labels."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; the first one chooses among the settings of the tuned methods."""

    epochs: tuple[int, ...] = (20, 100)
    """Lengths of the runs, the short ones first."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Contenders, the first ones first."""

    model: str = "preact_resnet18"
    """The network."""

    width: int = 64
    """Channels of its first stage."""

    precision: str = "bfloat16"
    """Numbers in which the network computes."""

    subset: int | None = None
    """Train on this many examples only."""

    batch_size: int = 128
    """Examples per step."""

    learning_rate: float = 0.05
    """Initial learning rate of SGD, which falls along a cosine."""

    augmentation: tuple[Augmentation, ...] = ("crop", "flip")
    """Random changes of the training images."""

    def __post_init__(self):
        for option in ("methods", "tuned"):
            for name in getattr(self, option):
                if name not in METHODS:
                    raise ValueError(
                        f"--{option}: {name!r} is not valid. Choose from {', '.join(METHODS)}."
                    )
        for option in ("noises", "decays", "factors", "tuned", "seeds", "epochs", "methods"):
            values = getattr(self, option)
            if len(set(values)) < len(values):
                raise ValueError(f"--{option}: {values!r} is not valid. Name each one once.")
        if Config.weight_decay in self.decays:
            raise ValueError(
                f"--decays: {Config.weight_decay!r} is not valid. It is tried anyway: leave it out."
            )
        for factor in self.factors:
            if not 0 < factor < float("inf") or factor == 1:
                raise ValueError(
                    f"--factors: {factor!r} is not valid. It is above 0, and not 1, which is tried "
                    "anyway."
                )
        if not self.minutes > 0:
            raise ValueError(f"--minutes: {self.minutes!r} is not valid. It is above 0.")
        for name in ("noises", "seeds", "epochs", "methods"):
            if not getattr(self, name):
                raise ValueError(f"--{name}: nothing is named. Name one at least.")


DIVERGED = "diverged.json"
"""What a run leaves whose loss was not finite: its message, its settings, the digests of its data."""


class Job(NamedTuple):
    """One run.

    Attributes:
      table: which table it belongs to: the noise and the epochs.
      name: the line of the table.
      config: its settings.
    """

    table: str
    name: str
    config: Config


def contenders(study: Study) -> dict[str, dict]:
    """The settings of every line of a table, in the order in which they run."""
    found = {name: METHODS[name] for name in study.methods}
    for name in study.tuned:
        if name in study.methods:
            for factor, decay in itertools.product((1.0, *study.factors), (None, *study.decays)):
                line, settings = name, dict(METHODS[name])
                if factor != 1:
                    symbol, setting = ("ρ", "rho") if "rho" in settings else RATE
                    settings[setting] = factor * settings.get(setting, study.learning_rate)
                    line += f", {symbol} = {settings[setting]:g}"
                if decay is not None:
                    settings["weight_decay"] = decay
                    line += f", decay {decay:g}"
                found[line] = settings
    return found


def make_job(study: Study, noise: str, epochs: int, name: str, seed: int) -> Job:
    """The run of a contender."""
    table = f"{noise.replace(':', '_')}_{epochs}_epochs"
    folder = name.replace(" = ", "_").replace(",", "").replace(" ", "_").replace("ρ", "rho")
    config = Config(
        data=study.data,
        subset=study.subset,
        noise=noise,
        noise_rate=study.noise_rate,
        held_out=0.1,
        augmentation=study.augmentation,
        model=study.model,
        norm="group",  # perturbations per example need one that does not mix them
        width=study.width,
        precision=study.precision,
        batch_size=study.batch_size,
        epochs=epochs,
        evaluate_every=max(1, epochs // 5),
        checkpoint_every=max(1, epochs // 4),
        keep_checkpoints=1,
        seed=seed,
        output=study.output / table / folder / str(seed),
        **{"learning_rate": study.learning_rate} | contenders(study)[name],
    )
    return Job(table, name, config)


def finished(job: Job) -> FinishedRun | None:
    """What the job has left, if it has ended.

    Raises:
      ValueError: if it was run with other settings.
    """
    folder = job.config.output
    if not (folder / "results.json").exists():
        return None
    run = read_run(folder)
    _check_settings(job, run.results)
    return run


def has_failed(job: Job) -> bool:
    """Whether its loss was not finite; it is not tried again.

    Raises:
      ValueError: if it was run with other settings.
    """
    failure = _failure(job)
    if failure is None:
        return False
    _check_settings(job, failure)
    return True


def _failure(job: Job) -> dict[str, Any] | None:
    path = job.config.output / DIVERGED
    failure = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return failure if "config" in failure else None  # an earlier version wrote none: tried again


def _check_settings(job: Job, record: dict[str, Any]) -> None:
    if changed := train.changed_settings(record["config"], job.config):
        raise ValueError(
            f"--output: {job.config.output} is a run of another study ({changed}). Take its settings, "
            "or name another --output."
        )


def check_data(study: Study, data: Dataset) -> None:
    """Raises a ValueError if a run in the folder has seen other images or labels than these."""
    now: dict[tuple[str, int], dict[str, str]] = {}
    every = itertools.product(study.noises, study.epochs, contenders(study), study.seeds)
    for noise, epochs, name, seed in every:
        job = make_job(study, noise, epochs, name, seed)
        run = finished(job)
        record = _failure(job) if run is None else run.results
        if record is None:
            continue
        if (noise, seed) not in now:
            now[noise, seed] = train.part_of(data, job.config)[-1]
        if changed := train.changed_data(record, now[noise, seed]):
            raise ValueError(
                f"--output: {job.config.output} was trained on {changed}. Is DATA the same? Name "
                "another --output for other data."
            )


def choices(study: Study, noise: str) -> dict[str, str]:
    """The contender with the best setting, of every method that is tried with several.

    It has the best accuracy on held-out noisy labels after the last epoch of the short run of the first
    seed. Nothing is chosen before all of them have ended.
    """
    best = {}
    for method in study.tuned:
        tried = {
            name: make_job(study, noise, study.epochs[0], name, study.seeds[0])
            for name in contenders(study)
            if name.partition(",")[0] == method
        }
        runs = {name: finished(job) for name, job in tried.items()}
        shares = {
            name: run.results["last"]["held_out_accuracy"]
            for name, run in runs.items()
            if run is not None
        }
        ended = all(name in shares or has_failed(job) for name, job in tried.items())
        if ended and shares and len(tried) > 1:
            best[method] = max(shares, key=shares.__getitem__)
    return best


def worth(study: Study, noise: str) -> set[str]:
    """What gets more seeds, and a line in the table: the usual settings and the chosen ones."""
    return {*study.methods, *choices(study, noise).values()}


def jobs(study: Study) -> Iterator[Job]:
    """All runs, the most telling first. Which come later depends on the results of those before."""
    first, *others = study.seeds
    stages = [(study.epochs[0], others), *((epochs, study.seeds) for epochs in study.epochs[1:])]
    for noise in study.noises:
        for name in contenders(study):
            yield make_job(study, noise, study.epochs[0], name, first)
    for epochs, seeds in stages:
        for seed in seeds:
            for noise in study.noises:
                chosen = worth(study, noise)
                for name in contenders(study):
                    if name in chosen:
                        yield make_job(study, noise, epochs, name, seed)


def run(study: Study) -> bool:
    """Runs what there is time for, and writes the tables.

    Returns:
      Whether everything is done.
    """
    deadline = time.monotonic() + 60 * study.minutes
    with held(study.output):
        data = load(study.data)
        check_data(study, data)
        try:
            return _run_until(study, data, deadline)
        finally:
            report(study)


def _run_until(study: Study, data: Dataset, deadline: float) -> bool:
    for job in jobs(study):
        if finished(job) is not None or has_failed(job):
            continue
        if time.monotonic() > deadline:
            return False
        resume = (job.config.output / "config.json").exists()
        print(f"{job.table}, {job.name}, seed {job.config.seed}", flush=True)
        try:
            train.train(
                dataclasses.replace(job.config, resume=resume), data=data, deadline=deadline
            )
        except train.OutOfTime:
            return False
        except train.TrainingDiverged as error:
            print(f"{job.config.output} has diverged: {error}", flush=True)
            failure = {"message": str(error), "config": job.config.to_json()}
            write_json(job.config.output / DIVERGED, failure | train.part_of(data, job.config)[-1])
    return True


def table(study: Study, noise: str, epochs: int) -> str | None:
    """The table of what has finished with this noise and length, or None."""
    lines, diverged = {}, {}
    for name in sorted(worth(study, noise), key=[*contenders(study)].index):
        planned = [make_job(study, noise, epochs, name, seed) for seed in study.seeds]
        runs = [run for run in map(finished, planned) if run is not None]
        diverged[name] = sum(map(has_failed, planned))
        if runs or diverged[name]:
            lines[name] = runs
    if not any(lines.values()):
        return None
    speeds = {
        name: statistics.median(row["images_per_second"] for run in runs for row in run.rows)
        for name, runs in lines.items()
        if runs
    }
    best = choices(study, noise)
    sgd = lines.get(best.get("SGD", "SGD"))
    rows = [HEADER, ["---", *["---:"] * (len(HEADER) - 1)]]
    for name, runs in lines.items():
        seeds = f"{len(runs)}" + (f" ({diverged[name]} diverged)" if diverged[name] else "")
        parts = [name, seeds, _mean(runs, "test_accuracy"), _difference(runs, sgd)]
        parts += [_mean(runs, "memorized"), _mean(runs, "held_out_accuracy")]
        parts.append(f"{speeds[name]:,.0f}" if runs else "–")
        parts.append(f"{speeds['SAM'] / speeds[name]:.2f}" if runs and "SAM" in speeds else "–")
        if name in best.values():
            parts[0] += " (chosen)"
        rows.append(parts)
    some = next(runs[0].results for runs in lines.values() if runs)
    device, wrong = some["device"], some["wrong_labels"]
    notes = (
        f"{noise}, {100 * wrong:.0f} % wrong labels, {epochs} epochs, {device}. Last epoch, mean ± "
        "standard deviation over the seeds; minus SGD, with its chosen settings: mean difference "
        "with the 95 % interval, paired by seed; images per second of the median epoch. Chosen: of the "
        "settings of a method, by the held-out noisy labels of the first seed."
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{notes}\n"


def trials(study: Study, noise: str) -> str | None:
    """The settings that were tried with the first seed, or None: a column per weight decay."""
    cells: dict[tuple[int, float, str], dict[float, str]] = {}
    for name, settings in contenders(study).items():
        job = make_job(study, noise, study.epochs[0], name, study.seeds[0])
        run, failed, method = finished(job), has_failed(job), name.partition(",")[0]
        if (run is not None or failed) and method in study.tuned:
            symbol, setting = ("ρ", "rho") if "rho" in settings else RATE
            value, text = getattr(job.config, setting), "diverged"
            if run is not None:
                last = run.results["last"]
                shares = (100 * last.get(key, np.nan) for key in ("test_accuracy", "memorized"))
                text = "{:.1f} / {:.0f}".format(*shares)
            place = study.tuned.index(method), value, f"{method}, {symbol} = {value:g}"
            cells.setdefault(place, {})[job.config.weight_decay] = text
    decays = sorted({decay for line in cells.values() for decay in line})
    if len(decays) < 2:
        return None
    rows = [["run", *(f"decay {decay:g}" for decay in decays)], ["---", *["---:"] * len(decays)]]
    for place in sorted(cells):
        rows.append([place[-1], *(cells[place].get(decay, "–") for decay in decays)])
    note = "Test accuracy and share of wrong labels memorized, in percent; the first seed."
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{note}\n"


def _mean(runs: list[FinishedRun], measure: str) -> str:
    if not runs:
        return "–"
    values = [100 * run.results["last"].get(measure, np.nan) for run in runs]
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


def _difference(runs: list[FinishedRun], others: list[FinishedRun] | None) -> str:
    """Points of test accuracy above other runs: of the seeds that both have, with the interval."""
    if others is None or runs is others:
        return "–"
    first, second = (
        {run.results["config"]["seed"]: 100 * run.results["last"]["test_accuracy"] for run in some}
        for some in (runs, others)
    )
    found = np.array([first[seed] - second[seed] for seed in first.keys() & second.keys()])
    if not len(found):
        return "–"
    if len(found) == 1:
        return f"{found[0]:+.1f}"
    width = scipy.stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / len(found) ** 0.5
    return f"{found.mean():+.1f} ± {width:.1f}"


def report(study: Study) -> None:
    """Writes and prints the tables, and says what is missing."""
    for noise in study.noises:
        texts = {f"{epochs}_epochs": table(study, noise, epochs) for epochs in study.epochs}
        texts["trials"] = trials(study, noise)
        for name, text in texts.items():
            if text is not None:
                write_atomically(study.output / f"{noise.replace(':', '_')}_{name}.md", text)
                print(text)
    planned = {job.config.output: job for job in jobs(study)}.values()
    counts = {
        "finished": sum(finished(job) is not None for job in planned),
        "diverged": sum(map(has_failed, planned)),
    }
    counts["missing"] = len(planned) - sum(counts.values())
    write_json(
        study.output / "study.json",
        json.loads(json.dumps(dataclasses.asdict(study), default=str)) | counts,
    )
    more = " The same command goes on." if counts["missing"] else ""
    print(
        f"{counts['finished']} runs have finished, {counts['diverged']} have diverged, "
        f"{counts['missing']} are missing.{more}"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    try:
        run(tyro.cli(Study, args=arguments, prog=PROGRAM, description=__doc__))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:
        sys.exit(f"error: {explain(error)}")
    except (ValueError, CheckpointError, CheckpointNotSaved) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
