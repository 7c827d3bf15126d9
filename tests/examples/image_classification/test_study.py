"""The program that fills a given number of minutes, and the examples that choose a setting."""

import dataclasses
import shutil
import time

import numpy as np
import pytest

from examples.image_classification import logs, study, train
from examples.image_classification.config import Config
from examples.image_classification.data import load
from examples.image_classification.study import Study, choices, jobs, run

TINY = Config(subset=64, batch_size=16, width=16, epochs=2, learning_rate=0.02, held_out=0.25)


DIGESTS = {"labels_sha256": "a", "images_sha256": "b"}


@pytest.fixture
def digests(monkeypatch):
    """Those of the data that are there now, where a test trains nothing."""
    now = dict(DIGESTS)
    monkeypatch.setattr(train, "part_of", lambda *_: (None, None, now))
    return now


def small(folder, **changes):
    options = {"noises": ("human:worse", "symmetric"), "decays": (0.01,), "seeds": (0, 1)}
    return Study("digits", **options | {"epochs": (1, 3), "output": folder} | changes)


def pretend(config, data=None, deadline=0.0):
    """The files of a run, of which the largest weight decay agrees best with held-out labels."""
    config.output.mkdir(parents=True, exist_ok=True)
    accuracy = 0.5 + 0.02 * config.seed * (config.method == "sam")
    row = {"epoch": config.epochs, "test_accuracy": accuracy, "memorized": 0.25 + 0.1 * config.seed}
    row |= {"held_out_accuracy": config.weight_decay, "images_per_second": 1000.0}
    if config.method != "sgd":
        row["images_per_second"] = 400.0 if config.group_size else 500.0
    logs.write_json(config.output / "config.json", config.to_json())
    logs.write_csv(config.output / "metrics.csv", [row])
    results = {"config": config.to_json(), "last": row, "best": row} | DIGESTS
    logs.write_json(config.output / "results.json", results | {"device": "A", "wrong_labels": 0.4})


def done(folder):
    return sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("results.json"))


def test_what_tells_most_comes_first(tmp_path, monkeypatch, digests, capsys):
    started = []

    def train_one(config, **options):
        started.append(config)
        pretend(config)

    monkeypatch.setattr(train, "train", train_one)
    assert run(small(tmp_path))
    lines = [(c.noise, c.epochs, c.seed, c.method, c.weight_decay) for c in started]
    names = list(study.contenders(small(tmp_path)))
    assert names == ["SGD", "SAM", "1-SAM", "SANER", "J-SAM", "NCSAM"] + [
        f"{name}, decay 0.01" for name in ("SGD", "SAM")
    ]
    first = [line[:3] for line in lines[: 2 * len(names)]]
    assert first == [("human:worse", 1, 0)] * len(names) + [("symmetric", 1, 0)] * len(names)
    later = [line[1:3] for line in lines[2 * len(names) :]]
    assert later == sorted(later)  # all seeds of the short runs, then the long ones
    assert {line[1:3] for line in lines} == {(1, 0), (1, 1), (3, 0), (3, 1)}
    assert all(c.held_out == 0.1 and c.norm == "group" for c in started)
    assert (tmp_path / "symmetric_3_epochs.md").exists()
    table = (tmp_path / "human_worse_1_epochs.md").read_text().splitlines()
    cells = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in table[2:10]
    }
    noisy = "0.1 ± 0.0"
    assert cells["SGD"] == ["2", "50.0 ± 0.0", "+0.0 ± 0.0", "30.0 ± 7.1", noisy, "1,000", "0.50"]
    assert cells["SGD, decay 0.01 (chosen)"][2] == "–"
    # By seed 0 and 2 points; the t quantile of one degree of freedom is 12.7.
    assert cells["SAM"][1:3] == ["51.0 ± 1.4", "+1.0 ± 12.7"]
    assert cells["1-SAM"][-2:] == ["400", "1.25"]
    assert {name for name in cells if "chosen" in name} == {
        "SGD, decay 0.01 (chosen)",
        "SAM, decay 0.01 (chosen)",
    }
    assert (tmp_path / "human_worse_trials.md").exists()
    before = len(started)
    assert run(small(tmp_path))
    assert len(started) == before  # nothing is done twice
    with pytest.raises(ValueError, match=r"another study \(width: 64 then, 32 now\)"):
        run(small(tmp_path, width=32))
    digests["labels_sha256"] = "c"
    capsys.readouterr()
    with pytest.raises(
        ValueError, match=r"0 was trained on other labels \(SHA-256 a then, c now\)"
    ):
        run(small(tmp_path))
    assert not capsys.readouterr().out  # no table of the other data


