"""What lessons take from `data/results`: tables of which they recompute a sample, and verdicts."""

import pandas as pd

from kvlib import paths
from kvlib.lab.results import studies, verification


def recompute(name: str, samples: int, seed: int) -> None:
    """Recompute samples of a table, drawn by lot, with one setting of every method, and print how many rows agree.

    Raises:
        ValueError: if the table disagrees (`kvlib.lab.results.verification.verify`).
    """
    study = studies.STUDIES[name]
    agree = verification.verify(name, study, samples, seed, by_lot=True)
    drawn = [f"{task}, sample {number} of {model}" for model, task, number in verification.draw(study, samples, seed)]
    print(f"{name}: {'; '.join(drawn)}, recomputed with one setting of every method: {agree:.0%} of the rows agree")


def verdicts(ids: list[str], *more: str) -> pd.DataFrame:
    """The rows of these claims in the ledger, whole sentences: columns claim, ours and verdict, and those named."""
    pd.set_option("display.max_colwidth", None)
    ledger = pd.read_csv(paths.RESULTS / "ledger.csv", index_col="id")
    return ledger.loc[ids, ["claim", "ours", "verdict", *more]].astype(object).fillna("–")
