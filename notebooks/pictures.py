"""Pictures with a palette: a quarter of the size, so that notebooks stay small in the repository."""

import base64
import io
from typing import Any

from PIL import Image

COLORS = 255


def with_palette(png: str) -> str:
    """Replaces the colors of a picture by the best 255; in a figure no one sees the difference.

    Args:
      png: a PNG file in base64.

    Returns:
      The same of the smaller file.
    """
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode != "P":
        picture = picture.convert("RGB").quantize(
            COLORS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def shrink_pictures(notebook: Any) -> None:
    """Gives all pictures among the outputs of a notebook a palette, in place."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = with_palette(data["image/png"])
