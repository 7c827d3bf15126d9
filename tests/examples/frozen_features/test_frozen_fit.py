"""The whole program at tiny size: its files, its bits, its resuming, its errors."""

import csv
import dataclasses
import errno
import json
import shlex
import signal

import numpy as np
import pytest

from examples.frozen_features import (
    compare_suspects,
    evidence,
    fit,
    model,
    predict,
    sets,
    summary,
    suspects,
)
from examples.frozen_features.config import Config
from examples.frozen_features.data import DataError
from examples.frozen_features.folder import Folder, FolderError
from examples.frozen_features.studies import METHODS
from tests.examples.frozen_features.frozen_data import arrays, features

DIGITS = "digits_symmetric_40"

FILES = {"config.json", "results.json", "model.npz", "suspects.csv", "table.md", ".lock", "state"}
FILES |= {"radius.png", "epochs.png", "confusion.png"}


def config(output, **changes):
    settings = {
        "methods": ("sgd", "sam"),
        "heads": ("linear", "mlp"),
        "radii": (0.1, 0.3),
        "decays": (1e-3, 1e-2),
        "epochs": 2,
        "hidden": 4,
        "batch_size": 16,
        "canary_share": 0.1,
    }
    return Config(output=output, **settings | changes)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "run"
    return folder, fit.fit(config(folder), features())


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes longer than a tiny fit."""
    monkeypatch.setattr(fit.figures, "draw", lambda outcome: {})


@pytest.fixture
def interrupts():
    """Pytest may have been started in the background, where shells ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def bits(folder):
    return {
        name: (folder / name).read_bytes()
        for name in ("suspects.csv", "table.md", "model.npz", "confusion.png")
    } | {"results": {k: v for k, v in _results(folder).items() if k != "config"}}


def _results(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_file_is_written(fitted):
    folder, outcome = fitted
    assert {path.name for path in folder.iterdir()} == FILES
    results = _results(folder)
    assert results["choice"]["setting"]["method"] in ("sgd", "sam")
    assert len(results["search"]) == len(outcome.results)
    assert {row["name"] for row in results["criteria"]} == {
        "held_out",
        "canaries",
        "small_loss",
        "gap",
    }
    assert results["refits"]["chosen"]["suspects"]["auroc"] > 0.5
    (edge,) = [
        line for line in (folder / "table.md").read_text().split("\n") if "Its decay" in line
    ]
    assert edge.endswith("that was tried: widen --decays there.")  # each of two decays is an edge
    for name in ("radius.png", "epochs.png", "confusion.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_suspects_name_every_row_once_in_the_order_of_the_margin(fitted):
    folder, _ = fitted
    with open(folder / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["row"]) for row in rows) == list(range(120))
    margins = [float(row["margin"]) for row in rows]
    assert margins == sorted(margins, reverse=True)
    labels = arrays()["labels"]
    assert all(int(row["observed"]) == labels[int(row["row"])] for row in rows)
    assert all(row["observed"] != row["suggested"] for row in rows)


def test_the_same_seed_gives_the_same_bits(fitted, tmp_path):
    folder, _ = fitted
    fit.fit(config(tmp_path / "again"), features(), quiet=True)
    assert bits(tmp_path / "again") == bits(folder)


def test_another_seed_gives_other_bits(tmp_path, no_figures):
    small = {"heads": ("linear",), "methods": ("sgd",), "decays": (1e-3,)}
    for seed in (0, 1):
        fit.fit(config(tmp_path / f"{seed}", seed=seed, **small), features(), quiet=True)
    first, second = ((tmp_path / f"{seed}" / "model.npz").read_bytes() for seed in (0, 1))
    assert first != second


@pytest.mark.programs
def test_losses_are_settings_like_any_other(tmp_path, no_figures):
    small = {"heads": ("mlp",), "methods": ("sgd", "saner"), "radii": (0.1,), "decays": (1e-3,)}
    losses = ("cross_entropy", "sce")
    outcome = fit.fit(config(tmp_path, losses=losses, **small), features(), quiet=True)
    table = (tmp_path / "table.md").read_text()
    assert [f"| {name} |" in table for name in ("SGD", "SGD + SCE", "SANER + SCE")] == [True] * 3
    first = {r.setting.name: r.measures["small_loss"] for r in outcome.results if r.rung == 0}
    assert len(set(first.values())) == len(first) == 4
    assert {row["loss"] for row in _results(tmp_path)["search"]} == set(losses)


def test_a_stopped_run_goes_on_to_the_same_bits(fitted, tmp_path, monkeypatch, interrupts):
    folder, _ = fitted
    saved, save = [], Folder.save_block

    def save_three(self, name, block):
        saved.append(name)
        if len(saved) == 3:
            signal.raise_signal(signal.SIGINT)  # the block is saved all the same
        save(self, name, block)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "save_block", save_three)
        with pytest.raises(KeyboardInterrupt):
            fit.fit(config(tmp_path / "run"), features(), quiet=True)
    state = tmp_path / "run" / "state"
    assert sorted(path.stem for path in state.iterdir()) == sorted(saved)
    (state / f"{saved[0]}.npz").write_bytes(b"PK half a file")
    with pytest.raises(FolderError, match="--resume"):
        fit.fit(config(tmp_path / "run"), features(), quiet=True)
    with pytest.raises(FolderError, match=r"epochs was 2 .* is 3 now"):
        fit.fit(config(tmp_path / "run", resume=True, epochs=3), features(), quiet=True)
    with pytest.raises(FolderError, match="data_sha256"):
        fit.fit(config(tmp_path / "run", resume=True), features(seed=1), quiet=True)
    fit.fit(config(tmp_path / "run", resume=True), features(), quiet=True)
    assert bits(tmp_path / "run") == bits(folder)


