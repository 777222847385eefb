"""How Sphinx builds these pages; `make docs` runs it, with warnings as errors."""
# ruff: noqa: INP001  Sphinx reads this file by itself

from limiter import __version__

project = "limiter"
copyright = "the limiter authors"  # noqa: A001  Sphinx's name for it
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
suppress_warnings = ["toc.not_readable"]  # until every page is there

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # the anchors that a forge gives to headings, so that links work in both

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"limiter {release}"
