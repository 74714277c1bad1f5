"""Settings of the documentation site: ``make site`` builds it from the Markdown pages as they are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "megamm"
html_title = "megamm"
html_theme = "furo"
extensions = ["myst_parser"]
# The root is the repository, not docs/, because pages link to CONTRIBUTING.md, examples/ and the two libraries.
include_patterns = ["*.md", "docs/**.md", "docs/**/*.md", "kernels/README.md", "laws/README.md"]
root_doc = "docs/index"
myst_heading_anchors = 4
# Pages keep their commands in indented blocks without a language.
highlight_language = "text"
html_copy_source = False
suppress_warnings = ["myst.xref_missing"]  # links to folders and to source files, which tests/unit/test_docs.py checks


def list_pages(app, docname, source):
    """The index's own lists become the table of contents, so that no page has to be named twice."""
    if docname != root_doc:
        return
    for section in re.findall(r"^## (.+)\n((?:.|\n(?!## ))*)", source[0], re.M):
        links = re.findall(r"\]\(([\w./-]+)\.md\)", section[1])
        pages = [str((ROOT / "docs" / link).resolve().relative_to(ROOT)) for link in links]
        listed = "\n".join(f"/{page}" for page in pages)
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {section[0]}\n\n{listed}\n```\n"


def setup(app):
    app.connect("source-read", list_pages)
