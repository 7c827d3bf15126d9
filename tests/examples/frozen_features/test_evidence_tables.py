"""What is read out of finished runs, on made-up runs with known numbers."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from examples.frozen_features import claims, decay_figure, evidence, noise_figure, sets, summary
from examples.frozen_features.data import DataError
from examples.frozen_features.studies import READINGS_OF_NCSAM, trials
from tests.examples.frozen_features.frozen_data import features

NAME = "cifar10n_worse"
CHOSEN = 0.01


def made_up(name, bonus):
    """Trials whose held-out accuracy is best at one decay, and finals of seeds 0 to 4."""
    contender = claims.contender(name)
    rows = []
    for trial in trials(contender, NAME):
        knobs = trial.knobs._asdict()
        chosen = knobs["decay"] == CHOSEN and knobs["rate"] == 0.02 and knobs["rho"] in (0.0, 0.2)
        recipe = evidence.changed(trial.recipe)
        row = {"set": NAME, "contender": name, "recipe": recipe, "knobs": knobs, "auroc": 0.9}
        row |= {"memorized": 0.25, "seconds": 1.0, "seed": 0, "epochs": 1}
        held_out, test = (0.6, 0.7) if chosen else (0.5, 0.72 if knobs["decay"] > 0.01 else 0.6)
        rows.append(
            row
            | {
                "part": "trial",
                "held_out": held_out,
                "held_out_best": held_out,
                "test_at_best": test,
                "test": test + bonus,
            }
        )
        if chosen:
            for seed in range(5):
                final = {"part": "final", "seed": seed, "test": 0.7 + bonus + 0.01 * seed}
                rows.append(row | final)
    return rows


ROWS = made_up("SGD", 0.0) + made_up("SAM", 0.02)


def test_a_pair_is_compared_seed_by_seed():
    assert claims.gain(ROWS, NAME, "SAM", "SGD") == "+2.00 ± 0.00"
    shifted = [row | {"test": row["test"] + 0.01 * (row["seed"] == 4)} for row in ROWS[:17]]
    assert claims.gain(shifted + ROWS[17:], NAME, "SAM", "SGD").startswith("+1.80 ± ")
    assert claims.gain(ROWS, NAME, "SANER", "SAM") == "-"
    table = claims.pairs(ROWS, "people").splitlines()
    assert table[0] == "| first | minus | images full worse |"
    assert table[2:] == ["| SAM | SGD | +2.00 ± 0.00 |"]


def test_contenders_stand_beside_tuned_sgd_and_the_best_single_one():
    rows = ROWS + made_up("clean labels", 0.05) + made_up("SAM + GCE", 0.03)
    overview = claims.overview(rows, "people").splitlines()
    assert overview[0] == "| contender | images full worse |"
    assert overview[2:] == [
        "| SGD (test accuracy) | 72.00 % |",
        "| SAM | +2.00 ± 0.00 |",
        "| clean labels | +5.00 ± 0.00 |",
        "| SAM + GCE | +3.00 ± 0.00 |",
    ]
    # Where no crossing has run there is no column, and the clean labels are a ceiling, no contender.
    assert claims.crossings(ROWS, "people").startswith("| crossing |\n")
    assert claims.crossings(rows, "people").splitlines()[2:] == [
        "| the best single one | SAM |",
        "| SAM + GCE | +1.00 ± 0.00 |",
    ]


def test_noisy_labels_choose_among_contenders():
    def held_out_more(rows, by):
        return [
            row | {"held_out": row["held_out"] + by} if "held_out" in row else row for row in rows
        ]

    better = held_out_more(made_up("GCE", -0.01), 0.05)
    worse = held_out_more(made_up("SAM + GCE", 0.03), -0.05)
    assert claims.choices(ROWS + better + worse, least=3).splitlines()[2:] == [
        "| images full worse | SGD | SGD | 60.0 | - |",
        "| images full worse | single ones | GCE | 65.0 | -1.00 ± 0.00 |",
        "| images full worse | all | GCE | 65.0 | -1.00 ± 0.00 |",
    ]
    assert len(claims.choices(ROWS + better + worse, least=4).splitlines()) == 2
    best = held_out_more(worse, 0.12)
    assert claims.choices(ROWS + better + best, least=3).splitlines()[3:] == [
        "| images full worse | single ones | GCE | 65.0 | -1.00 ± 0.00 |",
        "| images full worse | all | SAM + GCE | 67.0 | +3.00 ± 0.00 |",
    ]


def test_the_noise_table_has_little_decay_beside_tuned_decay():
    rows = ROWS + made_up("SANER", 0.05) + made_up("GCE", 0.01)
    lines = [line.split(" | ") for line in claims.noises(rows).splitlines()]
    # A trial at ρ = 0.4 and decay 0.0005 has the bonus of its method, and so have the five seeds.
    assert lines[0][:5] == ["| data set", "SGD, little decay", "SAM", "SANER", "SGD, tuned"]
    gains = ["+2.00 ± 0.00", "+5.00 ± 0.00", "+1.00 ± 0.00", "-", "-", "- |"]
    assert lines[2] == ["| images full worse", "60.0 %", "+2.0", "+5.0", "72.0 %", *gains]
    assert (
        claims.noises(ROWS)
        .splitlines()[2]
        .startswith("| images full worse | 60.0 % | +2.0 | - | 72.0 % | +2.00")
    )


def test_the_coordinates_stand_beside_sam_at_the_same_radius():
    rows = []
    for each, level in (("SAM on B, little decay", 0.5), ("SAM, little decay", 0.6)):
        contender = claims.contender(each)
        for trial in trials(contender, NAME):
            row = {"set": NAME, "contender": each, "seed": 0, "memorized": 0.25}
            row |= {"recipe": evidence.changed(trial.recipe), "knobs": trial.knobs._asdict()}
            row |= {"test": level + trial.knobs.rho / 10, "held_out": trial.knobs.rho}
            rows.append(row | {"part": "trial"})
        rows += [rows[-1] | {"part": "final", "seed": seed} for seed in range(5)]
    table = claims.coordinates(rows, NAME).splitlines()
    assert table[2:] == [
        "| B | 51.0 | 52.0 | 54.0 | 58.0 | 0.8 | 58.00 ± 0.00 | 25.0 | - |",
        "| ABC: SAM | 61.0 | 62.0 | 64.0 | 68.0 | 0.8 | 68.00 ± 0.00 | 25.0 | - |",
    ]


def test_the_regret_is_what_the_noisy_labels_missed():
    assert summary.regret(ROWS, NAME, claims.contender("SGD")) == pytest.approx(2.0)
    by_name = {cells[0]: cells for cells in summary.table(ROWS, NAME)}
    assert by_name["SAM"][1:7] == (
        "0.2, 0.01, 0.02",
        "74.00 ± 1.58",
        "+2.00 ± 0.00",
        *by_name["SAM"][4:6],
        "2.00",
    )


def test_trials_that_another_contender_has_asked_for_count_too():
    """Early stopping shares SGD's."""
    shared = [row | {"contender": "early stopping"} for row in made_up("SGD", 0.0)]
    rows = shared + made_up("SAM", 0.02)
    assert claims.radii(rows, NAME) == claims.radii(ROWS, NAME)
    command = decay_figure.Command(Path("runs.jsonl"), Path("none.png"))
    assert list(decay_figure.lines(rows, command)) == [("SGD", 0.0), ("SAM", 0.2)]


