"""README's table of decoding speed.

python -m kvlib.lab.speed.summary       write it, from data/results/decoding_speed.csv
"""

import pandas as pd

from kvlib import checksums, paths
from kvlib.lab.speed.settings import FULL, SAME, STOCK

README = paths.ROOT / "README.md"
MARKS = "<!-- decoding speed -->\n", "<!-- end of decoding speed -->\n"


def table(rows: pd.DataFrame) -> str:
    """Markdown: for every setting and method the median ratios to each baseline, and how the pairs spread."""
    lines = ["| setting | method | budget | ms a token | / stock | / stock of the same length | / full |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for (setting, method), group in rows.groupby(["setting", "method"], sort=True):
        ratios = {
            row.baseline: f"{row.ratio:.2f} ({row.ratio_min:.2f}-{row.ratio_max:.2f})" for row in group.itertuples()
        }
        first = group.iloc[0]
        cells = [ratios.get(baseline, "") for baseline in (STOCK, SAME, FULL)]
        lines.append(f"| {setting} | {method} | {first.budget:g} | {first.ms_per_token:.3g} | {' | '.join(cells)} |")
    facts = rows.groupby("setting", sort=True).first()
    notes = [
        f"{name}: {row['model']}, {row['dtype']}, batch {row.batch}, {row.prompt_tokens} tokens, {row.device}, "
        f"torch {row.torch}, transformers {row.transformers}, {row.date}"
        for name, row in facts.iterrows()
    ]
    return "\n".join([*lines, "", "Medians of pairs, least and greatest pair in brackets. " + "; ".join(notes) + "."])


def written(readme: str, rows: pd.DataFrame) -> str:
    """README with the table of today."""
    start, end = readme.index(MARKS[0]) + len(MARKS[0]), readme.index(MARKS[1])
    return readme[:start] + table(rows) + "\n" + readme[end:]


def main() -> None:
    file = paths.RESULTS / "decoding_speed.csv"
    rows = pd.read_csv(file)
    checksums.record(file)
    README.write_text(written(README.read_text(), rows))


if __name__ == "__main__":
    main()
