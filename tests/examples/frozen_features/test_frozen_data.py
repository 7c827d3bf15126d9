"""Reading features: what is kept, what is refused, and with which words."""

import errno
import io
import zipfile

import numpy as np
import polars as pl
import pytest

from examples.frozen_features.data import DataError, load, load_inputs, npz
from examples.frozen_features.data.answers import count_votes
from examples.frozen_features.data.features import column_statistics, compact
from tests.examples.frozen_features.frozen_data import arrays


def save(tmp_path, **changes):
    path = tmp_path / "data.npz"
    given = {name: array for name, array in (arrays() | changes).items() if array is not None}
    np.savez(path, **given)
    return path


def refusal(path, **options):
    with pytest.raises(DataError) as caught:
        load(path, **options)
    return str(caught.value)


def test_all_arrays_of_an_npz_are_read(tmp_path):
    data, given = load(save(tmp_path)), arrays()
    for name in ("inputs", "labels", "clean_labels", "test_inputs", "test_labels"):
        np.testing.assert_array_equal(getattr(data, name), given[name])
    assert data.class_names == ("0", "1", "2")
    np.testing.assert_allclose(data.mean, given["inputs"].mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(data.deviation, given["inputs"].std(axis=0), rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_compact_dtypes_stay_as_they_are(dtype):
    assert compact(np.ones((3, 2), dtype), "x").dtype == dtype


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.bool_])
def test_other_numbers_become_float32(dtype):
    assert compact(np.ones((3, 2), dtype), "x").dtype == np.float32