def test_a_resumed_run_trains_nothing_twice(fitted, monkeypatch):
    folder, _ = fitted
    monkeypatch.setattr("examples.frozen_features.train.Trainer.epochs", None)
    before = bits(folder)
    fit.fit(config(folder, resume=True), features(), quiet=True)
    assert bits(folder) == before


def test_a_second_process_is_refused(tmp_path):
    with Folder(tmp_path / "run", {}, resume=False), pytest.raises(OSError, match="in use"):
        fit.fit(config(tmp_path / "run", resume=True), features(), quiet=True)
    with Folder(tmp_path / "run", {}, resume=True):
        pass  # the lock ends with its owner


def test_an_output_that_cannot_be_written_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("examples.frozen_features.fit.search", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--output: .*run cannot be written to \("):
        fit.fit(config(tmp_path / "file" / "run"), features(), quiet=True)


def test_the_table_fits_into_80_columns(fitted, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    fit.report.show(fitted[1], 1.0)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for word in ("SGD", "SAM", "Chosen", "Runner-up", "Lead", "Criterion canaries", "AUROC"):
        assert word in printed
    assert "…" not in printed


def test_without_clean_labels_nothing_is_said_of_them(tmp_path, capsys):
    data = features()._replace(clean_labels=None, test_inputs=None, test_labels=None)
    fit.fit(config(tmp_path / "run", heads=("linear",), methods=("sgd",)), data)
    printed = capsys.readouterr().out
    assert "regret" not in printed
    assert "AUROC" not in printed
    assert all(row["memorized"] is None for row in _results(tmp_path / "run")["search"])


def test_a_crowd_trains_on_its_shares(tmp_path, no_figures):
    answers = np.full((120, 3), -1, np.int8)
    answers[:, 0] = arrays()["labels"]
    answers[:60, 1] = arrays()["clean_labels"][:60]
    np.savez(tmp_path / "crowd.npz", inputs=arrays()["inputs"], labels=answers)
    small = {"heads": ("linear",), "methods": ("sgd",), "data": tmp_path / "crowd.npz"}
    hard = fit.fit(config(tmp_path / "hard", **small), quiet=True)
    soft = fit.fit(config(tmp_path / "soft", soft=True, **small), quiet=True)
    assert np.abs(hard.chosen.logits - soft.chosen.logits).max() > 1e-3


def test_the_model_predicts_what_it_was_trained_to(fitted, tmp_path):
    folder, outcome = fitted
    np.savez(tmp_path / "new.npz", inputs=arrays()["inputs"])
    command = [str(folder / "model.npz"), str(tmp_path / "new.npz"), "--output"]
    predict.main([*command, str(tmp_path / "p.csv")])
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = outcome.chosen.logits.argmax(-1)
    assert [int(row["class"]) for row in rows] == expected.tolist()
    predict.main([*command, str(tmp_path / "p.npz")])
    with np.load(tmp_path / "p.npz") as archive:
        np.testing.assert_array_equal(archive["probabilities"].argmax(-1), expected)
        np.testing.assert_allclose(archive["probabilities"].sum(-1), 1, rtol=1e-5)


def test_predictions_that_cannot_be_made_are_refused(fitted, tmp_path):
    head = model.load(fitted[0] / "model.npz")
    with pytest.raises(DataError, match="4 columns, the model was trained on 5"):
        head.logits(np.zeros((2, 4), np.float32))
    with pytest.raises(DataError, match="no such model"):
        model.load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes((fitted[0] / "model.npz").read_bytes()[:200])
    with pytest.raises(DataError, match=r"bad.npz is damaged .* Give the model\.npz of a fit\."):
        model.load(tmp_path / "bad.npz")
    with pytest.raises(DataError, match=r"more than the 0\.0 of --memory-limit-gib"):
        model.load(fitted[0] / "model.npz", memory_limit_gib=1e-7)
    for change, words in (
        (
            {"params": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3)}},
            r"kernel is float32",
        ),
        ({"params": head.params | {"bias": np.ones((1, 3))}}, r"bias is float64 \(1, 3\)"),
        ({"mean": head.mean[:4]}, r"deviation is .*\(5,\), not of floats \(4,\)"),
        ({"class_names": ("a",)}, "not of floats"),
        ({"columns": ("x",)}, "5 features and 1 columns"),
    ):
        (tmp_path / "bad.npz").write_bytes(head._replace(**change).to_bytes())
        with pytest.raises(DataError, match=f"is no model of this program: .*{words}"):
            model.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "data.npz", inputs=arrays()["inputs"])
    with pytest.raises(SystemExit, match=r"--output: .*p\.txt"):
        predict.main(
            [str(fitted[0] / "model.npz"), str(tmp_path / "data.npz"), "--output", "p.txt"]
        )


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no such file"):
        fit.main([str(tmp_path / "none.npz")])
    with pytest.raises(SystemExit):
        fit.main(["--radii", "-1"])
    assert "--radii: -1.0 is not valid. It is at least 0" in capsys.readouterr().err


