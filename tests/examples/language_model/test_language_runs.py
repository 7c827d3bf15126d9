"""The program as a user runs it: files, resuming, fine-tuning, damage, kills, several processes."""

import contextlib
import csv
import dataclasses
import json
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from examples.language_model import (
    checkpoints,
    compare,
    data,
    interrupts,
    logs,
    study,
    tasks,
    train,
)
from examples.language_model.checkpoints import CheckpointError, Checkpoints
from examples.language_model.devices import make_mesh
from examples.language_model.model import Transformer
from examples.language_model.output_folder import held
from tests.examples.language_model.small import (
    SETTINGS,
    config,
    plain_logits,
    write_table,
    write_text,
)
from tests.examples.processes import outputs_of_two, started, wait_for

ROOT = Path(__file__).parents[3]
FILES = {
    "config.json",
    "metrics.csv",
    "results.json",
    "curves.png",
    "checkpoints",
    "network",
    ".lock",
}
FLAGS = [
    f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items() if name != "steps"
]
TIMES = {"seconds", "bytes_per_second"}


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def record_of(folder, step, kind="checkpoints"):
    path = folder / kind / str(step) / "record" / "metadata"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of Functional-SAM on 4 x 2 devices, and its text."""
    folder = tmp_path_factory.mktemp("language")
    text = write_text(folder / "text")
    settings = config(
        method="functional_sam",
        text=str(text),
        model_devices=2,
        validation_share=0.3,
        output=folder / "run",
    )
    return settings, train.train(settings)


@pytest.fixture
def quick(monkeypatch):
    """Without what takes as long as a run."""
    monkeypatch.setattr(train.figures, "plot_run", lambda *_: None)
    monkeypatch.setattr(train.Run, "sharpness", lambda *_: {"rise": 1.0})


@pytest.mark.programs
def test_a_run_writes_its_files_and_resumes_to_the_same_bits(finished, quick, tmp_path, capsys):
    settings, results = finished
    assert {path.name for path in settings.output.iterdir()} == FILES
    assert results["last"]["step"] == 4
    assert results["gradients"] == 8
    assert results["sharpness"]["rise"] > 0
    assert results["mesh"] == {"data": 4, "model": 2}
    assert results["last"]["validation_loss"] < results["before"]["validation_loss"]

    # As a run that was killed behind its third step, whose files told of a fourth already.
    resumed = tmp_path / "resumed"
    shutil.copytree(settings.output, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    shutil.rmtree(resumed / "network")
    train.train(dataclasses.replace(settings, output=resumed, resume=True))
    assert "resumed after step 3" in capsys.readouterr().out
    one, other = record_of(settings.output, 4), record_of(resumed, 4)
    assert one["sums"] == other["sums"]
    assert without_times(one["rows"]) == without_times(other["rows"])
    assert without_times(logs.read_csv(resumed / "metrics.csv")) == without_times(one["rows"])

    with pytest.raises(FileExistsError, match=r"--output: .*already holds a run.*--resume"):
        train.train(settings)
    with pytest.raises(ValueError, match=r"other settings \(rho: 0.05 then, 0.2 now\)"):
        train.train(dataclasses.replace(settings, output=resumed, resume=True, rho=0.2))
    shutil.copytree(settings.text, tmp_path / "text")
    (tmp_path / "text" / "0.txt").write_bytes(b"another text than before")
    changed = str(tmp_path / "text")
    again = dataclasses.replace(settings, output=resumed, resume=True, text=changed)
    with pytest.raises(ValueError, match="was trained on another text"):
        train.train(again)
    # Without a checkpoint it begins anew; what it leaves is of this training, not of the one before.
    shutil.rmtree(resumed / "checkpoints")
    train.train(again)
    sums = record_of(resumed, 4)["sums"]
    assert sums != one["sums"]
    found = record_of(resumed, 4, "network")["sums"]
    assert {f"params.{name}": value for name, value in found.items()}.items() <= sums.items()


@pytest.mark.programs
def test_adapters_on_another_text_and_what_is_forgotten(finished, quick, tmp_path):
    settings, before = finished
    tuned = dataclasses.replace(
        settings,
        text=str(write_text(tmp_path / "other", seed=1)),
        start_from=settings.output,
        adapter_rank=2,
        preconditioned=True,
        steps=2,  # before the first one, the moment is zero
        output=tmp_path / "tuned",
    )
    results = train.train(tuned)
    last = before["last"]["validation_loss"]
    assert results["before"]["earlier_loss"] == pytest.approx(last, rel=1e-5)
    assert results["last"]["earlier_loss"] != results["before"]["earlier_loss"]
    # Its network has the adapters in it, so it can be trained on without any.
    like = train.Run(dataclasses.replace(tuned, adapter_rank=None)).trainer.like.params
    one, other = (train._restore_network(run, like) for run in (settings.output, tuned.output))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), one, other)
    assert changed["layers"]["up"]["kernel"]
    assert changed["head"]["kernel"]
    assert not changed["embedding"]
    assert not changed["norm"]["scale"]

    with pytest.raises(ValueError, match=r"--start-from: .* has --layers 2, this run 3"):
        train.Run(dataclasses.replace(tuned, layers=3))
    with pytest.raises(ValueError, match=r"--start-from: .*nowhere holds no run"):
        train.Run(dataclasses.replace(tuned, start_from=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has not finished: it has no network"):
        train._restore_network(tmp_path, None)

    compare.compare(compare.Comparison((settings.output, tuned.output), tmp_path / "table"))
    table = (tmp_path / "table" / "table.md").read_text().splitlines()
    assert table[0].startswith(
        "| run | seeds | steps | gradients | validation loss | earlier text |"
    )
    assert len(table) == 4
    assert "| functional_sam, adapter_rank 2" in table[3]
    assert "| – | – |" in table[2]  # a run that starts from none forgets nothing


@pytest.mark.programs
def test_classes_of_texts_from_a_language_model_by_adapters(finished, quick, tmp_path):
    """Its predictions are those of the plain network."""
    before, table = finished[0], write_table(tmp_path / "texts.csv")
    settings = dataclasses.replace(
        before,
        **{"task": "classification", "text": str(table), "clean_label_column": "truth"},
        **{"method": "adamw", "start_from": before.output, "adapter_rank": 2, "steps": 2},
        output=tmp_path / "run",
    )
    results = train.train(settings)
    assert results["last"].keys() >= results["all_texts"].keys()
    assert results["classes"] == ("a", "b")
    trained = results["last"]["bytes_per_second"] * results["last"]["seconds"]
    task = tasks.Classification(settings)
    assert trained == pytest.approx(task.trained_bytes(task.batch(1)))

    plain = dataclasses.replace(settings, adapter_rank=None)
    like = nnx.split(nnx.eval_shape(lambda: Transformer(plain, nnx.Rngs(0), 2)), nnx.Param)[1]
    network = nnx.to_pure_dict(train._restore_network(settings.output, nnx.as_pure(like)))
    shapes = checkpoints.named(network) | {"head.kernel": jnp.zeros((8, 256))}
    del shapes["classifier.kernel"]
    earlier = train._restore_network(before.output, shapes)
    np.testing.assert_array_equal(network["embedding"], earlier["embedding"])
    assert (network["layers"]["up"]["kernel"] != earlier["layers.up.kernel"]).any()

    texts = [line.split(",") for line in table.read_text().splitlines()[1:]]
    tokens = np.zeros((40, 16), int)
    for row, (text, *_) in zip(tokens, texts, strict=True):
        row[: len(text)] = list(text[:16].encode())
    is_text = tokens > 0
    assert not is_text.all()
    plain = jax.tree.map(np.asarray, network) | {"head": {"kernel": jnp.eye(8)}}
    features = jax.jit(plain_logits, static_argnums=2)(plain, tokens, settings.heads)
    features = jnp.sum(features * is_text[..., None], axis=1) / is_text.sum(axis=1)[:, None]
    shares = np.asarray(jax.nn.softmax(features @ plain["classifier"]["kernel"]))

    with open(settings.output / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["clean label"]) for row in rows] == [(b, c) for _, b, c in texts]
    assert [int(row["row"]) for row in rows] == list(range(40))
    assert [row["predicted"] for row in rows] == ["ab"[i] for i in shares.argmax(axis=1)]
    of_labels = shares[range(40), ["ab".index(row["label"]) for row in rows]]
    found = [float(row["probability of the label"]) for row in rows]
    np.testing.assert_allclose(found, of_labels, rtol=1e-5)

    def share(part, column, wrong):
        """Of the texts whose true class is known and whose label is wrong, or not, or either."""
        among = [row for row in rows if row["part"] == part and row["clean label"]]
        among = [row for row in among if (row["label"] != row["clean label"]) in wrong]
        return np.mean([row["predicted"] == row[column] for row in among])

    expected = {"clean_accuracy": share("held out", "clean label", (True, False))}
    expected["memorized"] = share("training", "label", (True,))
    expected["fitted"] = share("training", "label", (False,))
    held_out = np.array([row["part"] == "held out" for row in rows])
    expected["validation_loss"] = -np.log(of_labels[held_out]).mean()
    expected["noisy_accuracy"] = np.mean(
        [r["predicted"] == r["label"] for r in rows if r["part"] != "training"]
    )
    assert results["all_texts"] == pytest.approx(expected, rel=1e-5)

    with pytest.raises(ValueError, match=r"--start-from: .* classifies texts"):
        train.Run(dataclasses.replace(settings, start_from=settings.output))


def fake(seed, loss, digest="a", **changes):
    """A finished run."""
    return {
        "config": config(seed=seed, **changes).to_json(),
        "last": {"step": 4, "validation_loss": loss},
        "sharpness": {"rise": 0.1, "eigenvalue": 3.0},
        "before": {},
        "best_validation_loss": loss,
        "gradients": 4,
        "text_sha256": digest,
        "folder": f"run {seed}",
        "rows": [{"step": 4, "validation_loss": loss}],
    }


def test_compare_is_mean_and_deviation_over_the_seeds(tmp_path):
    groups = compare.group_runs([fake(0, 1.0), fake(1, 2.0), fake(0, 3.0, method="sam", rho=0.1)])
    assert list(groups) == ["adamw, rho 0.05", "sam, rho 0.1"]
    header, *lines = compare.write(tmp_path, groups)
    assert header == [
        *("run", "seeds", "steps", "gradients"),
        "validation loss",
        "rise at ε",
        "eigenvalue",
    ]
    assert lines[0][1:5] == ["2", "4", "4", "1.500 ± 0.707"]
    assert lines[1][4] == "3.000"
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 4
    one, two = study.ROWS[0][1], study.ROWS[1][1]
    compare.write(tmp_path, {one: [fake(0, 5.0), fake(1, 3.0)], two: [fake(0, 4.0)]})
    groups = {one: [fake(0, 1.0)]}  # only this run is at hand
    others = study._rows_of_others(tmp_path / "table.csv", "learning", groups)
    assert [(row["run"], row["seed"]) for row in others] == [(one, 1), (two, 0)]
    _, *lines = compare.write(tmp_path, groups, others)
    assert [line[:5] for line in lines] == [
        [one, "2", "4", "4", "2.000 ± 1.414"],
        [two, "1", "4", "4", "4.000"],
    ]
    with pytest.raises(ValueError, match=r"holds no finished run: results\.json is missing"):
        compare.read_run(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="is missing"):
        compare.read_run(tmp_path)
    (tmp_path / "metrics.csv").write_text("step\n4\n")
    with pytest.raises(ValueError, match="is damaged, or not of this program"):
        compare.read_run(tmp_path)


def test_compare_counts_no_run_twice_and_tells_of_other_texts():
    with pytest.raises(
        ValueError, match=r"one setting \(adamw\) is there twice: run 0, run 0\. Le"
    ):
        compare.group_runs([fake(0, 1.0), fake(0, 1.0)])
    starts = ["a/code_0", "a/code_1", "b/code_2", "a/prose"]
    groups = compare.group_runs(
        [fake(i, 1.0, start_from=Path(path)) for i, path in enumerate(starts)]
    )
    assert {name: len(runs) for name, runs in groups.items()} == {
        "adamw, from a/code": 2,
        "adamw, from b/code": 1,
        "adamw, from a/prose": 1,
    }
    runs = [fake(0, 1.0), fake(1, 1.0), fake(0, 1.0, "b", method="sam")]
    assert compare.text_notes(compare.group_runs(runs[:2])) == []
    assert compare.text_notes(compare.group_runs(runs)) == [
        "--text stdlib: the runs have learned 2 different texts of this name"
    ]
    assert compare.text_notes(compare.group_runs([runs[0], fake(0, 1.0, "b", text="manual")])) == []


def test_compare_without_a_run_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"no runs are given besides --output"):
        compare.compare(compare.Comparison((tmp_path,), tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_lines_of_the_figure_end_together_and_the_first_run_is_in_every_panel():
    def lines(steps):
        rows = [{"step": step, "validation_loss": 1 / step} for step in steps]
        return [{"config": {"seed": 0}, "rows": rows, "last": rows[-1]}]

    groups = {"AdamW": lines([2, 4]), "longer": lines([2, 4, 6, 8])}
    figure = compare.plot(groups | {name: lines([2, 4]) for name in "abcd"})
    first, second = figure.axes
    assert first.get_xlabel() == "share of the run's steps, %"
    assert [text.get_text() for text in second.texts] == ["AdamW", "d"]
    short, long = first.lines[:2]
    np.testing.assert_array_equal(long.get_xdata(), [25, 50, 75, 100])
    np.testing.assert_allclose(long.get_ydata(), [1 / 2, 1 / 4, 1 / 6, 1 / 8])
    # Between its own places the shorter run's line is straight; before them there is none.
    np.testing.assert_allclose(short.get_ydata(), [np.nan, 1 / 2, 3 / 8, 1 / 4])
    assert compare.plot({"AdamW": lines([2, 4])}).axes[0].get_xlabel() == "step"


def test_the_study_starts_from_runs_that_come_before(tmp_path):
    seen = set()
    for part, name, settings in study.runs(study.Study(output=tmp_path, seeds=(0, 1), steps=1)):
        assert settings.start_from is None or settings.start_from in seen, (part, name)
        assert settings.output not in seen
        assert settings.steps == 1
        seen.add(settings.output)
    assert len(seen) == 2 * len(study.ROWS)


def pretend(settings):
    """In place of the training of a study's run."""
    study_folder = settings.output.parents[1]
    with pytest.raises(BlockingIOError, match="in use"), held(study_folder):
        pass
    settings.output.mkdir(parents=True)
    results = fake(0, 1.0) | {"config": settings.to_json(), "gradients": settings.steps}
    logs.write_csv(settings.output / "metrics.csv", results.pop("rows"))
    logs.write_json(settings.output / "results.json", results)


