"""Checkpoints: the same bits back, or a refusal that says why."""

import os
import resource
import shutil
from typing import NamedTuple

import ml_dtypes
import numpy as np
import optax
import pytest

from examples.image_classification.checkpoints import (
    CheckpointError,
    CheckpointNotSaved,
    Checkpoints,
)


class State(NamedTuple):
    params: dict
    opt_state: object


def state(dtype=np.float32, seed=0):
    params = {
        "layer": {"kernel": np.random.default_rng(seed).normal(size=(4, 3)).astype(dtype)},
        "half": np.arange(3).astype(ml_dtypes.bfloat16),
        "count": np.array(7, np.int32),
    }
    return State(params, (optax.EmptyState(), optax.TraceState(trace={"x": np.ones(2)})))


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield opened
    opened.close()


def reopened(checkpoints):
    checkpoints.close()
    return Checkpoints(checkpoints.folder, keep=2)


def test_the_same_bits_come_back(checkpoints):
    assert checkpoints.restore(state()) is None
    assert checkpoints.latest() is None
    checkpoints.save(3, state(), {"rows": [{"loss": 0.1}]})
    found = reopened(checkpoints).restore(state(seed=1))
    assert found.epoch == 3
    assert found.record["rows"] == [{"loss": 0.1}]
    assert isinstance(found.state, State)
    for name in ("half", "count"):
        assert found.state.params[name].dtype == state().params[name].dtype
    kernel = found.state.params["layer"]["kernel"]
    assert kernel.tobytes() == state().params["layer"]["kernel"].tobytes()
    assert found.state.opt_state[1].trace["x"].tolist() == [1, 1]


def test_a_relative_folder_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = Checkpoints(tmp_path.relative_to(tmp_path) / "relative", keep=1)
    opened.save(1, state(), {})
    assert (tmp_path / "relative" / "1").is_dir()
    opened.close()


def test_old_ones_are_removed(checkpoints):
    for epoch in (1, 2, 3):
        checkpoints.save(epoch, state(), {})
    names = {path.name for path in checkpoints.folder.iterdir() if path.is_dir()}
    assert names == {"2", "3"}
    assert checkpoints.latest() == checkpoints.folder / "3"


def test_another_dtype_is_refused_not_cast(checkpoints):
    checkpoints.save(1, state(), {})
    with pytest.raises(
        CheckpointError, match=r"kernel is float32\[4, 3\].*float16\[4, 3\] in this"
    ):
        checkpoints.restore(state(np.float16))


def test_another_structure_is_refused(checkpoints):
    checkpoints.save(1, state(), {})
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint"):
        checkpoints.restore({"new": np.ones(2)})


def largest_file(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_the_arrays_is_refused(checkpoints):
    big = {"x": np.random.default_rng(0).normal(size=5000)}  # incompressible
    checkpoints.save(1, big, {})
    checkpoints.save(2, big, {})
    damage(largest_file(checkpoints.folder / "2" / "state"))
    message = r"checkpoints/2 is refused: .*Delete this folder to go on from epoch 1"
    with pytest.raises(CheckpointError, match=message):
        reopened(checkpoints).restore(big)


def test_a_changed_digit_in_the_record_is_refused(checkpoints):
    checkpoints.save(1, state(), {"rows": [{"loss": 0.25}]})
    path = checkpoints.folder / "1" / "record" / "metadata"
    text = path.read_text()
    assert "0.25" in text
    path.write_text(text.replace("0.25", "0.35"))
    with pytest.raises(CheckpointError, match=r"record is damaged.*begin anew"):
        reopened(checkpoints).restore(state())


def test_an_empty_folder_is_refused_not_taken_for_the_latest(checkpoints):
    checkpoints.save(1, state(), {})
    (checkpoints.folder / "5").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoints/5 is refused.*go on from epoch 1"):
        reopened(checkpoints).restore(state())


def test_a_renamed_or_copied_folder_is_refused(checkpoints):
    """An older state under a newer name would be trained as if it were the newer one."""
    checkpoints.save(1, state(), {})
    checkpoints.save(2, state(), {})
    shutil.copytree(checkpoints.folder / "2", checkpoints.folder / "7")
    message = r"checkpoints/7 is refused: it is that of epoch 2, renamed.*to go on from epoch 2"
    with pytest.raises(CheckpointError, match=message):
        reopened(checkpoints).restore(state())
    shutil.rmtree(checkpoints.folder / "2")
    with pytest.raises(CheckpointError, match=r"checkpoints/7 is refused.*to go on from epoch 1"):
        reopened(checkpoints).restore(state())


def test_a_copy_under_a_name_that_is_no_number_is_ignored(checkpoints):
    checkpoints.save(1, state(), {})
    shutil.copytree(checkpoints.folder / "1", checkpoints.folder / "1 (copy)")
    assert reopened(checkpoints).restore(state()).epoch == 1


def test_the_arrays_of_another_checkpoint_are_refused(checkpoints):
    checkpoints.save(1, state(seed=1), {})
    checkpoints.save(2, state(seed=2), {})
    shutil.rmtree(checkpoints.folder / "2" / "state")
    shutil.copytree(checkpoints.folder / "1" / "state", checkpoints.folder / "2" / "state")
    with pytest.raises(CheckpointError, match=r"arrays are damaged.*go on from epoch 1"):
        reopened(checkpoints).restore(state())


def test_a_full_disk_is_one_short_error(checkpoints, capfd, caplog):
    """A limit on the size of files stands for it; orbax's threads would print 100 lines."""
    checkpoints.save(1, state(), {})
    big = {str(n): np.random.default_rng(n).normal(size=50_000) for n in range(9)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(CheckpointNotSaved) as error:
            checkpoints.save(2, big, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == (
        f"the checkpoint of epoch 2 could not be written in {checkpoints.folder} (File too large). "
        f"The last one, {checkpoints.folder / '1'}, is unharmed. Free some space."
    )
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert reopened(checkpoints).restore(state()).epoch == 1


def test_any_error_of_orbax_names_the_last_good_checkpoint(checkpoints, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: " + "long " * 1000)

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(CheckpointNotSaved, match=r"\(ValueError: RESOURCE.*no earlier") as error:
        checkpoints.save(2, state(), {})
    assert len(str(error.value)) < 500


def test_what_a_killed_save_leaves_is_ignored(checkpoints):
    checkpoints.save(1, state(), {})
    left = checkpoints.folder / "2.orbax-checkpoint-tmp-0"
    left.mkdir()
    (left / "half").write_bytes(os.urandom(10))
    assert reopened(checkpoints).restore(state()).epoch == 1


def test_a_save_that_would_be_dropped_is_an_error(checkpoints):
    checkpoints.save(2, state(), {})
    with pytest.raises(CheckpointError, match=r"epoch 1 was not saved in .*\[2\].*--output"):
        checkpoints.save(1, state(), {})


def test_the_record_is_checked_before_the_arrays(checkpoints):
    """Other settings give other shapes; the settings are what the user can mend."""
    checkpoints.save(1, state(), {"rho": 0.1})

    def check(record):
        raise ValueError(f"rho was {record['rho']}")

    with pytest.raises(ValueError, match=r"rho was 0\.1"):
        checkpoints.restore({"another": np.zeros(3)}, check)
