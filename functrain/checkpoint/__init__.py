"""A tree in a folder: safetensors and JSON, never pickle, whole or not there at all.

`save` and `load` are inverse; `every` saves a run, `resume` goes on with it, `best` finds its best. The format is in
docs/checkpoint-format.md.
"""

from functrain.checkpoint.best import best
from functrain.checkpoint.document import environment
from functrain.checkpoint.errors import (
    ChangedError,
    CheckpointError,
    ExistsError,
    HeaderError,
    IntegrityError,
    LockedError,
    MismatchError,
    MissingError,
    StorageError,
    UnknownTypeError,
    UnsupportedError,
    VersionError,
)
from functrain.checkpoint.hook import Every, every
from functrain.checkpoint.hub import load_folder, save_folder
from functrain.checkpoint.loading import load
from functrain.checkpoint.reading import Contents, contents, load_file, verify
from functrain.checkpoint.registry import register
from functrain.checkpoint.resuming import differences, resume
from functrain.checkpoint.retention import Best
from functrain.checkpoint.run import latest, list
from functrain.checkpoint.writing import save
from functrain.tree import elsewhere

__all__ = [
    "Best", "ChangedError", "CheckpointError", "Contents", "Every", "ExistsError", "HeaderError", "IntegrityError",
    "LockedError", "MismatchError", "MissingError", "StorageError", "UnknownTypeError", "UnsupportedError",
    "VersionError", "best", "contents", "differences", "environment", "every", "latest", "list", "load",
    "load_file", "load_folder", "register", "resume", "save", "save_folder", "verify",
]  # fmt: skip

elsewhere.furnish(__name__)
