"""Trains a head on frozen features with wrong labels, chosen without clean ones.

    python -m examples.frozen_features.fit                         # digits, within two minutes
    python -m examples.frozen_features.fit DATA --output DIR
    python -m examples.frozen_features.fit DATA --output DIR --resume

The folder gets table.md, results.json, model.npz, suspects.csv and three figures.
"""

import math
import platform
import shlex
import sys
import time
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from . import figures, report
from .choose import Choice, Criterion, choose, compare_criteria
from .config import Config
from .criteria import CRITERIA, split
from .data import Features, load
from .folder import Folder, FolderError, json_bytes, plain
from .grid import Setting
from .interrupts import between_steps, leave
from .model import Model
from .output_folder import explain
from .search import Result, scores, search
from .suspects import as_csv, quality, rank
from .train import Lane, Trainer

PROGRAM = "examples.frozen_features.fit"
PACKAGES = ("optax_sam", "jax", "optax", "numpy", "scikit-learn")


class Fitted(NamedTuple):
    """The result of a refit on all rows.

    Attributes:
      setting: what was trained.
      model: the trained head.
      logits: of all rows, shape ``(n, classes)``.
      curves: name -> one value per epoch.
    """

    setting: Setting
    model: Model
    logits: np.ndarray
    curves: dict[str, np.ndarray]


class Outcome(NamedTuple):
    """All that a fit found.

    Attributes:
      config: fitted to the data.
      data: the data set.
      results: one per training of the search.
      choice: the chosen setting and how sure that is.
      criteria: what other criteria would have chosen.
      chosen, sgd: the refits of the chosen setting and of the best SGD; ``sgd`` is None where SGD was
        not tried or diverged, and the same as ``chosen`` where it won.
    """

    config: Config
    data: Features
    results: list[Result]
    choice: Choice
    criteria: list[Criterion]
    chosen: Fitted
    sgd: Fitted | None


def fit(config: Config, data: Features | None = None, quiet: bool = False) -> Outcome:
    """Searches, chooses, refits, and writes everything.

    Args:
      config: the settings.
      data: in place of ``config.data``, if it is in memory already.
      quiet: no output on the terminal.

    Returns:
      What was found.

    Raises:
      ValueError: for settings or data that cannot be used, and if training diverges.
      FolderError: for a folder that holds another run.
      OSError: for a folder that is in use or cannot be written to.
    """
    started = time.perf_counter()
    if data is None:
        data = load(
            config.data,
            label_column=config.label_column,
            clean_label_column=config.clean_label_column,
            ignore_columns=config.ignore_columns,
            memory_limit_gib=config.memory_limit_gib,
        )
    config = config.fitted_to(data)
    parts = split(data, config.validation_share, config.canary_share, config.seed)
    with (
        Folder(config.output, _identity(config, data), config.resume) as folder,
        between_steps() as check_interrupt,
        report.progress(quiet) as show_progress,
    ):

        def progress(what: str, done: int, total: int) -> None:
            show_progress(what, done, total)
            check_interrupt()

        results = search(config, data, parts, folder, progress)
        choice = choose(results)
        ranking = scores(results)
        with_sgd = [s for s, score in ranking.items() if s.method == "sgd" and math.isfinite(score)]
        best_sgd = max(with_sgd, key=lambda setting: ranking[setting], default=None)
        chosen = _refit(config, data, choice.setting, "refit", folder, progress)
        sgd = chosen if best_sgd == choice.setting else None
        if best_sgd is not None and sgd is None:
            sgd = _refit(config, data, best_sgd, "refit_sgd", folder, progress)
        outcome = Outcome(config, data, results, choice, compare_criteria(results), chosen, sgd)
        _write(outcome, folder)
    if not quiet:
        report.show(outcome, time.perf_counter() - started)
    return outcome


def _identity(config: Config, data: Features) -> dict[str, Any]:
    """What decides the bits of a run."""
    other = ("data", "output", "resume", "memory_limit_gib")
    settings = {name: value for name, value in vars(config).items() if name not in other}
    return settings | {"data_sha256": data.digest(), "versions": _versions()}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in PACKAGES
    }


