"""README's tables of decoding speed, of captured steps, of the bytes that a step reads, of prefill, of column sums.

python -m kvlib.lab.speed.summary       write them, from data/results/*_speed.csv
"""

from pathlib import Path

import pandas as pd

from kvlib import checksums, paths
from kvlib.lab.speed import prefill
from kvlib.lab.speed.captured import NOTHING
from kvlib.lab.speed.settings import FULL, SAME, SETTINGS, STOCK, SYSTEMS

README = paths.ROOT / "README.md"
DECODING = "decoding_speed.csv"
ADDED = dict(
    zip(prefill.METHODS, ("kvlib's cache", "scoring", "sums", "stages", "typing", "stages", "typing"), strict=True)
)  # to another


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
        budget = "" if pd.isna(first.budget) else f"{first.budget:g}"
        lines.append(f"| {setting} | {method} | {budget} | {first.ms_per_token:.3g} | {' | '.join(cells)} |")
    facts = rows.groupby("setting", sort=True).first()
    notes = [
        f"{name}: {row['model']}, {row['dtype']}, batch {row.batch}, {row.prompt_tokens} tokens, {row.device}, "
        f"torch {row.torch}, transformers {row.transformers}, {row.date}"
        for name, row in facts.iterrows()
    ]
    return "\n".join([*lines, "", "Medians of pairs, least and greatest pair in brackets. " + "; ".join(notes) + "."])


def machines(rows: pd.DataFrame, facts: list[str], text: str) -> str:
    """Where and with what the rows were measured: the text, filled with each different set of facts."""
    different = rows[facts].drop_duplicates().sort_values(facts).itertuples(index=False)
    return "; ".join(text.format(*row) for row in different)