def test_training_that_diverges_is_told_before_anything_is_written(tmp_path, monkeypatch):
    small = {"heads": ("linear",), "methods": ("sgd",), "decays": (1e-3,), "batch_size": 64}
    with pytest.raises(ValueError, match=r"--learning-rates: 1e\+38: every setting diverged"):
        fit.fit(config(tmp_path / "all", learning_rates=(1e38,), **small), features(), quiet=True)
    refit = Folder.load_block

    def diverged(folder, name):
        arrays = refit(folder, name)
        return {"logits": np.full((120, 3), np.nan)} if name == "refit" else arrays

    monkeypatch.setattr(Folder, "load_block", diverged)
    with pytest.raises(ValueError, match=r"--learning-rates: 0.02: SGD .* diverged on all rows"):
        fit.fit(config(tmp_path / "one", **small), features(), quiet=True)
    for folder in ("all", "one"):
        assert not (tmp_path / folder / "model.npz").exists()


def test_an_interrupt_or_a_full_disk_ends_with_the_command_that_goes_on(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "runs.jsonl")

    for program, name, flags in ((fit, "fit", "--seed 3"), (evidence, "run", "--output 'a b'")):
        go_on = f"-m {program.__name__} {flags}" + " --resume" * (program is fit)
        monkeypatch.setattr(program, name, interrupt)
        with pytest.raises(SystemExit) as stop:
            program.main(shlex.split(flags))
        assert stop.value.code == 130
        assert capsys.readouterr().err.splitlines()[-1].endswith(go_on)
        monkeypatch.setattr(program, name, fail)
        with pytest.raises(SystemExit, match="could not be written") as stop:
            program.main(shlex.split(flags))
        assert stop.value.code.endswith(go_on)


