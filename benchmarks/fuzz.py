"""Wrong files by the thousand: each gives exact tensors or a CheckpointError, never anything else.

    python benchmarks/fuzz.py [--files 100000] [--seed 0] [--guided]

Five kinds of input take turns: anybody's safetensors file, a damaged checkpoint, a checkpoint whose damage its manifest
vouches for (as somebody hostile would make it), a hub folder, and a model's folder of transformers. Counted are

- crashes: another exception, a signal, more than 10 seconds, or tensors of more bytes than the file has;
- silent: something was loaded that is not what the bytes say: for safetensors, what the safetensors library says of
  the same file; for a checkpoint, what was saved.

File i of a seed is always the same: `--first i --files 1` runs it alone. `--guided` takes the first kind alone,
and lets atheris (pip install atheris) choose the bytes by what they reach in the parser, up to the first bad end.
`--until-found` ends at the first bad end, too.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from mutations import mutate
from torch import Tensor

from functrain import checkpoint, tree
from functrain import random as keys
from functrain.checkpoint import collect, document, header, manifest, strict_json, tensors
from functrain.checkpoint.stream import Record
from functrain.models import gpt2

SECONDS = 10  # far above what a file of a few kB takes on a busy machine
ROOM_BYTES = 512 << 20  # address space above that of the start: what claims to be large fails here
CHUNK = 500  # files of one process
UNREADABLE = {"F8_E8M0"}  # safetensors 0.8.0 writes it and cannot read it


class TooSlow(BaseException):
    """A file took too long."""


class Wrong(BaseException):
    """A file was loaded as something that it is not."""


def sample() -> dict[str, Any]:
    """A little state with every dtype, ties, strides, scalars and containers."""
    raw = torch.randint(0, 256, (16,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    every = {name: (raw % 2 if name == "BOOL" else raw).view(dtype) for name, dtype in tensors.DTYPES.items()}
    w = torch.arange(6.0).reshape(2, 3)
    return {"every": every, "w": w, "tied": [w, w.t()], "empty": torch.empty(0, 3), "n": (1, 0.5, "é", None, True)}


class Corpus:
    """The good inputs, and the folder in which wrong ones are made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = sample()
        for name, most in (("one", 1 << 30), ("many", 60)):
            checkpoint.save(folder / name, self.state, metadata={"step": 1}, max_file_bytes=most)
        self.config = gpt2.Config(vocab=7, context=5, layers=2, heads=2, width=4)
        self.params = gpt2.init(self.config, keys.key(0))
        gpt2.to_hf(folder / "model", self.params, self.config)
        flat = collect.collect(self.state, "sample")[1]
        self.flat = {name: tensor.contiguous() for name, tensor in flat.items()}
        checkpoint.save_folder(folder / "hub", self.flat, {}, max_file_bytes=60)
        self.files = [path.read_bytes() for path in sorted(folder.glob("*/*.safetensors"))]
        self.files += [bytes([2, *bytes(7)]) + b"{}", self.files[0][:200]]
        self.texts = {name: _contents(folder / name) for name in ("one", "many", "hub", "model")}


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def of_file(corpus: Corpus, draw: random.Random, where: Path) -> None:
    path = where / "file.safetensors"
    path.write_bytes(mutate(draw.choice(corpus.files), corpus.files, draw, framed=True))
    with _no_more_than(path.stat().st_size):
        found = checkpoint.load_file(path)
    _as_the_library_reads(path, found)


def of_damaged_checkpoint(corpus: Corpus, draw: random.Random, where: Path) -> None:
    _damaged(corpus.texts[draw.choice(("one", "many"))], corpus, draw, where)
    if draw.random() < 0.5:
        found = checkpoint.load(where)
    else:
        found = checkpoint.load(where, like=corpus.state)
    _equal(corpus.state, found)


def of_forged_checkpoint(corpus: Corpus, draw: random.Random, where: Path) -> None:
    name = _damaged(corpus.texts[draw.choice(("one", "many"))], corpus, draw, where, but=(manifest.NAME,))
    texts = {path.name: path.read_bytes() for path in where.iterdir() if path.name != manifest.NAME}
    records = {file: Record(len(text), hashlib.sha256(text).hexdigest()) for file, text in texts.items()}
    (where / manifest.NAME).write_bytes(manifest.write(records))
    with _no_more_than(sum(map(len, texts.values()))):
        found = checkpoint.load(where)
    said = document.read(where / manifest.TREE, records[manifest.TREE]).tree
    # what was loaded, described again, is what the file says
    again, flat, _ = collect.collect(found, "again")
    if _plain(again) != _plain(said):
        raise Wrong(f"{name}: {said} was loaded as {again}")
    held = {n: t for path in where.glob("*.safetensors") for n, t in checkpoint.load_file(path).items()}
    for path, node in checkpoint.contents(where).leaves.items():
        if node["kind"] == "tensor":
            _same(path, held[node["tensor"]], tree.at(found, path))


