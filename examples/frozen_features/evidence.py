"""The evidence: every method with the same number of trials, chosen on noisy held-out labels.

    python -m examples.frozen_features.evidence --data DIR --output DIR
    python -m examples.frozen_features.evidence --output DIR --summary --tables docs/results/DIR

Protocol: twelve trials per contender over ρ, weight decay and learning rate (or the strength of a
loss), seed 0, trained without a held-out part of the noisy labels, which chooses one; then five seeds
of that setting on all rows; the last epoch counts. Clean labels are only looked at to report. One line
of runs.jsonl per finished run: kill it and start it again as you like.

DIR holds cifar10n_features.npz, noisy_agnews.npz and sentiment_crowd.npz, or some of them: features in
``inputs``, ``labels`` (of CIFAR-10N "worse", with ``labels_aggre`` and ``labels_random1``),
``clean_labels``, ``test_inputs`` and ``test_labels``.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from optax_sam.diagnostics import auroc

from . import claims, summary
from .criteria import Split, split
from .data import DataError, Features
from .folder import Folder, FolderError, json_bytes, npz_bytes
from .interrupts import between_steps, leave
from .output_folder import explain, write_atomically
from .recipes import Recipe
from .sets import FAMILIES, SETS, digest_of, fitted, is_there, load_set
from .studies import STUDIES, Contender, Trial, schedule, trials
from .train import Lane, Trainer, predicted, probabilities

PROGRAM = "examples.frozen_features.evidence"
SEEDS = (0, 1, 2, 3, 4)
PASSES = {contender.name: contender.passes for study in STUDIES.values() for contender in study}
LANES = 6
"""Runs per program: divides the trials, and an incomplete block repeats its last run."""

CURVE_POINTS = 10
"""How often a run is evaluated on its way, at least; early stopping chooses among these points."""


@dataclasses.dataclass(frozen=True)
class Command:
    """Settings of the evidence."""

    output: Path
    """Folder of the runs."""

    data: Path | None = None
    """Folder of the data; without it only digits run."""

    sets: tuple[str, ...] = ()
    """Data sets to run; by default all of sets.py that are there."""

    studies: tuple[str, ...] = ()
    """Of methods, baselines, crossings, ncsam, coordinates; by default all."""

    contenders: tuple[str, ...] = ()
    """Names of contenders; by default all."""

    minutes: float | None = None
    """Begin nothing new after so many minutes."""

    epochs: int | None = None
    """Passes over the rows; by default as in sets.py."""

    summary: bool = False
    """Run nothing, print what is known."""

    tables: Path | None = None
    """Folder for a Markdown table per data set and the runs without their curves."""


def run_id(name: str, contender: Contender, trial: Trial, part: str, seed: int, epochs: int) -> str:
    """What a run depends on, as a short digest."""
    what = [name, changed(trial.recipe), trial.knobs, part, seed, epochs]
    what += [contender.clean, contender.drops_suspects]
    what += ["without wrong labels"] * contender.drops_wrong  # runs from before keep their names
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def changed(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe that differ from the defaults."""
    default = Recipe()
    given = dataclasses.asdict(recipe)
    return {key: value for key, value in given.items() if value != getattr(default, key)}


class Runs:
    """The finished runs, one JSON line each; half a line at the end of a killed process is dropped."""

    def __init__(self, path: Path):
        self._path = path
        self.rows = read_runs(path) if path.exists() else []
        self._known = {row["id"]: row for row in self.rows}
        write_atomically(path, "".join(map(_line, self.rows)).encode())

    def get(self, identifier: str) -> dict[str, Any] | None:
        """A finished run."""
        return self._known.get(identifier)

    def add(self, row: dict[str, Any]) -> None:
        """Appends a finished run, on disk when it returns."""
        self.rows.append(row)
        self._known[row["id"]] = row
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())