def test_statistics_of_float16_neither_overflow_nor_lose_bits():
    inputs = np.full((10_000, 2), 60_000, np.float16)
    inputs[::2, 1] = 59_000
    mean, deviation = column_statistics(inputs)
    np.testing.assert_allclose(mean, inputs.astype(np.float64).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(deviation, [1.0, inputs[:, 1].astype(float).std()], rtol=1e-6)


def test_other_labels_are_named(tmp_path):
    path = save(tmp_path, second=(arrays()["labels"] + 1) % 3)
    np.testing.assert_array_equal(
        load(path, label_column="second").labels, (load(path).labels + 1) % 3
    )


def test_names_of_classes_may_be_strings(tmp_path):
    names = np.array(["cat", "dog", "eel"])
    given = {key: names[arrays()[key]] for key in ("labels", "clean_labels", "test_labels")}
    data = load(save(tmp_path, **given))
    assert data.class_names == ("cat", "dog", "eel")
    np.testing.assert_array_equal(data.labels, arrays()["labels"])
    given["labels"] = given["labels"].astype("S")
    data = load(save(tmp_path, **given))
    assert data.class_names == ("cat", "dog", "eel")
    np.testing.assert_array_equal(data.labels, arrays()["labels"])
    assert "labels holds bytes that are no UTF-8" in refusal(
        save(tmp_path, labels=np.full(120, b"\xff"))
    )


def test_integers_of_all_kinds_are_named_as_integers(tmp_path):
    test_labels = arrays()["test_labels"].astype(np.uint64)
    assert load(save(tmp_path, test_labels=test_labels)).class_names == ("0", "1", "2")


def test_a_crowd_votes_and_ties_are_told(tmp_path):
    answers = np.full((120, 4), -1, np.int8)
    answers[:, 0] = arrays()["labels"]
    answers[0] = [1, 2, -1, 2]
    answers[1] = [0, 1, -1, -1]
    data = load(save(tmp_path, labels=answers))
    assert data.labels[0] == 2
    assert data.labels[1] in (0, 1)
    np.testing.assert_array_equal(data.labels[2:], arrays()["labels"][2:])
    np.testing.assert_allclose(data.soft_labels[0], [0, 1 / 3, 2 / 3], rtol=1e-6)
    assert data.notes == ("4 annotators: majority vote; 1 ties drawn by lot",)


def test_ties_are_drawn_evenly_and_always_alike():
    answers = np.tile([0, 1], (1000, 1))
    votes = count_votes(answers, "x")
    assert votes.ties == 1000
    assert 400 < votes.labels.sum() < 600
    np.testing.assert_array_equal(votes.labels, count_votes(answers, "x").labels)


def test_answers_may_be_unsigned_and_their_counts_have_to_fit(tmp_path):
    answers = np.array([[0, 1, 1], [2, 0, 2]], np.uint8)
    assert count_votes(answers, "x").labels.tolist() == [1, 2]
    with pytest.raises(DataError, match="no class but -1"):
        count_votes(answers[:0], "x")
    answers = np.zeros((120, 2), np.int16)
    answers[0] = 9_999
    message = refusal(save(tmp_path, labels=answers), memory_limit_gib=0.01)
    assert "counts of 120 rows and 10,000 classes take 0.0 GiB" in message
    assert "--memory-limit-gib" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": None}, ["no array 'labels'", "clean_labels", "Rename"]),
        ({"inputs": np.zeros(3)}, ["inputs", "(3,)", "(rows, features)"]),
        ({"inputs": np.array([["a"]])}, ["dtype <U1", "Convert"]),
        ({"labels": np.zeros(7, int)}, ["labels has 7 rows", "120"]),
        ({"labels": np.zeros(120, int)}, ["only the class 0", "Two"]),
        ({"labels": np.arange(120) - 1}, ["row 0 is -1", "at least 0"]),
        ({"labels": np.arange(120)}, ["120 classes in 120 rows"]),
        ({"labels": np.ones(120)}, ["labels has dtype float64", "integers or strings"]),
        ({"labels": np.full((120, 2), -1)}, ["no class but -1"]),
        ({"labels": np.full((120, 2), -2)}, ["answer -2", "-1 for none"]),
        ({"labels": np.array([[-1, -1]] + [[0, 1]] * 119)}, ["nobody answered 1 rows", "0"]),
        ({"labels": np.array(["a", "b"] * 60)}, ["clean_labels int", "integers or by strings"]),
        ({"test_labels": None}, ["come together"]),
        ({"test_inputs": np.zeros((120, 4))}, ["(120, 4)", "must agree"]),
        ({"labels": np.array([object()] * 120)}, ["pickled objects"]),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, words):
    message = refusal(save(tmp_path, **changes))
    for word in words:
        assert word in message


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_what_is_not_finite_is_refused_by_its_place(tmp_path, value):
    inputs = arrays()["inputs"].astype(np.float64)
    inputs[7, 3] = value
    assert "row 7, column 3" in refusal(save(tmp_path, inputs=inputs))


def test_too_much_is_refused_before_it_is_read(tmp_path):
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 1000)}
    np.lib.format.write_array_header_1_0(header, shape)
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", header.getvalue())
        archive.writestr("labels.npy", header.getvalue())
    assert "--memory-limit-gib" in refusal(path)
    path = save(tmp_path)
    load(path, memory_limit_gib=1e-4)
    assert "more than the 0.0 of --memory-limit-gib" in refusal(path, memory_limit_gib=1e-6)


