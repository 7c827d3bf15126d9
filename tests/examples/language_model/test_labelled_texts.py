"""Tables of labelled texts: what is read, what is held out, and what is refused."""

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from examples.language_model import data, labelled, tasks
from examples.language_model.model import pooled
from examples.language_model.tables import Columns, TextError
from tests.examples.language_model.small import config, write_table, write_text

CLEAN = Columns(clean_label="truth")


def load(path, columns=CLEAN, context=16, share=0.3, noise_rate=None):
    return labelled.load(str(path), columns, context, share, noise_rate)


def joined(found):
    """All texts, in the order of the table."""
    parts = zip(found.train, found.validation, strict=True)
    both = labelled.Texts(*(np.concatenate(pair) for pair in parts))
    return both.take(np.argsort(both.rows))


def test_all_kinds_of_tables_give_the_same(tmp_path):
    found = load(write_table(tmp_path / "a.csv"))
    frame = pl.read_csv(tmp_path / "a.csv")
    frame.write_parquet(tmp_path / "a.parquet")
    frame.write_ndjson(tmp_path / "a.jsonl")
    assert {load(tmp_path / f"a.{kind}").digest for kind in ("csv", "parquet", "jsonl")} == {
        found.digest
    }
    assert found.class_names == ("a", "b")
    texts = joined(found)
    lines = frame.rows()
    assert [bytes(row[row >= 0].astype(np.uint8)) for row in texts.tokens] == [
        line[0].encode()[:16] for line in lines
    ]
    assert [found.class_names[label] for label in texts.labels] == [line[1] for line in lines]
    known = [("a", "b", None)[label] for label in texts.clean_labels]
    assert known == [line[2] for line in lines]
    held_out = [line[0] for line in lines if data.place(line[0].encode()[:16]) < 0.3]
    assert len(found.validation) == len(held_out) > 3
    assert [lines[row][0] for row in found.validation.rows] == held_out
    longer = sum(len(line[0]) > 16 for line in lines)
    assert found.notes[-1].startswith(f"{longer} are longer than --context 16 bytes")


def test_integers_may_have_a_point_and_answers_are_counted(tmp_path):
    texts = [f"text {number}" for number in range(40)]
    one, two, three = [3] * 40, [3, 3, 7, None] * 10, [7, 3, 7, 7] * 10
    answers = {"one": one, "two": two, "three": three}
    frame = pl.DataFrame({"words": texts, "truth": [3.0, None, 7.0, float("nan")] * 10} | answers)
    frame.write_parquet(tmp_path / "a.parquet")
    found = load(tmp_path / "a.parquet", Columns("words", "", "truth", ("one", "two", "three")))
    labels = joined(found).labels
    np.testing.assert_array_equal(labels[[0, 1, 2]], [0, 0, 1])
    assert set(labels[3::4]) == {0, 1}  # one answer each: by lot
    assert "10 labels are ties of their answers, drawn by lot" in found.notes
    assert joined(found).clean_labels[:4].tolist() == [0, -1, 1, -1]
    assert found.class_names == ("3", "7")


def test_the_built_in_set_has_forty_percent_wrong_labels():
    found = load("stdlib", context=128, share=0.2)
    texts = joined(found)
    assert found.class_names == labelled.PACKAGES
    assert np.mean(texts.labels != texts.clean_labels) == pytest.approx(0.4, abs=1e-3)
    assert np.bincount(texts.clean_labels).tolist() == [300] * 8
    lines = bytes(texts.tokens[0][texts.tokens[0] >= 0].astype(np.uint8)).decode()
    assert lines.endswith("\n")
    both = {tuple(row) for row in found.train.tokens} & {
        tuple(row) for row in found.validation.tokens
    }
    assert not both


def test_what_is_trained_per_second_are_bytes_of_texts(tmp_path):
    settings = {"text": str(write_table(tmp_path / "a.csv")), "task": "classification"}
    task = tasks.Classification(config(**settings))
    texts = task.texts.train
    lines = (tmp_path / "a.csv").read_text().splitlines()[1:]
    expected = sum(min(lines[row].index(","), 16) for row in texts.rows)
    assert task.trained_bytes(labelled.batch_of(texts, np.arange(len(texts)))) == expected
    task = tasks.Language(
        config(text=str(write_text(tmp_path / "text")), validation_share=0.3), None
    )
    windows = task.text.train
    whole = data.batch_of(windows, np.arange(len(windows)))
    assert task.trained_bytes(whole) == windows.lengths.sum() < whole.inputs.size


def test_texts_that_look_equal_to_the_network_are_in_one_part(tmp_path):
    same = "é" * 8  # 16 bytes
    texts = [f"{same} {number}" for number in range(9)] + [f"text {number}" for number in range(20)]
    frame = pl.DataFrame({"text": texts, "label": (["a", "b"] * 15)[: len(texts)]})
    frame.write_parquet(tmp_path / "a.parquet")
    found = load(tmp_path / "a.parquet", Columns(), share=0.5)
    first = {frozenset(part.rows[part.rows < 9]) for part in (found.train, found.validation)}
    assert first == {frozenset(), frozenset(range(9))}