def _refit(
    config: Config,
    data: Features,
    setting: Setting,
    name: str,
    folder: Folder,
    progress: Any,
) -> Fitted:
    """Trains on all rows with their observed labels."""
    arrays = folder.load_block(name)
    if arrays is None:
        labels = data.labels
        if config.soft and data.soft_labels is not None:
            labels = data.soft_labels
        trainer = Trainer(data, labels, config.batch_size or 1)
        lanes = [Lane(setting.knobs, config.seed)]
        rows = np.arange(len(data.labels))
        epochs = config.epochs or 1
        curves: dict[str, list[float]] = {}
        logits, params = np.empty(0), {}
        trained = trainer.epochs(setting.recipe(config.hidden or 1), lanes, rows, epochs)
        for epoch, (state, losses) in enumerate(trained, start=1):
            logits = trainer.predict(state, data.inputs)[0]
            measured = {"loss": float(losses[0])} | _curve_points(data, logits)
            if data.test_inputs is not None:
                predicted = trainer.predict(state, data.test_inputs)[0].argmax(-1)
                measured["test_accuracy"] = float((predicted == data.test_labels).mean())
            for key, value in measured.items():
                curves.setdefault(key, []).append(value)
            params = {key: np.asarray(value[0]) for key, value in state.params.items()}
            progress(f"refit: {setting.label}", epoch, epochs)
        arrays = {f"param_{key}": value for key, value in params.items()}
        arrays |= {f"curve_{key}": np.array(value) for key, value in curves.items()}
        arrays["logits"] = logits
        folder.save_block(name, arrays)
    if not np.isfinite(arrays["logits"]).all():
        raise ValueError(
            f"--learning-rates: {setting.rate:g}: {setting.label} diverged on all rows. Give lower "
            "ones."
        )
    params = {k.removeprefix("param_"): v for k, v in arrays.items() if k.startswith("param_")}
    kept = {k.removeprefix("curve_"): v for k, v in arrays.items() if k.startswith("curve_")}
    model = Model(params, data.mean, data.deviation, data.class_names, data.columns)
    return Fitted(setting, model, arrays["logits"], kept)


def _curve_points(data: Features, logits: np.ndarray) -> dict[str, float]:
    predicted = logits.argmax(-1)
    fitted = predicted == data.labels
    points = {"fitted": float(fitted.mean())}
    if data.clean_labels is not None:
        wrong = data.clean_labels != data.labels
        if wrong.any() and not wrong.all():
            points["memorized"] = float(fitted[wrong].mean())
            points["clean_fit"] = float(fitted[~wrong].mean())
    return points


def _write(outcome: Outcome, folder: Folder) -> None:
    data, chosen = outcome.data, outcome.chosen
    folder.write("model.npz", chosen.model.to_bytes())
    suspects = rank(chosen.logits, data.labels)
    folder.write("suspects.csv", as_csv(suspects, data.class_names).encode())
    folder.write("table.md", report.markdown(outcome).encode())
    for name, content in figures.draw(outcome).items():
        folder.write(name, content)
    folder.write("results.json", json_bytes(plain(as_dict(outcome))))


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """All numbers of a fit."""
    choice, data = outcome.choice, outcome.data
    refits = {"chosen": outcome.chosen} | ({"sgd": outcome.sgd} if outcome.sgd else {})
    return {
        "config": {name: _text(value) for name, value in vars(outcome.config).items()},
        "data": {
            "rows": len(data.labels),
            "features": data.inputs.shape[1],
            "classes": data.class_names,
            "notes": data.notes,
            "sha256": data.digest(),
        },
        "versions": _versions(),
        "backend": jax.default_backend(),
        "choice": choice._asdict()
        | {
            "setting": choice.setting._asdict(),
            "runner_up": choice.runner_up._asdict() if choice.runner_up else None,
            "sure": choice.sure,
        },
        "criteria": [
            row._asdict() | {"setting": row.setting._asdict(), "what": CRITERIA[row.name]}
            for row in outcome.criteria
        ],
        "refits": {
            name: {
                "setting": fitted.setting._asdict(),
                "curves": {key: curve.tolist() for key, curve in fitted.curves.items()},
                "suspects": suspects_quality(fitted, data),
            }
            for name, fitted in refits.items()
        },
        "search": [
            result.setting._asdict()
            | {"round": result.rung + 1, "seed": result.seed, "rows": result.rows}
            | result.measures
            for result in outcome.results
        ],
    }


def suspects_quality(fitted: Fitted, data: Features) -> dict[str, float] | None:
    """How well a refit's suspects find the true errors, where these are known."""
    if data.clean_labels is None:
        return None
    wrong = data.clean_labels != data.labels
    if wrong.all() or not wrong.any():
        return None
    suspects = rank(fitted.logits, data.labels)
    margins = np.empty(len(wrong))
    margins[suspects.row] = suspects.margin
    return quality(margins, wrong)


def _text(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, tuple, type(None))) else str(value)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = [flag for flag in arguments if flag != "--resume"]
    go_on = shlex.join([sys.executable, "-m", PROGRAM, *flags, "--resume"])
    try:
        config = tyro.cli(Config, args=arguments, prog=f"python -m {PROGRAM}", description=__doc__)
        fit(config)
    except KeyboardInterrupt:
        leave(go_on)
    except OSError as error:
        sys.exit(f"error: {explain(error, go_on)}")
    except (ValueError, FolderError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
