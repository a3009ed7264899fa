"""Which errors are a sentence for the user, and which are a traceback for us."""

from __future__ import annotations

import sys


def explain(error: Exception) -> tuple[int, str | None]:
    """Return the exit code and the sentence for an error; no sentence means that it is ours, with its traceback.

    An error that functrain itself raises says what the user did and how to go on; the system's errors about files name
    the file.
    """
    # numbers that are not finite: Diverged, NotFinite, and what a model of them cannot generate
    if isinstance(error, ArithmeticError) and _is_raised_by_functrain(error):
        return 1, str(error)
    # looked up, as a wrong word must not load the compiler, and with it torch
    compiler = sys.modules.get("functrain.compiler.cxx")
    if compiler is not None and isinstance(error, compiler.CompilerNotFoundError):
        return 2, f"{error}; for this command: --no-compile"
    if isinstance(error, OSError):
        return 2, str(error)
    # torch raises RuntimeError; its own ValueErrors come from deeper frames than ours
    if isinstance(error, (ValueError, TypeError)) and _is_raised_by_functrain(error):
        return 2, str(error)
    # a sentence that functrain raises for a missing package has no module's name, unlike a failed import statement
    if isinstance(error, ImportError) and error.name is None and _is_raised_by_functrain(error):
        return 2, str(error)
    return 1, None


def _is_raised_by_functrain(error: Exception) -> bool:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__")).startswith("functrain.")
