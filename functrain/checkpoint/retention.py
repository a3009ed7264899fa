"""Which checkpoints of a run stay: the newest, every n-th, the best; only whole ones count, only the run's own go."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from functrain.checkpoint import run, staging
from functrain.checkpoint.errors import CheckpointError, StorageError
from functrain.checkpoint.reading import contents


@dataclass(frozen=True)
class Best:
    """Keep the `count` checkpoints whose metric is lowest, or with mode "max" highest; not finite is never best."""

    metric: str
    count: int = 1
    mode: Literal["min", "max"] = "min"

    def of(self, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what a checkpoint's metadata keeps of a step's metrics: nothing where the metric is not among them.

        Raises: ValueError when it is no single number.
        """
        value = self.value(metrics) if metrics else None
        if value is None:
            return {}
        kept = value if math.isfinite(value) else str(value)
        return {"metrics": {self.metric: kept}, "keep_best": {"metric": self.metric, "mode": self.mode}}

    def value(self, metrics: Mapping[str, Any]) -> float | None:
        """Return the metric, or None where it is not there."""
        if self.metric not in metrics:
            return None
        shape = tuple(getattr(metrics[self.metric], "shape", ()))
        if math.prod(shape) != 1:
            raise ValueError(
                f"keep_best: {self.metric}: expected one number, came a tensor {shape}, as the lanes of a sweep have; "
                "leave keep_best out, or call the hook with the metric of one lane"
            )
        return float(metrics[self.metric])


class Rules(NamedTuple):
    """What `checkpoint.every` was asked to keep."""

    keep_last: int | None  # None: all
    keep_every: int | None
    keep_best: Best | None

    def check(self) -> None:
        for name, value in (("keep_last", self.keep_last), ("keep_every", self.keep_every)):
            if value is not None and (type(value) is not int or value < 1):
                leave = "None keeps all" if name == "keep_last" else "None keeps none for this"
                raise ValueError(f"checkpoint.every: expected {name} of at least 1, came {value!r}; {leave}")
        best = self.keep_best
        if best is not None and not (isinstance(best, Best) and best.count >= 1 and best.mode in ("min", "max")):
            raise ValueError(f"checkpoint.every: expected keep_best of Best(metric, count, mode), came {best!r}")


@dataclass
class _Facts:
    signature: tuple[Any, ...]
    run: str | None
    metrics: Mapping[str, Any]
    keep_best: Mapping[str, Any]
    planned: bool
    whole: bool | None = None


class Known:
    """What this process has read of checkpoints; one whose files were touched since is read again."""

    def __init__(self) -> None:
        self._facts: dict[Path, _Facts] = {}

    def facts(self, path: Path) -> _Facts | None:
        """Return whose it is and its metrics, or None when it is too broken to say."""
        try:
            signature = _signature(path)
            if path not in self._facts or self._facts[path].signature != signature:
                found = contents(path)
                metrics, keep_best = (_table(found.metadata, name) for name in ("metrics", "keep_best"))
                planned = "unplanned" not in found.metadata
                self._facts[path] = _Facts(signature, found.run, metrics, keep_best, planned)
        except (CheckpointError, OSError):
            return None
        return self._facts[path]

    def is_planned(self, path: Path) -> bool:
        """Tell whether it was saved as an n-th one, not because the run stopped there."""
        facts = self.facts(path)
        return facts is not None and facts.planned

    def forget_all_but(self, paths: Iterable[Path]) -> None:
        """Drop what is known of others: a long run removes thousands."""
        there = set(paths)
        self._facts = {path: facts for path, facts in self._facts.items() if path in there}

    def is_whole(self, path: Path) -> bool:
        """Tell whether every byte verifies."""
        facts = self.facts(path)
        if facts is None:
            return False
        if facts.whole is None:
            facts.whole = run.fault(path) is None
        return facts.whole


def _table(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = metadata.get(name)
    return found if isinstance(found, dict) else {}


def _signature(path: Path) -> tuple[Any, ...]:
    stats = [(file.name, file.stat(follow_symlinks=False)) for file in sorted(path.iterdir())]
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)


def retain(root: Path, rules: Rules, name: str, known: Known) -> None:
    """Remove what `rules` do not keep of the checkpoints that run `name` saved; no other's counts or goes.

    The newest that was planned stays too: of all others, none is a place to go back to.

    Raises: StorageError.
    """
    if rules.keep_last is None:
        return
    paths = run.list(root)
    known.forget_all_but(paths)
    # one too broken to say whose it is stays too: it may be somebody's only copy
    own = [path for path in paths if (facts := known.facts(path)) is not None and facts.run == name]
    if len(own) <= rules.keep_last:
        return
    rest, kept = list(own), 0
    while rest and kept < rules.keep_last:
        kept += known.is_whole(rest.pop())
    planned = (path for path in reversed(own) if known.is_planned(path) and known.is_whole(path))
    stay = _best(rest, rules.keep_best, known) | {next(planned, None)}
    for path in rest:
        marked = rules.keep_every is not None and run.step_of(path) % rules.keep_every == 0
        if path not in stay and not (marked and known.is_whole(path)):
            try:
                staging.remove(path)
            except OSError as error:
                way_out = "check the rights of the run folder"
                raise StorageError(path, expected="a folder to remove", came=str(error), way_out=way_out) from error


def _best(paths: list[Path], best: Best | None, known: Known) -> set[Path]:
    if best is None:
        return set()
    ranked = []
    for path in paths:
        facts = known.facts(path)
        value = None if facts is None else facts.metrics.get(best.metric)
        if isinstance(value, float):
            # of equal ones the newer is better
            ranked.append((value if best.mode == "min" else -value, -run.step_of(path), path))
    chosen: set[Path] = set()
    for _, _, path in sorted(ranked):
        if len(chosen) < best.count and known.is_whole(path):
            chosen.add(path)
    return chosen
