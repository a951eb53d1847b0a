"""Build the book and check it.

From nothing each time: a second build of what has not changed would not repeat its warnings.
"""

import shutil
import sys
import tempfile

from sphinx.cmd.build import main as sphinx

from kvlib.lab.book.checking import problems
from kvlib.lab.book.pages import lay, pages
from kvlib.paths import ROOT


def main() -> None:
    written, built = ROOT / "build" / "site-source", ROOT / "build" / "site"
    lay(written, pages(ROOT))
    shutil.rmtree(built, ignore_errors=True)
    strict = ["-W", "--keep-going", "-n"]  # warnings are errors, and all of them are shown
    with tempfile.TemporaryDirectory() as doctrees:
        settings = ["-q", "-b", "html", *strict, "-d", doctrees, "-c", str(ROOT / "docs")]
        if sphinx([*settings, str(written), str(built)]):
            sys.exit("the book was not built")
    if found := problems(built):
        sys.exit("\n".join(found))
    print(f"Built from stored outputs, links checked. Open: {(built / 'index.html').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