def test_a_part_of_the_study_has_what_it_starts_from_and_writes_its_own_table(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(study, "train", pretend)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    study.main(["--output", str(tmp_path), "--seeds", "0", "--parts", "classifying"])
    found = {path.parent.relative_to(tmp_path) for path in tmp_path.glob("*/*/results.json")}
    of_part = {
        Path("classifying", f"{name} 0") for part, name, *_ in study.ROWS if part == "classifying"
    }
    assert found == of_part | {Path("learning", "AdamW 0")}
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["classifying"]
    with pytest.raises(ValueError, match=r"--parts: \(\) is not valid\. Name one"):
        study.Study(parts=())


def test_the_study_refuses_runs_of_other_settings_and_says_how_it_goes_on(
    tmp_path, monkeypatch, capsys
):
    flags = ["--output", str(tmp_path), "--seeds", "0", "--steps"]
    monkeypatch.setattr(study, "ROWS", study.ROWS[:1])
    monkeypatch.setattr(study, "train", pretend)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    study.main([*flags, "50"])
    table_of_seed_0 = tmp_path / "tables" / "learning" / "table.csv"
    assert table_of_seed_0.with_suffix(".md").read_text().count("| AdamW | 1 | 50 |") == 1
    for more in ([], ["--summary"]):
        with pytest.raises(
            SystemExit, match=r"error: --output: .*another study .*steps: 50 then, 60"
        ):
            study.main([*flags, "60", *more])

    # Into a table that has rows of other steps nothing is written: one line has one number of them.
    tables = ["--tables", str(tmp_path / "tables"), "--output", str(tmp_path / "third")]
    before = table_of_seed_0.read_bytes()
    with pytest.raises(
        SystemExit,
        match=r"error: --tables: .*table\.csv has AdamW with 50 steps.*it has 60 and 60 now",
    ):
        study.main([*tables, "--seeds", "1", "--steps", "60"])
    assert table_of_seed_0.read_bytes() == before
    assert not list((tmp_path / "third").glob("learning"))
    study.main([*tables, "--seeds", "1", "--steps", "50"])
    assert "| AdamW | 2 | 50 |" in table_of_seed_0.with_suffix(".md").read_text()

    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "train", interrupted)
    flags[1] = str(tmp_path / "other")
    with pytest.raises(SystemExit) as ended:
        study.main([*flags, "50"])
    assert ended.value.code == interrupts.INTERRUPTED
    assert capsys.readouterr().err.endswith(f"study {shlex.join([*flags, '50'])}\n")
    with pytest.raises(ValueError, match=r"--seeds: \(0, 0\) is not valid\. .* each one once"):
        study.Study(seeds=(0, 0))


