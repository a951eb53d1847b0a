"""Run the notebooks, store their outputs, and tell whether stored outputs are still true.

    python -m kvlib.lab.notebooks dependencies PROFILE    what executed notebooks depend on, as makefile rules
    python -m kvlib.lab.notebooks run PROFILE NOTEBOOK    execute into build/PROFILE, figures included
    python -m kvlib.lab.notebooks publish                 store the outputs of build/default in notebooks/
    python -m kvlib.lab.notebooks check                   fail if stored outputs are stale, missing or wrong
    python -m kvlib.lab.notebooks student                 copy the lessons, without outputs, into student/
    python -m kvlib.lab.notebooks mutant [N]              break a copy of kvlib in student/, to be found; 0 removes it
    python -m kvlib.lab.notebooks compare MANIFEST        fail if figures drawn from tables differ from these

A lesson is a path <root>/notebooks/NN_name.ipynb; its solutions are in <root>/notebooks/solutions/NN_name.ipynb, its
parameters in <root>/notebooks/params/PROFILE.yaml under NN_name, its result tables those of <root>/data/results that
its code names. Its outputs are stale once these, its cells or what they reach in kvlib have changed
(`kvlib.lab.notebooks.dependencies`). MODEL=... in the environment runs lessons on another model, in a folder of build/
of its own; the smoke profile names its model itself.
"""

import argparse
import sys
from pathlib import Path

from kvlib.lab.notebooks import mutants
from kvlib.lab.notebooks.dependencies import makefile
from kvlib.lab.notebooks.figures import compare
from kvlib.lab.notebooks.outputs import check, publish
from kvlib.lab.notebooks.running import run
from kvlib.lab.notebooks.students import copies
from kvlib.paths import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("dependencies", "run"):
        commands.add_parser(command).add_argument("profile", choices=("smoke", "default", "paper"))
    commands.choices["run"].add_argument("notebook", type=Path)
    commands.add_parser("publish")
    commands.add_parser("check")
    commands.add_parser("student")
    commands.add_parser("mutant").add_argument("number", type=int, nargs="?")
    commands.add_parser("compare").add_argument("manifest", type=Path)
    arguments = parser.parse_args()
    try:
        match arguments.command:
            case "dependencies":
                print(makefile(ROOT, arguments.profile), end="")
            case "run":
                run(arguments.notebook, arguments.profile)
            case "publish":
                publish()
            case "check":
                check()
            case "student":
                copies()
            case "mutant":
                mutants.show() if arguments.number is None else mutants.plant(arguments.number)
            case "compare":
                compare(arguments.manifest)
    except ValueError as error:
        sys.exit(str(error))
