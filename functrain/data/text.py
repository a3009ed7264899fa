"""Corpora: named documents of text in a fixed order, one side of a split, and the fingerprint of both."""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

Split = Literal["train", "validation"]

END = "\0"
"""What stands between two documents: the character that no text contains."""


class Document(NamedTuple):
    """A text of a corpus, and its name."""

    name: str  # relative to the corpus, with "/"
    text: str


class Corpus(NamedTuple):
    """One side of a split, held in memory. For more text than memory holds, stream it through `write_tokens`."""

    name: str
    split: Split
    documents: tuple[Document, ...]  # sorted by name, none empty
    fingerprint: str  # sha256 over the names and the UTF-8 bytes of `documents`

    @property
    def text(self) -> str:
        """The documents in order, `END` between each two: what every tokenizer encodes and every byte count counts."""
        return END.join(document.text for document in self.documents)

    def __repr__(self) -> str:  # the text would fill the screen, or the log
        return f"Corpus({self.name!r}, {self.split!r}, {len(self.documents)} documents, {self.fingerprint[:16]})"


def corpus(
    name_or_path: str | Path,
    *,
    split: Split = "train",
    validation: float = 0.1,
    pattern: str | None = None,
) -> Corpus:
    """Read one side of a corpus: `"python"`, a folder of text or a single file of text, all UTF-8.

    `"python"` is what every Python installation carries: the standard library's sources and the help topics of
    `pydoc_data`, about 10 MB (`"./python"` is the folder of that name). It and a folder are split by document: one
    goes to validation when the hash of its name falls below the fraction `validation`, so it stays on its side
    whatever is added, removed or changed beside it, in every Python version, and a larger fraction only adds to
    validation. A folder gives its regular files that are not empty and not hidden, those whose file name matches
    `pattern`, those of linked folders too. A single file is split by position: the last fraction of its characters is
    the validation text, which equals nanoGPT's split. `validation=0.0` gives the whole as train. A byte order mark
    before a text is no part of it.

    Raises: ValueError naming the path when it is missing, holds no text for this split, or is not UTF-8 text.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder, "text.txt")
    ...     _ = file.write_text("0123456789")
    ...     ft.data.corpus(file, validation=0.2).text, ft.data.corpus(file, validation=0.2, split="validation").text
    ('01234567', '89')
    """
    if split not in ("train", "validation"):
        raise ValueError(f"corpus: expected split 'train' or 'validation', came {split!r}")
    if not 0.0 <= validation < 1.0:
        raise ValueError(f"corpus: expected a validation fraction in [0, 1), came {validation}; 0.1 is usual")
    path = Path(name_or_path)

    def wanted(name: str) -> bool:
        return is_validation(name, validation) == (split == "validation")

    if pattern is not None and (name_or_path == "python" or not path.is_dir()):
        raise ValueError(
            f"corpus: pattern={pattern!r} selects files of a folder, {str(name_or_path)!r} is none; drop it"
        )
    if name_or_path == "python":
        path = Path(sysconfig.get_path("stdlib"))
        found = _standard_library(path, wanted)
    elif path.is_dir():
        found = _folder(path, pattern, wanted)
    elif path.is_file():
        found = _by_position(Document(path.name, _read(path)), split, validation)
    else:
        raise ValueError(f"corpus: {str(name_or_path)!r} is neither a file nor a folder, nor the corpus 'python'")
    documents = tuple(sorted(document for document in found if document.text))
    if not documents:
        way_out = (
            "another fraction (0.0 gives everything to train)" if split == "train" else "another fraction, a larger one"
        )
        raise ValueError(
            f"corpus: {path} holds no text for split {split!r} with validation={validation} and pattern={pattern!r}; "
            f"give more text, or {way_out}"
        )
    return Corpus(str(name_or_path), split, documents, _fingerprint(documents))


def is_validation(name: str, fraction: float) -> bool:
    """Say on which side the document of this name falls, from the hash of the name alone."""
    digest = hashlib.sha256(_encoded(name)).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def _by_position(document: Document, split: Split, fraction: float) -> Iterator[Document]:
    cut = int(len(document.text) * (1.0 - fraction))
    yield Document(document.name, document.text[:cut] if split == "train" else document.text[cut:])


def _folder(folder: Path, pattern: str | None, wanted: Callable[[str], bool]) -> Iterator[Document]:
    for name in _files(folder, left_out=(".*",), follow=True):
        if wanted(name) and (pattern is None or fnmatchcase(name.split("/")[-1], pattern)):
            yield Document(name, _read(folder / name))


_TOPICS = "pydoc_data/topics.py"
# tests hold odd encodings, encodings/ holds generated tables, the rest differs from machine to machine
_LEFT_OUT = (
    *("test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "config-*"),
    *("_sysconfigdata*", "sitecustomize.py", "usercustomize.py"),
)


def _standard_library(stdlib: Path, wanted: Callable[[str], bool]) -> Iterator[Document]:
    for name in _files(stdlib, left_out=_LEFT_OUT):
        if name == _TOPICS:
            yield from (topic for topic in _topics(stdlib / name) if wanted(topic.name))
        elif name.endswith(".py") and wanted(name):
            yield Document(name, _read(stdlib / name))


def _topics(path: Path) -> Iterator[Document]:
    """Give the help topics as prose: the file is one assignment of a dictionary from topic to text."""
    for statement in ast.parse(_read(path)).body:
        if isinstance(statement, ast.Assign):
            for topic, text in ast.literal_eval(statement.value).items():
                yield Document(f"pydoc_data/topics/{topic}", text)


def _files(folder: Path, *, left_out: Sequence[str], follow: bool = False) -> Iterator[str]:
    """Give the names of the regular files below a folder, passing by every file and folder that `left_out` matches.

    Those of a linked folder too, if `follow`: each folder is read once, by its own name where it has one here, else by
    that of the first link. So a link upwards leads nowhere, and no text is on both sides of a split.
    """

    def kept(names: list[str]) -> list[str]:
        return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in left_out)]

    seen, starts = set[Path](), [folder]
    while starts:
        links = []
        for start in starts:
            for parent, folders, names in os.walk(start, onerror=_raise):
                real = Path(parent).resolve()
                folders[:] = [] if real in seen else kept(folders)
                paths = [] if real in seen else [Path(parent, name) for name in kept(names)]
                seen.add(real)
                links += [path for name in folders if (path := Path(parent, name)).is_symlink()]
                yield from (path.relative_to(folder).as_posix() for path in paths if path.is_file())
        starts = sorted(links) if follow else []


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out an unreadable folder in silence


def _read(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")  # a mark of the encoding, which editors put before a text
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, came byte 0x{data[error.start]:02x} at position {error.start}; "
            "convert the file, or leave it out with corpus(folder, pattern=...)"
        ) from None
    if END in text:
        raise ValueError(
            f"{path}: expected text, came a zero byte at position {data.index(0)}, as in binary files; "
            "leave it out with corpus(folder, pattern=...)"
        )
    return text


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # a file name may be any bytes


def _fingerprint(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        for data in (_encoded(document.name), document.text.encode("utf-8")):
            digest.update(len(data).to_bytes(8, "big"))  # lengths: moving a byte across a border changes the hash
            digest.update(data)
    return digest.hexdigest()