def test_a_loss_that_is_not_finite_stops_the_run(finished, tmp_path, monkeypatch):
    settings, _ = finished
    ordinary = train.Run.train_to

    def diverging(self, state, first, last, *rest):
        state, row = ordinary(self, state, first, last, *rest)
        return state, row | ({"loss": float("nan")} if last == 2 else {})

    monkeypatch.setattr(train.Run, "train_to", diverging)
    with pytest.raises(train.TrainingDiverged, match=r"step 2 is not finite.*checkpoints/1\."):
        train.train(dataclasses.replace(settings, output=tmp_path))
    assert not (tmp_path / "checkpoints" / "2").exists()


@pytest.mark.programs
def test_an_interrupt_waits_for_the_trained_network(finished, tmp_path, monkeypatch):
    """The last save of a run; here of one whose steps are done."""
    settings, _ = finished
    resumed = dataclasses.replace(settings, output=tmp_path / "run", resume=True)
    shutil.copytree(settings.output, resumed.output)
    shutil.rmtree(resumed.output / "network")
    ordinary = checkpoints._own_bytes

    def within_a_save(arrays):
        signal.raise_signal(signal.SIGINT)
        return ordinary(arrays)

    monkeypatch.setattr(checkpoints, "_own_bytes", within_a_save)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train.train(resumed)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (resumed.output / "network" / "4").is_dir()