def test_of_the_network_that_was_stopped_only_the_accuracy_is_known():
    best = next(row for row in ROWS if row["held_out_best"] == 0.6)
    seeds = [best | {"part": "trial", "seed": seed} for seed in range(1, 5)]
    by_name = {cells[0]: cells for cells in summary.table(ROWS + seeds, NAME)}
    assert by_name["SGD"][4:6] == ("25.0", "0.900")
    assert (by_name["early stopping"][2], *by_name["early stopping"][4:6]) == (
        "70.00 ± 0.00",
        "-",
        "-",
    )


def test_without_runs_nothing_is_published_or_drawn(tmp_path):
    (tmp_path / "table.md").write_text("committed")
    missing = [str(tmp_path / "typo.jsonl"), "--output", str(tmp_path / "x.png")]
    tables = ["--summary", "--tables", str(tmp_path)]
    for program, arguments in (
        (evidence, ["--output", str(tmp_path / "typo"), *tables]),
        (decay_figure, missing),
        (noise_figure, missing),
    ):
        with pytest.raises(SystemExit, match=r"error: .*typo.*: there is no such file\. Give the"):
            program.main(arguments)
    (tmp_path / "runs.jsonl").touch()
    with pytest.raises(SystemExit, match="--tables: there are no runs to publish"):
        evidence.main(["--output", str(tmp_path), *tables])
    with pytest.raises(SystemExit, match="RUNS: there are no runs"):
        noise_figure.main([str(tmp_path / "runs.jsonl"), "--output", str(tmp_path / "x.png")])
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "runs.jsonl"}


