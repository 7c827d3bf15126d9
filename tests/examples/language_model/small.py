"""A network and a text that are as small as they can be."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from examples.language_model.config import Config
from examples.language_model.data import Batch, cut_windows, training_batch

SETTINGS = {
    **{"layers": 2, "width": 8, "heads": 2, "context": 16, "precision": "float32"},
    **{"batch_size": 4, "learning_rate": 1e-2, "steps": 4, "evaluate_every": 1},
    **{"checkpoint_every": 1, "evaluation_windows": 6, "warmup": 0.25},
}


def config(**changes) -> Config:
    return Config(**SETTINGS | changes)


def batch() -> Batch:
    """Four windows, two of which have an end."""
    letters = np.random.default_rng(0).integers(97, 105, 60, np.uint8).tobytes()
    return training_batch(cut_windows([letters[:25], letters[25:]], 16), 4, 0, 0)


def plain_logits(params, tokens, heads):
    """The same network as a loop, with attention written out."""

    def norm(x, scale):
        return scale * x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    def rotate(x):
        positions, half = x.shape[1], x.shape[-1] // 2
        angles = np.arange(positions)[:, None, None] / 10000 ** (np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return jnp.concatenate([turned.real, turned.imag], axis=-1)

    x = params["embedding"][tokens]
    for number in range(params["layers"]["up"]["kernel"].shape[0]):
        layer = jax.tree.map(lambda leaf, number=number: leaf[number], params["layers"])
        y = norm(x, layer["norm_attention"]["scale"])
        query, key, value = (
            (y @ layer[name]["kernel"]).reshape(*y.shape[:2], heads, -1)
            for name in ("query", "key", "value")
        )
        query, key = rotate(query), rotate(key)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
        earlier = np.tril(np.ones(scores.shape[-2:], bool))
        shares = jax.nn.softmax(jnp.where(earlier, scores, -jnp.inf))
        y = jnp.einsum("bhqk,bkhd->bqhd", shares, value).reshape(x.shape)
        x = x + y @ layer["output"]["kernel"]
        y = jax.nn.gelu(norm(x, layer["norm_mlp"]["scale"]) @ layer["up"]["kernel"])
        x = x + y @ layer["down"]["kernel"]
    return norm(x, params["norm"]["scale"]) @ params["head"]["kernel"]


def write_table(path: Path, texts: int = 40) -> Path:
    """A CSV file of short texts, whose class is their first letter; every fourth label is wrong."""
    generator = np.random.default_rng(2)
    lines = ["text,label,truth"]
    for number in range(texts):
        length, truth = int(generator.integers(3, 25)), "ab"[number % 2]
        letters = generator.integers(97, 105, length, np.uint8).tobytes().decode()
        label = "ba"[number % 2] if number % 4 == 0 else truth
        lines.append(f"{truth}{letters},{label},{truth if number % 5 else ''}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_text(folder: Path, seed: int = 0, files: int = 12) -> Path:
    """A folder of short files."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for number in range(files):
        length = int(generator.integers(40, 120))
        letters = generator.integers(97, 105, length, np.uint8).tobytes()
        (folder / f"{number}.txt").write_bytes(letters)
    return folder
