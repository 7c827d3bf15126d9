"""A table of labelled texts: CSV, Parquet or JSON lines, read by polars and checked."""

import dataclasses
import difflib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

KINDS = (".csv", ".parquet", ".jsonl", ".ndjson")


class TextError(ValueError):
    """Texts that cannot be used; the message says which, and the remedy."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """The names of the columns; see config.py."""

    text: str = "text"
    label: str = "label"
    clean_label: str | None = None
    answers: tuple[str, ...] = ()


class Known(NamedTuple):
    """Labels of which some may be missing.

    Attributes:
      values: integers or strings, shape ``(n,)``.
      is_known: bools, shape ``(n,)``; where False, the value means nothing.
    """

    values: np.ndarray
    is_known: np.ndarray


class Table(NamedTuple):
    """What is in a file.

    Attributes:
      texts: the texts, none of them empty.
      labels: integers or strings, shape ``(n,)``.
      clean_labels: the true ones, where they are known; None without such a column.
      notes: what the reader should know.
    """

    texts: list[str]
    labels: np.ndarray
    clean_labels: Known | None
    notes: tuple[str, ...]


def read(path: Path, columns: Columns) -> Table:
    """Reads a table and checks all of it.

    Args:
      path: a ``.csv``, ``.parquet``, ``.jsonl`` or ``.ndjson`` file.
      columns: the names of its columns. With ``answers`` the label is the one that most people gave; a
        tie is drawn by lot, always the same way.

    Raises:
      TextError: with the file or flag at fault, what was found, and the remedy.
    """
    named = {"--text-column": (columns.text,)}
    if columns.answers:
        named["--answer-columns"] = columns.answers
    else:
        named["--label-column"] = (columns.label,)
    if columns.clean_label is not None:
        named["--clean-label-column"] = (columns.clean_label,)
    frame = _read(path, named)
    if frame[columns.text].dtype != pl.String:
        raise TextError(
            f"--text-column: {columns.text!r} in {path} is {frame[columns.text].dtype}. Name a column "
            "of texts."
        )
    texts = frame[columns.text].to_list()
    if empty := [row for row, text in enumerate(texts) if not text]:
        raise TextError(
            f"--text: {path} has no text in {len(empty):,} rows, the first is row {empty[0]}. Remove "
            "them."
        )
    notes: tuple[str, ...] = ()
    if columns.answers:
        labels, ties = _most_answers([_labels(frame, name, path) for name in columns.answers], path)
        notes = (f"{ties:,} labels are ties of their answers, drawn by lot",) if ties else ()
    else:
        labels, is_known = _labels(frame, columns.label, path)
        if not is_known.all():
            raise TextError(
                f"--text: {path} has no {columns.label!r} in {np.sum(~is_known):,} rows, the first is "
                f"row {np.argmin(is_known)}. Remove them."
            )
    clean = None
    if columns.clean_label is not None:
        clean = _labels(frame, columns.clean_label, path)
        if not clean.is_known.any():  # a column without a value has no kind
            clean = Known(labels, clean.is_known)
        if clean.values.dtype.kind != labels.dtype.kind:
            raise TextError(
                f"--clean-label-column: {columns.clean_label!r} in {path} names classes by "
                f"{_kind(clean.values)}, the labels by {_kind(labels)}. Take one for both."
            )
    return Table(texts, labels, clean, notes)


def _read(path: Path, named: dict[str, tuple[str, ...]]) -> pl.DataFrame:
    kind = path.suffix.lower()
    if not path.is_file():
        raise TextError(f"--text: {str(path)!r} is no file. Name one, or stdlib.")
    if kind not in KINDS:
        raise TextError(f"--text: {str(path)!r} is not valid. A table is {', '.join(KINDS)}.")
    (text_column,) = named["--text-column"]
    try:
        if kind == ".csv":  # texts that look like numbers stay texts
            found = pl.scan_csv(path, infer_schema=False).collect_schema()
            types = {text_column: pl.String} if text_column in found else None
            frame = pl.read_csv(path, infer_schema_length=None, schema_overrides=types)
        elif kind == ".parquet":
            frame = pl.read_parquet(path)
        else:
            frame = pl.read_ndjson(path, infer_schema_length=None)
    except (pl.exceptions.PolarsError, OSError) as error:
        found = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise TextError(
            f"--text: {path} cannot be read as {kind}: {found.rstrip('.')}. Write it again."
        ) from error
    for flag, names in named.items():
        for name in names:
            if name not in frame.columns:
                near = difflib.get_close_matches(name, frame.columns, n=1)
                hint = f"Did you mean {near[0]}? " if near else ""
                known = ", ".join(frame.columns[:8])
                raise TextError(f"{flag}: {path} has no column {name!r}. {hint}It has {known}.")
    if frame.is_empty():
        raise TextError(f"--text: {path} has no rows. Give it texts and labels.")
    return frame.select(list(dict.fromkeys(name for names in named.values() for name in names)))


def _labels(frame: pl.DataFrame, name: str, path: Path) -> Known:
    """A column of classes; whole numbers with a point are integers, as other programs write them."""
    column = frame[name]
    if column.dtype.is_float():
        column = column.fill_nan(None)
    elif column.dtype == pl.String:
        column = column.replace("", None)
    is_known = column.is_not_null().to_numpy()
    if column.dtype.is_float() and (column.drop_nulls() == column.drop_nulls().round()).all():
        column = column.cast(pl.Int64, strict=False)
    if column.dtype.is_integer() or column.dtype == pl.Boolean:
        return Known(column.cast(pl.Int64).fill_null(0).to_numpy(), is_known)
    if column.dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null):
        return Known(np.array(column.cast(pl.String).fill_null("").to_list(), str), is_known)
    raise TextError(
        f"--text: column {name!r} of {path} is {column.dtype}. Name classes by integers or strings."
    )


def _most_answers(answers: list[Known], path: Path) -> tuple[np.ndarray, int]:
    """The label with most answers in every row, and how many rows are ties."""
    if len({known.values.dtype.kind for known in answers if known.is_known.any()}) > 1:
        raise TextError(
            f"--answer-columns: some of {path} are integers, others strings. Take one for all."
        )
    is_known = np.stack([known.is_known for known in answers], axis=1)
    if not is_known.any(axis=1).all():
        silent = np.flatnonzero(~is_known.any(axis=1))
        raise TextError(
            f"--answer-columns: nobody answered {len(silent):,} rows of {path}, the first is row "
            f"{silent[0]}. Remove them."
        )
    values = [known.values for known in answers if known.is_known.any()]
    is_known = is_known[:, is_known.any(axis=0)]
    values = np.stack(values, axis=1)
    classes = np.unique(values[is_known])
    counts = np.stack([((values == c) & is_known).sum(axis=1) for c in classes], axis=1)
    most = counts == counts.max(axis=1, keepdims=True)
    lot = np.random.default_rng(0).random(counts.shape)
    labels = classes[np.where(most, lot, -1.0).argmax(axis=1)]
    return labels, int((most.sum(axis=1) > 1).sum())


def _kind(labels: np.ndarray) -> str:
    return "integers" if labels.dtype.kind == "i" else "strings"