def test_a_decay_that_is_not_chosen_gets_no_more_seeds(tmp_path):
    settings = small(tmp_path, decays=(1e-4, 2e-4), noises=("symmetric",))
    planned = jobs(settings)
    for number in range(10):  # the first seed of all contenders, SAM's last
        assert choices(settings, "symmetric") == ({"SGD": "SGD"} if number >= 8 else {})
        pretend(next(planned).config)
    assert choices(settings, "symmetric") == {"SGD": "SGD", "SAM": "SAM"}
    assert {job.config.weight_decay for job in planned} == {5e-4}


def test_radii_and_learning_rates_are_chosen_too(tmp_path):
    settings = small(tmp_path, factors=(2.0,), tuned=("SGD", "SAM", "1-SAM"), learning_rate=0.1)
    found = study.contenders(settings)
    assert len(found) == 6 + 3 * 3
    assert found["SAM, ρ = 0.2, decay 0.01"] == {
        **{"method": "sam", "rho": 0.2, "method_starts": 0.1, "weight_decay": 0.01}
    }
    assert found["1-SAM, ρ = 0.04"]["rho"] == 0.04
    assert "weight_decay" not in found["1-SAM, ρ = 0.04"]
    job = study.make_job(settings, "symmetric", 1, "SGD, learning rate = 0.2, decay 0.01", 0)
    assert (job.config.learning_rate, job.config.weight_decay) == (0.2, 0.01)
    assert job.config.output.parent.name == "SGD_learning_rate_0.2_decay_0.01"
    other = study.make_job(settings, "symmetric", 1, "SAM, ρ = 0.2", 0).config
    assert (other.learning_rate, other.rho, other.output.parent.name) == (0.1, 0.2, "SAM_rho_0.2")
    folders = {study.make_job(settings, "symmetric", 1, name, 0).config.output for name in found}
    assert len(folders) == len(found)
    planned = jobs(settings)
    for _ in range(2 * len(found)):
        pretend(next(planned).config)
    lines = study.trials(settings, "symmetric").splitlines()
    assert lines[0] == "| run | decay 0.0005 | decay 0.01 |"
    assert [line.split(" | ")[0] for line in lines[2:8]] == [
        *("| SGD, learning rate = 0.1", "| SGD, learning rate = 0.2"),
        *("| SAM, ρ = 0.1", "| SAM, ρ = 0.2", "| 1-SAM, ρ = 0.02", "| 1-SAM, ρ = 0.04"),
    ]
    assert lines[2] == "| SGD, learning rate = 0.1 | 50.0 / 25 | 50.0 / 25 |"
    chosen = {"SGD": "SGD, decay 0.01", "SAM": "SAM, decay 0.01", "1-SAM": "1-SAM, decay 0.01"}
    assert choices(settings, "symmetric") == chosen
    lines = study.table(settings, "symmetric", 1).splitlines()[2:-2]
    shown = {line.split(" | ")[0].strip("| ").removesuffix(" (chosen)") for line in lines}
    assert shown == {*settings.methods, *chosen.values()}  # not all that was tried


def test_it_stops_in_time_and_goes_on(tmp_path, monkeypatch, digests):
    settings = small(tmp_path, methods=("SGD", "J-SAM"), noises=("symmetric",), seeds=(0,))
    clock, resumed = [0.0], []
    monkeypatch.setattr(study.time, "monotonic", lambda: clock[0])

    def slow(config, data, deadline):
        resumed.append(config.resume)
        clock[0] += 500
        if clock[0] > deadline:
            config.output.mkdir(parents=True)
            logs.write_json(config.output / "config.json", {})
            raise train.OutOfTime("the time is over")
        pretend(config)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", slow)
        assert not run(settings)
        assert done(tmp_path) == ["symmetric_1_epochs/SGD/0"]
        patch.setattr(
            train, "train", lambda config, **_: resumed.append(config.resume) or pretend(config)
        )
        assert run(settings)
    assert resumed == [False, False, True] + 4 * [False]
    assert len(done(tmp_path)) == 6


def test_nothing_begins_after_the_end_and_the_last_run_may_be_cut_short(
    tmp_path, monkeypatch, digests
):
    clock, started = [0.0], []
    monkeypatch.setattr(study.time, "monotonic", lambda: clock[0])
    settings = small(tmp_path, methods=("SGD",), noises=("symmetric",), seeds=(0,), epochs=(1,))

    def late(config, **_):  # it ends behind the deadline
        started.append(config)
        clock[0] += 1e6
        pretend(config)

    def cut_short(config, **_):
        raise train.OutOfTime("the time is over")

    monkeypatch.setattr(train, "train", late)
    assert not run(settings)
    assert len(started) == 1
    monkeypatch.setattr(train, "train", cut_short)
    assert not run(settings)  # of two, the last one is left


