"""Small pictures for the lists of notebooks and programs: ``docs/images/thumbnails/NAME.png``.

    python notebooks/thumbnails.py    # all again; execute.py does it for each notebook that it writes

A notebook's is made from its first picture, or from that of the cell with the tag ``thumbnail``.
"""

import base64
import io
import json
from pathlib import Path

from PIL import Image, ImageOps

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "images" / "thumbnails"
SIZE = 320, 240
COLORS = 128

# Of the programs in examples/: a committed picture, or a notebook whose first picture has its data.
PROGRAMS = {
    "frozen_features": "docs/images/human_labels.png",
    "image_classification": "docs/results/image_classification/human_worse/points.png",
    "label_noise": "notebooks/quick_start.ipynb",
    "language_model": "docs/results/language_model/learning/curves.png",
}


def picture_of(path: Path, tag: str | None = "thumbnail") -> Image.Image:
    """A picture that is committed.

    Args:
      path: of a picture, or of a notebook with outputs.
      tag: of the cell whose picture is preferred to the first one; None: the first one.

    Raises:
      ValueError: if the notebook has no picture.
    """
    if path.suffix != ".ipynb":
        return Image.open(path)
    found = [
        (tag not in cell["metadata"].get("tags", []), output["data"]["image/png"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    if not found:
        raise ValueError(f"{path} has no picture. Execute it, or draw one.")
    _, content = min(found, key=lambda one: one[0])
    return Image.open(io.BytesIO(base64.b64decode("".join(content))))


def thumbnail(picture: Image.Image) -> Image.Image:
    """The picture in the size of a thumbnail, on white; of a tall one the upper half."""
    picture = picture.convert("RGBA")
    if picture.height > picture.width:
        picture = picture.crop((0, 0, picture.width, picture.height // 2))
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return ImageOps.pad(white.convert("RGB"), SIZE, Image.Resampling.LANCZOS, color="white")


def write_thumbnail(name: str, picture: Image.Image) -> None:
    """Writes ``NAME.png``, with a palette."""
    how = Image.Quantize.MAXCOVERAGE
    small = thumbnail(picture).quantize(COLORS, method=how, dither=Image.Dither.NONE)
    FOLDER.mkdir(exist_ok=True)
    small.save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        write_thumbnail(path.stem, picture_of(path))
    for name, source in PROGRAMS.items():
        write_thumbnail(name, picture_of(ROOT / source, tag=None))
