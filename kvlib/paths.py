"""Where things are, independent of the working directory."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
FIGURES = ROOT / "figures"
DATA = ROOT / "data"
MODELS = DATA / "models"
RESULTS = DATA / "results"
PUBLISHED = DATA / "published"
