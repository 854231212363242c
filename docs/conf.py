"""How the documentation is built: ``make docs``. Pages are Markdown; ``_ext`` generates what can be."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

from apr_dist import __version__  # noqa: E402  (the checkout's own, found by the line above)

project = "apr-dist"
author = "the apr-dist project"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated_pages"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
default_role = "code"
# An error's name in a docstring stands alone; its page is the table of exit codes.
nitpick_ignore_regex = [("py:exc", r"\w+"), ("py:class", r"collections\.abc\..*")]
exclude_patterns = ["_build", "_ext"]
root_doc = "index"

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
suppress_warnings: list[str] = []

html_theme = "furo"
html_title = "apr-dist"
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
# Both are read in black on white and in white on black; neither names a font that has to be fetched.
pygments_style = "friendly"
pygments_dark_style = "github-dark"
