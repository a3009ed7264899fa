"""The documentation site: `make docs` builds it into docs/_build/html, warnings as errors."""

import functools
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import functrain  # noqa: E402

project = "functrain"
author = "the functrain authors"
copyright = author  # noqa: A001
release = version = functrain.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "functrain"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
copybutton_exclude = ".linenos, .gp"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
# names of Sphinx's own that our pages have for something else
suppress_warnings = ["misc.highlighting_failure"]


def _as_rst(text: str) -> str:
    """Return a paragraph of a docstring, which is plain text with `code` in it, as reStructuredText."""
    parts = re.split(r"(`+[^`]+`+)", text)
    made = []
    for part, after in zip(parts, [*parts[1:], ""], strict=True):
        if part.startswith("`"):
            # text right behind code needs a mark that is not shown
            made.append(f"``{part.strip('`')}``" + ("\\ " if re.match(r"\w", after) else ""))
        else:
            made.append(re.sub(r"([*|\\])|(?<=\w)(_)(?!\w)", r"\\\1\2", part))
    return "".join(made)


def _plain_docstring(app, what, name, obj, options, lines):  # noqa: ANN001, ANN202
    """Docstrings stay readable in a terminal: nothing in them is markup but code, paragraphs and `>>>` examples."""
    if re.fullmatch(r"Alias for field number \d+", "".join(lines).strip()):
        lines[:] = [_as_rst(_comment_of(name))]
        return
    made = []
    for paragraph in "\n".join(lines).split("\n\n"):
        if not paragraph.lstrip().startswith(">>>"):
            paragraph = re.sub(r"\n(?=(Raises|Shapes|Source|Units): |Equals )", "\n\n", _as_rst(paragraph))
        made.append(paragraph)
    lines[:] = "\n\n".join(made).split("\n")


def _comment_of(field: str) -> str:
    """Return what stands beside a field of a NamedTuple: its shape and what it is."""
    module, _, path = field.partition(".")
    cls = sys.modules[module]
    for part in path.split(".")[:-1]:
        cls = getattr(cls, part)
    found = re.search(rf"^    {field.rpartition('.')[2]}: [^#\n]*#(?: type: [^#\n]*#)? *(.*)$", _source(cls), re.M)
    return found[1] if found else ""


_source = functools.cache(inspect.getsource)  # it parses the whole file each time


def setup(app):  # noqa: ANN001, ANN201
    app.connect("autodoc-process-docstring", _plain_docstring)
