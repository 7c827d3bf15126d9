"""Text as windows of bytes: nothing is lost, nothing is counted twice, no file is in both parts."""

import numpy as np
import pytest

from examples.language_model import data
from tests.examples.language_model.small import write_text


def test_every_byte_but_the_first_of_a_file_is_predicted_once():
    files = [b"abcdefghij", b"k", b"", b"lmnop"]
    windows = data.cut_windows(files, 4)
    batch = data.batch_of(windows, np.arange(len(windows)))
    predicted = batch.labels[batch.weights == 1]
    assert bytes(predicted.astype(np.uint8)) == b"bcdefghij" + b"mnop"
    before = batch.inputs[batch.weights == 1]
    assert bytes(before.astype(np.uint8)) == b"abcdefghi" + b"lmno"
    assert batch.weights.sum() == windows.lengths.sum() == 13
    assert batch.inputs.shape == batch.labels.shape == (4, 4)


def test_an_order_of_training_sees_every_window_once_and_then_another_order():
    windows = data.cut_windows([bytes(range(200))], 10)
    assert len(windows) == 20
    firsts = [
        data.training_batch(windows, 5, seed, step).inputs[:, 0].tolist()
        for seed, step in [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]
    ]
    assert sorted(np.concatenate(firsts[:4])) == list(range(0, 200, 10))
    assert firsts[4] != firsts[0] != firsts[5]
    assert data.training_batch(windows, 5, 0, 4).inputs[:, 0].tolist() == firsts[4]
    data._order.cache_clear()
    for step in range(8):
        data.training_indices(len(windows), 5, 0, step)
    assert data._order.cache_info().misses == 2  # an order is drawn once per pass


def test_evaluation_fills_up_with_windows_that_do_not_count():
    windows = data.cut_windows([bytes(range(200))], 10)
    batches = data.evaluation_batches(windows, 7, 4)
    assert [batch.weights.any(axis=1).sum() for batch in batches] == [4, 3]
    assert {batch.inputs.shape for batch in batches} == {(4, 10)}
    assert batches[0].inputs[0, 0] == 0
    assert batches[1].inputs[2, 0] == 190  # the last window: they are spread over the text
    assert sum(b.weights.any(axis=1).sum() for b in data.evaluation_batches(windows, 99, 4)) == 20


def test_files_are_divided_by_their_names(tmp_path):
    folder = write_text(tmp_path / "text", files=40)
    text = data.load(str(folder), "*", 16, 0.3)
    assert data.load(str(folder), "*", 16, 0.3).digest == text.digest
    names = [f"{number}.txt" for number in range(40)]
    chosen = [name for name in names if data.place(name.encode()) < 0.3]
    assert 4 <= len(chosen) <= 20
    expected = data.cut_windows([(folder / name).read_bytes() for name in sorted(chosen)], 16)
    np.testing.assert_array_equal(text.validation.tokens, expected.tokens)
    assert len(text.train) + len(text.validation) == sum(
        len(data.cut_windows([(folder / name).read_bytes()], 16)) for name in names
    )
    (folder / names[0]).write_bytes(b"something else")
    assert data.load(str(folder), "*", 16, 0.3).digest != text.digest


def test_a_single_file_is_validated_on_its_end(tmp_path):
    (tmp_path / "one.txt").write_bytes(bytes(range(100)))
    text = data.load(str(tmp_path / "one.txt"), "*", 10, 0.2)
    assert text.train.tokens.max() == 79
    assert text.validation.tokens[0, 0] == 80


def test_both_built_in_texts_are_on_board():
    source = data.read("stdlib", "*")
    assert {"dataclasses.py", "json/decoder.py"} <= source.keys()
    assert not any(name.startswith(("test/", "site-packages/", "encodings/")) for name in source)
    manual = data.read("manual", "*")
    assert b"statement" in manual["assert"]


@pytest.mark.parametrize(
    ("name", "pattern", "share", "message"),
    [
        ("nowhere", "*", 0.1, r"--text: '.*nowhere' is no file and no folder.*stdlib or manual"),
        ("text", "*.py", 0.1, r"--text: no file in '.*text' has a name like '\*\.py'.*--pattern"),
        ("text", "*", 1e-9, r"--text: .*12 files, none of them for validation"),
        ("empty.txt", "*", 0.1, r"--text: .*none of them for training"),
    ],
)
def test_a_text_that_is_none_is_refused(name, pattern, share, message, tmp_path):
    write_text(tmp_path / "text")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / name), pattern, 16, share)
