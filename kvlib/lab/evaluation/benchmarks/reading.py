"""How the published files are read: bytes of a file in, rows with the published names out."""

import gzip
import io
import json
import re
import zipfile

import pandas as pd

MBPP_SPLITS = {"test": (11, 510), "train": (601, 974), "validation": (511, 600), "prompt": (1, 10)}  # of task_id


def read_jsonl(data: bytes, split: str = "test") -> list[dict]:
    """One JSON object a line, compressed with gzip or not."""
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def read_json(data: bytes, split: str) -> list[dict]:
    """One list of objects."""
    return json.loads(data)


def read_mbpp(data: bytes, split: str) -> list[dict]:
    """The published file has all problems; their numbers say which split they are in."""
    first, last = MBPP_SPLITS[split]
    return [row for row in read_jsonl(data) if first <= row["task_id"] <= last]


def read_text(data: bytes, split: str, title: str) -> list[dict]:
    return [{"title": title, "text": data.decode()}]


def read_gutenberg(data: bytes, split: str, title: str) -> list[dict]:
    """A book of Project Gutenberg without its header and licence, as PG-19 has its books, and with plain newlines.

    Raises:
        ValueError: if the lines that mark beginning and end are missing.
    """
    text = data.decode("utf-8-sig").replace("\r\n", "\n")
    marks = r"\*\*\* ?START OF TH.*?\*\*\*\n(.*)\*\*\* ?END OF TH"
    if (body := re.search(marks, text, re.DOTALL)) is None:
        raise ValueError(f"{title}: no *** START OF ... *** and *** END OF ... lines of Project Gutenberg")
    return [{"title": title, "text": body[1].strip() + "\n"}]


def read_books(data: bytes, split: str) -> list[dict]:
    """PG-19 as its authors have it, a folder of texts with numbers for names, or the parquet file of the hub."""
    if data[:4] != b"PAR1":
        return [{"title": row["name"], "text": row["text"]} for row in read_jsonl(data)]
    return pd.read_parquet(io.BytesIO(data)).rename(columns={"short_book_title": "title"}).to_dict("records")


def read_member(data: bytes, split: str, member: str) -> list[dict]:
    """One JSON-lines file of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return read_jsonl(archive.read(member))


def join_wikitext(rows: list[dict]) -> bytes:
    """The published text: the hub has one row a line and has emptied the blank lines, which hold a space."""
    return "".join(row["text"] or " \n" for row in rows).encode()