def test_logits_that_are_not_finite_stop_a_classification(finished, tmp_path, monkeypatch):
    """Also where the loss of the step was finite still."""
    settings = dataclasses.replace(
        finished[0],
        **{"task": "classification", "method": "adamw", "output": tmp_path / "run"},
        **{"text": str(write_table(tmp_path / "texts.csv")), "clean_label_column": "truth"},
    )
    done = []

    def step(self, state, first, last, *rest):
        done.append(last)
        return state, {"step": last, "loss": 1.0, "bytes_per_second": 1.0} | self.evaluate(state)

    def logits(self, state, batches):
        count = sum(len(batch.labels) for batch in batches)
        return np.full((count, 2), np.nan if done == [1, 2] else 0.0)

    monkeypatch.setattr(train.Run, "train_to", step)
    monkeypatch.setattr(train.Trainer, "logits", logits)
    with pytest.raises(train.TrainingDiverged, match=r"step 2 is not finite.*checkpoints/1\."):
        train.train(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6}, r"--batch-size: 6 cannot be divided between 8 devices"),
        ({"batch_size": 400}, r"--batch-size: 400 is more than the \d+ windows"),
        ({"width": 40, "heads": 5, "batch_size": 8}, None),
        (
            {"width": 12, "heads": 3, "model_devices": 3},
            r"--model-devices: 3 does not divide the 8",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message, finished):
    settings = dataclasses.replace(finished[0], **{"model_devices": 1} | changes)
    if message is None:
        train.Run(settings)
    else:
        with pytest.raises(ValueError, match=message):
            train.Run(settings)


