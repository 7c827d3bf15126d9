"""The sweep over radii of the label-noise example, and what is read off it."""

import csv

import guidance
import pytest
import sweep

SETTINGS = ("method", "rho", "alpha", "kappa", "test")
# Best at 0.2; 1.4 points lower at 0.1; collapsed from 0.4; a better setting of another strength.
SWEPT = [
    ("SGD", "0", "", "", 70.0),
    ("SANER", "0.05", "0.5", "", 80.0),
    ("SANER", "0.1", "0.5", "", 88.7),
    ("SANER", "0.2", "0.5", "", 89.5),
    ("SANER", "0.4", "0.5", "", 79.9),
    ("SANER", "0.8", "0.5", "", 10.0),
    ("SANER", "0.2", "1", "", 90.1),
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
        "90.1 ± 0.5",
        "12.0 ± 1.0",
        "0.1 to 0.2",
        "from 0.4",
    ]
    assert sam["best"] == "ρ = 0.2"
    assert list(sam.values())[4:] == ["0.2", "none tried"]


@pytest.mark.slow
def test_sweep_writes_a_row_for_every_setting(tmp_path, monkeypatch):
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
        assert all(" ± " in value for name, value in row.items() if "%" in name)
    assert [path.name for path in output.parent.iterdir()] == ["sweep.csv"]