def test_a_network_that_diverged_ranks_no_row(monkeypatch):
    class Diverged:
        def __init__(self, *_):
            pass

        def epochs(self, *_):
            yield None, None

        def predict(self, *_):
            return np.eye(3)[None, np.arange(120) % 3] / (np.arange(120) != 7)[None, :, None]

    monkeypatch.setattr(compare_suspects, "Trainer", Diverged)
    data = features()
    (setting, *_) = compare_suspects.settings(0.3, 0.01).values()
    with np.errstate(all="ignore"):
        scores, _ = compare_suspects.score_by_training(data, setting, Config(), 0)
    for values in scores.values():
        measured = suspects.quality(values, data.labels != data.clean_labels)
        assert len(measured) == 4
        assert np.isnan(list(measured.values())).all()


def test_suspects_are_compared(tmp_path, monkeypatch, capsys):
    few = compare_suspects.settings(0.3, 0.01)
    few = {name: few[name] for name in list(few)[-2:]}
    monkeypatch.setattr(compare_suspects, "settings", lambda rho, decay: few)
    command = compare_suspects.Command(epochs=2, cleanlab=False)
    rows = compare_suspects.compare(command, features())
    assert len(rows) == 4
    assert all(0 <= row["auroc"] <= 1 and row["seconds"] > 0 for row in rows)
    monkeypatch.setenv("COLUMNS", "80")
    compare_suspects.show(rows)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    table = compare_suspects.markdown(rows).splitlines()
    assert len(table) == 2 + 4
    assert f"| {rows[0]['auroc']:.3f} | {100 * rows[0]['precision_at_100']:.1f} |" in table[2]
    with pytest.raises(SystemExit, match=r"--output: .* is a folder\. Name a file"):
        compare_suspects.main(["--no-cleanlab", "--output", str(tmp_path)])
    # A network that diverged finds nothing, and is told beside the others.
    diverged = {"margin": np.full(120, np.nan)}, 1.0
    score = compare_suspects.score_by_training
    monkeypatch.setattr(
        compare_suspects,
        "score_by_training",
        lambda data, setting, *rest: (
            diverged if setting.method == "saner" else score(data, setting, *rest)
        ),
    )
    file = tmp_path / "suspects.json"
    monkeypatch.setattr(compare_suspects, "load", lambda *_, **__: features())
    compare_suspects.main(["--no-cleanlab", "--epochs", "2", "--output", str(file)])
    first, second, *_ = json.loads(file.read_text())
    measures = [first[name] for name in compare_suspects.MEASURES]
    assert measures == [None, None, None, None, 1.0]
    assert 0 <= second["auroc"] <= 1
    with pytest.raises(SystemExit, match=r"--set: .news. is not valid\. Choose from digits_sym"):
        compare_suspects.main(["--set", "news", "--no-cleanlab"])
    with pytest.raises(SystemExit, match=r"--set: 'news_full' goes without --label-column"):
        compare_suspects.main(["--set", "news_full", "--label-column", "y", "--no-cleanlab"])
    for seeds in ((0, 0), ()):
        with pytest.raises(DataError, match=r"--seeds: \(.*\) is not valid\. Name each one once"):
            compare_suspects.compare(dataclasses.replace(command, seeds=seeds), features())
    with pytest.raises(DataError, match="clean_labels are missing"):
        compare_suspects.compare(command, features()._replace(clean_labels=None))
    with pytest.raises(DataError, match="nothing to find"):
        compare_suspects.compare(command, features(wrong=0.0))


