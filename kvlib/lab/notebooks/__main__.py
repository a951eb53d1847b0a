"""`python -P kvlib/lab/notebooks/__main__.py COMMAND`, as make starts the tool, or `python -m kvlib.lab.notebooks`."""

import sys
from pathlib import Path
from types import ModuleType

if "kvlib" not in sys.modules:  # started as a file: an empty package, since kvlib itself imports torch, for seconds
    sys.modules["kvlib"] = ModuleType("kvlib")
    sys.modules["kvlib"].__path__ = [str(Path(__file__).resolve().parents[2])]

from kvlib.lab.notebooks.commands import main

if __name__ == "__main__":
    main()
