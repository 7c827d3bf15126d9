"""Trains a language model on bytes of text, or a classifier of texts whose labels are partly wrong.

    python -m examples.language_model.train                                       # minutes on a CPU
    python -m examples.language_model.train --method sam --output runs/sam
    python -m examples.language_model.train --start-from runs/sam --text manual --adapter-rank 8 \\
        --output runs/adapters
    python -m examples.language_model.train --task classification --text reviews.csv \\
        --output runs/reviews
    python -m examples.language_model.train --help                                # all settings

The output folder gets config.json, metrics.csv, checkpoints, the trained network, results.json and a
figure.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils

from . import figures, logs
from .checkpoints import Checkpoint, CheckpointError, CheckpointNotSaved, Checkpoints, named
from .config import Config, differences
from .devices import fetch, make_mesh, shardings, spread
from .interrupts import between_steps, leave
from .methods import gradients, make_optimizer
from .model import BYTES, merged
from .output_folder import explain, held
from .steps import Trainer, TrainState
from .tasks import Classification, Language, summary

PROGRAM = "examples.language_model.train"
SHARPNESS_RHO = 0.05
SHARPNESS_STEP = 2**31
"""The step whose training batch the sharpness is measured on; no run comes to it."""

MAY_MOVE = ("text", "start_from")
"""A resumed run may find these elsewhere: the digests say whether they are the same."""


class OtherProcessFailed(Exception):
    """Another process of the run could not begin; it says why."""


class TrainingDiverged(Exception):
    """The loss is not finite any more; the message names the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes and devices of a run."""

    distributed: bool = False
    """This is one process of several. A cluster that JAX knows (Slurm, Cloud TPU, Kubernetes) needs
    nothing else."""

    coordinator: str | None = None
    """address:port of process 0, elsewhere."""

    processes: int | None = None
    """How many processes there are, elsewhere."""

    process: int | None = None
    """Number of this one, from 0, elsewhere."""

    simulated_devices: int | None = None
    """CPU devices of this process to pretend, to try things out."""


@dataclasses.dataclass(frozen=True)
class Command:
    """Trains a language model on bytes of text, or a classifier of texts."""

    settings: tyro.conf.OmitArgPrefixes[Config] = dataclasses.field(default_factory=Config)
    processes: tyro.conf.OmitArgPrefixes[Processes] = dataclasses.field(default_factory=Processes)


class Run:
    """One run: its text, its functions and where it began."""

    def __init__(self, config: Config, devices: list[jax.Device] | None = None):
        self.config = config
        self.mesh = make_mesh(config.model_devices, devices)
        self.writes = jax.process_index() == 0  # one process of several keeps the folder
        self._check_sizes()
        earlier = None if config.start_from is None else self._earlier_settings()
        self.task: Language | Classification
        if config.task == "language":
            self.task, pieces = Language(config, earlier), "windows"
        else:
            self.task, pieces = Classification(config), "texts"
        if config.batch_size > self.task.size:
            raise ValueError(
                f"--batch-size: {config.batch_size} is more than the {self.task.size} {pieces} of the "
                "training text. Make it smaller."
            )
        self.trainer = Trainer(config, make_optimizer(config), self.mesh, self.task.classes)

    def _check_sizes(self) -> None:
        config, (data_devices, model_devices) = self.config, self.mesh.devices.shape
        for flag, value, count in (
            ("--batch-size", config.batch_size, data_devices),
            ("--width", config.width, data_devices),
            ("--width", config.width, model_devices),
        ):
            if value % count:
                raise ValueError(
                    f"{flag}: {value} cannot be divided between {count} devices. Make it a multiple."
                )
        # The embedding's bytes are cut along the model axis, those of the head's adapter along data.
        of_bytes = {"model": model_devices}
        if config.task == "language" and config.adapter_rank is not None:
            of_bytes["data"] = data_devices
        for axis, count in of_bytes.items():
            if BYTES % count:
                raise ValueError(
                    f"--model-devices: {model_devices} makes {data_devices} x {model_devices} devices "
                    f"(data x model), and the {BYTES} bytes cannot be divided between {count} devices "
                    f"of the {axis} axis. Make their number a power of two."
                )

    def _earlier_settings(self) -> dict[str, Any]:
        """Those of the run that this one starts from, whose network must have the same shape."""
        path = self.config.start_from / "config.json"
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            settings = {name: earlier[name] for name in ("text", "pattern", "validation_share")}
            shape = {name: earlier[name] for name in ("layers", "width", "heads")}
            classifies = earlier.get("task", "language") != "language"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--start-from: {self.config.start_from} holds no run ({error})."
            ) from None
        if classifies:
            raise ValueError(
                f"--start-from: the network in {self.config.start_from} classifies texts. Name the "
                "run of a language model."
            )
        for name, value in shape.items():
            if getattr(self.config, name) != value:
                raise ValueError(
                    f"--start-from: the network in {self.config.start_from} has --{name} {value}, "
                    f"this run {getattr(self.config, name)}. Give it the same."
                )
        if self.config.task == "language":  # its text is evaluated too
            settings["text_sha256"] = _learned_text(self.config.start_from)
        return settings

    def first_state(self) -> TrainState:
        """The state before the first step; with ``--start-from``, the network of that run in it."""
        state = self.trainer.initial_state(np.uint32(self.config.seed))
        if self.config.start_from is None:
            return state
        name = "params" if self.config.adapter_rank is None else "frozen"
        if self.task.classes is None:
            network = _restore_network(self.config.start_from, getattr(self.trainer.like, name))
        else:
            network = self._with_classifier(getattr(state, name))
        return state._replace(**{name: network})

    def _with_classifier(self, network: Any) -> Any:
        """The earlier run's network with the classifier of this one in place of its head for bytes."""
        like = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for path, leaf in named(network).items()
            if not path.startswith("classifier")
        }
        head = jax.ShapeDtypeStruct((self.config.width, BYTES), np.float32)
        cut = shardings({"head": head}, self.mesh)["head"]
        like["head.kernel"] = jax.ShapeDtypeStruct(head.shape, head.dtype, sharding=cut)
        earlier = _restore_network(self.config.start_from, like)
        leaves = [earlier.get(path, leaf) for path, leaf in named(network).items()]
        return jax.tree.unflatten(jax.tree.structure(network), leaves)

    def network(self, state: TrainState) -> Any:
        """The parameters of the network, which has its adapters in it if there are some."""
        if self.config.adapter_rank is None:
            return state.params
        return jax.jit(merged)(state.frozen, state.params)

    def train_to(
        self,
        state: TrainState,
        first: int,
        last: int,
        terminal: logs.Terminal,
        check_interrupt: Callable[[], None],
    ) -> tuple[TrainState, logs.Row]:
        """Trains the steps from ``first`` to ``last``, which is left out: the new state and its row."""
        start, metrics, trained = time.perf_counter(), [], 0
        for step in range(first, last):
            batch = self.task.batch(step)
            trained += self.task.trained_bytes(batch)
            state, step_metrics = self.trainer.step(state, spread(batch, self.mesh))
            metrics.append(step_metrics)
            terminal.step(step + 1)
            check_interrupt()
        metrics = [fetch(one) for one in metrics]
        seconds = time.perf_counter() - start
        row = {"step": last}
        row |= {name: float(np.mean([one[name] for one in metrics])) for name in metrics[0]}
        row |= self.evaluate(state)
        return state, row | {"bytes_per_second": trained / seconds, "seconds": seconds}

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """How good the network is now."""
        return self.task.evaluate(self.trainer, state)

    def sharpness(self, state: TrainState) -> dict[str, float]:
        """How sharp the minimum is, on a batch of the training text."""
        batch = self.task.batch(SHARPNESS_STEP)
        return self.trainer.sharpness(state, batch, SHARPNESS_RHO, self.config.curvature)


