"""What the programs say to their users: help, errors, tables; and that their advice can be followed."""

import contextlib
import csv
import functools
import io
import re
import shlex
import sys
from pathlib import Path

import choose_rho
import guidance
import main as label_noise
import numpy as np
import pytest
import report
import sweep
import tyro
from config import Config
from methods import METHODS
from train import Epoch

from benchmarks import cost, tpu
from docs import pictures
from examples import batch_norm_and_dropout, plain_step
from examples.frozen_features import (
    compare_suspects,
    decay_figure,
    evidence,
    fit,
    noise_figure,
    predict,
)
from examples.image_classification import compare, train, train_nnx
from examples.image_classification import study as image_study
from examples.image_classification.config import Config as ImageConfig
from examples.image_classification.presets import PRESETS
from examples.language_model import compare as compare_texts
from examples.language_model import study
from examples.language_model import train as language_model

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPT = "examples/label_noise/main.py"


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """A terminal of 80 columns, in which the label-noise program was started from the repository."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [SCRIPT])


@pytest.fixture
def said(capsys):
    """Runs a command line that ends by itself: its exit code, and what it printed, without boxes."""

    def run(program, *arguments):
        with pytest.raises(SystemExit) as stop:
            program(list(arguments))
        out, err = capsys.readouterr()
        code = stop.value.code
        if isinstance(code, str):  # Python prints it and ends with 1
            code, err = 1, err + code
        assert all(len(line) <= 80 for line in out.splitlines() if line.startswith(("╭", "│")))
        return code, " ".join(re.sub("[│╭╮╰╯─]", " ", out + err).split())

    return run


def help_of(script):
    return lambda arguments: tyro.cli(script, args=arguments)


PROGRAMS = {
    f"python -m {train.PROGRAM}": train.main,
    compare.PROGRAM: compare.main,
    f"python -m {language_model.PROGRAM}": language_model.main,
    compare_texts.PROGRAM: compare_texts.main,
    f"python {SCRIPT}": label_noise.command_line,
}


def without_arguments(main):
    """A program that reads its command line itself."""

    def program(arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["program.py", *arguments])
            main()

    return program


# Every program that takes flags, but docs/look.py, which needs a browser.
SCRIPTS = {
    "benchmarks/cost.py": cost.main,
    "benchmarks/tpu.py": tpu.main,
    "docs/pictures.py": without_arguments(pictures.main),
    "examples/plain_step.py": help_of(plain_step.main),
    "examples/batch_norm_and_dropout.py": help_of(batch_norm_and_dropout.main),
    "examples/label_noise/main.py": label_noise.command_line,
    "examples/label_noise/guidance.py": help_of(guidance.main),
    "examples/label_noise/sweep.py": help_of(sweep.Sweep),
    "examples/label_noise/choose_rho.py": help_of(choose_rho.Choice),
    "examples/frozen_features/compare_suspects.py": compare_suspects.main,
    "examples/frozen_features/decay_figure.py": decay_figure.main,
    "examples/frozen_features/evidence.py": evidence.main,
    "examples/frozen_features/fit.py": fit.main,
    "examples/frozen_features/noise_figure.py": noise_figure.main,
    "examples/frozen_features/predict.py": predict.main,
    "examples/image_classification/compare.py": compare.main,
    "examples/image_classification/study.py": image_study.main,
    "examples/image_classification/train.py": train.main,
    "examples/image_classification/train_nnx.py": help_of(train_nnx.Config),
    "examples/language_model/compare.py": compare_texts.main,
    "examples/language_model/study.py": study.main,
    "examples/language_model/train.py": language_model.main,
}


@functools.cache
def flags_of(script):
    """All flags in a program's help."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        SCRIPTS[script](["--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]*", out.getvalue()))


