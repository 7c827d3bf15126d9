"""Makes the modules of the label-noise example importable, as running its main.py does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "label_noise"))