def read_runs(path: Path) -> list[dict[str, Any]]:
    """All complete lines.

    Raises:
      DataError: if there is no such file.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file. Give the runs.jsonl of the evidence.")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True) + "\n"


def read_digests(folder: Path) -> dict[str, str]:
    """The digest of each data set that the runs in a folder saw, by its name."""
    path = folder / "data.json"
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return known


def publish(rows: list[dict[str, Any]], digests: dict[str, str], folder: Path) -> None:
    """Writes the tables, and the runs in files that another run of this program goes on from.

    Args:
      rows: the runs.
      digests: of the data sets that they saw.
      folder: is made if it is not there.

    Raises:
      DataError: without runs.
    """
    if not rows:
        raise DataError("--tables: there are no runs to publish. Check --output.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        lines = summary.table(rows, name)
        if lines:
            write_atomically(folder / f"{name}.md", summary.markdown(lines).encode())
            write_atomically(folder / f"{name}_radii.md", claims.radii(rows, name).encode())
        if any(row["set"] == name and row["contender"].startswith("NCSAM, ") for row in rows):
            write_atomically(folder / f"{name}_ncsam.md", claims.readings(rows, name).encode())
        if any(row["set"] == name and row["contender"].startswith("SAM on ") for row in rows):
            text = claims.coordinates(rows, name)
            write_atomically(folder / f"{name}_coordinates.md", text.encode())
    for family, table in itertools.product(FAMILIES, claims.BY_FAMILY):
        path = folder / f"{table.__name__}_{family}.md"
        write_atomically(path, table(rows, family).encode())
    for table in (claims.choices, claims.noises):
        write_atomically(folder / f"{table.__name__}.md", table(rows).encode())
    runs = "".join(_line({k: v for k, v in row.items() if "curve" not in k}) for row in rows)
    write_atomically(folder / "data.json", json_bytes(digests))
    write_atomically(folder / "runs.jsonl", runs.encode())


class Bench:
    """One data set with its split, and the runs on it.

    Args:
      name: of the data set.
      data: the data set.
      runs: those that are finished.
      command: the settings.
      check_interrupt: is called after every epoch.

    Raises:
      DataError: if the folder's runs are of other data, or of another number of epochs.
    """

    def __init__(
        self,
        name: str,
        data: Features,
        runs: Runs,
        command: Command,
        check_interrupt: Callable[[], None] = lambda: None,
    ):
        self.name, self.data, self.runs = name, data, runs
        self._check_interrupt = check_interrupt
        self.config = fitted(name, data, command.epochs)
        self._check_same_data(command)
        for row in runs.rows:
            passes = PASSES.get(row["contender"])
            if row["set"] == name and passes and row["epochs"] != passes * self.config.epochs:
                raise DataError(
                    f"--epochs: {str(command.output)!r} has runs on {name!r} with "
                    f"{row['epochs'] // passes} epochs, and now it is {self.config.epochs}. Take the "
                    "same, or name another --output."
                )
        self.parts: Split = split(data, self.config.validation_share, 0.0, seed=0)
        self._folder = command.output

    def _check_same_data(self, command: Command) -> None:
        known = read_digests(command.output)
        digest = digest_of(self.name, command.data)
        has_runs = any(row["set"] == self.name for row in self.runs.rows)
        if has_runs and self.name not in known and SETS[self.name].file is not None:
            raise DataError(
                f"--output: {str(command.output)!r} has runs on {self.name!r}, but no digest of its "
                "file in data.json. Copy the data.json of these runs too, or name another --output."
            )
        if known.setdefault(self.name, digest) != digest:
            raise DataError(
                f"--data: {str(command.data)!r} has another file of {self.name!r} than the runs in "
                f"{str(command.output)!r} saw. Take that one, or name another --output."
            )
        write_atomically(command.output / "data.json", json_bytes(known))

    def compare(self, contender: Contender) -> None:
        """Twelve trials, then five seeds of the one with the best held-out noisy accuracy."""
        tried = trials(contender, self.name)
        rows = self._train(contender, [(trial, 0) for trial in tried], "trial")
        best = tried[rows.index(summary.chosen(rows, contender))]
        part = "trial" if contender.early_stopping else "final"
        self._train(contender, [(best, seed) for seed in SEEDS], part)

    def _train(
        self, contender: Contender, wanted: list[tuple[Trial, int]], part: str
    ) -> list[dict[str, Any]]:
        epochs = self._epochs(contender)
        ids = [run_id(self.name, contender, t, part, seed, epochs) for t, seed in wanted]
        missing = [i for i, key in enumerate(ids) if self.runs.get(key) is None]
        while missing:
            recipe = wanted[missing[0]][0].recipe
            same = [i for i in missing if wanted[i][0].recipe == recipe][:LANES]
            for index, row in zip(
                same, self._run(contender, [wanted[i] for i in same], part), strict=True
            ):
                self.runs.add({"id": ids[index], **row})
            missing = [i for i in missing if i not in same]
        found = [self.runs.get(key) for key in ids]
        return [row for row in found if row is not None]

    def _run(
        self, contender: Contender, block: list[tuple[Trial, int]], part: str
    ) -> list[dict[str, Any]]:
        data, parts, start = self.data, self.parts, time.perf_counter()
        labels = data.labels
        if contender.clean:
            assert data.clean_labels is not None
            labels = data.clean_labels
        rows = parts.train if part == "trial" else np.arange(len(labels))
        if contender.drops_suspects:
            rows = rows[~self._issues[rows]]
        scored = rows  # without wrong labels: also those that were not trained on
        if contender.drops_wrong:
            assert data.clean_labels is not None
            rows = rows[labels[rows] == data.clean_labels[rows]]
        recipe = dataclasses.replace(block[0][0].recipe, hidden=self.config.hidden or 1)
        trainer = Trainer(data, labels, self.config.batch_size or 1)
        epochs = self._epochs(contender)
        # Always the same number of lanes, so that a program is compiled once.
        padded = block + [block[-1]] * (LANES - len(block))
        lanes = [Lane(trial.knobs, seed) for trial, seed in padded]
        held_curves, test_curves = [], []
        state = None
        assert data.test_inputs is not None
        every = max(epochs // CURVE_POINTS, 1)
        for epoch, (state, _) in enumerate(trainer.epochs(recipe, lanes, rows, epochs), start=1):
            self._check_interrupt()
            if epoch % every and epoch < epochs:
                continue
            test = predicted(trainer.predict(state, data.test_inputs))
            test_curves.append((test == data.test_labels).mean(axis=1))
            if part == "trial":
                held = predicted(trainer.predict(state, data.inputs[parts.held_out]))
                held_curves.append((held == labels[parts.held_out]).mean(axis=1))
        assert state is not None
        logits = trainer.predict(state, data.inputs[scored])
        seconds = (time.perf_counter() - start) / len(block)
        results = []
        for lane, (trial, seed) in enumerate(block):
            row: dict[str, Any] = {
                "set": self.name,
                "contender": contender.name,
                "part": part,
                "seed": seed,
                "recipe": changed(trial.recipe),
                "knobs": trial.knobs._asdict(),
                "epochs": epochs,
                "rows": len(rows),
                "test": _curve(test_curves, lane)[-1],
                "test_curve": _curve(test_curves, lane),
                "seconds": round(seconds, 2),
            }
            if held_curves:
                curve = _curve(held_curves, lane)
                best = int(np.argmax(curve))
                row |= {"held_out": curve[-1], "held_out_curve": curve}
                row |= {"held_out_best": curve[best], "test_at_best": row["test_curve"][best]}
            results.append(row | self._errors(logits[lane], scored))
        return results

    def _epochs(self, contender: Contender) -> int:
        return contender.passes * (self.config.epochs or 1)

    def _errors(self, logits: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        data = self.data
        assert data.clean_labels is not None
        labels = data.labels[rows]
        wrong = labels != data.clean_labels[rows]
        fitted = predicted(logits) == labels
        p = probabilities(np.nan_to_num(logits.astype(np.float64), posinf=0.0, neginf=0.0))
        observed = p[np.arange(len(rows)), labels]
        p[np.arange(len(rows)), labels] = -1.0
        return {
            "memorized": round(float(fitted[wrong].mean()), 6),
            "clean_fit": round(float(fitted[~wrong].mean()), 6),
            "auroc": round(auroc(p.max(axis=1) - observed, wrong), 6),
        }

    @functools.cached_property
    def _issues(self) -> np.ndarray:
        """The rows that cleanlab calls label issues, kept in the folder."""
        path = self._folder / f"issues_{self.name}.npz"
        if path.exists():
            with np.load(path) as archive:
                known: np.ndarray = archive["issues"]
                return known
        from cleanlab.filter import find_label_issues

        from .compare_suspects import cross_validated

        issues: np.ndarray = find_label_issues(
            self.data.labels, cross_validated(self.data, seed=0), n_jobs=1
        )
        write_atomically(path, npz_bytes({"issues": issues}))
        return issues


def _curve(points: list[np.ndarray], lane: int) -> list[float]:
    return [round(float(point[lane]), 6) for point in points]


def run(command: Command) -> None:
    """Runs what is missing, in the order of studies.py."""
    started = time.monotonic()
    known = {c.name: c for study in STUDIES.values() for c in study}
    for flag, given, choices in (
        ("--sets", command.sets, tuple(SETS)),
        ("--studies", command.studies, tuple(STUDIES)),
        ("--contenders", command.contenders, tuple(known)),
    ):
        for value in given:
            if value not in choices:
                raise DataError(
                    f"{flag}: {value!r} is not valid. Choose from {', '.join(choices)}."
                )
    chosen = {c.name for study in command.studies or STUDIES for c in STUDIES[study]}
    chosen &= set(command.contenders or known)
    scheduled = {c.name for name, c in schedule() if name in (command.sets or SETS)}
    needing = sorted(name for name in chosen & scheduled if known[name].drops_suspects)
    if needing and importlib.util.find_spec("cleanlab") is None:
        raise DataError(
            f"--contenders: cleanlab is not installed, and these need it: {', '.join(needing)}. "
            "pip install cleanlab, or name others."
        )
    with (
        Folder(command.output, {"protocol": 1}, resume=True),
        between_steps() as check_interrupt,
    ):
        runs = Runs(command.output / "runs.jsonl")

        @functools.cache
        def bench(name: str) -> Bench:
            return Bench(name, load_set(name, command.data), runs, command, check_interrupt)

        for name, contender in schedule():
            if contender.name not in chosen or name not in (command.sets or SETS):
                continue
            if not (command.sets or is_there(name, command.data)):
                continue
            if command.minutes is not None and time.monotonic() - started > 60 * command.minutes:
                return
            before = len(runs.rows)
            bench(name).compare(contender)
            if len(runs.rows) > before:
                print(summary.line(runs.rows, name, contender), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = tyro.cli(Command, args=arguments, description=__doc__)
    go_on = shlex.join([sys.executable, "-m", PROGRAM, *arguments])
    try:
        if not command.summary:
            run(command)
        rows = read_runs(command.output / "runs.jsonl")
        summary.show(rows)
        if command.tables is not None:
            publish(rows, read_digests(command.output), command.tables)
    except KeyboardInterrupt:
        leave(go_on)
    except OSError as error:
        sys.exit(f"error: {explain(error, go_on)}")
    except (ValueError, FolderError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
