"""The folder of a run, in both programs: one process at a time, checked first, no half file."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import main as label_noise
import output_folder as flat
import pytest
from config import Config as LabelNoise

from examples.image_classification import compare, output_folder, train
from examples.image_classification.config import Config as Images

ROOT = Path(__file__).parents[2]
HELD = """
import sys, time
from pathlib import Path
from examples.image_classification.output_folder import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def run_label_noise(folder):
    label_noise.main(LabelNoise(methods=("sgd",), epochs=1, seeds=(0,), output=folder))


def run_train(folder):
    train.train(Images(subset=64, batch_size=32, width=16, epochs=1, resume=True, output=folder))


def run_compare(folder, monkeypatch):
    monkeypatch.setattr(compare, "read_run", lambda folder: folder)
    monkeypatch.setattr(compare, "group_runs", lambda runs: {})
    compare.compare(compare.Comparison((Path("a"),), folder))


@pytest.fixture(params=["label_noise", "train", "compare"])
def program(request, monkeypatch):
    """Runs a program into a folder; a program that trains or reports fails the test."""

    def too_late(*args, **kwargs):
        raise AssertionError("the folder is looked at too late")

    monkeypatch.setattr(label_noise, "compare", too_late)
    monkeypatch.setattr(train, "_train_from", too_late)
    monkeypatch.setattr(compare, "_report", too_late)
    return {
        "label_noise": run_label_noise,
        "train": run_train,
        "compare": lambda folder: run_compare(folder, monkeypatch),
    }[request.param]


def test_all_programs_have_the_same_file():
    """Each can be copied as one folder."""
    for name, copies in (("output_folder.py", 4), ("interrupts.py", 3)):
        texts = [path.read_text() for path in (ROOT / "examples").glob(f"*/{name}")]
        assert len(texts) == copies
        assert len(set(texts)) == 1


def test_two_processes_in_one_folder(program, tmp_path):
    with flat.held(tmp_path):
        message = rf"--output: .*{tmp_path.name} is in use by process {os.getpid()} on .*another"
        with pytest.raises(BlockingIOError, match=message):
            program(tmp_path)
    with pytest.raises(AssertionError, match="too late"):  # it is free again
        program(tmp_path)


@pytest.mark.parametrize("unwritable", ["a file in its path", "no permission", "a full disk"])
def test_an_unwritable_output_is_found_before_training(unwritable, program, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    if unwritable == "a file in its path":
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "run"
    else:
        number = errno.EACCES if unwritable == "no permission" else errno.ENOSPC

        def refuse(**where):
            raise OSError(number, os.strerror(number), "a name")

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        OSError, match=r"--output: .*run cannot be written to \(.*\)\. Name a folder"
    ):
        program(folder)


@pytest.mark.parametrize("module", [flat, output_folder])
def test_a_killed_process_leaves_no_lock(module, tmp_path):
    command = [sys.executable, "-c", HELD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"process {process.pid} "), module.held(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with module.held(tmp_path):
        pass


@pytest.mark.parametrize("missing", ["the module", "in the file system"])
def test_a_folder_without_locks_is_held_by_a_file(missing, tmp_path, monkeypatch):
    if missing == "the module":
        monkeypatch.setattr(flat, "fcntl", None)
    else:

        def refuse(file, how):
            raise OSError(errno.ENOLCK, "no locks available")

        monkeypatch.setattr(flat.fcntl, "flock", refuse)
    with flat.held(tmp_path):
        message = rf"in use by process {os.getpid()} .*If it has been killed, delete .*\.lock\.held"
        with pytest.raises(BlockingIOError, match=message), flat.held(tmp_path):
            pass
    with flat.held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "epochs.csv"
    flat.write_atomically(path, "old")

    def fail(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left") as error:
        flat.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]

    message = flat.explain(error.value, "python again")
    assert message.startswith(f"{path} could not be written (No space left on device).")
    assert message.endswith("Free some space. Then run:\npython again")
    assert flat.explain(OSError("another"), "python again") == "another"


def test_a_written_file_is_readable_by_whom_the_umask_lets_read(tmp_path):
    for mask, mode in ((0o077, 0o600), (0o022, 0o644)):
        before = os.umask(mask)
        try:
            flat.write_atomically(tmp_path / "epochs.csv", "")
        finally:
            os.umask(before)
        assert (tmp_path / "epochs.csv").stat().st_mode & 0o777 == mode


def test_an_error_behind_the_last_step_of_a_write_stays_itself(tmp_path, monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flat.write_atomically(tmp_path / "epochs.csv", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["epochs.csv"]


def test_a_full_disk_is_a_short_error_with_the_command_that_goes_on(monkeypatch):
    def fail(config, processes):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.csv")

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(SystemExit) as stop:
        train.main(["digits", "--rho", "0.2"])
    assert stop.value.code == (
        "error: metrics.csv could not be written (No space left on device). What was written before "
        f"is unharmed. Free some space. Then run:\n{sys.executable} -m "
        "examples.image_classification.train digits --rho 0.2 --resume"
    )


def test_an_interrupt_ends_with_130_and_the_command_that_goes_on(monkeypatch, tmp_path, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupt)
    monkeypatch.setattr(label_noise, "compare", interrupt)
    flags = ["--output", str(tmp_path / "a run")]
    expected = {
        train.main: f"-m examples.image_classification.train {flags[0]} '{flags[1]}' --resume",
        label_noise.command_line: f"{flags[0]} '{flags[1]}'",
    }
    for program, command in expected.items():
        for again in [[], ["--resume"]] if program is train.main else [[]]:
            with pytest.raises(SystemExit) as stop:
                program([*flags, *again])
            assert stop.value.code == 130
            said = capsys.readouterr().err.splitlines()
            assert said[-2].startswith("interrupted")
            assert said[-1].startswith(sys.executable)
            assert said[-1].endswith(command)


def test_the_settings_name_no_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    for config in (LabelNoise(), Images()):
        with pytest.raises(ValueError, match=r"--output: .*file.* It must be a folder"):
            dataclasses.replace(config, output=tmp_path / "file")
