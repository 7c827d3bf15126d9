"""Features in the columns of a CSV or Parquet file."""

from pathlib import Path

import numpy as np
import polars as pl

from .features import DataError, Features, assemble, compact


def read(
    path: Path,
    limit: int,
    label_column: str,
    clean_label_column: str | None,
    ignore_columns: tuple[str, ...],
) -> Features:
    """Reads a table; every other column is a feature.

    Args:
      path: a ``.csv`` or ``.parquet`` file.
      limit: bytes of memory that the features may take.
      label_column: the column with the labels, integers or strings.
      clean_label_column: a column with correct labels, if there is one.
      ignore_columns: columns that are no features.

    Returns:
      The data set, with float32 features.

    Raises:
      DataError: for missing columns, text where numbers are needed, and empty cells.
    """
    table, schema = _open(path)
    labels = [name for name in (label_column, clean_label_column) if name is not None]
    for flag, names in (
        ("--label-column", (label_column,)),
        ("--clean-label-column", labels[1:]),
        ("--ignore-columns", ignore_columns),
    ):
        for name in names:
            if name not in schema:
                known = ", ".join(list(schema)[:8])
                raise DataError(
                    f"{path}: {flag}: {name!r} is none of its columns {known}. Name one."
                )
    columns = tuple(name for name in schema if name not in (*labels, *ignore_columns))
    inputs = _inputs(table, schema, columns, path, limit)
    given = [_labels(table, schema, name, path) for name in labels]
    clean = given[1] if len(given) > 1 else None
    return assemble(inputs, given[0], str(path), clean_labels=clean, columns=columns)


def read_inputs(path: Path, limit: int, columns: tuple[str, ...]) -> np.ndarray:
    """The named columns, float32."""
    table, schema = _open(path)
    missing = [name for name in columns if name not in schema]
    if missing or not columns:
        wanted = f"the column {missing[0]!r}" if missing else "named columns, the model has none"
        raise DataError(f"{path}: {wanted} is missing. Give the kind of file that was trained on.")
    return compact(_inputs(table, schema, columns, path, limit), str(path))


def _open(path: Path) -> tuple[pl.LazyFrame, pl.Schema]:
    try:
        if path.suffix.lower() == ".csv":  # a fraction or a name may come in the last row
            table = pl.scan_csv(path, infer_schema_length=None)
        else:
            table = pl.scan_parquet(path)
        return table, table.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _damaged(path, error) from error


def _inputs(
    table: pl.LazyFrame, schema: pl.Schema, columns: tuple[str, ...], path: Path, limit: int
) -> np.ndarray:
    if not columns:
        raise DataError(f"{path} has no column besides the labels. Add the features.")
    for name in columns:
        if not (schema[name].is_numeric() or schema[name] == pl.Boolean):
            raise DataError(
                f"{path}: column {name!r} is {schema[name]}. Encode it as numbers, or name it in "
                "--ignore-columns."
            )
    rows = int(_collect(table.select(pl.len()), path).item())
    size = 4 * rows * len(columns)
    if size > limit:
        raise DataError(
            f"{path}: {rows:,} rows of {len(columns):,} features take {size / 2**30:.1f} GiB, more "
            f"than the {limit / 2**30:.1f} of --memory-limit-gib. Raise it, or give fewer columns."
        )
    numbers = _collect(table.select(pl.col(columns).cast(pl.Float32)), path)
    for name in columns:
        _require_full(numbers[name], path)
    return numbers.to_numpy()


def _labels(table: pl.LazyFrame, schema: pl.Schema, name: str, path: Path) -> np.ndarray:
    column = _collect(table.select(name), path)[name]
    _require_full(column, path)
    if schema[name].is_integer() or schema[name] == pl.Boolean:
        return column.cast(pl.Int64).to_numpy()
    if schema[name] in (pl.String, pl.Categorical, pl.Enum):
        return np.array(column.cast(pl.String).to_list(), dtype=str)
    raise DataError(
        f"{path}: column {name!r} is {schema[name]}. Name classes by integers or strings."
    )


def _require_full(column: pl.Series, path: Path) -> None:
    if column.null_count():
        row = int(column.is_null().arg_max() or 0)
        raise DataError(
            f"{path}: column {column.name!r} is empty in row {row}. Remove the row, or fill it in."
        )


def _collect(table: pl.LazyFrame, path: Path) -> pl.DataFrame:
    try:
        return table.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    found = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    return DataError(f"{path} cannot be read as a table: {found.rstrip('.')}. Write it again.")
