"""The sweep over radii of the label-noise example, and what is read off it."""

import csv
import dataclasses
import itertools

import choose_rho
import guidance
import numpy as np
import pytest
import sweep
from data import NUM_TRAIN, load_digits
from output_folder import held
from report import MEASURES
from train import Epoch

SETTINGS = ("method", "rho", "alpha", "kappa", "test")
# Best at 0.2; 0.8 points lower at 0.1; collapsed from 0.4; as good again at 0.02, behind a gap; a much
# better setting of another strength.
SWEPT = [
    ("SGD", "0", "", "", 70.0),
    ("SANER", "0.02", "0.5", "", 89.0),
    ("SANER", "0.05", "0.5", "", 80.0),
    ("SANER", "0.1", "0.5", "", 88.7),
    ("SANER", "0.2", "0.5", "", 89.5),
    ("SANER", "0.4", "0.5", "", 79.4),
    ("SANER", "0.8", "0.5", "", 10.0),
    ("SANER", "0.2", "1", "", 95.1),
    ("SAM", "0.1", "", "", 80.0),
    ("SAM", "0.2", "", "", 85.0),
]


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_guidance_is_read_off_the_sweep(tmp_path):
    with open(tmp_path / "sweep.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*SETTINGS[:4], guidance.TEST, guidance.MEMORIZED])
        writer.writerows([*row[:4], f"{row[4]} ± 0.5", "12.0 ± 1.0"] for row in SWEPT)
    guidance.main(tmp_path / "sweep.csv", tmp_path / "guidance.csv")

    saner, sam = read(tmp_path / "guidance.csv")
    assert list(saner.values()) == [
        "SANER",
        "ρ = 0.2, α = 1",
        "95.1 ± 0.5",
        "12.0 ± 1.0",
        "0.1 to 0.2",
        "from 0.4",
    ]
    assert sam["best"] == "ρ = 0.2"
    assert list(sam.values())[4:] == ["0.2", "none tried"]


def test_sweep_writes_a_row_for_every_setting(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(
        sweep, "compare", lambda config, data: made.append(config) or epochs_of(0.5)
    )
    monkeypatch.setattr(sweep, "FACTORS", (0.5,))
    monkeypatch.setattr(sweep, "OTHERS", [("saner", "alpha", 1.0), ("ncsam", "kappa", 1.0)])
    output = tmp_path / "new" / "sweep.csv"
    sweep.main(sweep.Sweep(methods=("saner",), epochs=1, seeds=(0, 1), output=output))

    rows = read(output)
    assert [(row["method"], row["rho"], row["alpha"], row["kappa"]) for row in rows] == [
        ("SGD", "0", "", ""),
        ("SANER", "0.1", "0.5", ""),
        ("SANER", "0.2", "1", ""),
    ]
    for row in rows:
        assert all(value == "50.0 ± 14.1" for name, value in row.items() if "%" in name)
    assert {path.name for path in output.parent.iterdir()} == {".lock", "sweep.csv"}
    assert "partial" not in capsys.readouterr().out
    assert [(*one.methods, one.rho, one.alpha, one.seeds) for one in made] == [
        ("sgd", 0.0, 0.5, (0, 1)),
        ("saner", 0.1, 0.5, (0, 1)),
        ("saner", 0.2, 1.0, (0, 1)),
    ]


def test_what_was_stopped_goes_on_and_an_earlier_table_stays_until_then(
    tmp_path, monkeypatch, capsys
):
    output, tried = tmp_path / "table.csv", []
    output.write_text("an earlier table")

    def results(config, data):
        tried.append((*config.methods, config.rho))
        if len(tried) in (2, 4 + 2 * choose_rho.FOLDS):  # Ctrl-C
            raise KeyboardInterrupt
        return epochs_of(0.5)

    for program in (sweep, choose_rho):
        monkeypatch.setattr(program, "compare", results)
    monkeypatch.setattr(sweep, "FACTORS", (0.5, 1.0))
    monkeypatch.setattr(sweep, "OTHERS", [])
    settings = sweep.Sweep(methods=("saner",), epochs=1, seeds=(0, 1), output=output)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(settings)
    assert output.read_text() == "an earlier table"
    assert f"{output} is there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--output: .*partial has rows of other settings"):
        sweep.main(dataclasses.replace(settings, epochs=2))
    sweep.main(settings)
    assert tried == [("sgd", 0.0), ("saner", 0.1), ("saner", 0.1), ("saner", 0.2)]
    assert [row["rho"] for row in read(output)] == ["0", "0.1", "0.2"]

    choice = choose_rho.Choice(rhos=(0.1, 0.2), seeds=(0,), output=output)
    with pytest.raises(KeyboardInterrupt):
        choose_rho.main(choice)
    assert len(read(output)) == 3
    choose_rho.main(choice)
    assert [rho for _, rho in tried[4:]] == [0.1] * 5 + [0.2] * 10
    assert [row["rho"] for row in read(output)] == ["0.1", "0.2"]
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "table.csv"}
    (tmp_path / "table.csv.partial").write_text("{")
    with pytest.raises(ValueError, match=r"partial is damaged .* Delete it to begin anew"):
        choose_rho.main(choice)