def train(config: Config, processes: Processes | None = None) -> dict[str, Any]:
    """Trains a network, and keeps everything in the output folder.

    Args:
      config: the settings.
      processes: how the processes of a run find each other.

    Returns:
      The results: the numbers before the first and after the last step, and the best validation loss.
    """
    processes = processes or Processes()
    given = (processes.coordinator, processes.processes, processes.process)
    if not processes.distributed and given != (None, None, None):
        raise ValueError("--coordinator, --processes and --process need --distributed.")
    if processes.simulated_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", processes.simulated_devices)
    if processes.distributed:
        jax.distributed.initialize(*given)
    with contextlib.ExitStack() as stack:
        run = _in_all_processes(lambda: _prepare(config, stack))
        checkpoints = Checkpoints(config.output / "checkpoints", config.keep_checkpoints)
        stack.callback(checkpoints.close)
        saved = None
        if config.resume:
            saved = checkpoints.restore(
                run.trainer.like, lambda record: _check_same_run(run, record)
            )
        return _train_from(run, checkpoints, saved)


def _in_all_processes(prepare: Callable[[], Run]) -> Run:
    """The result, if no process fails: one that fails alone would leave the others waiting."""
    run, failure = None, None
    try:
        run = prepare()
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(failure is not None))
        if failed.any() and failure is None:
            number = int(np.argmax(failed))
            failure = OtherProcessFailed(f"process {number} has failed; see its message.")
    if failure is not None:
        raise failure
    return run


