"""Where a run goes on, and in what it is not the run that was saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from functrain.checkpoint import document
from functrain.checkpoint.errors import ChangedError
from functrain.checkpoint.loading import load
from functrain.checkpoint.reading import Folder, contents
from functrain.checkpoint.run import OWN_METADATA, Run, latest
from functrain.sharding import Plan
from functrain.tree import Tree


def resume(
    run: Run,
    like: Tree,
    *,
    metadata: Mapping[str, Any] | None = None,
    accept_changes: bool = False,
    plan: Plan | None = None,
) -> Tree:
    """Load the run's newest whole checkpoint as `load(latest(run), like=like)` does; without one, return `like` itself.

    `metadata` is what `every` gets too: all that a resumed run must have in common with the one that was saved, such as
    `{"data": batches.description, "config": dataclasses.asdict(config)}`. With `plan`, every rank must call it; the
    checkpoint may be that of any other number of ranks.

    Raises: ChangedError, whose message lists every difference in the metadata, unless `accept_changes`; what `latest`
    and `load` raise.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as run:
    ...     ft.checkpoint.every(100, run)(100, {"w": torch.ones(2)})
    ...     ft.checkpoint.resume(run, like={"w": torch.zeros(2)})  # in a run's first process, the zeros themselves
    {'w': tensor([1., 1.])}
    """
    if metadata is not None:
        document.check_metadata(metadata, str(run))
    newest = latest(run, plan=plan)
    if newest is None:
        return like
    changes = [] if metadata is None or accept_changes else differences(newest, metadata)
    if changes:
        raise ChangedError(
            newest,
            expected="the metadata that it was saved with",
            came=f"{len(changes)} difference{'s' * (len(changes) > 1)}",
            way_out="choose another run folder, or pass accept_changes=True",
            details="\n".join(f"  {change}" for change in changes),
        )
    return load(newest, like=like, verify=plan is None, plan=plan)  # ranks have shared the check of all bytes


def differences(folder: Folder, metadata: Mapping[str, Any]) -> list[str]:
    """List in what a checkpoint's metadata is not this one, as lines `data.seed: 0 -> 1`.

    What `every` itself adds is not compared.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = ft.checkpoint.save(f"{folder}/mine", {}, metadata={"data": {"seed": 0, "batch": 32}})
    ...     ft.checkpoint.differences(path, {"data": {"seed": 1, "batch": 32}})
    ['data.seed: 0 -> 1']
    """
    saved = {key: value for key, value in contents(Path(folder)).metadata.items() if key not in OWN_METADATA}
    before, now = dict(_rows(saved, "")), dict(_rows(metadata, ""))
    return [
        f"{key}: {before.get(key, 'nothing')} -> {now.get(key, 'nothing')}"
        for key in [*now, *(key for key in before if key not in now)]
        if before.get(key) != now.get(key)
    ]


def _rows(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _rows(child, f"{path}.{key}" if path else key)
    else:
        yield path, json.dumps(value)
