"""Trains one network with one method on images with wrong labels.

    python -m examples.image_classification.train                      # digits, in seconds
    python -m examples.image_classification.train saner-cifar10 --data DIR --output runs/saner
    python -m examples.image_classification.train --help               # all settings, all flags

The first word names a set of settings (presets.py), every flag changes one of them. The output folder
gets config.json, labels.npz, metrics.csv, TensorBoard files, checkpoints, results.json and figures.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.metadata
import io
import math
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import tyro
from jax.experimental import multihost_utils

from . import figures, logs, methods
from .checkpoints import Checkpoint, CheckpointError, CheckpointNotSaved, Checkpoints
from .config import Config, differences
from .data import Dataset, NoisyLabels, load, mean_and_deviation, noisy_labels, subset
from .devices import Devices, start_processes
from .interrupts import between_steps, leave
from .models import make_model
from .output_folder import explain, held, write_atomically
from .presets import PRESETS
from .steps import Epochs, Evaluator, Source, TrainState, make_coordinate_probe, make_train_step

PROGRAM = "examples.image_classification.train"
PROBE_SIZE = 256

MAY_MOVE = ("data", "human_labels")
"""A resumed run may find its data elsewhere: the digest of the labels says whether it is the same."""


class TrainingDiverged(Exception):
    """The loss is not finite any more; the message names the last good checkpoint."""


class OutOfTime(Exception):
    """The deadline has passed; the last checkpoint is that of the epoch that has just ended."""


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
    """Trains one network with one method on images with wrong labels."""

    settings: tyro.conf.OmitArgPrefixes[Config]
    processes: tyro.conf.OmitArgPrefixes[Processes] = dataclasses.field(default_factory=Processes)


def make_optimizer(
    config: Config, steps_per_epoch: int, axis_name: str | None, wrong: float
) -> optax.GradientTransformationExtraArgs:
    """The method, then SGD: weight decay and momentum act on the method's gradient.

    ``wrong`` is the share of wrong labels.
    """
    total = steps_per_epoch * config.epochs
    rate: optax.ScalarOrSchedule = config.learning_rate
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, total)
    elif config.schedule == "multistep":
        falls = [steps_per_epoch * (config.epochs * quarter // 4) for quarter in (2, 3)]
        rate = optax.piecewise_constant_schedule(rate, dict.fromkeys(falls, 0.1))
    return optax.with_extra_args_support(
        optax.chain(
            methods.build(config, total, axis_name, wrong),
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(rate, config.momentum or None),
        )
    )


def part_of(data: Dataset, config: Config) -> tuple[Dataset, NoisyLabels, dict[str, str]]:
    """What a run has of a data set: its images, its noisy labels, and the digests of both."""
    data = data if config.subset is None else subset(data, config.subset, config.seed)
    labels = noisy_labels(data, config.noise, config.noise_rate, config.seed)
    images_digest = _digest(data.images, data.test_images)
    return data, labels, {"labels_sha256": labels.digest, "images_sha256": images_digest}


class Run:
    """One run: its data, its functions and its folder.

    Args:
      config: the settings.
      devices: all of JAX's without them.
      data: what ``config.data`` names, if it has been read already.
    """

    def __init__(
        self,
        config: Config,
        devices: list[jax.Device] | None = None,
        data: Dataset | None = None,
    ):
        self.config = config
        self.devices = Devices(config.parallel, devices)
        self.writes = jax.process_index() == 0  # one process of several keeps the folder
        data = load(config.data, config.human_labels) if data is None else data
        self.data, self.labels, self.digests = part_of(data, config)
        self.held_out = _draw_held_out(len(self.data.labels), config)
        self.trained = np.flatnonzero(~self.held_out)
        self._check_sizes()
        self.steps_per_epoch = len(self.trained) // config.batch_size

        average, deviation = mean_and_deviation(self.data.images)
        images, labels = self.data.images, self.labels.labels
        if config.held_out:
            images, labels = images[self.trained], labels[self.trained]
        source = Source(images, labels, average, deviation)
        wrong = float(self.labels.changed[self.trained].mean())
        tx = make_optimizer(config, self.steps_per_epoch, self.devices.axis_name, wrong)
        self._check_devices()
        local = config.perturbation == "per_device" and config.method != "sgd"
        # Under pmap and shard_map, batch statistics are the whole batch's, or those of the examples
        # that share a perturbation.
        model = make_model(config, self.data.num_classes, None if local else self.devices.axis_name)
        unmapped = make_model(config, self.data.num_classes)  # to initialize and to evaluate
        self.epochs = Epochs(
            config, source, self.devices, make_train_step(model, tx, self.devices.axis_name, local)
        )
        self.evaluator = Evaluator(unmapped, self.devices, source, config.data_on == "host")
        self.train_chunks = self.evaluator.chunks(self.data.images)
        self.test_chunks = self.evaluator.chunks(self.data.test_images)
        self.probe = make_coordinate_probe(unmapped, self.devices, source, config.rho)
        self._initialize = lambda: _initial_state(unmapped, tx, config.seed, self.data.images[:1])

    def _check_sizes(self) -> None:
        config, count = self.config, self.devices.count
        if config.batch_size > len(self.trained):
            raise ValueError(
                f"--batch-size: {config.batch_size} is more than the {len(self.trained)} training "
                "examples. Make it smaller."
            )
        if config.batch_size % count or (config.batch_size // count) % (config.group_size or 1):
            raise ValueError(
                f"--batch-size: {config.batch_size} cannot be cut into equal shares for {count} devices"
                + (f" in groups of {config.group_size}" if config.group_size else "")
                + ". Make it a multiple of their product."
            )

    def _check_devices(self) -> None:
        config = self.config
        if self.devices.count == 1:
            return
        is_local, is_jit = config.perturbation == "per_device", config.parallel == "jit"
        if config.method == "ncsam" and not is_jit and not is_local:
            raise ValueError(
                f"--parallel: under {config.parallel}, each device would estimate NCSAM's noise "
                "gradient from its own examples. Take jit, or --perturbation per_device."
            )
        if is_local and is_jit and config.method != "sgd":
            raise ValueError(
                "--parallel: under jit, every device would compute the perturbations of all. With "
                "--perturbation per_device, take shard_map or pmap."
            )

    def initial_state(self) -> Any:
        """The first state, as NumPy arrays."""
        return jax.tree.map(np.asarray, self._initialize())

    def train_epoch(
        self,
        state: TrainState,
        epoch: int,
        terminal: logs.Terminal,
        check_interrupt: Callable[[], None] = lambda: None,
    ):
        """One epoch: the new state and its row of numbers."""
        start = time.perf_counter()
        done, metrics = self.steps_per_epoch * (epoch - 1), []
        for new_state, step_metrics in self.epochs.run(state, epoch):
            state = new_state
            metrics.append(step_metrics)
            done += 1
            terminal.step(done, f"epoch {epoch}")
            check_interrupt()
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        terminal.step(self.steps_per_epoch * epoch, f"epoch {epoch}")
        metrics = [self.devices.fetch(one) for one in metrics]
        names = ["loss", "train_accuracy", *(metrics[0].keys() - {"loss", "train_accuracy"})]
        row = {"epoch": epoch}
        row |= {
            name: float(np.mean(np.concatenate([np.atleast_1d(one[name]) for one in metrics])))
            for name in names
        }
        used = self.steps_per_epoch * self.config.batch_size
        row |= {
            "images_per_second": used / seconds,
            "input_share": self.epochs.input_seconds / seconds,
            "seconds": seconds,
        }
        return state, row

    def evaluate(self, state: TrainState) -> tuple[dict[str, float], np.ndarray]:
        """The accuracies after an epoch, and the predictions on the training images.

        A share of no examples is left out.
        """
        data, noisy = self.data, self.labels
        predicted = self.evaluator.predictions(state, self.train_chunks, len(data.labels))
        tested = self.evaluator.predictions(state, self.test_chunks, len(data.test_labels))
        fitted, held_out = predicted == noisy.labels, self.held_out
        correct, wrong = ~noisy.changed & ~held_out, noisy.changed & ~held_out
        row = {"test_accuracy": float(np.mean(tested == data.test_labels))}
        if held_out.any():
            row["held_out_accuracy"] = float(np.mean(fitted[held_out]))
        if correct.any():
            row["clean_fit"] = float(np.mean(fitted[correct]))
        if wrong.any():
            row["memorized"] = float(np.mean(fitted[wrong]))
            row["recovered"] = float(np.mean((predicted == data.labels)[wrong]))
        return row, predicted

    def coordinate_shares(self, state: TrainState) -> dict[str, float]:
        """The shares of SANER's coordinates A, B and C on the first examples."""
        state = self.devices.fetch(state._replace(opt_state=()))
        first = self.trained[:PROBE_SIZE]
        images, labels = self.data.images[first], self.labels.labels[first]
        shares = self.probe(state, images, labels)
        return {f"coordinates_{name}": float(share) for name, share in shares.items()}