def test_more_data_than_the_header_says_is_refused(tmp_path):
    path = save(tmp_path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "long.npz", "w") as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name) + b"\0" * (name == "labels.npy"))
    assert "more data than its shape says" in refusal(tmp_path / "long.npz")


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_damaged_file_is_refused(tmp_path, keep):
    path = save(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged" in refusal(path)


def test_a_flipped_byte_is_refused(tmp_path):
    path = save(tmp_path)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(path)


@pytest.mark.parametrize(
    ("raised", "told", "words"),
    [
        (OSError(errno.EIO, "Input/output error"), OSError, "Input/output"),
        (OSError(errno.EINVAL, "Invalid argument"), DataError, "damaged"),
        (MemoryError(), DataError, "do not fit into the memory that is free"),
    ],
)
def test_what_is_no_damage_is_not_called_so(tmp_path, monkeypatch, raised, told, words):
    def fail(*_):
        raise raised

    path = save(tmp_path)
    monkeypatch.setattr(npz, "_read_array", fail)
    with pytest.raises(told, match=words):
        load(path)


def test_paths_that_are_no_data(tmp_path):
    assert "unknown kind of file '.txt'" in refusal(tmp_path / "x.txt")
    assert "no such file" in refusal(tmp_path / "x.npz")
    assert "--memory-limit-gib: 0" in refusal(save(tmp_path), memory_limit_gib=0)


def table():
    given = arrays()
    columns = {f"x{i}": given["inputs"][:, i] for i in range(3)}
    names = np.array(["no", "yes", "maybe"])[given["labels"]]
    return pl.DataFrame(columns | {"label": names, "id": [f"r{i}" for i in range(120)]})


def write(frame, path):
    (frame.write_csv if path.suffix == ".csv" else frame.write_parquet)(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_are_read_by_the_names_of_their_columns(tmp_path, suffix):
    path = write(table(), tmp_path / f"data{suffix}")
    data = load(path, ignore_columns=("id",))
    assert data.columns == ("x0", "x1", "x2")
    assert data.class_names == ("maybe", "no", "yes")
    assert data.inputs.dtype == np.float32
    np.testing.assert_allclose(data.inputs, arrays()["inputs"][:, :3], rtol=1e-5)
    other = write(table().select("id", "x2", "x0", "x1"), tmp_path / f"other{suffix}")
    np.testing.assert_allclose(load_inputs(other, data.columns), data.inputs, rtol=1e-5)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_that_do_not_fit_are_refused(tmp_path, suffix):
    path = write(table(), tmp_path / f"data{suffix}")
    assert "'id' is String" in refusal(path)
    assert "--label-column: 'y' is none" in refusal(path, label_column="y")
    assert "--ignore-columns: 'y' is none" in refusal(path, ignore_columns=("y",))
    assert "--memory-limit-gib" in refusal(path, ignore_columns=("id",), memory_limit_gib=1e-6)
    holes = table().with_columns(
        pl.when(pl.col("id") == "r5").then(None).otherwise("x1").alias("x1")
    )
    write(holes, path)
    holes_message = refusal(path, ignore_columns=("id",))
    assert "'x1'" in holes_message
    with pytest.raises(DataError, match="'x9' is missing"):
        load_inputs(path, ("x0", "x9"))
    path.write_bytes(b"\0\1")
    refusal(path, ignore_columns=("id",))


def test_a_column_of_a_csv_has_the_kind_of_all_its_cells(tmp_path):
    path = tmp_path / "data.csv"
    rows = [f"{i},{i % 2}" for i in range(200)]
    path.write_text("\n".join(["x,label", *rows, "0.5,2nd", "1,2nd"]))
    data = load(path)
    assert data.inputs[-2:, 0].tolist() == [0.5, 1.0]
    assert data.class_names == ("0", "1", "2nd")
    assert load_inputs(path, ("x",))[-2, 0] == 0.5


def test_flags_that_would_do_nothing_are_refused(tmp_path):
    path = save(tmp_path)
    said = refusal(path, clean_label_column="foo")
    assert (
        said
        == "--clean-label-column: 'foo' would do nothing here. An .npz has the array clean_labels."
    )
    assert "--ignore-columns: ('bar',)" in refusal(path, ignore_columns=("bar",))
    assert "--label-column: 'y'" in refusal(None, label_column="y")


def test_an_empty_cell_is_told_by_its_row(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("x,label\n1,a\n,b\n3,a\n")
    assert "column 'x' is empty in row 1" in refusal(path)
    path.write_text("x,label\n1,a\n2,\n3,a\n")
    assert "column 'label' is empty in row 1" in refusal(path)


def test_digits_need_no_file():
    data = load(None)
    assert data.inputs.shape == (1297, 64)
    assert (data.labels != data.clean_labels).sum() == round(0.4 * 1297)