def test_other_data_or_other_epochs_in_the_same_folder_are_refused(tmp_path):
    file = tmp_path / "cifar10n_features.npz"
    file.write_bytes(b"some features")
    command = evidence.Command(tmp_path, data=tmp_path)
    runs = evidence.Runs(tmp_path / "runs.jsonl")
    bench = evidence.Bench(NAME, features(), runs, command)
    runs.rows += [row | {"epochs": 60} for row in made_up("SGD", 0.0)]
    runs.rows += [row | {"epochs": 120} for row in made_up("SGD, twice the epochs", 0.0)]
    evidence.Bench(NAME, features(), runs, command)
    # A network that diverged fits nothing and finds nothing.
    diverged = bench._errors(np.full((120, 3), np.nan), np.arange(120))
    assert diverged == {"memorized": 0.0, "clean_fit": 0.0, "auroc": 0.5}
    evidence.Bench("news_full", features(), runs, dataclasses.replace(command, data=None, epochs=2))
    with pytest.raises(DataError, match=r"--epochs: .* with 60 epochs, and now it is 2\. Take"):
        evidence.Bench(NAME, features(), runs, dataclasses.replace(command, epochs=2))
    file.write_bytes(b"other features")
    with pytest.raises(DataError, match=r"--data: .* has another file of 'cifar10n_worse'"):
        evidence.Bench(NAME, features(), runs, command)
    # Published runs come with the digests, and those whose data is not known adopt none.
    published = tmp_path / "published"
    evidence.publish(runs.rows, evidence.read_digests(tmp_path), published)
    copied = dataclasses.replace(command, output=published)
    with pytest.raises(DataError, match=r"--data: .* has another file of 'cifar10n_worse'"):
        evidence.Bench(NAME, features(), runs, copied)
    (published / "data.json").unlink()
    with pytest.raises(DataError, match=r"--output: .*, but no digest of its file in data.json"):
        evidence.Bench(NAME, features(), runs, copied)
    digits = [row | {"set": "digits_symmetric_40", "epochs": 60} for row in made_up("SGD", 0.0)]
    runs.rows[:] = digits
    evidence.Bench("digits_symmetric_40", features(), runs, dataclasses.replace(copied, epochs=60))


def test_a_missing_cleanlab_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence.importlib.util, "find_spec", lambda name: None)
    (dropping, *_) = [one for one in evidence.schedule() if one[1].drops_suspects]
    monkeypatch.setattr(evidence, "schedule", lambda: [dropping])
    command = evidence.Command(tmp_path / "new")
    with pytest.raises(
        DataError, match=r"--contenders: cleanlab is not installed, and these need it: .*suspects"
    ):
        evidence.run(command)
    assert not command.output.exists()
    evidence.run(dataclasses.replace(command, contenders=("SGD",)))


def test_no_epochs_are_refused():
    with pytest.raises(ValueError, match=r"--epochs: 0 is not valid"):
        sets.fitted("news_reduced", features(), 0)


def test_the_trials_stand_by_radius_and_decay():
    table = claims.radii(ROWS, NAME).splitlines()
    assert table[0] == "| method | ρ | decay 0.0005 | decay 0.003 | decay 0.01 | decay 0.02 |"
    assert table[2] == "| SGD | - | 60.0 / 25 | 60.0 / 25 | 70.0 / 25 | 72.0 / 25 |"
    assert table[3:] == [
        "| SAM | 0.1 | 62.0 / 25 | 62.0 / 25 | 62.0 / 25 | 74.0 / 25 |",
        "| SAM | 0.2 | 62.0 / 25 | 62.0 / 25 | 72.0 / 25 | 74.0 / 25 |",
        "| SAM | 0.4 | 62.0 / 25 | 62.0 / 25 | 62.0 / 25 | 74.0 / 25 |",
    ]