def _prepare(config: Config, stack: contextlib.ExitStack) -> Run:
    """The run, whose folder is held until the stack ends and is not written over."""
    run = Run(config)
    if run.writes:
        stack.enter_context(held(config.output))
        path = config.output / "config.json"
        if path.exists() and not config.resume:
            raise FileExistsError(
                f"--output: {config.output} already holds a run. Pass --resume to go on with it, or "
                "name another folder."
            )
        if path.exists():  # also if there is no checkpoint, which would know the settings
            _check_same_settings(config, _settings_of(path))
    return run


def _train_from(run: Run, checkpoints: Checkpoints, saved: Checkpoint | None) -> dict[str, Any]:
    config, folder = run.config, run.config.output
    if saved is None:
        state = run.first_state()
        record = _record(run) | {"before": run.evaluate(state)}
        done, rows = 0, []
    else:
        state, done, rows = saved.state, saved.step, saved.record["rows"]
        record = {name: saved.record[name] for name in (*_record(run), "before")}
    if run.writes:
        if saved is None:
            _remove_results(folder)
        logs.write_json(folder / "config.json", record["config"])
    with (
        between_steps() as check_interrupt,
        logs.terminal(config.steps, done, run.writes) as terminal,
    ):
        terminal.say(_headline(run))
        if saved:
            terminal.say(f"resumed after step {done}")
        while done < config.steps:
            last = min(done + config.evaluate_every, config.steps)
            state, row = run.train_to(state, done, last, terminal, check_interrupt)
            done = last
            if not np.isfinite([row["loss"], row["validation_loss"]]).all():
                raise _diverged(done, checkpoints)
            rows.append(row)
            terminal.row(row, config.steps)
            if done % config.checkpoint_every == 0 or done == config.steps:
                checkpoints.save(done, state, record | {"rows": rows})
            if run.writes:
                logs.write_csv(folder / "metrics.csv", rows)
            check_interrupt()
        _save_network(folder, config.steps, run.network(state))
        check_interrupt()
    results = record | {
        "last": rows[-1],
        "best_validation_loss": min(row["validation_loss"] for row in rows),
        "sharpness": run.sharpness(state),
        "gradients": gradients(config),
    }
    results |= run.task.finish(run.trainer, state, folder if run.writes else None)
    if run.writes:
        logs.write_csv(
            folder / "metrics.csv", rows
        )  # a run that was killed may not have come to it
        logs.write_json(folder / "results.json", results)
        figures.plot_run(folder, rows)
    return results


def _remove_results(folder: Path) -> None:
    """Removes what the run had left before it lost its checkpoints and began anew."""
    if (folder / "config.json").exists():
        (folder / "results.json").unlink(missing_ok=True)
        if (folder / "network").exists():
            shutil.rmtree(folder / "network")


def _save_network(folder: Path, step: int, network: Any) -> None:
    with contextlib.closing(Checkpoints(folder / "network")) as checkpoints:
        if checkpoints.latest() is None:
            checkpoints.save(step, network, {})