def test_train_help_shows_all_settings_and_all_options(said):
    code, text = said(train.main, "--help")
    assert code == 0
    for name in PRESETS:
        assert f"- {name}: " in text
    for name in (*ImageConfig.__dataclass_fields__, *train.Processes.__dataclass_fields__):
        assert f"--{name.replace('_', '-')}" in text
    assert said(train.main, "saner-cifar10", "--help")[1].count("(default: preact_resnet18)") == 1


def test_guidance_help_works(said):
    code, text = said(SCRIPTS["examples/label_noise/guidance.py"], "--help")
    assert code == 0
    assert "that sweep.py has written" in text


@pytest.mark.parametrize("content", ["", "method,rho\n", "method,rho\nSAM,0.1\n", "a,b\n1,2\n"])
def test_guidance_refuses_another_file(content, tmp_path):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(
        ValueError, match=r"a\.csv is not a complete table of a sweep, with the col"
    ):
        guidance.main(tmp_path / "a.csv", tmp_path / "b.csv")


@pytest.mark.parametrize(
    ("program", "arguments", "code", "message"),
    [
        (train.main, "--method samm", 2, "--method: 'samm' is not valid. Did you mean sam?"),
        (train.main, "--rho -1", 2, "--rho: -1.0 is not valid. It is finite and at least 0."),
        (
            train.main,
            "saner-cifar",
            1,
            "'saner-cifar' names no settings. Did you mean saner-cifar10",
        ),
        (train.main, "--rhoo 1", 2, "Perhaps you meant: --rho FLOAT"),
        (
            train.main,
            "--batch-size 5000",
            1,
            "error: --batch-size: 5000 is more than the 1297 training examples.",
        ),
        (train.main, "--data /nowhere", 1, "error: /nowhere does not exist. Give a folder with"),
        (label_noise.command_line, "--methods samm", 2, "'samm' is not valid. Did you mean sam?"),
        (label_noise.command_line, "--noise pairflip", 2, "invalid choice 'pairflip'"),
        (language_model.main, "--method samm", 2, "'samm' is not valid. Did you mean sam?"),
        (language_model.main, "--text /nowhere", 1, "error: --text: '/nowhere' is no file and no"),
        (compare_texts.main, "/nowhere", 1, "error: /nowhere holds no finished run: results.json"),
        (compare.main, "/nowhere", 1, "error: /nowhere cannot be compared (no run): results.json"),
        (compare.main, "", 1, "error: no runs are given. Name the folders of finished runs."),
        (compare.main, "a --output a", 1, "error: no runs are given besides --output a. Name the"),
    ],
)
def test_errors_can_be_followed(program, arguments, code, message, said):
    found, text = said(program, *arguments.split())
    assert found == code
    assert message in text
    assert "dummy" not in text
    advised = re.findall(r"For full helptext, (?:run|see) (python .*? --help)", text)
    assert bool(advised) == (code == 2)
    for command in advised:
        (start,) = [start for start in PROGRAMS if command.startswith(start)]
        assert PROGRAMS[start] is program
        assert said(program, *shlex.split(command.removeprefix(start)))[0] == 0
    if hint := re.search(r"Did you mean ([\w-]+)\?", text):
        assert hint[1] in METHODS | PRESETS