def of_hub_folder(corpus: Corpus, draw: random.Random, where: Path) -> None:
    name = _damaged(corpus.texts["hub"], corpus, draw, where)
    found = checkpoint.load_folder(where)
    if name.endswith(".json"):
        _equal(_dotted(corpus.flat), _dotted(found))
    else:
        held = checkpoint.load_file(where / name)
        _as_the_library_reads(where / name, held)
        for key, tensor in found.items():
            _same(key, held.get(key, corpus.flat.get(key)), tensor)


def of_model(corpus: Corpus, draw: random.Random, where: Path) -> None:
    name = _damaged(corpus.texts["model"], corpus, draw, where)
    params, config = gpt2.from_hf(where)
    if name == "config.json":
        _equal(corpus.params, params)
    if (config.vocab, config.width) != tuple(params["wte"].shape) or len(params["blocks"]) != config.layers:
        raise Wrong(f"{config} beside parameters of another shape")


KINDS: dict[str, Callable[[Corpus, random.Random, Path], None]] = {
    "file": of_file,
    "damaged": of_damaged_checkpoint,
    "forged": of_forged_checkpoint,
    "hub": of_hub_folder,
    "model": of_model,
}


def _damaged(texts: dict[str, bytes], corpus: Corpus, draw: random.Random, where: Path, but: Any = ()) -> str:
    """Write a folder in which one file is wrong, and return that file's name."""
    name = draw.choice(sorted(texts.keys() - set(but)))
    for other, text in texts.items():
        if other == name:
            text = mutate(text, [*texts.values()], draw, framed=name.endswith(".safetensors"))
        (where / other).write_bytes(text)
    return name


def _as_the_library_reads(path: Path, found: dict[str, Tensor]) -> None:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(found):
                raise Wrong(f"{sorted(found)}, and the library reads {sorted(file.keys())}")
            for name, tensor in found.items():
                if tensors.NAMES[tensor.dtype] not in UNREADABLE:
                    _same(name, file.get_tensor(name), tensor)
    except safetensors.SafetensorError as error:
        raise Wrong(f"loaded, and the library says {error}") from None


def _dotted(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("/", "."): tensor for name, tensor in sorted(found.items())}


def _equal(wanted: Any, found: Any) -> None:
    a, b = dict(tree.items(wanted)), dict(tree.items(found))
    if a.keys() != b.keys():
        raise Wrong(f"{sorted(a.keys() ^ b.keys())} are not in both")
    for path, leaf in a.items():
        if isinstance(leaf, Tensor):
            _same(path, leaf, b[path])
        elif repr(leaf) != repr(b[path]):
            raise Wrong(f"{path}: {leaf!r} was loaded as {b[path]!r}")


def _same(path: str, wanted: Any, found: Tensor) -> None:
    facts = (wanted.dtype, wanted.shape), (found.dtype, found.shape)
    if facts[0] != facts[1] or _bits(wanted) != _bits(found):
        raise Wrong(f"{path}: {facts[0]} was loaded as {facts[1]}, or with other bits")


def _bits(tensor: Tensor) -> bytes:
    return bytes(tensors.memory(tensor.contiguous()))