def test_the_readings_of_ncsam_stand_beside_sam_at_the_same_radius():
    rows = []
    for each in (*READINGS_OF_NCSAM[:2], *READINGS_OF_NCSAM[-2:]):
        for trial in trials(each, NAME):
            test = 0.5 + trial.knobs.rho / 10 + trial.knobs.strength / 100
            test += (each.passes - 1) / 10  # a longer training is beside SAM in a longer training
            row = {"set": NAME, "contender": each.name, "part": "trial", "test": test, "seed": 0}
            row |= {"recipe": evidence.changed(trial.recipe), "knobs": trial.knobs._asdict()}
            rows.append(row)
    table = claims.readings(rows, NAME).splitlines()
    assert table[2] == "| paper | 0.2 | 52.0 | 51.0 | 51.9 | 52.0 | 52.0 | 52.1 | 53.0 |"
    assert table[4] == "| long | 0.2 | 72.0 | 71.0 | 71.9 | 72.0 | 72.0 | 72.1 | 73.0 |"
    assert len(table) == 2 + 2 * 2


def test_the_figure_has_a_line_per_radius_and_a_mark_per_choice():
    files = {"runs": Path("runs.jsonl"), "output": Path("none.png")}
    command = decay_figure.Command(**files, contenders=("SGD", "SAM"), radii=(0.1, 0.2, 0.4))
    assert list(decay_figure.lines(ROWS, decay_figure.Command(**files)))[1:] == [("SAM", 0.2)]
    weaker = [row | {"knobs": row["knobs"] | {"strength": 0.1}} for row in ROWS]
    assert not decay_figure.lines(weaker, command)  # another strength of the loss is another line
    found = decay_figure.lines(ROWS, command)
    assert list(found) == [("SGD", 0.0), ("SAM", 0.1), ("SAM", 0.2), ("SAM", 0.4)]
    decays = [row["knobs"]["decay"] for row in found["SGD", 0.0]]
    assert decays == [5e-4, 3e-3, 1e-2, 2e-2, 3e-2, 6e-2]
    figure = decay_figure.draw(ROWS, command)
    for axes in figure.axes:
        names = {text.get_text() for text in axes.texts[:4]}
        assert names == {"SGD", "SAM, ρ = 0.1", "SAM, ρ = 0.2", "SAM, ρ = 0.4"}
        heights = [text.get_position()[1] for text in axes.texts[:4]]  # apart: none covers another
        assert np.diff(heights).min() > np.ptp(axes.get_ylim()) / 16
        marks = [container.get_label() for container in axes.containers]
        assert marks == [decay_figure.CHOSEN] * 2
    with pytest.raises(SystemExit, match=r"--set: 'x' is not valid\. Choose from digits"):
        decay_figure.main(["runs.jsonl", "--output", "none.png", "--set", "x"])


def test_the_figure_of_the_noise_rates_has_a_point_per_data_set_that_has_run(monkeypatch):
    kinds = {kind: {} for kind in noise_figure.KINDS} | {
        "by people": {40: NAME, 20: "news_reduced"}
    }
    monkeypatch.setattr(noise_figure, "KINDS", kinds)
    little, tuned = noise_figure.points(ROWS, "by people")
    assert (len(little), len(tuned)) == (1, 1)
    assert little[0] == pytest.approx((40, 2.0, 0.0))
    assert tuned[0] == pytest.approx((40, 2.0, 0.0), abs=1e-9)
    figure = noise_figure.draw(ROWS)
    assert [[name.get_text() for name in axes.texts] for axes in figure.axes] == [["by people"]] * 2


def test_the_committed_runs_have_the_names_that_this_program_gives_them():
    """So that a run with that file in its folder goes on, and the tables can be made again."""
    root = Path(__file__).parents[3] / "docs" / "results" / "frozen_features"
    rows = evidence.read_runs(root / "runs.jsonl")
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows[:: max(len(rows) // 20, 1)]:
        contender = claims.contender(row["contender"])
        (trial,) = (
            trial
            for trial in trials(contender, row["set"])
            if (evidence.changed(trial.recipe), trial.knobs._asdict())
            == (row["recipe"], row["knobs"])
        )
        wanted = (row["part"], row["seed"], row["epochs"])
        assert row["id"] == evidence.run_id(row["set"], contender, trial, *wanted)
    for name in {row["set"] for row in rows}:
        table = (root / f"{name}.md").read_text(encoding="utf-8")
        assert table == summary.markdown(summary.table(rows, name))
        assert re.search(r"^\| SGD \| 0, ", table, re.M)