def reads(rows: pd.DataFrame) -> str:
    """Markdown: time beside bytes read, on a CPU, where these were counted. Stock reads a full cache."""
    lines = ["| setting | method | ms a token | / stock | MB read in a step | / full cache |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    shown = [name for name, setting in SETTINGS.items() if setting.device == "cpu" and setting.methods != SYSTEMS]
    counted = rows["setting"].isin(shown) & rows.read_bytes.notna() & (rows.baseline == STOCK)
    for setting, group in rows[counted].groupby("setting"):
        stock = group.iloc[0]
        lines.append(f"| {setting} | stock | {stock.baseline_ms:.3g} | 1.00 | {stock.full_bytes / 1e6:.1f} | 1.00 |")
        for row in group.itertuples():
            time = f"{row.ms_per_token:.3g} | {row.ratio:.2f}"
            read = f"{row.read_bytes / 1e6:.1f} | {row.read_bytes / row.full_bytes:.2f}"
            lines.append(f"| {setting} | {row.method} | {time} | {read} |")
    return "\n".join(lines)


def reading(rows: pd.DataFrame) -> str:
    """Markdown: time to read a prompt, and what each method that was measured adds to another, as a share of it."""
    lines = ["| model | device | tokens | pairs | method | ms | / stock | adds, % |"]
    lines.append("|---|---|---:|---:|---|---:|---:|---|")
    for (model, device, tokens), group in rows.groupby(["model", "device", "tokens"], sort=True):
        found = group.set_index(["method", "baseline"])
        first = found.loc["full", STOCK]
        cells = f"| {model} | {device} | {tokens} | {first.pairs} |"
        lines.append(f"{cells} stock | {first.baseline_ms:.4g} | 1.00 | |")
        for method, part in ((m, part) for m, part in ADDED.items() if (m, STOCK) in found.index):
            row, more = found.loc[method, STOCK], found.loc[method, prefill.BEFORE[method]]
            ratio = f"{row.ratio:.2f} ({row.ratio_min:.2f}-{row.ratio_max:.2f})"
            share, least, most = (f"{100 * (x - 1):+.1f}" for x in (more.ratio, more.ratio_min, more.ratio_max))
            lines.append(f"{cells} {method} | {row.ms:.4g} | {ratio} | {part} {share} ({least} to {most}) |")
    facts = ["model", "device", "dtype", "threads", "torch", "transformers", "date"]
    notes = machines(rows, facts, "{} on {}: {}, batch 1, threads: {}, torch {}, transformers {}, {}")
    return "\n".join([*lines, "", "Medians of pairs, least and greatest pair in brackets. " + notes + "."])


def column_sums(rows: pd.DataFrame) -> str:
    """Markdown: a prompt's column sums in one layer beside its attention, each work by its fastest kernel."""
    lines = ["| heads of | device | tokens | work | kernel | ms | / attention | MiB beside inputs |"]
    lines.append("|---|---|---:|---|---|---:|---:|---:|")
    works = list(dict.fromkeys(rows["work"]))
    for (model, device, tokens), group in rows.groupby(["model", "device", "context"], sort=True):
        fastest = group.sort_values("ms").drop_duplicates("work").sort_values("work", key=lambda x: x.map(works.index))
        for row in fastest.itertuples():
            cells = f"| {model} | {device} | {tokens} | {row.work} | {row.kernel} | {row.ms:.3g} |"
            ratio = f"{row.ratio:.3g} ({row.ratio_q1:.3g}-{row.ratio_q3:.3g})"
            lines.append(f"{cells} {ratio} | {row.extra_mib:.3g} |")
    facts = ["device", "dtype", "torch", "triton", "date"]
    notes = machines(rows, facts, "{}: {}, batch 1, torch {}, triton {}, {}")
    return "\n".join([*lines, "", "Medians of turns, quartiles in brackets. " + notes + "."])


def steps(rows: pd.DataFrame) -> str:
    """Markdown: a line for each case of captured steps, methods in the order of their time."""
    lines = [
        "| model | device | batch x context | compiled | stock (without context), ms | method: ms (times as fast) |"
    ]
    lines.append("|---|---|---|---|---|---|")
    case = ["model", "device", "batch", "context", "fused"]
    for (model, device, batch, context, fused), group in rows.groupby(case, sort=True):
        ms = group.set_index("method")["ms"]
        stock = f"{ms[STOCK]:.3g} ({ms[NOTHING]:.3g})" if STOCK in ms else ""
        methods = group[~group["method"].isin([STOCK, NOTHING])].sort_values("ms")
        said = [
            f"{row.method}{'' if row.method == FULL else f' {row.budget:g}'}: {row.ms:.3g}"
            + (f" ({row.speed_up:.2f})" if STOCK in ms else "")  # over stock of the same run, if runs differ
            for row in methods.itertuples()
        ]
        cells = f"| {model} | {device} | {batch} x {context} | {'yes' if fused else ''} |"
        lines.append(f"{cells} {stock} | {', '.join(said)} |")
    facts = ["device", "dtype", "torch", "transformers", "date"]
    notes = machines(rows, facts, "{}: {}, torch {}, transformers {}, {}")
    blocks = " or ".join(str(count) for count in sorted(rows["blocks"].unique()))
    return "\n".join([*lines, "", f"Medians of {blocks} blocks of tokens. " + notes + "."])


TABLES = {  # between the markers of a name: the file, and what is made of its rows
    "bytes read": (DECODING, reads),
    "captured steps": ("captured_speed.csv", steps),
    "column sums": ("sums_speed.csv", column_sums),
    "decoding speed": (DECODING, table),
    "prefill speed": (prefill.FILE.name, reading),
}


def written(readme: str, results: Path = paths.RESULTS) -> str:
    """README with the tables of today; in place of one whose file is missing stands that it is not measured yet."""
    for name, (file, made) in TABLES.items():
        before, rest = readme.split(f"<!-- {name} -->\n")
        after = rest.split(f"<!-- end of {name} -->\n")[1]
        text = made(pd.read_csv(results / file)) if (results / file).exists() else "Not measured yet."
        readme = f"{before}<!-- {name} -->\n{text}\n<!-- end of {name} -->\n{after}"
    return readme


def main() -> None:
    for name in {file for file, _ in TABLES.values()}:
        checksums.record(paths.RESULTS / name)
    README.write_text(written(README.read_text()))


if __name__ == "__main__":
    main()