def test_a_network_that_is_not_finite_has_a_loss_that_is_not(tmp_path):
    """And of a noise rate of zero there are true labels, but no wrong ones."""
    found = load(write_table(tmp_path / "a.csv"), Columns(), noise_rate=0.0)
    part = found.validation.take(np.arange(3))
    logits = np.full((3, 2), np.nan)
    measured = tasks.measures(part, logits, part, logits)
    assert np.isnan(measured["validation_loss"])
    assert measured.keys() == {"validation_loss", "noisy_accuracy", "clean_accuracy", "fitted"}


def test_a_class_that_a_spreadsheet_would_run_is_marked_as_text():
    names = ["=1+1", "-1", "-x", "@x", "a=1"]
    shown = [tasks._in_spreadsheet(name) for name in names]
    assert shown == ["'=1+1", "-1", "'-x", "'@x", "a=1"]


def test_noise_for_a_try_keeps_the_true_labels(tmp_path):
    write_table(tmp_path / "a.csv")
    found = joined(load(tmp_path / "a.csv", Columns(), noise_rate=0.25))
    given = joined(load(tmp_path / "a.csv", Columns()))
    np.testing.assert_array_equal(found.clean_labels, given.labels)
    assert (found.labels != given.labels).sum() == 10
    assert set(given.clean_labels) == {-1}
    with_truth = joined(load(tmp_path / "a.csv", noise_rate=0.25))
    np.testing.assert_array_equal(
        with_truth.clean_labels, joined(load(tmp_path / "a.csv")).clean_labels
    )


def test_true_classes_may_be_known_nowhere(tmp_path):
    columns = {"text": [f"text {number}" for number in range(40)], "label": [1, 2] * 20}
    frame = pl.DataFrame(columns | {"truth": [None] * 40})
    frame.write_csv(tmp_path / "a.csv")
    frame.write_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        found = load(tmp_path / name)
        assert found.class_names == ("1", "2")
        assert joined(found).labels.tolist() == [0, 1] * 20
        assert set(joined(found).clean_labels) == {-1}


def test_what_stands_behind_a_text_does_not_count():
    x = jnp.arange(24.0).reshape(2, 4, 3)
    is_text = jnp.array([[True, True, False, False], [True] * 4])
    mean, last = (pooled(x, is_text, pooling) for pooling in ("mean", "last"))
    np.testing.assert_allclose(mean, [x[0, :2].mean(axis=0), x[1].mean(axis=0)])
    np.testing.assert_allclose(last, [x[0, 1], x[1, 3]])


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        (
            "a.txt",
            "text,label\na,b\n",
            {},
            r"--text: .*a\.txt' is not valid. A table is \.csv, \.par",
        ),
        ("a.csv", None, {}, r"--text: '.*a\.csv' is no file. Name one, or stdlib"),
        ("a.csv", "", {}, r"a\.csv cannot be read as \.csv: .*Write it again"),
        (
            "a.parquet",
            "no parquet",
            {},
            r"a\.parquet cannot be read as \.parquet: .*Write it again",
        ),
        ("a.jsonl", "{", {}, r"a\.jsonl cannot be read as \.jsonl: .*Write it again"),
        (
            "a.csv",
            "words,label\na,b\n",
            {"text": "word"},
            r"--text-column: .*no column 'word'\. Did you mean words\? It has words, label\.",
        ),
        ("a.csv", "text,y\na,b\n", {}, r"--label-column: .* no column 'label'\. It has text, y\."),
        ("a.csv", "text\na\n", {"answers": ("one",)}, r"--answer-columns: .* no column 'one'"),
        (
            "a.csv",
            "text,label\na,b\nb,\n",
            {},
            r"has no 'label' in 1 rows, the first is row 1\. Rem",
        ),
        ("a.csv", "text,label\n,b\nb,c\n", {}, r"has no text in 1 rows, the first is row 0\. Rem"),
        (
            "a.csv",
            "text,label\na,0.5\nb,1\n",
            {},
            r"column 'label' of .* is Float64\. Name classes by",
        ),
        (
            "a.jsonl",
            '{"text": 1, "label": 2}',
            {},
            r"--text-column: 'text' in .* is Int64\. Name a",
        ),
        ("a.csv", "text,label\n", {}, r"--text: .*a\.csv has no rows\. Give"),
        ("a.csv", "text,label\na,b\nb,b\n", {}, r"all labels in '.*a\.csv' are b\. Two classes"),
        (
            "a.csv",
            "text,label\na,b\nb,c\nd,e\n",
            {},
            r"has 3 different labels for 3 texts.*--label-col",
        ),
        (
            "a.csv",
            "text,label\na,b\na,c\n",
            {},
            r"has 2 texts, none of them for (training|validation)",
        ),
        (
            "a.csv",
            "text,label,t\na,1,x\nb,2,y\n",
            {"clean_label": "t"},
            r"--clean-label-column: 't' in .* names classes by strings, the labels by integers",
        ),
        (
            "a.csv",
            "text,one,two\na,1,\nb,,\n",
            {"answers": ("one", "two")},
            r"--answer-columns: nobody answered 1 rows of .*, the first is row 1\. Remove",
        ),
        (
            "a.csv",
            "text,one,two\na,1,x\nb,2,y\n",
            {"answers": ("one", "two")},
            r"--answer-columns: some of .* are integers, others strings\. Take one for all",
        ),
    ],
)
def test_a_table_that_is_none_is_refused(name, content, columns, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=message):
        load(tmp_path / name, Columns(**columns))
