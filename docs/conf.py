"""Sphinx's settings for the book. Sources are in build/site-source, written by `python -m kvlib.lab.book`."""

from importlib.metadata import distribution

project = "kvlib"
author = "the authors of kvlib"
extensions = ["myst_nb", "kvlib.lab.book.mathml"]
# An OpenType font for mathematics, under the Open Font License; of the package that brings it nothing else is used.
FONT = str(distribution("ziamath").locate_file("ziamath/fonts/STIXTwoMath-Regular.ttf"))

exclude_patterns = ["generated"]  # parts that pages include

nb_execution_mode = "off"  # outputs are those that the notebooks store
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "kvlib: KV-cache compression, tested"
html_static_path = ["_static", FONT]
html_css_files = ["book.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_use_index = False
pygments_dark_style = "monokai"
