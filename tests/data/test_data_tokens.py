"""Laws of token files: equal to the tokens in memory, written once, whole or not at all, checked when opened."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain import data
from functrain.data import atomic

LAW = settings(deadline=None, derandomize=True, max_examples=50)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


def corpus_of(texts):
    documents = tuple(data.Document(f"{number:03}", text) for number, text in enumerate(texts))
    return data.Corpus("drawn", "train", documents, repr(texts))


@LAW
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_tokens_are_those_of_the_whole_text_in_memory_and_in_a_file(tmp_path_factory, texts):
    corpus = corpus_of(texts)
    for tokenizer in (data.Bytes(), data.Characters(corpus.text)):
        kept = data.tokenize(corpus, tokenizer)
        mapped = data.tokenize(corpus, tokenizer, folder=tmp_path_factory.mktemp("tokens"))
        assert kept.ids.tolist() == mapped.ids.tolist() == tokenizer.encode(corpus.text).tolist()
        assert kept.ids.dtype == mapped.ids.dtype
        assert kept.fingerprint == mapped.fingerprint
        assert kept.size_bytes == mapped.size_bytes == len(corpus.text.encode())
        assert kept.vocab_size == mapped.vocab_size == tokenizer.vocab_size
        assert tokenizer.decode(mapped.ids) == data.END.join(texts)


def test_bpe_tokens_are_those_of_the_whole_text(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    corpus = corpus_of(["one two three", "two three four ", " three\n"])
    bpe = data.train_bpe(corpus, vocab_size=280)
    tokens = data.tokenize(corpus, bpe, folder=tmp_path)
    assert tokens.ids.tolist() == bpe.encode(corpus.text).tolist()
    assert tokens.ids.dtype == np.uint16
    assert tokens.bytes_per_token == len(corpus.text) / len(tokens.ids) > 1.0


def test_the_byte_tokenizer_has_one_byte_per_token():
    assert data.tokenize(corpus_of(["grüße", "b"])).bytes_per_token == 1.0


def test_a_large_vocabulary_is_kept_in_four_bytes(tmp_path):
    characters = data.Characters("".join(map(chr, range(0x10000, 0x10000 + 70000))))
    tokens = data.tokenize(corpus_of([chr(0x10000 + 69999)]), characters, folder=tmp_path)
    assert tokens.ids.tolist() == [69999]
    assert tokens.ids.dtype == np.uint32


class Counting(data.Bytes):
    calls = 0

    def encode(self, text):
        type(self).calls += 1
        return super().encode(text)


def test_a_file_is_written_once_and_again_when_text_or_tokenizer_change(tmp_path):
    Counting.calls = 0
    for _ in range(3):
        data.tokenize(corpus_of(["abc"]), Counting(), folder=tmp_path)
    assert Counting.calls == 1
    data.tokenize(corpus_of(["abd"]), Counting(), folder=tmp_path)
    assert Counting.calls == 2
    data.tokenize(corpus_of(["abc"]), data.Characters("abc"), folder=tmp_path)
    assert len(list(tmp_path.glob("*.bin"))) == len(list(tmp_path.glob("*.json"))) == 3


def test_a_write_that_fails_leaves_nothing_and_one_that_stops_before_the_header_is_done_again(tmp_path, monkeypatch):
    def texts():
        yield "one"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        data.write_tokens(tmp_path / "t.bin", texts(), data.Bytes(), corpus="c")
    assert list(tmp_path.iterdir()) == []

    replace = atomic.os.replace

    def stop_at_the_header(staging, path):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        replace(staging, path)

    monkeypatch.setattr(atomic.os, "replace", stop_at_the_header)
    with pytest.raises(KeyboardInterrupt):
        data.tokenize(corpus_of(["abc"]), folder=tmp_path)
    monkeypatch.undo()
    (partial,) = tmp_path.iterdir()
    partial.write_bytes(b"xx")
    assert bytes(data.tokenize(corpus_of(["abc"]), folder=tmp_path).ids) == b"abc"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failing_replacement_keeps_the_old_file(tmp_path):
    path = tmp_path / "folder" / "file"
    with atomic.replacing(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), atomic.replacing(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


@pytest.fixture
def written(tmp_path):
    data.write_tokens(tmp_path / "t.bin", ["some text", "more"], data.Bytes(), corpus="c")
    return tmp_path / "t.bin"


def test_the_map_is_read_only(written):
    with pytest.raises(ValueError, match="read-only"):
        data.open_tokens(written).ids[0] = 1


@LAW
@given(chooser=st.data())
def test_every_damage_to_the_tokens_is_noticed(tmp_path_factory, chooser):
    path = tmp_path_factory.mktemp("tokens") / "t.bin"
    data.write_tokens(path, ["some text", "more"], data.Bytes(), corpus="c")
    content = bytearray(path.read_bytes())
    bit = chooser.draw(st.integers(0, 8 * len(content) - 1))
    cut = chooser.draw(st.integers(0, len(content) - 1))
    flipped = content.copy()
    flipped[bit // 8] ^= 1 << bit % 8
    for damaged, message in (
        (flipped, "crc32"),
        (content[:cut], "expected 14 tokens"),
        (content + b"x", "came 15 bytes"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as caught:
            data.open_tokens(path)
        assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match="came 0 bytes"):
        data.open_tokens(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "uint16"}, "is kept as uint8, came 'uint16'"),
        ({"vocab_size": 70000}, "is kept as uint32, came 'uint8'"),
        ({"count": 13}, "expected 13 tokens"),
        ({"count": "14"}, "expected the fields"),
        ({"extra": 1}, "expected the fields"),
        ({"version": 2}, "version 2 is newer than 1; upgrade functrain"),
    ],
)
def test_a_header_that_does_not_fit_is_an_error(written, change, message):
    header = written.with_suffix(".json")
    header.write_text(json.dumps(json.loads(header.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        data.open_tokens(written)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff"])
def test_what_is_no_header_is_an_error(written, content):
    written.with_suffix(".json").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.json: expected"):
        data.open_tokens(written)
    written.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"t\.json: the header of a token file is missing"):
        data.open_tokens(written)


def test_a_token_file_of_another_text_under_this_name_is_an_error(tmp_path):
    data.tokenize(corpus_of(["abc"]), folder=tmp_path)
    (header,) = tmp_path.glob("*.json")
    header.write_text(json.dumps(json.loads(header.read_text()) | {"corpus": "other"}))
    with pytest.raises(ValueError, match="expected tokens with fingerprint"):
        data.tokenize(corpus_of(["abc"]), folder=tmp_path)


def test_wrong_arguments_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no token for the end of a document"):
        data.tokenize(corpus_of(["a", "b"]), data.Characters("ab"))
    with pytest.raises(ValueError, match="no text at all"):
        data.write_tokens(tmp_path / "t.bin", [], data.Bytes(), corpus="c")
    with pytest.raises(ValueError, match="call the token file .bin"):
        data.write_tokens(tmp_path / "t.json", ["a"], data.Bytes(), corpus="c")
    assert list(tmp_path.iterdir()) == []