@pytest.mark.parametrize("program", ["sweep", "choose_rho"])
def test_an_output_that_cannot_be_is_told_before_training(program, tmp_path, monkeypatch):
    start, settings = {
        "sweep": (sweep.main, sweep.Sweep),
        "choose_rho": (choose_rho.main, choose_rho.Choice),
    }[program]
    for module in (sweep, choose_rho):
        monkeypatch.setattr(module, "compare", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ValueError, match=r"--output: .* is a folder\. Name a file in it"):
        start(settings(output=tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--output: .* cannot be written to"):
        start(settings(output=tmp_path / "file" / "table.csv"))
    with held(tmp_path), pytest.raises(BlockingIOError, match=r"--output: .* is in use by process"):
        start(settings(output=tmp_path / "table.csv"))


def epochs_of(*means):
    """The last epoch of runs with two seeds."""
    for mean in means:
        shares = np.array([mean - 0.1, mean + 0.1])
        yield Epoch("saner", 1, 1.0, dict.fromkeys(MEASURES, shares))


def test_a_sweep_of_unknown_methods_is_refused():
    with pytest.raises(ValueError, match=r"--methods: .samm. is not valid\. Did you mean sam\?"):
        sweep.Sweep(methods=("samm",))
    with pytest.raises(ValueError, match=r"--method: .samm. is not valid\. Did you mean sam\?"):
        choose_rho.Choice(method="samm")
    with pytest.raises(ValueError, match=r"--rhos: -1 is not valid\. A radius is at least 0"):
        choose_rho.Choice(rhos=(0.1, -1))
    with pytest.raises(ValueError, match=r"--alphas: 2 is not valid"):
        choose_rho.Choice(alphas=(2,))
    with pytest.raises(ValueError, match="--rhos and --alphas: give at least one of each"):
        choose_rho.Choice(rhos=())


def test_no_test_label_and_no_correct_label_chooses_the_radius():
    data = load_digits("symmetric", 0.4, (7,))
    folds = choose_rho.held_out_folds(data, seed=7)
    assert len(folds) == 5
    assert sum(len(fold.test_labels) for fold in folds) == NUM_TRAIN
    noisy = {
        image.tobytes(): label for image, label in zip(data.inputs, data.labels[0], strict=True)
    }
    for fold in folds:
        assert len(fold.inputs) + len(fold.test_inputs) == NUM_TRAIN
        for images, labels in [(fold.inputs, fold.labels[0]), (fold.test_inputs, fold.test_labels)]:
            assert [noisy[image.tobytes()] for image in images] == labels.tolist()
    held_out = {image.tobytes() for fold in folds for image in fold.test_inputs}
    assert held_out == noisy.keys()


def test_the_smallest_radius_within_one_standard_error_is_chosen(tmp_path, monkeypatch, capsys):
    means = {(0.1, 0.5): 0.5, (0.1, 1.0): 0.5, (0.2, 0.5): 0.54, (0.2, 1.0): 0.55, (0.4, 0.5): 0.58}
    means |= {(0.4, 1.0): 0.58, (0.8, 0.5): 0.1, (0.8, 1.0): 0.1}
    turns = itertools.cycle([-0.1, -0.05, 0.0, 0.05, 0.1])  # the standard error is 3.5 points

    def results(config, data):
        shares = np.array([means[config.rho, config.alpha] + next(turns)])
        yield Epoch("saner", 1, 1.0, {"test_accuracy": shares})

    monkeypatch.setattr(choose_rho, "compare", results)
    output = tmp_path / "new" / "choice.csv"
    choice = choose_rho.Choice(
        rhos=(0.1, 0.2, 0.4, 0.8), alphas=(0.5, 1.0), seeds=(0,), output=output
    )
    choose_rho.main(choice)
    rows = read(output)
    assert len(rows) == 8
    assert list(rows[3].values()) == ["saner", "0.2", "1", "55.00", "3.54"]
    assert capsys.readouterr().out.endswith("saner: rho = 0.2, alpha = 1\n")
