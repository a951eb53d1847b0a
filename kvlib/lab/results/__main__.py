"""Making, resuming and verifying the result tables of `kvlib.lab.results.studies.STUDIES`.

    python -m kvlib.lab.results [STUDY ...]             make tables, or what is missing of them
    python -m kvlib.lab.results --verify FRACTION       recompute a share of the samples, at least four, and compare
    python -m kvlib.lab.results --rekey FRACTION        the same, and if every row agrees give their cells today's keys
    python -m kvlib.lab.results --check                 fail if files are not those whose checksums and means are kept
    python -m kvlib.lab.results --clean                 delete tables and shards, to make everything anew

Work is cut into blocks of samples, in the same way whatever was done before. A block is a shard, which grows by fifty
configurations at a time; it is written under another name and renamed, so that a run killed at any moment leaves
nothing half-written and the next run goes on after it. A row is reused, from a shard or from the table, when its key is
that of today's checkpoint, parameters, and code of method and task. Samples to recompute are drawn by the date, so that
every day checks others, unless `--seed` says how. `--rekey` is for changes that move keys and not
values: of how keys are made, or of code that computes the same in another way.
"""

import argparse
import sys

from kvlib.lab.evaluation.evaluate import BLOCK
from kvlib.lab.results import checking, making, tables, verification
from kvlib.lab.results.studies import STUDIES
from kvlib.lab.results.study import Study, samples_of


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kvlib.lab.results", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"default: all; known: {', '.join(STUDIES)}")
    parser.add_argument("--block", type=int, default=BLOCK, help="prompts per prefill")
    parser.add_argument("--processes", type=int, default=1, help="side by side, spread over the GPUs")
    parser.add_argument(
        "--seed", type=int, default=verification.todays_seed(), help="draws the samples to recompute; default: the date"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--verify", type=float, metavar="FRACTION", help="recompute this share of the samples instead")
    instead.add_argument(
        "--rekey", type=float, metavar="FRACTION", help="and give their cells today's keys if all rows agree"
    )
    instead.add_argument("--check", action="store_true", help="see whether files are as they were recorded, in seconds")
    instead.add_argument("--clean", action="store_true", help="delete instead")
    arguments = parser.parse_args(argv)
    names = arguments.studies or list(STUDIES)
    if unknown := set(names) - set(STUDIES):
        parser.error(f"unknown study {', '.join(sorted(unknown))}; known: {', '.join(STUDIES)}")
    for option in ("verify", "rekey"):
        share = getattr(arguments, option)
        if share is not None and not 0 < share <= 1:
            parser.error(f"--{option} {share}: a share of the samples, in (0, 1]")
    if arguments.check:
        return check()
    if arguments.clean:
        return tables.clean(names)
    for name in names:
        study = STUDIES[name]
        if arguments.verify is not None:
            count = samples_to_recompute(study, arguments.verify)
            try:
                agreement = verification.verify(name, study, count, arguments.seed, arguments.processes)
            except FileNotFoundError as error:  # of arms, most of which are not shipped
                print(error)
                continue
            print(f"{name}: {agreement:.1%} of the rows of {count} recomputed samples agree (seed {arguments.seed})")
        elif arguments.rekey is not None:
            count = samples_to_recompute(study, arguments.rekey)
            changed, old = verification.rekey(name, study, count, arguments.seed, arguments.processes)
            print(f"{name}: all rows of {count} recomputed samples agree; {changed} rows have new keys, {old} old ones")
        else:
            print(f"{len(making.make(name, study, arguments.block, arguments.processes))} rows in {name}.parquet")


def check() -> None:
    """Say what is wrong with the data, and fail if anything is."""
    if found := checking.problems():
        sys.exit("\n".join(found))
    print("Data as recorded: checksums, and means of the tables in their summaries.")


def samples_to_recompute(study: Study, share: float) -> int:
    """A share of a study's samples in samples, as many as a verification needs at least, if there are so many."""
    return min(samples_of(study), max(verification.LEAST, round(share * samples_of(study))))


if __name__ == "__main__":
    main()