def train(
    config: Config,
    processes: Processes | None = None,
    data: Dataset | None = None,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Trains a network, and keeps everything in the output folder.

    Args:
      config: the settings.
      processes: how the processes of a run find each other.
      data: what ``config.data`` names, if it has been read already.
      deadline: a time of ``time.monotonic()``; the first epoch that ends behind it is the last one.

    Returns:
      The results: numbers of the last and the best epoch.

    Raises:
      OutOfTime: at the deadline; the state is saved, and ``resume`` goes on.
      TrainingDiverged: if the loss is not finite any more.
    """
    processes = processes or Processes()
    named = (processes.coordinator, processes.processes, processes.process)
    if not processes.distributed and named != (None, None, None):
        raise ValueError("--coordinator, --processes and --process need --distributed.")
    if processes.simulated_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", processes.simulated_devices)
    if processes.distributed:
        start_processes(processes.coordinator, processes.processes, processes.process)
    with contextlib.ExitStack() as stack:
        run = _in_all_processes(lambda: _prepare(config, stack, data))
        checkpoints = Checkpoints(config.output / "checkpoints", config.keep_checkpoints)
        stack.callback(checkpoints.close)
        state = run.initial_state()
        saved = None
        if config.resume:
            saved = checkpoints.restore(state, lambda record: _check_same_run(run, record))
        state = state if saved is None else saved.state
        return _train_from(run, checkpoints, saved, state, deadline)


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
            failure = RuntimeError(f"process {int(np.argmax(failed))} has failed; see its message.")
    if failure is not None:
        raise failure
    return run


def _prepare(config: Config, stack: contextlib.ExitStack, data: Dataset | None) -> Run:
    """The run, whose folder is held until the stack ends."""
    run = Run(config, data=data)
    if run.writes:
        stack.enter_context(held(config.output))
        _check_folder(config)
    return run


def _train_from(
    run: Run, checkpoints: Checkpoints, saved: Checkpoint | None, state: Any, deadline: float
) -> dict[str, Any]:
    config, folder = run.config, run.config.output
    rows: list[logs.Row] = saved.record["rows"] if saved else []
    first = len(rows) + 1
    record = _record(run) if saved is None else {name: saved.record[name] for name in _record(run)}
    board = None
    if run.writes:
        logs.write_json(folder / "config.json", record["config"])
        _write_labels(run)
        board = logs.TensorBoard(folder / "tensorboard", rows)
        if rows:  # a run that was killed may not have come to it
            logs.write_csv(folder / "metrics.csv", rows)
    state = run.devices.replicate(state)
    predicted = None
    steps = (config.epochs * run.steps_per_epoch, (first - 1) * run.steps_per_epoch)
    with between_steps() as check_interrupt, logs.terminal(*steps, run.writes) as terminal:
        terminal.say(_headline(run))
        if saved:
            terminal.say(f"resumed after epoch {saved.epoch}")
        for epoch in range(first, config.epochs + 1):
            state, row = run.train_epoch(state, epoch, terminal, check_interrupt)
            if not np.isfinite(row["loss"]):
                raise _diverged(f"the loss of epoch {epoch} is {row['loss']}", checkpoints)
            if epoch % config.evaluate_every == 0 or epoch == config.epochs:
                accuracies, predicted = run.evaluate(state)
                row |= accuracies | run.coordinate_shares(state)
            rows.append(row)
            terminal.epoch(row, config.epochs)
            out_of_time = epoch < config.epochs and time.monotonic() > deadline
            if epoch % config.checkpoint_every == 0 or epoch == config.epochs or out_of_time:
                fetched = run.devices.fetch(state)
                if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fetched.params)):
                    raise _diverged(f"after epoch {epoch}, parameters are not finite", checkpoints)
                checkpoints.save(epoch, fetched, record | {"rows": rows})
            if run.writes:
                logs.write_csv(folder / "metrics.csv", rows)
                board.write(row)
            if out_of_time:
                raise OutOfTime(f"the time is over after epoch {epoch}: --resume goes on.")
            check_interrupt()
    if predicted is None:  # resumed behind the last epoch
        predicted = run.evaluate(state)[1]
    results = _results(run, record, rows)
    if run.writes:
        board.close()
        logs.write_json(folder / "results.json", results)
        wrong = run.labels.changed & ~run.held_out  # of what was trained on
        figures.plot_run(folder, rows, run.data.labels, predicted, wrong)
    return results


def _draw_held_out(count: int, config: Config) -> np.ndarray:
    """Which examples are kept out of training, bool, shape ``(count,)``."""
    held_out = np.zeros(count, bool)
    order = np.random.default_rng([config.seed, 0]).permutation(count)  # as if for an epoch 0
    held_out[order[: round(config.held_out * count)]] = True
    return held_out


def _initial_state(model: Any, tx: Any, seed: int, images: np.ndarray) -> TrainState:
    def initialize():
        variables = model.init(jax.random.key(seed), jax.numpy.zeros(images.shape), training=False)
        params = variables["params"]
        return TrainState(params, variables.get("batch_stats", {}), tx.init(params))

    return jax.jit(initialize)()


def _diverged(what: str, checkpoints: Checkpoints) -> TrainingDiverged:
    good = checkpoints.latest()
    known = f"The last good checkpoint is {good}." if good else "There is no checkpoint."
    return TrainingDiverged(
        f"{what}: training stops. {known} Begin a new --output with a lower --learning-rate or --rho."
    )


def _check_folder(config: Config) -> None:
    """A folder that holds a run is not written over."""
    if (config.output / "config.json").exists() and not config.resume:
        raise FileExistsError(
            f"--output: {config.output} already holds a run. Pass --resume to go on with it, or name "
            "another folder."
        )


def _record(run: Run) -> dict[str, Any]:
    """What a run is: its settings, its data, and where it began."""
    packages = ("jax", "jaxlib", "flax", "optax", "optax_sam", "orbax-checkpoint", "numpy")
    return {
        "config": run.config.to_json(),
        **run.digests,
        "device": jax.devices()[0].device_kind,
        "devices": run.devices.count,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def changed_settings(then: dict[str, Any], now: Config) -> str:
    """The settings in which a run differs from an earlier one, as text; its data may have moved."""
    changed = differences(then, now.to_json())
    return ", ".join(
        f"{name}: {old!r} then, {new!r} now"
        for name, (old, new) in changed.items()
        if name not in MAY_MOVE
    )


def changed_data(then: dict[str, Any], now: dict[str, str]) -> str:
    """What is not the same any more, labels or images, by their digests, as text."""
    return ", ".join(
        f"other {name.removesuffix('_sha256')} (SHA-256 {then[name][:12]} then, {digest[:12]} now)"
        for name, digest in now.items()
        if then[name] != digest
    )


def _check_same_run(run: Run, record: dict[str, Any]) -> None:
    folder = run.config.output
    if changed := changed_settings(record["config"], run.config):
        raise ValueError(
            f"--resume: the run in {folder} has other settings ({changed}). Take its settings, or name "
            "another --output."
        )
    if changed := changed_data(record, run.digests):
        raise ValueError(
            f"--resume: the run in {folder} was trained on {changed}. Is --data the same?"
        )
    count, then = run.devices.count, record["devices"]
    if run.config.perturbation == "per_device" and run.config.method != "sgd" and count != then:
        raise ValueError(
            f"--resume: the run in {folder} has one perturbation for each of {then} devices, and now "
            f"there are {count}. That is another method: take {then}, or name another --output."
        )


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _write_labels(run: Run) -> None:
    """The labels that were trained on, to tell whether two runs saw the same."""
    file = io.BytesIO()
    np.savez_compressed(
        file,
        labels=run.labels.labels,
        changed=run.labels.changed,
        sha256=np.array(run.labels.digest),
    )
    write_atomically(run.config.output / "labels.npz", file.getvalue())


def _headline(run: Run) -> str:
    config, data = run.config, run.data
    return (
        f"{config.method} on {data.name}: {len(data.labels):,} images, "
        f"{100 * run.labels.changed.mean():.1f} % wrong labels ({config.noise}), {config.model}, "
        f"{run.devices.count} {jax.devices()[0].platform} device(s), {config.parallel}"
    )


def _results(run: Run, record: dict[str, Any], rows: list[logs.Row]) -> dict[str, Any]:
    best = max(rows, key=lambda row: row.get("test_accuracy", -1.0))
    wrong = float(run.labels.changed[run.trained].mean())
    return record | {"last": rows[-1], "best": best, "wrong_labels": wrong}


def parse(arguments: list[str]) -> Command:
    """The settings that the first word names, changed by the flags."""
    named = bool(arguments) and not arguments[0].startswith("-")
    name, flags = (arguments[0], arguments[1:]) if named else ("digits", arguments)
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ValueError(f"{name!r} names no settings. {hint}Choose from {', '.join(PRESETS)}.")
    program = f"python -m {PROGRAM}" + f" {name}" * named
    lines = [f"- {key}: {what}" for key, (what, _) in PRESETS.items()]
    description = (
        "Trains one network with one method on images with wrong labels.\n\n"
        f"The first word names the settings that the flags change; below are those of {name}.\n\n"
        + "\n".join(lines)
    )
    default = Command(PRESETS[name][1])
    return tyro.cli(Command, args=flags, default=default, prog=program, description=description)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = [flag for flag in arguments if flag != "--resume"]
    go_on = shlex.join([sys.executable, "-m", PROGRAM, *flags, "--resume"])
    try:
        command = parse(arguments)
        results = train(command.settings, command.processes)
    except KeyboardInterrupt:
        leave(go_on)
    except CheckpointNotSaved as error:
        sys.exit(f"error: {error} Then run:\n{go_on}")
    except OSError as error:
        sys.exit(f"error: {explain(error, go_on)}")
    except (ValueError, CheckpointError, TrainingDiverged) as error:
        sys.exit(f"error: {error}")
    if jax.process_index() == 0:
        last, folder = results["last"], command.settings.output
        print(f"test accuracy {100 * last['test_accuracy']:.1f} %, files in {folder}")


if __name__ == "__main__":
    main()
