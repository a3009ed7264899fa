"""A tree in a folder: safetensors and JSON, never pickle, whole or not there at all.

`save` and `load` are inverse; `every` saves a run, `resume` goes on with it, `best` finds its best. The format is in
docs/checkpoint-format.md.
"""

from functrain.checkpoint.best import best as best
from functrain.checkpoint.document import environment as environment
from functrain.checkpoint.errors import ChangedError as ChangedError
from functrain.checkpoint.errors import CheckpointError as CheckpointError
from functrain.checkpoint.errors import ExistsError as ExistsError
from functrain.checkpoint.errors import HeaderError as HeaderError
from functrain.checkpoint.errors import IntegrityError as IntegrityError
from functrain.checkpoint.errors import LockedError as LockedError
from functrain.checkpoint.errors import MismatchError as MismatchError
from functrain.checkpoint.errors import MissingError as MissingError
from functrain.checkpoint.errors import StorageError as StorageError
from functrain.checkpoint.errors import UnknownTypeError as UnknownTypeError
from functrain.checkpoint.errors import UnsupportedError as UnsupportedError
from functrain.checkpoint.errors import VersionError as VersionError
from functrain.checkpoint.hook import Every as Every
from functrain.checkpoint.hook import every as every
from functrain.checkpoint.hub import load_folder as load_folder
from functrain.checkpoint.hub import save_folder as save_folder
from functrain.checkpoint.loading import load as load
from functrain.checkpoint.reading import Contents as Contents
from functrain.checkpoint.reading import contents as contents
from functrain.checkpoint.reading import load_file as load_file
from functrain.checkpoint.reading import verify as verify
from functrain.checkpoint.registry import register as register
from functrain.checkpoint.resuming import differences as differences
from functrain.checkpoint.resuming import resume as resume
from functrain.checkpoint.retention import Best as Best
from functrain.checkpoint.run import latest as latest
from functrain.checkpoint.run import list as list
from functrain.checkpoint.writing import save as save
