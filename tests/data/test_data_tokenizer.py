"""Laws of tokenizers: the round trip, saved and loaded equals kept, clear errors."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from functrain import data

LAW = settings(deadline=None, derandomize=True, max_examples=50)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))  # halves of surrogate pairs are not UTF-8


def pydoc_topics():
    """A small corpus of prose, 0.4 MB."""
    everything = data.corpus("python")
    topics = tuple(document for document in everything.documents if document.name.startswith("pydoc_data/topics/"))
    return everything._replace(documents=topics)


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    return data.train_bpe(pydoc_topics(), vocab_size=500)


@pytest.fixture(scope="module")
def tokenizers(bpe):
    return {"bytes": data.Bytes(), "bpe": bpe}


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_decoding_undoes_encoding_for_every_text(tokenizers, name):
    tokenizer = tokenizers[name]

    @LAW
    @given(text=TEXTS)
    @example(text="a\0b\0\0 c")
    def law(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(torch.from_numpy(ids.astype(np.int64))) == tokenizer.decode(ids.tolist()) == text

    law()


@LAW
@given(text=TEXTS.filter(bool), chooser=st.data())
def test_characters_round_trip_every_text_over_their_vocabulary(text, chooser):
    characters = data.Characters(text)
    other = chooser.draw(st.text(st.sampled_from(text)))
    assert characters.decode(characters.encode(other)) == other
    assert characters.vocab_size == len(set(text))
    # nanoGPT's data/shakespeare_char/prepare.py
    stoi = {character: number for number, character in enumerate(sorted(set(text)))}
    assert characters.encode(other).tolist() == [stoi[character] for character in other]


def test_the_byte_tokenizer_equals_the_utf8_bytes():
    text = "Grüße, 世界 𝄞\0"
    assert data.Bytes().encode(text).tolist() == list(text.encode())
    assert data.Bytes().encode(text).dtype == np.uint8
    assert data.Bytes().vocab_size == 256


def test_a_character_cut_short_decodes_to_a_replacement():
    assert data.Bytes().decode(data.Bytes().encode("aü")[:-1]) == "a\ufffd"


def test_the_end_of_a_document_is_one_token(tokenizers):
    for tokenizer in (*tokenizers.values(), data.Characters("ab\0")):
        assert tokenizer.encode(data.END).tolist() == [tokenizer.end]
        assert tokenizer.encode("ab\0ba").tolist().count(tokenizer.end) == 1
    assert data.Characters("ab").end is None


def test_saved_and_loaded_equals_kept(tmp_path, tokenizers):
    for tokenizer in (*tokenizers.values(), data.Characters("caé\0 'b\n")):
        path = tmp_path / "tokenizer.json"
        tokenizer.save(path)
        loaded = data.load_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.vocab_size, loaded.end) == (tokenizer.vocab_size, tokenizer.end)
        assert np.array_equal(loaded.encode("a bé\0ca"), tokenizer.encode("a bé\0ca"))
        assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_fingerprints_tell_tokenizers_apart(bpe):
    others = [
        data.Bytes(),
        data.Characters("ab"),
        data.Characters("ac"),
        data.train_bpe(pydoc_topics(), vocab_size=400),
    ]
    assert len({tokenizer.fingerprint for tokenizer in (bpe, *others)}) == 5
    assert data.Bytes().fingerprint == data.Bytes().fingerprint


def test_bpe_training_is_deterministic_and_gives_the_vocabulary_asked_for(bpe):
    assert data.train_bpe(pydoc_topics(), vocab_size=500).definition == bpe.definition
    assert bpe.vocab_size == 500
    assert bpe.encode("the").dtype == np.uint16
    text = pydoc_topics().text
    # a merge replaces two tokens by one: prose with 243 merges must shrink by far more than a half
    assert len(bpe.encode(text)) < 0.6 * len(text.encode())


def test_the_libraries_read_the_saved_file_and_agree(tmp_path, bpe):
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    import tokenizers as library

    bpe.save(tmp_path / "tokenizer.json")
    text = "def f(x):\n    return 'Grüße'\0import os"
    ids = bpe.encode(text).tolist()
    assert library.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == ids
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=data.END)
    assert fast.encode(text) == ids
    assert fast.eos_token_id == bpe.end


def test_bpe_learns_from_the_train_side_only():
    with pytest.raises(ValueError, match="expected the train side of 'python', came its 'validation' side"):
        data.train_bpe(data.corpus("python", split="validation"), vocab_size=300)
    with pytest.raises(ValueError, match="257 or more"):
        data.train_bpe(data.corpus("python"), vocab_size=256)


def test_without_the_library_the_error_names_the_install_and_a_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install functrain\[cli\].*Bytes\(\)"):
        data.train_bpe(data.corpus("python"), vocab_size=300)


def test_importing_the_room_does_not_import_the_library():
    program = "import sys, functrain.data; print('tokenizers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


def test_an_unknown_character_is_an_error_with_its_place():
    with pytest.raises(ValueError, match="'z' at position 2 is none of the 2 characters"):
        data.Characters("ab").encode("abz")
    with pytest.raises(ValueError, match="empty"):
        data.Characters("")


@pytest.mark.parametrize("wrong", [[-1], [500], [[1]], [0.5]])
def test_wrong_tokens_are_errors(tokenizers, wrong):
    for tokenizer in (*tokenizers.values(), data.Characters("ab")):
        with pytest.raises(ValueError, match="decode: expected"):
            tokenizer.decode(wrong)


@pytest.mark.parametrize("content", [b"\xff", b"[]", b"{}", b"words", json.dumps({"functrain": "other"}).encode()])
def test_what_is_no_tokenizer_is_an_error_with_its_path(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="no such file"):
        data.load_tokenizer(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected") as caught:
        data.load_tokenizer(path)
    assert str(path) in str(caught.value)