def test_what_diverges_is_told_and_not_tried_again(tmp_path, monkeypatch, digests, capsys):
    settings = small(tmp_path, methods=("SGD", "SAM"), noises=("symmetric",), epochs=(1,))
    tried = []

    def train_one(config, **_):
        tried.append((config.method, config.weight_decay, config.seed))
        config.output.mkdir(parents=True)
        if config.method == "sam" and config.weight_decay == 0.01:
            raise train.TrainingDiverged("the loss is nan")
        if config.method == "sgd" and config.seed == 1:
            raise train.TrainingDiverged("the loss is inf")
        pretend(config)

    monkeypatch.setattr(train, "train", train_one)
    assert run(settings)
    assert run(settings)
    assert len(tried) == len(set(tried)) == 7  # at the larger decay SGD is chosen, SAM has failed
    assert choices(settings, "symmetric") == {"SGD": "SGD, decay 0.01", "SAM": "SAM"}
    said = capsys.readouterr().out
    assert said.count("/0 has diverged: the loss is nan\n") == 1
    assert said.endswith("4 runs have finished, 3 have diverged, 0 are missing.\n")
    lines = (tmp_path / "symmetric_1_epochs.md").read_text().splitlines()[2:5]
    assert [line.split(" | ")[:2] for line in lines] == [
        *(["| SGD", "1 (1 diverged)"], ["| SAM (chosen)", "2"]),
        ["| SGD, decay 0.01 (chosen)", "1 (1 diverged)"],
    ]
    assert "| SAM, ρ = 0.1 | 50.0 / 25 | diverged |" in study.trials(settings, "symmetric")
    with pytest.raises(ValueError, match=r"SAM_decay_0\.01/0 is .*\(width: 64 then, 32 now\)"):
        study.has_failed(
            next(
                j
                for j in jobs(dataclasses.replace(settings, width=32))
                if j.name == "SAM, decay 0.01"
            )
        )
    digests["images_sha256"] = "c"
    settings = dataclasses.replace(settings, methods=("SAM",), seeds=(0,))
    shutil.rmtree(tmp_path / "symmetric_1_epochs" / "SAM")
    with pytest.raises(ValueError, match=r"SAM_decay_0\.01/0 was trained on other images"):
        run(settings)


def test_a_line_of_which_every_seed_diverged_stays_in_the_table(tmp_path):
    settings = small(tmp_path, methods=("SGD", "SAM"), decays=(), seeds=(0,))
    first, second = (study.make_job(settings, "symmetric", 1, name, 0) for name in ("SGD", "SAM"))
    assert study.table(settings, "symmetric", 1) is None
    pretend(first.config)
    second.config.output.mkdir(parents=True)
    failure = {"config": second.config.to_json()} | DIGESTS
    logs.write_json(second.config.output / study.DIVERGED, failure)
    line = study.table(settings, "symmetric", 1).splitlines()[3]
    assert line == "| SAM | 0 (1 diverged) | – | – | – | – | – | – |"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("SDG",)}, r"--methods: 'SDG'.*Choose from SGD, SAM"),
        ({"minutes": 0}, r"--minutes: 0"),
        ({"seeds": ()}, r"--seeds: nothing"),
        ({"tuned": ("SDG",)}, r"--tuned: 'SDG'.*Choose from SGD, SAM"),
        ({"factors": (2.0, 1.0)}, r"--factors: 1.0 is not valid"),
        ({"factors": (-1.0,)}, r"--factors: -1.0 is not valid"),
        ({"seeds": (0, 0)}, r"--seeds: \(0, 0\) is not valid\. Name each one once"),
        ({"decays": (0.01, 0.0005)}, r"--decays: 0\.0005 is not valid\. It is tried anyway"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Study("digits", **changes)


def test_held_out_examples_are_not_trained_on():
    training = train.Run(TINY)
    assert training.held_out.sum() == 16
    assert training.steps_per_epoch == 3
    source = training.epochs._data
    np.testing.assert_array_equal(source.images, training.data.images[training.trained])
    np.testing.assert_array_equal(source.labels, training.labels.labels[training.trained])
    right = training.labels.labels.copy()
    right[np.flatnonzero(training.held_out)[:4]] = 10  # agrees with no label
    training.evaluator.predictions = lambda state, chunks, count: np.resize(right, count)
    row, _ = training.evaluate(None)
    assert row["held_out_accuracy"] == 0.75
    assert row["clean_fit"] == row["memorized"] == 1
    other = train.Run(dataclasses.replace(TINY, seed=1))
    assert (other.held_out != training.held_out).any()


@pytest.mark.programs
def test_a_run_stops_at_the_deadline_and_resumes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train.figures, "plot_run", lambda *of: drawn.append(of[-1]))
    config, data = dataclasses.replace(TINY, checkpoint_every=5, output=tmp_path), load("digits")
    with pytest.raises(train.OutOfTime, match="after epoch 1"):
        train.train(config, data=data, deadline=time.monotonic())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    results = train.train(dataclasses.replace(config, resume=True), data=data)
    assert results["last"]["epoch"] == 2
    assert 0 <= results["last"]["held_out_accuracy"] <= 1
    assert drawn[0].sum() == round(48 * results["wrong_labels"])  # no held-out example among them