def _restore_network(folder: Path, like: Any) -> Any:
    network = None
    if (folder / "network").is_dir():
        with contextlib.closing(Checkpoints(folder / "network", read_only=True)) as checkpoints:
            network = checkpoints.restore(like)
    if network is None:
        raise _unfinished(folder, "network")
    return network.state


def _learned_text(folder: Path) -> str:
    """The SHA-256 of the text that a finished run has learned."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return results["text_sha256"]
    except FileNotFoundError:
        raise _unfinished(folder, "results.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--start-from: {folder / 'results.json'} is damaged ({error}). Restore it from a copy."
        ) from None


def _unfinished(folder: Path, lacks: str) -> ValueError:
    return ValueError(
        f"--start-from: the run in {folder} has not finished: it has no {lacks}. Finish it with "
        "--resume."
    )


def _diverged(step: int, checkpoints: Checkpoints) -> TrainingDiverged:
    good = checkpoints.latest()
    known = f"The last good checkpoint is {good}." if good else "There is no checkpoint."
    return TrainingDiverged(
        f"the loss up to step {step} is not finite: training stops. {known} Begin a new --output with "
        "a lower --learning-rate or --rho."
    )


def _record(run: Run) -> dict[str, Any]:
    """What a run is: its settings, its text, and where it began."""
    packages = ("jax", "jaxlib", "flax", "optax", "optax_sam", "orbax-checkpoint", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "config": run.config.to_json(),
        "text_sha256": run.task.digest,
        "earlier_text_sha256": run.task.earlier_digest,
        "device": jax.devices()[0].device_kind,
        "mesh": dict(run.mesh.shape),
        "versions": versions | {"python": platform.python_version()},
    }


def changed_settings(then: dict[str, Any], now: Config) -> str:
    """The settings in which a run differs from an earlier one, as text; its text may have moved."""
    changed = differences(then, now.to_json())
    return ", ".join(
        f"{name}: {old!r} then, {new!r} now"
        for name, (old, new) in changed.items()
        if name not in MAY_MOVE
    )


def _settings_of(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"--resume: {path} is damaged ({error}). Restore it from a copy, or delete it: checkpoints "
            "have the settings too."
        ) from None


def _check_same_settings(config: Config, then: dict[str, Any]) -> None:
    if changed := changed_settings(then, config):
        raise ValueError(
            f"--resume: the run in {config.output} has other settings ({changed}). Take its settings, "
            "or name another --output."
        )


def _check_same_run(run: Run, record: dict[str, Any]) -> None:
    folder = run.config.output
    _check_same_settings(run.config, record["config"])
    for name, now in _record(run).items():
        if name.endswith("sha256") and record[name] != now:
            raise ValueError(
                f"--resume: the run in {folder} was trained on another text ({name} {record[name]} "
                f"then, {now} now). Is --text the same, and the version of Python?"
            )


def _headline(run: Run) -> str:
    config, mesh = run.config, run.mesh.shape
    like = run.trainer.like
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in like[:2]]
    return (
        f"{config.method} on {config.text}: {', '.join(run.task.describe())}, "
        f"{sum(sizes):,} parameters, {sizes[0]:,} of them trained, "
        f"{mesh['data']} x {mesh['model']} {jax.devices()[0].platform} devices (data x model)"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = [flag for flag in arguments if flag != "--resume"]
    go_on = shlex.join([sys.executable, "-m", PROGRAM, *flags, "--resume"])
    try:
        command = tyro.cli(
            Command, args=arguments, prog=f"python -m {PROGRAM}", description=__doc__
        )
        results = train(command.settings, command.processes)
    except KeyboardInterrupt:
        leave(go_on)
    except CheckpointNotSaved as error:
        sys.exit(f"error: {error} Then run:\n{go_on}")
    except OSError as error:
        sys.exit(f"error: {explain(error, go_on)}")
    except (ValueError, CheckpointError, OtherProcessFailed, TrainingDiverged) as error:
        sys.exit(f"error: {error}")
    if jax.process_index() == 0:
        print(f"{summary(results)}, files in {command.settings.output}")


if __name__ == "__main__":
    main()
