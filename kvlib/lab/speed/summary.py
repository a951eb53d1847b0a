"""README's tables of decoding speed, and of the bytes that a step reads.

python -m kvlib.lab.speed.summary       write them, from data/results/decoding_speed.csv
"""

import pandas as pd

from kvlib import checksums, paths
from kvlib.lab.speed.settings import FULL, SAME, STOCK

README = paths.ROOT / "README.md"


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


def reads(rows: pd.DataFrame) -> str:
    """Markdown: time beside bytes read, where these were counted. Stock reads a full cache."""
    lines = ["| setting | method | ms a token | / stock | MB read in a step | / full cache |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for setting, group in rows[rows.read_bytes.notna() & (rows.baseline == STOCK)].groupby("setting", sort=True):
        stock = group.iloc[0]
        lines.append(f"| {setting} | stock | {stock.baseline_ms:.3g} | 1.00 | {stock.full_bytes / 1e6:.1f} | 1.00 |")
        for row in group.itertuples():
            time = f"{row.ms_per_token:.3g} | {row.ratio:.2f}"
            read = f"{row.read_bytes / 1e6:.1f} | {row.read_bytes / row.full_bytes:.2f}"
            lines.append(f"| {setting} | {row.method} | {time} | {read} |")
    return "\n".join(lines)


def written(readme: str, rows: pd.DataFrame) -> str:
    """README with the tables of today."""
    for name, made in (("bytes read", reads), ("decoding speed", table)):
        before, rest = readme.split(f"<!-- {name} -->\n")
        after = rest.split(f"<!-- end of {name} -->\n")[1]
        readme = f"{before}<!-- {name} -->\n{made(rows)}\n<!-- end of {name} -->\n{after}"
    return readme


def main() -> None:
    file = paths.RESULTS / "decoding_speed.csv"
    rows = pd.read_csv(file)
    checksums.record(file)
    README.write_text(written(README.read_text(), rows))


if __name__ == "__main__":
    main()
