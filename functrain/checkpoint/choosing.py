"""Which saved leaf goes to which path: `only=` by pattern, `rename=` by prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from functrain.checkpoint.errors import MismatchError, MissingError
from functrain.tree.hints import instead
from functrain.tree.selection import Pattern


def choose(only: str | Sequence[str] | None, paths: Iterable[str], where: str) -> set[str]:
    """Return the paths that fit any of the patterns, which are those of `tree.select`; None fits all.

    Raises: MissingError for a pattern that fits no path.
    """
    there = list(paths)
    if only is None:
        return set(there)
    chosen: set[str] = set()
    for pattern in [only] if isinstance(only, str) else only:
        fits = set(filter(Pattern(pattern).fits, there))
        if not fits:
            came = f"only {instead(pattern, there)}"
            raise MissingError(where, expected=f"a path that fits only={pattern!r}", came=came, way_out="name a path")
        chosen |= fits
    return chosen


class Renaming:
    """Old prefixes of paths to new ones, by whole names; the longest that fits is taken, and "" fits every path."""

    def __init__(self, prefixes: Mapping[str, str] | None) -> None:
        self._prefixes = sorted((prefixes or {}).items(), key=lambda pair: -len(pair[0]))

    def __call__(self, path: str) -> str:
        for old, new in self._prefixes:
            if _below(path, old):
                rest = path[len(old) :].lstrip("/")
                return f"{new}/{rest}" if new and rest else new or rest
        return path

    def of_all(self, paths: Iterable[str], where: str) -> dict[str, str]:
        """Return old path by new path.

        Raises: MissingError for a prefix that no path has, MismatchError for two paths that get one name.
        """
        there = list(paths)
        for old, _ in self._prefixes:
            if not any(_below(path, old) for path in there):
                came = f"only {instead(old, there)}"
                raise MissingError(where, expected=f"a path below rename={old!r}", came=came, way_out="name a prefix")
        new: dict[str, str] = {}
        for path in there:
            first = new.setdefault(self(path), path)
            if first != path:
                came = f"both {first!r} and {path!r}"
                way_out = "give them different names"
                raise MismatchError(where, path=self(path), expected="one leaf by rename=", came=came, way_out=way_out)
        return new


def _below(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(f"{prefix}/")
