"""What is learned: the next byte of a text, or the class of a text."""

from pathlib import Path
from typing import Any

import numpy as np

from optax_sam.diagnostics import memorization

from . import data, labelled, logs
from .config import Config
from .labelled import Texts
from .steps import Trainer, TrainState
from .tables import Columns

PREDICTIONS = "predictions.csv"


class Language:
    """The next byte of every position.

    Args:
      config: the settings.
      earlier: those of the run that this one starts from, whose text is evaluated too, and the
        ``text_sha256`` of what it learned.

    Attributes:
      classes: None.
      size: how many windows there are to learn from.
      digest, earlier_digest: SHA-256 of the texts.
    """

    classes = None

    def __init__(self, config: Config, earlier: dict[str, Any] | None):
        def load(text: str, pattern: str, validation_share: float) -> data.Text:
            return data.load(text, pattern, config.context, validation_share)

        self.config = config
        self.text = load(config.text, config.pattern, config.validation_share)
        self.validation = {"validation_loss": self._evaluation_batches(self.text)}
        self.earlier_digest = None
        if earlier is not None:
            try:
                text = load(*(earlier[name] for name in ("text", "pattern", "validation_share")))
            except ValueError:  # it has moved
                text = None
            if text is None or text.digest != earlier["text_sha256"]:
                raise ValueError(
                    f"--start-from: the text of the run in {config.start_from}, {earlier['text']!r}, "
                    "is not what it learned any more: what is forgotten of it could not be told. Put "
                    "the same text back; for a built-in one, take the same version of Python."
                )
            self.earlier_digest = text.digest
            self.validation["earlier_loss"] = self._evaluation_batches(text)
        self.size, self.digest = len(self.text.train), self.text.digest

    def _evaluation_batches(self, text: data.Text) -> list[data.Batch]:
        config = self.config
        return data.evaluation_batches(
            text.validation, config.evaluation_windows, config.batch_size
        )

    def batch(self, step: int) -> data.Batch:
        """The batch of a step."""
        config = self.config
        return data.training_batch(self.text.train, config.batch_size, config.seed, step)

    def trained_bytes(self, batch: data.Batch) -> int:
        """How many bytes of a batch are predicted."""
        return int(batch.weights.sum())

    def evaluate(self, trainer: Trainer, state: TrainState) -> dict[str, float]:
        """The mean losses of the validation texts."""
        return {name: trainer.loss(state, batches) for name, batches in self.validation.items()}

    def finish(self, trainer: Trainer, state: TrainState, folder: Path | None) -> dict[str, Any]:
        """What is known of the trained network besides: nothing."""
        del trainer, state, folder
        return {}

    def describe(self) -> list[str]:
        """What is learned, for the reader."""
        return [f"{self.text.train.lengths.sum():,} bytes"]