def pretend_run(folder, text):
    """A folder as a finished run leaves it, without a network and checkpoints."""
    settings = config(text=str(text), validation_share=0.3, batch_size=8, output=folder)
    folder.mkdir()
    logs.write_json(folder / "config.json", settings.to_json())
    digest = data.load(str(text), "*", 16, 0.3).digest
    logs.write_json(folder / "results.json", {"text_sha256": digest})
    return settings


def test_what_is_forgotten_is_told_of_the_text_that_was_learned(tmp_path):
    text = write_text(tmp_path / "text")
    earlier = pretend_run(tmp_path / "run", text)
    other = str(write_text(tmp_path / "other", seed=1))
    tuned = dataclasses.replace(earlier, text=other, start_from=earlier.output, output=tmp_path)
    devices = jax.devices()[:1]
    assert train.Run(tuned, devices).task.earlier_digest
    (text / "0.txt").write_bytes(b"another text than before")
    message = rf"--start-from: the text of the run in .*run, '{text}', is not what it learned.*Put "
    with pytest.raises(ValueError, match=message):
        train.Run(tuned, devices)
    shutil.rmtree(text)
    with pytest.raises(ValueError, match=message):
        train.Run(tuned, devices)
    (earlier.output / "results.json").unlink()
    with pytest.raises(ValueError, match=r"--start-from: .*has not finished: it has no results"):
        train.Run(tuned, devices)


