"""The image program as a user runs it: files, resuming, being killed, several processes, comparing."""

import contextlib
import dataclasses
import json
import shlex
import shutil
import signal
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import optax_sam
from examples.image_classification import compare, logs, methods, train
from examples.image_classification.compare import Comparison
from examples.image_classification.config import Config
from tests.examples.processes import outputs_of_two, started, wait_for

ROOT = Path(__file__).parents[3]
TINY = Config(
    subset=64, batch_size=32, width=16, method="sam", epochs=2, learning_rate=0.02, momentum=0.5
)
FLAGS = shlex.split("--subset 64 --batch-size 32 --width 16 --method saner --learning-rate 0.02")
FILES = {
    "config.json",
    "labels.npz",
    "metrics.csv",
    "results.json",
    "curves.png",
    "confusion.png",
    "tensorboard",
    "checkpoints",
    ".lock",
}
TIMES = {"seconds", "images_per_second", "input_share"}


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def checkpoint_record(folder, epoch):
    return json.loads((folder / "checkpoints" / str(epoch) / "record" / "metadata").read_text())


@pytest.mark.programs
def test_a_run_writes_its_files_and_resumes_to_the_same_bits(tmp_path, monkeypatch):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    results = train.train(dataclasses.replace(TINY, output=straight))
    assert {path.name for path in straight.iterdir()} == FILES
    assert results["last"]["epoch"] == 2
    monkeypatch.setattr(train.figures, "plot_run", lambda *_: None)  # they take as long as a run

    # As a run that was killed behind its first epoch, whose files told of a second already.
    shutil.copytree(straight, resumed)
    (resumed / "checkpoints" / "2").rename(tmp_path / "second")
    train.train(dataclasses.replace(TINY, output=resumed, resume=True))

    one, other = checkpoint_record(straight, 2), checkpoint_record(resumed, 2)
    assert one["arrays_sha256"] == other["arrays_sha256"]
    assert without_times(one["rows"]) == without_times(other["rows"])
    rows = logs.read_csv(resumed / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert without_times(rows) == without_times(logs.read_csv(straight / "metrics.csv"))

    with np.load(straight / "labels.npz") as labels:
        assert labels["changed"].mean() == pytest.approx(0.4, abs=0.01)
        assert str(labels["sha256"]) == results["labels_sha256"]

    with pytest.raises(FileExistsError, match=r"--output: .*already holds a run.*--resume"):
        train.train(dataclasses.replace(TINY, output=straight))
    for other, then in [({"rho": 0.2}, "rho: 0.1"), ({"width": 32}, "width: 16")]:
        with pytest.raises(ValueError, match=rf"other settings \({then} then"):
            train.train(dataclasses.replace(TINY, output=straight, resume=True, **other))

    # Killed between the last checkpoint and the files that tell of it.
    (straight / "metrics.csv").unlink()
    (straight / "results.json").unlink()
    train.train(dataclasses.replace(TINY, output=straight, resume=True))
    assert without_times(compare.read_run(straight).rows) == without_times(one["rows"])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    wild = dataclasses.replace(TINY, method="sgd", learning_rate=1e30, output=tmp_path)
    with pytest.raises(
        train.TrainingDiverged, match=r"loss of epoch 1 is .*There is no checkpoint"
    ):
        train.train(wild)
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.programs
def test_divergence_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    ordinary = train.Run.train_epoch

    def diverging(self, state, epoch, *rest):
        state, row = ordinary(self, state, epoch, *rest)
        return state, row | ({"loss": float("nan")} if epoch == 2 else {})

    monkeypatch.setattr(train.Run, "train_epoch", diverging)
    with pytest.raises(train.TrainingDiverged, match=r"epoch 2 is nan.*checkpoints/1\."):
        train.train(dataclasses.replace(TINY, output=tmp_path))
    assert not (tmp_path / "checkpoints" / "2").exists()


@pytest.mark.programs
def test_parameters_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """The loss is that before the last update, so it may look well."""
    ordinary = train.Run.train_epoch

    def overflowing(self, state, epoch, *rest):
        state, row = ordinary(self, state, epoch, *rest)
        if epoch == 2:
            state = state._replace(params=jax.tree.map(lambda x: x * np.inf, state.params))
        return state, row

    monkeypatch.setattr(train.Run, "train_epoch", overflowing)
    with pytest.raises(train.TrainingDiverged, match=r"epoch 2, parameters.*checkpoints/1\."):
        train.train(dataclasses.replace(TINY, output=tmp_path))
    assert not (tmp_path / "checkpoints" / "2").exists()


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("here", [False, True])
def test_no_process_goes_on_alone(here, elsewhere, monkeypatch):
    def prepare():
        if here:
            raise OSError("the disk is full")
        return "a run"

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gather = lambda mine: np.array([bool(mine), elsewhere])  # noqa: E731
    monkeypatch.setattr(train.multihost_utils, "process_allgather", gather)
    if not here and not elsewhere:
        assert train._in_all_processes(prepare) == "a run"
        return
    error, message = (OSError, "disk is full") if here else (RuntimeError, "process 1 has failed")
    with pytest.raises(error, match=message):
        train._in_all_processes(prepare)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sgld"}, r"--method: 'sgld'.*Choose from sgd, sam"),
        ({"noise": "human:"}, r"--noise: 'human:'"),
        ({"noise_rate": 40}, r"--noise-rate: 40.*not a percentage"),
        ({"group_size": 3}, r"--group-size: 3.*must divide --batch-size 128"),
        ({"group_size": 1, "norm": "batch"}, r"--norm: 'batch'.*choose --norm group"),
        (
            {"group_size": 8, "perturbation": "per_device"},
            r"--perturbation.*leave --group-size out",
        ),
        ({"model": "wide_resnet", "depth": 29}, r"--depth: 29.*6 n \+ 4"),
        ({"model": "resnet"}, r"--model: 'resnet'.*Choose from"),
        ({"augmentation": ("mixup",)}, r"--augmentation: 'mixup'"),
        ({"rho": -0.1}, r"--rho: -0.1"),
        ({"method": "sgd", "down_weight": 0.5}, r"--method: 'sgd'.*leave --down-weight"),
        ({"flip_ratio": 0.2}, r"--flip-ratio: 0.2.*Only --method ncsam"),
        ({"sigma": 0.1}, r"--sigma: 0.1.*only --method le_sam"),
        ({"sigma": -0.1, "method": "le_sam"}, r"--sigma: -0.1.*at least 0"),
        ({"epochs": 0}, r"--epochs: 0"),
        ({"epochs": 2, "schedule": "multistep"}, r"--epochs: 2.*3 epochs at least"),
        ({"width": 24}, r"--width: 24.*multiple of 16"),
        ({"data_on": "host", "epoch_loop": "compiled"}, r"--epoch-loop.*--data-on device"),
        ({"method": "msam", "group_size": 8}, r"--method: 'msam'.*leave --group-size"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_other_images_under_the_same_labels_are_noticed(tmp_path):
    run = train.Run(dataclasses.replace(TINY, output=tmp_path))
    record = train._record(run)
    train._check_same_run(run, record)
    run.data.images[0, 0, 0] += 1
    assert train.part_of(run.data, run.config)[-1]["images_sha256"] != record["images_sha256"]
    with pytest.raises(ValueError, match="trained on other images"):
        train._check_same_run(run, record | {"images_sha256": "0" * 64})


@pytest.mark.parametrize(
    ("perturbation", "method", "refused"),
    [("per_device", "sam", True), ("per_device", "sgd", False), ("global", "sam", False)],
)
def test_perturbations_per_device_take_as_many_devices_as_before(perturbation, method, refused):
    config = dataclasses.replace(TINY, perturbation=perturbation, method=method)
    run = types.SimpleNamespace(config=config, devices=types.SimpleNamespace(count=2), digests={})
    record = {"config": config.to_json(), "devices": 2}
    train._check_same_run(run, record)
    with (
        pytest.raises(ValueError, match=r"for each of 4 devices, and now there are 2")
        if refused
        else contextlib.nullcontext()
    ):
        train._check_same_run(run, record | {"devices": 4})


def test_a_process_number_without_distributed_is_refused():
    with pytest.raises(ValueError, match="need --distributed"):
        train.train(TINY, train.Processes(process=1))


def test_the_flip_ratio_is_that_of_the_labels(monkeypatch):
    ratios = {}
    monkeypatch.setattr(
        optax_sam, "ncsam", lambda *_, flip_ratio, **__: ratios.update(r=flip_ratio)
    )
    config = dataclasses.replace(TINY, method="ncsam", noise_rate=0.2)
    for wrong, ratio in [(0.2, 0.2), (0.0, 0.1), (0.6, 0.4)]:
        methods.build(config, 10, None, wrong)
        assert ratios["r"] == ratio


@pytest.mark.parametrize(("every_k", "steps"), [(None, 10), (2, 5), (20, 1)])
def test_alpha_warms_up_over_epochs_where_second_gradients_are_rare(every_k, steps, monkeypatch):
    """Its schedule counts the steps with a second gradient."""
    warmups = []
    monkeypatch.setattr(optax_sam, "linear_warmup_alpha", lambda *args: warmups.append(args) or 0.5)
    config = dataclasses.replace(
        TINY, method="saner", epochs=8, down_weight_warmup=0.25, every_k=every_k
    )
    methods.build(config, 80, None, 0.4)
    assert warmups == [(0.5, 2, steps)]


def test_the_nnx_page_refuses_what_it_ignores():
    from examples.image_classification import train_nnx

    ignored = {"model": "preact_resnet18", "held_out": 0.1, "group_size": 8}
    for name, value in ignored.items():
        flag = "--" + name.replace("_", "-")
        with pytest.raises(ValueError, match=f"{flag} has no effect"):
            train_nnx.main(dataclasses.replace(train_nnx.DEFAULTS, **{name: value}))
    assert dataclasses.replace(train_nnx.DEFAULTS, width=24).width == 24


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"--batch-size: 128 is more than the 64 training examples"
    ):
        train.train(dataclasses.replace(TINY, batch_size=128, output=tmp_path))


def fake_run(folder, method, seed, accuracies, digest="a"):
    config = dataclasses.replace(TINY, method=method, seed=seed).to_json()
    rows = [
        {"epoch": epoch, "test_accuracy": accuracy, "memorized": 0.5, "images_per_second": 100.0}
        for epoch, accuracy in enumerate(accuracies, 1)
    ]
    best = max(rows, key=lambda row: row["test_accuracy"])
    results = {"config": config, "last": rows[-1], "best": best, "labels_sha256": digest}
    folder.mkdir()
    logs.write_json(folder / "results.json", results)
    logs.write_csv(folder / "metrics.csv", rows)
    return folder


def test_compare_makes_one_line_per_setting(tmp_path, capsys):
    folders = (
        fake_run(tmp_path / "a", "sgd", 0, [0.5, 0.4]),
        fake_run(tmp_path / "b", "sgd", 1, [0.6, 0.6]),
        fake_run(tmp_path / "c", "sam", 0, [0.7, 0.8], digest="b"),
    )
    for _ in range(2):  # the second time, runs/* has the first comparison in it
        rows = compare.compare(Comparison(folders, tmp_path / "out"))
        folders = (*folders[:3], tmp_path / "out")
    assert [row["run"] for row in rows] == ["SGD", "SAM"]
    assert rows[0]["test, last epoch"] == pytest.approx(50)
    assert rows[0]["test, last epoch, deviation"] == pytest.approx(100 * np.std([0.4, 0.6], ddof=1))
    assert rows[0]["test, best epoch"] == pytest.approx(55)
    assert np.isnan(rows[1]["correct labels fitted"])
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| SGD | 2 | 50.0 ± 14.1 | 55.0 ± 7.1 | – |" in table
    assert "seed 0: the runs were trained on 2 different sets of labels" in table
    assert len((tmp_path / "out" / "table.csv").read_text().splitlines()) == 3
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")

    points = tmp_path / "out" / "points.png"
    drawn = points.read_bytes()
    points.unlink()
    compare.main(["--redraw", "--output", str(tmp_path / "out")])
    assert points.read_bytes() == drawn
    with pytest.raises(SystemExit, match="--redraw: it takes no runs, 1 are given"):
        compare.main([str(tmp_path), "--redraw", "--output", str(tmp_path / "out")])
    (tmp_path / "out" / "table.csv").write_text("run,seeds\nSGD,2\n")
    with pytest.raises(
        SystemExit, match=r"table\.csv is no table of this program.*test, last epoch"
    ):
        compare.main(["--redraw", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"table\.csv"):
        compare.main(["--redraw", "--output", str(tmp_path / "elsewhere")])
    assert not (tmp_path / "elsewhere").exists()


def test_compare_writes_settings_as_people_do():
    settings = [
        {"method": "jsam", "rho": 0.1},
        {"method": "sam", "rho": 0.02, "group_size": 1},
        {"method": "sam", "rho": 0.2},
        {"method": "sam", "rho": 0.1},
        {"method": "sgd", "rho": 0.1},
        {"method": "sgd", "rho": 0.1, "group_size": 1},
    ]
    runs = [
        compare.FinishedRun(Path("run"), {"config": {"seed": seed, **config}}, [])
        for seed, config in enumerate(settings)
    ]
    names = ["SGD", "SAM, ρ = 0.1", "SAM, ρ = 0.2", "1-SAM, ρ = 0.02", "J-SAM, ρ = 0.1"]
    assert list(compare.group_runs(runs)) == names
    looks = compare.styles(names)
    assert looks[1]["color"] == looks[2]["color"] != looks[3]["color"]
    assert looks[1]["linestyle"] != looks[2]["linestyle"]


def test_compare_refuses_what_is_no_finished_run(tmp_path):
    with pytest.raises(ValueError, match=r"no run.*results\.json is missing"):
        compare.read_run(tmp_path)
    (tmp_path / "rho_choice.csv").write_text("rho\n")
    with pytest.raises(ValueError, match=r"rho_choice\.csv cannot be compared \(no run\)"):
        compare.read_run(tmp_path / "rho_choice.csv")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="training has not finished"):
        compare.read_run(tmp_path)
    run = fake_run(tmp_path / "a", "sgd", 0, [0.5])
    with pytest.raises(ValueError, match="the same run"):
        compare.compare(Comparison((run, run), tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", "[]"),
        ("results.json", "{}"),
        ("results.json", '{"config": {"method": "sgd"}, "last": {}}'),
        ("results.json", "{"),
        ("metrics.csv", "epoch,test_accuracy,images_per_second\n"),
        ("metrics.csv", "epoch,test_accuracy,images_per_second\n7,0.5,100\n"),
        ("metrics.csv", "epoch,test_accuracy,images_per_second\n1,half,100\n"),
    ],
)
def test_compare_refuses_other_files_with_the_names_of_a_run(name, content, tmp_path):
    run = fake_run(tmp_path / "a", "sgd", 0, [0.5])
    compare.read_run(run)
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged, or not of this program \("):
        compare.read_run(run)


# A process that was started in the background ignores interrupts.
INTERRUPTIBLE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("examples.image_classification.train", run_name="__main__", alter_sys=True)
"""

# The documented command, and a second run of the same processes.
TWO_RUNS = """
import sys
from examples.image_classification import train
folder, coordinator, process, *flags = sys.argv[1:]
join = ["--distributed", "--coordinator", coordinator, "--processes", "2", "--process", process]
join += ["--simulated-devices", "2"]
train.main([*flags, "--parallel", "jit", "--output", folder + "/jit", *join])
train.main([*flags, "--parallel", "pmap", "--output", folder + "/pmap"])
"""


@pytest.mark.programs
def test_a_run_that_is_interrupted_and_killed_ends_with_the_same_bits(
    tmp_path, capsys, monkeypatch
):
    """The processes in between have as many devices as this one."""
    monkeypatch.setattr(train.figures, "plot_run", lambda *_: None)  # here; they draw
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    flags = ["digits", *FLAGS, "--epochs", "6", "--output"]
    config = train.parse([*flags, str(straight)]).settings
    train.train(config)
    folder, metrics = stopped / "checkpoints", stopped / "metrics.csv"

    def saving(epoch):
        """A save of this epoch or a later one is under way."""
        names = [path.name for path in folder.glob("*tmp*")] if folder.exists() else []
        return any(int(name.split(".")[0]) >= epoch for name in names)

    count = str(jax.device_count())
    command = [
        sys.executable,
        "-c",
        INTERRUPTIBLE,
        *flags,
        str(stopped),
        "--simulated-devices",
        count,
    ]
    with started(*command, compiled=tmp_path / "interrupted") as process:
        wait_for(lambda: saving(2), process)  # within a save: it is finished first
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    *_, interrupted, go_on = output.splitlines()
    assert interrupted == "interrupted. To go on:"

    with started(*shlex.split(go_on), compiled=tmp_path / "killed") as process:
        wait_for(lambda: saving(4), process)  # during one
    complete = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    assert max(complete) >= len(logs.read_csv(metrics))  # what was told is not lost

    train.train(dataclasses.replace(config, output=stopped, resume=True))
    assert f"resumed after epoch {max(complete)}" in capsys.readouterr().out
    one, other = (checkpoint_record(run, 6) for run in (straight, stopped))
    assert one["arrays_sha256"] == other["arrays_sha256"]
    assert without_times(one["rows"]) == without_times(other["rows"])


@pytest.mark.programs
def test_two_processes_with_two_devices_give_the_result_of_one(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, method="saner", norm="batch", momentum=0.9)
    monkeypatch.setattr(train.figures, "plot_run", lambda *_: None)  # here; they draw
    alone = train.train(dataclasses.replace(config, output=tmp_path / "alone"))
    command = [sys.executable, "-c", TWO_RUNS, str(tmp_path)]
    flags = ["digits", *FLAGS, "--norm", "batch", "--epochs", "2"]
    outputs = outputs_of_two(
        lambda address, number: [*command, address, number, *flags], tmp_path / "compiled"
    )
    assert "epoch" not in outputs[1]  # one process tells

    for mode in ("jit", "pmap"):
        assert f"4 cpu device(s), {mode}" in outputs[0]
        together = json.loads((tmp_path / mode / "results.json").read_text())
        assert together["devices"] == 4
        for name in ("loss", "train_accuracy", "test_accuracy", "memorized", "down_weighted"):
            assert together["last"][name] == pytest.approx(alone["last"][name], rel=1e-4), name


@pytest.mark.programs
def test_the_nnx_page_learns(capsys):
    from examples.image_classification import train_nnx

    accuracy = train_nnx.main(
        dataclasses.replace(
            train_nnx.DEFAULTS,
            **{"subset": 256, "batch_size": 32, "method": "jsam", "rho": 0.05, "epochs": 4},
            **{"learning_rate": 0.02, "noise_rate": 0.2, "method_starts": 0.0},
        )
    )
    assert accuracy > 0.5
    assert capsys.readouterr().out.count("epoch") == 4
