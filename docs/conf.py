"""How Sphinx builds these pages; `make docs` runs it, with warnings as errors."""
# ruff: noqa: INP001  Sphinx reads this file by itself

import re

from sphinx.application import Sphinx

from limiter import __version__

project = "limiter"
copyright = "the limiter authors"  # noqa: A001  Sphinx's name for it
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "code"  # docstrings have Markdown's backticks
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # the anchors that a forge gives to headings, so that links work in both

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

_RELATIVE_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")

html_theme = "furo"
html_title = f"limiter {release}"


def link_to_repository(app: Sphinx, name: str, source: list[str]) -> None:
    """Turn links to files of the repository, which a forge shows, into downloads: HTML has only these pages."""
    page = app.srcdir / name

    def download(link: re.Match[str]) -> str:
        target = (page.parent / link[2]).resolve()
        return link[0] if target.is_relative_to(app.srcdir) else f"{{download}}`{link[1]} <{link[2]}>`"

    source[0] = _RELATIVE_LINK.sub(download, source[0])


def setup(app: Sphinx) -> None:
    """Connect the above."""
    app.connect("source-read", link_to_repository)
