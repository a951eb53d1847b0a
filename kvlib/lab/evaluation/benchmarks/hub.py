"""What is asked of the hub: one commit of one repository."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hub:
    """Where the hub has a set.

    repository, revision (a commit: branches move), config: arguments of `datasets.load_dataset`.
    file: download this file as it is. `datasets` refuses repositories with loading scripts, and would fetch all splits.
    join: turns rows into the bytes of the published file, so that both ways end in the same text with one checksum.
    """

    repository: str
    revision: str | None
    config: str | None = None
    file: str | None = None
    join: Callable[[list[dict]], bytes] | None = None


def rows_of(hub: Hub, commit: str, split: str) -> list[dict]:
    import datasets  # here, because machines with GPUs may lack it

    return datasets.load_dataset(hub.repository, hub.config, split=split, revision=commit).to_list()


def download(hub: Hub, commit: str) -> bytes:
    import huggingface_hub

    path = huggingface_hub.hf_hub_download(hub.repository, hub.file, repo_type="dataset", revision=commit)
    return Path(path).read_bytes()
