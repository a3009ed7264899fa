"""What can go wrong with a checkpoint, each as its own type; all are `CheckpointError`, a ValueError.

Every message says which file and which tensor path, what was expected, what came, and one way out.
"""

from __future__ import annotations

import os


class CheckpointError(ValueError):
    """The common type; `file`, `path`, `expected`, `came` and `way_out` are what the message was made of."""

    def __init__(
        self,
        file: str | os.PathLike[str],
        *,
        expected: str,
        came: str,
        way_out: str,
        path: str | None = None,
        details: str = "",
    ) -> None:
        self.file, self.path, self.expected, self.came, self.way_out = str(file), path, expected, came, way_out
        where = self.file if not path else f"{self.file}: {path!r}"
        super().__init__(f"{where}: expected {expected}, came {came}; {way_out}" + (f"\n{details}" if details else ""))


class HeaderError(CheckpointError):
    """A file is not well-formed safetensors."""


class IntegrityError(CheckpointError):
    """A file is missing, or its bytes are not those that were saved."""


class VersionError(CheckpointError):
    """The format is newer than this functrain knows."""


class MissingError(CheckpointError):
    """There is no checkpoint, or no such part of the tree, where one was asked for."""


class ExistsError(CheckpointError):
    """The target exists and holds something else; a checkpoint is never overwritten."""


class LockedError(CheckpointError):
    """Another process writes checkpoints of the same run."""


class StorageError(CheckpointError):
    """The operating system refused to read or write; its own error is the cause."""


class UnsupportedError(CheckpointError):
    """The tree holds something that cannot be saved."""


class MismatchError(CheckpointError):
    """The saved tree and `like=` differ; the message lists all differences by path."""


class ChangedError(CheckpointError):
    """The run that would go on is not the one that was saved; the message lists what differs."""


class UnknownTypeError(CheckpointError):
    """The saved tree has a container type whose name is not registered here."""