def test_a_run_without_a_checkpoint_is_not_resumed_with_other_settings(tmp_path):
    settings = pretend_run(tmp_path / "run", write_text(tmp_path / "text"))
    other = dataclasses.replace(settings, resume=True, seed=1)
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(ValueError, match=r"--resume: .*other settings \(seed: 0 then, 1 now\)"),
    ):
        train._prepare(other, stack)
    (settings.output / "config.json").write_text("{")
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(ValueError, match=r"--resume: .*config\.json is damaged .*Restore"),
    ):
        train._prepare(other, stack)


@pytest.mark.parametrize(
    ("changes", "axis"),
    [
        ({"model_devices": 3, "heads": 3, "width": 96}, "model"),
        ({"adapter_rank": 2, "start_from": ROOT, "width": 12, "batch_size": 3}, "data"),
    ],
)
def test_bytes_that_cannot_be_divided_are_refused(changes, axis):
    message = (
        rf"--model-devices: \d .* the 256 bytes cannot be divided between 3 devices .*{axis} axis"
    )
    with pytest.raises(ValueError, match=message):
        train.Run(config(text=str(ROOT / "nowhere"), **changes), jax.devices()[:3])


def test_a_process_number_without_distributed_is_refused():
    with pytest.raises(ValueError, match="need --distributed"):
        train.train(config(), train.Processes(process=1))


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
    message = "the disk is full" if here else "process 1 has failed; see its message."
    monkeypatch.setattr(train, "train", lambda *_: train._in_all_processes(prepare))
    with pytest.raises(SystemExit, match=f"error: {message}"):
        train.main([])


STATE = {"count": jnp.zeros([], jnp.int32), "w": jnp.arange(32.0).reshape(4, 8)}
LIKE = jax.eval_shape(lambda: STATE)


@pytest.fixture
def saved(tmp_path):
    manager = Checkpoints(tmp_path / "checkpoints")
    manager.save(1, STATE, {"rows": [1]})
    yield manager
    manager.close()