FOLDERS = ["label_noise", "frozen_features", "image_classification", "language_model"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_flag_in_a_message_exists(folder):
    """In a program of the same folder."""
    known = {"--help"}.union(*(flags_of(s) for s in SCRIPTS if s.startswith(f"examples/{folder}/")))
    for path in (EXAMPLES / folder).glob("*.py"):
        named = set(re.findall(r"--[a-z][a-z-]*[a-z]", path.read_text(encoding="utf-8")))
        assert named <= known, path.name


def documented_commands():
    """(page, program, flags) of the command lines in fences and in code font."""
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "llms.txt")]
    pages += [*EXAMPLES.rglob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        if "_build" in page.parts:
            continue
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        fence = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
        lines = [line for block in fence.findall(text) for line in block.splitlines()]
        lines += [code.replace("\n", " ") for code in re.findall("`([^`]+)`", fence.sub("", text))]
        for command in (part for line in lines for part in re.split(r"&&|[;|#]", line)):
            if found := re.search(r"\bpython3? (-m )?((?:examples|benchmarks|docs)\b\S*)", command):
                module, program = found.groups()
                script = program.replace(".", "/") + ".py" if module else program
                flags = re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", command[found.end() :])
                yield page.relative_to(ROOT).as_posix(), script, set(flags)


def test_every_documented_command_is_one():
    commands = list(documented_commands())
    assert len(commands) > 80
    for page, script, flags in commands:
        assert (ROOT / script).is_file(), (page, script)
        assert flags <= (flags_of(script) if script in SCRIPTS else set()), (page, script)


def epochs_of(config):
    """Results as wide as they come."""
    shares = np.array([1.0, 0.7])
    measures = dict.fromkeys(report.MEASURES, shares)
    return [Epoch(name, 1, 12.0, measures) for name in config.methods]


def test_the_table_fits_into_80_columns(capsys):
    config = Config(methods=tuple(METHODS), epochs=1, seeds=(0, 1))
    report.print_table(config, epochs_of(config))
    printed = capsys.readouterr().out
    rule = next(number for number, line in enumerate(printed.splitlines()) if "─" in line)
    title, header = printed.splitlines()[: rule - 2], printed.splitlines()[rule - 2 : rule]
    assert " ".join(" ".join(title).split()) == report._title(config)
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert header[1].split() == ["method", *("epoch [%] " * 2 + "[%] fitted [%] / SGD").split()]
    rows = [line for line in printed.splitlines()[rule + 1 :] if line.strip()]
    assert len(rows) == len(METHODS)  # none is broken
    for row, method in zip(rows, METHODS.values(), strict=True):
        assert row.split("  ")[0].strip() == method.label
        assert row.count("85.0 ± 21.2") == 4


def test_the_progress_fits_into_80_columns(capsys):
    config = Config(methods=("looksam_saner", "friendly_sam_saner"), epochs=1, seeds=(0, 1))
    with report.live_progress(config) as show:
        for epoch in epochs_of(config):
            show(epoch)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.rstrip().endswith("memorized 85%") for line in lines)


def test_compare_says_where_its_files_went_and_fits_into_80_columns(tmp_path, capsys, monkeypatch):
    runs = {
        name: [compare.FinishedRun(Path(str(seed)), results(seed), rows()) for seed in (0, 1)]
        for name in ("sgd", "saner, noise human:worse, rho 0.1, down_weight_warmup 0.25")
    }
    monkeypatch.setattr(compare, "read_run", lambda folder: folder)
    monkeypatch.setattr(compare, "group_runs", lambda _: runs)
    compare.main(["a", "b", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out.splitlines()
    files = "table.md, table.csv, curves.png, points.png"
    assert printed[-1] == f"files in {tmp_path / 'out'}: {files}"
    table = printed[: next(n for n, line in enumerate(printed) if line.startswith("files"))]
    assert all(len(line) <= 80 for line in table)
    rule = next(number for number, line in enumerate(table) if "─" in line)
    assert sum(bool(line.strip()) for line in table[:rule]) == 2
    assert sum("85.0 ± 21.2" in line for line in table) == 2
    assert len(list(csv.reader(io.StringIO((tmp_path / "out" / "table.csv").read_text())))) == 3


def results(seed):
    shares = {"epoch": 1, "test_accuracy": 1.0 - 0.3 * seed, "clean_fit": 1.0, "memorized": 1.0}
    return {
        "config": {"method": "sgd", "seed": seed},
        "last": shares,
        "best": shares,
        "labels_sha256": "a",
    }


def rows():
    return [{"epoch": 1, "test_accuracy": 1.0, "memorized": 1.0, "images_per_second": 12345.0}]