@pytest.mark.programs
def test_the_evidence_goes_on_and_is_summed_up(tmp_path, monkeypatch, capsys, interrupts):
    monkeypatch.setattr(sets.digits, "load", lambda rate, kind: features())
    names = ("SGD", "SAM", "early stopping", "SGD, twice the epochs", "without wrong labels")
    command = evidence.Command(tmp_path, epochs=1, sets=(DIGITS,), contenders=names)
    evidence.run(command)
    rows = evidence.read_runs(tmp_path / "runs.jsonl")
    # Early stopping shares SGD's trials and adds four seeds of its choice.
    assert len(rows) == 4 * (12 + 5) + 4
    assert len({row["id"] for row in rows}) == len(rows)

    cut = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(cut[:20]) + cut[20][:30])
    add = evidence.Runs.add

    def add_and_stop(runs, row):
        add(runs, row)
        if len(runs.rows) == 21:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(evidence.Runs, "add", add_and_stop)
        with pytest.raises(KeyboardInterrupt):
            evidence.run(command)
    assert 20 < len(evidence.read_runs(tmp_path / "runs.jsonl")) <= 20 + evidence.LANES
    evidence.run(command)
    again = evidence.read_runs(tmp_path / "runs.jsonl")

    def numbers(rows):
        return sorted((row["id"], row["test"], row["memorized"], row["auroc"]) for row in rows)

    assert numbers(again) == numbers(rows)
    by_name = {cells[0]: cells for cells in summary.table(rows, DIGITS)}
    assert set(by_name) == set(names)
    assert by_name["SGD"][3] == "-"
    passes = {row["epochs"] for row in rows if row["contender"] == "SGD, twice the epochs"}
    assert passes == {2}
    right = int((features().labels == features().clean_labels).sum())
    ceiling = [row for row in rows if row["contender"] == "without wrong labels"]
    assert {row["rows"] for row in ceiling if row["part"] == "final"} == {right}
    assert all(0 < row["auroc"] < 1 for row in ceiling)  # scored on the wrong ones too
    own = [row for row in rows if row["contender"] == "SGD"]
    assert [cells[0] for cells in summary.table(own, DIGITS)] == ["SGD"]
    sgd = summary.finals(rows, DIGITS, METHODS[0])
    assert sorted(sgd) == [0, 1, 2, 3, 4]
    assert {row["rows"] for row in sgd.values()} == {120}
    assert f"{100 * np.mean([row['test'] for row in sgd.values()]):.2f}" in by_name["SGD"][2]
    evidence.main(["--output", str(tmp_path), "--summary", "--tables", str(tmp_path / "tables")])
    assert "early" in capsys.readouterr().out
    table = (tmp_path / "tables" / f"{DIGITS}.md").read_text().splitlines()
    assert len(table) == 2 + len(names)
    assert table[2].startswith("| SGD | 0, ")
    # A run that has these rows in its folder has nothing left to do.
    (tmp_path / "other").mkdir()
    published = (tmp_path / "tables" / "runs.jsonl").read_text()
    assert "curve" not in published
    (tmp_path / "other" / "runs.jsonl").write_text(published)
    evidence.run(dataclasses.replace(command, output=tmp_path / "other"))
    assert (tmp_path / "other" / "runs.jsonl").read_text() == published
    with pytest.raises(DataError, match="--contenders: 'X'"):
        evidence.run(evidence.Command(tmp_path, contenders=("X",)))


def test_paired_intervals_by_hand():
    mean, half = summary.paired(np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.0]))
    assert mean == pytest.approx(5 / 3)
    assert half == pytest.approx(4.3027 * np.std([1, 1, 3], ddof=1) / 3**0.5, rel=1e-4)


@pytest.mark.parametrize("program", [fit, predict, compare_suspects, evidence])
def test_every_command_has_a_help(program, capsys):
    with pytest.raises(SystemExit) as caught:
        program.main(["--help"])
    assert caught.value.code == 0
    assert "--output" in capsys.readouterr().out