def test_a_checkpoint_comes_back_on_other_devices(saved):
    mesh = make_mesh(2, jax.devices()[:4])
    cut = NamedSharding(mesh, PartitionSpec("data", "model"))
    like = LIKE | {"w": jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=cut)}
    restored = saved.restore(like)
    np.testing.assert_array_equal(restored.state["w"], STATE["w"])
    assert restored.state["w"].sharding == cut
    assert (restored.step, restored.record["rows"]) == (1, [1])
    with pytest.raises(
        CheckpointError, match=r"of step 1 was not saved .* which holds \[1\]\. Name"
    ):
        saved.save(1, STATE, {})


def test_a_checksum_is_of_all_bits_in_their_places():
    mesh = make_mesh(2, jax.devices()[:4])
    array = jax.random.normal(jax.random.key(0), (4, 8))
    one = checkpoints._checksum(array)
    cut = jax.device_put(array, NamedSharding(mesh, PartitionSpec("data", "model")))
    assert one == checkpoints._checksum(cut)
    for other in (array.at[1, 2].add(1e-6), array[::-1], -array):
        assert one != checkpoints._checksum(other)
    for one, other in [
        ([True, False], [True, True]),
        (jnp.zeros(2, jnp.bfloat16), -jnp.zeros(2, jnp.bfloat16)),
    ]:
        assert checkpoints._checksum(jnp.array(one)) != checkpoints._checksum(jnp.array(other))
    with jax.enable_x64(True):
        for one, other in [(1.0, 1.0 + 2.0**-52), (1, 1 + 2**32), (1, 2)]:
            assert checkpoints._checksum(jnp.array(one)) != checkpoints._checksum(jnp.array(other))