def _plain(node: Any) -> Any:
    """A description without what may be said in several ways: the name that a tied tensor has in the file."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items() if key not in ("tensor", "stride")}
    return [_plain(child) for child in node] if isinstance(node, list) else node


@contextlib.contextmanager
def _no_more_than(size_bytes: int) -> Iterator[None]:
    """Count the bytes of the tensors that are made to read into; more than the files have is a crash."""
    real, made = torch.empty, 0

    def counted(shape: Any, **options: Any) -> Tensor:
        nonlocal made
        tensor = real(shape, **options)
        made += tensor.nbytes
        assert made <= size_bytes, f"{made} bytes allocated for {size_bytes} of files"
        return tensor

    torch.empty = counted  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = real


def one(corpus: Corpus, seed: int, number: int) -> tuple[str, str, str]:
    """Make one wrong input and read it: its kind, what came of it, and the story of a bad end."""
    draw = random.Random(f"{seed} {number}")
    kind = list(KINDS)[number % len(KINDS)]
    with tempfile.TemporaryDirectory(dir=corpus.folder) as where:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            KINDS[kind](corpus, draw, Path(where))
            return kind, "loaded", ""
        except checkpoint.CheckpointError as error:
            told = bool(error.expected and error.came and error.way_out) and str(where) in str(error)
            return kind, type(error).__name__ if told else "crash", str(error)
        except Wrong as error:
            return kind, "silent", str(error)
        except (Exception, TooSlow):
            return kind, "crash", traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _chunk(corpus: Corpus, seed: int, numbers: range, out: int) -> None:
    def slow(*_: Any) -> None:
        raise TooSlow

    logging.disable()
    signal.signal(signal.SIGALRM, slow)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM_BYTES,) * 2)
    for number in numbers:
        os.write(out, (json.dumps([number, *one(corpus, seed, number)])[:60_000] + "\n").encode())


def run(
    corpus: Corpus, seed: int, first: int, files: int, say: Callable[[str], None], until_found: bool = False
) -> dict[str, Any]:
    """Read many wrong inputs, in processes of their own, and count what came of them; maybe until one ends badly."""
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in KINDS}
    stop, begun = first + files, time.monotonic()
    at = first
    while at < stop:
        numbers = range(at, min(at + CHUNK, stop))
        come, out = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(come)
            try:
                _chunk(corpus, seed, numbers, out)
            finally:
                os._exit(0)
        os.close(out)
        with open(come, encoding="utf-8") as lines:
            for line in lines:
                number, kind, outcome, story = json.loads(line)
                counts[kind][outcome] += 1
                at = number + 1
                if outcome in ("crash", "silent"):
                    say(f"file {number}, {kind}: {outcome}\n{story}")
                    if until_found:
                        stop = at
                        break  # closes the pipe, by which the process ends
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if at < min(numbers.stop, stop):
            kind = list(KINDS)[at % len(KINDS)]
            counts[kind]["crash"] += 1
            say(f"file {at}, {kind}: the process ended with {status}")
            at += 1
    total = sum(counts.values(), collections.Counter())
    return {
        "tried": total.total(),
        "crashes": total["crash"],
        "silent": total["silent"],
        "loaded": total["loaded"],
        "seconds": round(time.monotonic() - begun, 1),
        "by kind": {kind: dict(count.most_common()) for kind, count in counts.items()},
    }


def guided(corpus: Corpus, seed: int, files: int) -> int:
    """Read files that libFuzzer makes of the good ones, and return its exit code: 0 if nothing ended badly."""
    pid = os.fork()  # libFuzzer ends its process, and somebody has to clean up
    if pid == 0:
        try:
            _guided(corpus, seed, files)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _guided(corpus: Corpus, seed: int, files: int) -> None:
    import atheris

    parser = (header.read, header._check, header._entry, header._refuse_start, strict_json.loads)
    for function in parser:
        atheris.instrument_func(function)
    seeds, path = corpus.folder / "seeds", corpus.folder / "guided.safetensors"
    seeds.mkdir()
    for i, text in enumerate(corpus.files):
        (seeds / str(i)).write_bytes(text)

    def read(text: bytes) -> None:
        path.write_bytes(text)
        try:
            with _no_more_than(len(text)):
                found = checkpoint.load_file(path)
        except checkpoint.CheckpointError:
            return
        _as_the_library_reads(path, found)

    words = [f"-runs={files}", f"-seed={seed + 1}", f"-timeout={SECONDS}", "-max_len=4096", str(seeds)]
    atheris.Setup([sys.argv[0], *words], read)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--until-found", action="store_true", help="stop at the first file that ends badly")
    options = parser.parse_args()
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        if options.guided:
            return guided(Corpus(Path(folder)), options.seed, options.files)
        found = run(
            Corpus(Path(folder)), options.seed, options.first, options.files, lambda s: print(s, file=sys.stderr),
            options.until_found,
        )  # fmt: skip
    print(json.dumps(found, indent=1))
    return 1 if found["crashes"] or found["silent"] else 0


if __name__ == "__main__":
    sys.exit(main())