class Classification:
    """The class of every text; some labels are wrong.

    Args:
      config: the settings.

    Attributes:
      classes: how many classes there are.
      size: how many texts there are to learn from.
      digest: SHA-256 of texts and labels.
      earlier_digest: None.
    """

    earlier_digest = None

    def __init__(self, config: Config):
        columns = Columns(
            config.text_column,
            config.label_column,
            config.clean_label_column,
            config.answer_columns,
        )
        self.config = config
        self.texts = labelled.load(
            config.text, columns, config.context, config.validation_share, config.noise_rate
        )
        self.classes = len(self.texts.class_names)
        self.size, self.digest = len(self.texts.train), self.texts.digest

    def batch(self, step: int) -> data.Batch:
        """The batch of a step."""
        config = self.config
        chosen = data.training_indices(self.size, config.batch_size, config.seed, step)
        return labelled.batch_of(self.texts.train, chosen)

    def trained_bytes(self, batch: data.Batch) -> int:
        """How many bytes the texts of a batch have."""
        return int((batch.inputs >= 0).sum())

    def evaluate(self, trainer: Trainer, state: TrainState) -> dict[str, float]:
        """The numbers of :func:`measures`, of at most ``--evaluation-windows`` texts of each part."""
        count = self.config.evaluation_windows
        parts = [
            part.take(data.evenly_chosen(len(part), count))
            for part in (self.texts.train, self.texts.validation)
        ]
        return measures(
            *(pair for part in parts for pair in (part, self._logits(trainer, state, part)))
        )

    def finish(self, trainer: Trainer, state: TrainState, folder: Path | None) -> dict[str, Any]:
        """The classes and the numbers of all texts; with a folder, predictions.csv goes there."""
        train, validation = self.texts.train, self.texts.validation
        found = [self._logits(trainer, state, part) for part in (train, validation)]
        if folder is not None:
            rows = self._rows("training", train, found[0])
            rows += self._rows("held out", validation, found[1])
            logs.write_csv(folder / PREDICTIONS, sorted(rows, key=lambda row: row["row"]))
        return {
            "classes": self.texts.class_names,
            "all_texts": measures(train, found[0], validation, found[1]),
        }

    def _logits(self, trainer: Trainer, state: TrainState, part: Texts) -> np.ndarray:
        size = self.config.batch_size
        batches = [
            labelled.batch_of(part, np.arange(start, min(start + size, len(part))), size)
            for start in range(0, len(part), size)
        ]
        return trainer.logits(state, batches)[: len(part)]

    def _rows(self, name: str, part: Texts, logits: np.ndarray) -> list[dict[str, Any]]:
        names = [
            *map(_in_spreadsheet, self.texts.class_names),
            "",
        ]  # of the last one, −1: not known
        shares = np.exp(log_softmax(logits))[np.arange(len(part)), part.labels]
        predicted = logits.argmax(axis=1)
        return [
            {
                "row": int(part.rows[i]),
                "part": name,
                "label": names[part.labels[i]],
                "predicted": names[predicted[i]],
                "probability of the label": float(shares[i]),
                "clean label": names[part.clean_labels[i]],
            }
            for i in range(len(part))
        ]

    def describe(self) -> list[str]:
        """What is learned, for the reader."""
        return [f"{self.classes} classes", *self.texts.notes]


def _in_spreadsheet(name: str) -> str:
    """The name of a class, marked as text where a spreadsheet would run it as a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@")) and not name[1:].isdigit() else name


def measures(
    train: Texts, train_logits: np.ndarray, validation: Texts, logits: np.ndarray
) -> dict[str, float]:
    """How well the classes are told.

    Args:
      train: texts that are learned.
      train_logits: shape ``(n, classes)``.
      validation: held-out texts.
      logits: shape ``(m, classes)``.

    Returns:
      Of the held-out texts ``validation_loss`` (nats per text) and ``noisy_accuracy``, by their given
      labels, and ``clean_accuracy``; of the learned ones ``memorized``, the share of the wrong labels
      that are predicted, and ``fitted``, that of the correct ones. The last three only where there are
      such texts.
    """
    at = np.arange(len(validation)), validation.labels
    predicted = logits.argmax(axis=1)
    found = {
        "validation_loss": -np.mean(log_softmax(logits)[at]),
        "noisy_accuracy": np.mean(predicted == validation.labels),
    }
    known = validation.clean_labels >= 0
    if known.any():
        found["clean_accuracy"] = np.mean(predicted[known] == validation.clean_labels[known])
    known = train.clean_labels >= 0
    if known.any():
        changed = train.labels[known] != train.clean_labels[known]
        learned = memorization(train_logits[known], train.labels[known], changed)
        shares = {"memorized": learned.memorized, "fitted": learned.clean_fit}
        found |= {name: share for name, share in shares.items() if not np.isnan(share)}
    return {name: float(value) for name, value in found.items()}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The logarithms of the classes' probabilities."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def summary(results: dict[str, Any]) -> str:
    """The numbers of a run that matter most."""
    if "all_texts" not in results:
        return f"validation loss {results['last']['validation_loss']:.3f} nats per byte"
    names = ("noisy_accuracy", "clean_accuracy", "memorized")
    found = {name: results["all_texts"][name] for name in names if name in results["all_texts"]}
    return ", ".join(f"{name.replace('_', ' ')} {share:.3f}" for name, share in found.items())