def test_other_arrays_are_refused(saved):
    wide = jax.ShapeDtypeStruct((4, 9), jnp.float32)
    half = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    for like, message in [
        (LIKE | {"w": wide}, r"w is float32\[4, 8\] in it and float32\[4, 9\] in this run"),
        (LIKE | {"w": half}, r"w is float32\[4, 8\] in it and bfloat16\[4, 8\] in this run"),
        (LIKE | {"v": wide}, r"v is missing in it"),
        ({"w": LIKE["w"]}, r"count is int32\[\] in it and unknown in this run"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            saved.restore(like)


def test_damage_is_refused(saved, monkeypatch):
    metadata = saved.folder / "1" / "record" / "metadata"
    record = metadata.read_text()
    metadata.write_text(record.replace("float32[4, 8]", "float32[4, 9]"))
    with pytest.raises(
        CheckpointError, match="record is damaged: it does not match its own digest"
    ):
        saved.restore(LIKE)
    metadata.write_text("{")
    with pytest.raises(CheckpointError, match="its record cannot be read"):
        saved.restore(LIKE)
    metadata.write_text(record)
    with monkeypatch.context() as patch:  # one number changed
        patch.setattr(checkpoints, "_checksum", lambda array: jnp.uint32(1))
        with pytest.raises(CheckpointError, match=r"do not match their checksums.*begin anew"):
            saved.restore(LIKE)
    (saved.folder / "1").rename(saved.folder / "7")
    with Checkpoints(saved.folder)._manager as _:
        renamed = Checkpoints(saved.folder)
        with pytest.raises(CheckpointError, match="it is that of step 1 under another name"):
            renamed.restore(LIKE)
        renamed.close()


def test_a_full_disk_is_told_with_the_checkpoint_that_is_left(saved, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "reserve", full)
    with pytest.raises(
        checkpoints.CheckpointNotSaved, match=r"No space left.*checkpoints/1, is un"
    ):
        saved.save(2, STATE, {})


def test_a_process_reserves_room_for_its_own_pieces():
    """Of a matrix in four pieces, of which one is twice in this process, and one elsewhere."""
    shard = jax.device_put(jnp.zeros(8))
    shards = [SimpleNamespace(data=shard, replica_id=replica) for replica in (0, 0, 0, 1)]
    elsewhere = SimpleNamespace(nbytes=128, addressable_shards=shards)
    whole = jax.device_put(jnp.zeros((4, 8)), NamedSharding(make_mesh(2), PartitionSpec("model")))
    assert checkpoints._own_bytes({"a": elsewhere, "b": whole, "c": STATE["w"]}) == 96 + 128 + 128


def test_a_network_is_read_without_disturbing_the_run_that_saves_it(tmp_path):
    train._save_network(tmp_path, 1, STATE)
    saving = tmp_path / "network" / "2.orbax-checkpoint-tmp"
    saving.mkdir()
    np.testing.assert_array_equal(train._restore_network(tmp_path, LIKE)["w"], STATE["w"])
    assert saving.exists()
    Checkpoints(tmp_path / "network").close()  # as the run itself does when it begins again
    deadline = time.monotonic() + 60  # orbax deletes it in the background
    while saving.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# A process that was started in the background ignores interrupts.
INTERRUPTIBLE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("examples.language_model.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.programs
def test_a_run_that_is_interrupted_and_killed_ends_with_the_same_bits(
    finished, quick, tmp_path, capsys
):
    settings, _ = finished
    straight = dataclasses.replace(settings, steps=24, keep_checkpoints=24, output=tmp_path / "a")
    train.train(straight)
    stopped = tmp_path / "b"
    folder = stopped / "checkpoints"

    def saving(step):
        """A save of this step or a later one is under way."""
        names = [path.name for path in folder.glob("*tmp*")] if folder.exists() else []
        return any(int(name.split(".")[0]) >= step for name in names)

    flags = [
        *FLAGS,
        "--steps=24",
        "--keep-checkpoints=24",
        "--method=functional_sam",
        "--model-devices=2",
    ]
    flags += [f"--text={settings.text}", "--validation-share=0.3", f"--output={stopped}"]
    flags += ["--simulated-devices=8"]
    command = [sys.executable, "-c", INTERRUPTIBLE, *flags]
    with started(*command, compiled=tmp_path / "interrupted") as process:
        wait_for(lambda: saving(2), process)  # within a save: it is finished first
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    *_, interrupted, go_on = output.splitlines()
    assert interrupted == "interrupted. To go on:"

    with started(*shlex.split(go_on), compiled=tmp_path / "killed") as process:
        wait_for(lambda: saving(8), process)  # during one
    complete = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    assert 24 > max(complete) >= len(logs.read_csv(stopped / "metrics.csv"))

    train.train(dataclasses.replace(straight, output=stopped, resume=True))
    assert f"resumed after step {max(complete)}" in capsys.readouterr().out
    one, other = record_of(straight.output, 24), record_of(stopped, 24)
    assert one["sums"] == other["sums"]
    assert without_times(one["rows"]) == without_times(other["rows"])


@pytest.mark.programs
def test_two_processes_with_two_devices_give_the_result_of_one_with_eight(finished, tmp_path):
    settings, alone = finished
    flags = [
        *FLAGS,
        "--steps=4",
        "--method=functional_sam",
        "--model-devices=2",
        "--validation-share=0.3",
    ]
    flags += [f"--text={settings.text}", f"--output={tmp_path / 'together'}"]
    flags += ["--distributed", "--processes=2", "--simulated-devices=2"]
    command = [sys.executable, "-m", "examples.language_model.train", *flags]
    outputs = outputs_of_two(
        lambda address, number: [*command, f"--coordinator={address}", f"--process={number}"],
        tmp_path / "compiled",
    )
    assert "step" not in outputs[1]  # one process tells
    assert "2 x 2 cpu devices" in outputs[0]
    together = json.loads((tmp_path / "together" / "results.json").read_text())
    for name in ("loss", "validation_loss", "gradient_norm"):
        assert together["last"][name] == pytest.approx(alone["last"][name], rel=1e-4), name
    assert together["sharpness"]["rise"] == pytest.approx(alone["sharpness"]["rise"], rel=1e-2)
