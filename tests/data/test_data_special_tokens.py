"""What a tokenizer knows of its special tokens, what it loses, and WordPiece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functrain import data
from functrain.data.pretraining.words import word_parts

pytest.importorskip("tokenizers", reason="needs the package tokenizers")
TEXT = "To be, or not to be: that is the question of a naïve Étude.\nWhether 'tis nobler in the mind to suffer 世\n" * 5
CORPUS = data.Corpus("x", "train", (data.Document("a", TEXT), data.Document("b", "unaffable " * 20)), "f")


@pytest.fixture(scope="module")
def wordpiece() -> data.Subwords:
    return data.train_wordpiece(CORPUS, vocab_size=200)


def files_of(folder: Path, **contents: Any) -> Path:
    folder.mkdir()
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def named(tokenizer: data.Tokenizer) -> dict[str, str | None]:
    ids = tokenizer.special._asdict()
    ids.pop("ids")
    return {name: None if id is None else tokenizer.decode([id]) for name, id in ids.items()}


NONE = dict.fromkeys(("cls", "sep", "pad", "mask", "begin", "end", "unknown"))
BERT = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", "unknown": "[UNK]"}


def test_special_tokens_are_told_by_the_usual_names(wordpiece: data.Subwords) -> None:
    assert named(wordpiece) == NONE | BERT and wordpiece.end == wordpiece.special.sep
    plain = data.train_bpe(CORPUS, vocab_size=300)
    assert named(plain) == NONE | {"end": data.END} and plain.special.ids == (0,) and plain.end == 0
    roberta = data.train_bpe(CORPUS, vocab_size=300, special=["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<other>"])
    expected = {"begin": "<s>", "cls": "<s>", "sep": data.END, "end": data.END, "pad": "<pad>", "unknown": "<unk>"}
    assert named(roberta) == expected | {"mask": "<mask>"} and roberta.special.ids == tuple(range(7))
    assert data.Bytes().special == data.SpecialTokens(end=0, ids=(0,)) and data.Bytes().lossless
    assert data.Characters("ab").special == data.SpecialTokens() and data.Characters("ab\0").special.end == 0


def test_special_tokens_are_told_by_the_files_of_the_folder(tmp_path: Path, wordpiece: data.Subwords) -> None:
    config = {"cls_token": "[CLS]", "mask_token": {"content": "question", "special": False}, "pad_token": None}
    folder = files_of(tmp_path / "a", tokenizer=wordpiece.definition, tokenizer_config=config)
    found = data.load_tokenizer(folder)
    assert named(found) == NONE | BERT | {"mask": "question", "pad": None}
    assert set(found.special.ids) == {0, 1, 2, 3, 4, int(found.encode("question")[0])}
    map_ = {"mask_token": "[MASK]", "eos_token": "[SEP]", "additional_special_tokens": ["[UNK]"]}
    folder = files_of(tmp_path / "b", tokenizer=wordpiece.definition, tokenizer_config=config, special_tokens_map=map_)
    assert named(data.load_tokenizer(folder / "tokenizer.json")) == NONE | BERT | {"pad": None, "end": "[SEP]"}


def test_what_they_are_for_is_saved(tmp_path: Path, wordpiece: data.Subwords) -> None:
    found = data.Subwords(wordpiece.definition, {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": None})
    (tmp_path / "new").mkdir()
    found.save(tmp_path / "new" / "tokenizer.json")
    assert data.load_tokenizer(tmp_path / "new").special == found.special != wordpiece.special
    wordpiece.save(tmp_path / "new" / "tokenizer.json")  # what lies there is of another one
    assert data.load_tokenizer(tmp_path / "new").special == wordpiece.special
    wordpiece.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["tokenizer.json"]


def test_transformers_agrees_about_special_tokens(tmp_path: Path, wordpiece: data.Subwords) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    wordpiece.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "To be: unaffable, NAÏVE questions 世!"
    ours = wordpiece.encode(text).tolist()
    assert theirs(text)["input_ids"] == [wordpiece.special.cls, *ours, wordpiece.special.sep]
    for name in ("cls", "sep", "pad", "mask"):
        assert getattr(theirs, f"{name}_token_id") == getattr(wordpiece.special, name)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"mask_token": "<no>"}},
            "tokenizer.json: .*mask_token is '<no>', which is not in the voc",
        ),
        ({"tokenizer_config": {"mask_token": 3}}, "tokenizer_config.json: expected mask_token to be a token or null"),
        ({"special_tokens_map": "{"}, "special_tokens_map.json: expected JSON"),
        ({"special_tokens_map": []}, "special_tokens_map.json: expected a JSON object, came list"),
    ],
)
def test_files_that_name_no_token_are_errors(
    files: dict[str, Any], message: str, tmp_path: Path, wordpiece: data.Subwords
) -> None:
    with pytest.raises(ValueError, match=message):
        data.load_tokenizer(files_of(tmp_path / "a", tokenizer=wordpiece.definition, **files))


def test_encoding_neither_pads_nor_cuts_whatever_the_file_says(tmp_path: Path, wordpiece: data.Subwords) -> None:
    padding = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None}
    published = {
        "padding": padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "truncation": {"direction": "Right", "max_length": 128, "strategy": "LongestFirst", "stride": 0},
    }
    definition = json.dumps(json.loads(wordpiece.definition) | published)
    loaded = data.load_tokenizer(files_of(tmp_path / "a", tokenizer=definition))
    assert loaded.encode("to be or not to be").tolist() == wordpiece.encode("to be or not to be").tolist()
    assert len(loaded.encode("to be " * 150)) == 300


def test_a_tokenizer_that_loses_text_says_so(wordpiece: data.Subwords) -> None:
    import tokenizers as library

    assert not wordpiece.lossless and wordpiece.decode(wordpiece.encode("To  BE naïve")) == "to be naive"
    bpe = data.train_bpe(CORPUS, vocab_size=300, special=["<mask>"])
    assert bpe.lossless
    for change in ("Lowercase", "StripAccents", "NFC", "NFKC", "Strip"):
        changed = library.Tokenizer.from_str(bpe.definition)
        changed.normalizer = getattr(library.normalizers, change)()
        assert not data.Subwords(changed.to_str()).lossless, change
    spaced = library.Tokenizer.from_str(bpe.definition)
    spaced.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not data.Subwords(spaced.to_str()).lossless
    eating = json.loads(bpe.definition)
    eating["added_tokens"][1]["lstrip"] = True  # as <mask> of RoBERTa
    assert not data.Subwords(json.dumps(eating)).lossless


def test_wordpiece_has_the_same_vocabulary_each_time() -> None:
    # the library alone numbers "##a", "##b", ... in another order each time, in one process too
    assert len({data.train_wordpiece(CORPUS, vocab_size=200).fingerprint for _ in range(4)}) == 1


def test_wordpiece_cuts_words_and_keeps_case_if_asked(wordpiece: data.Subwords) -> None:
    assert 80 < wordpiece.vocab_size <= 200
    pieces = [wordpiece.decode([id]) for id in wordpiece.encode("Question unafford!")]
    assert pieces[0] == "question" and pieces[-1] == "[UNK]" and all(piece[:2] == "##" for piece in pieces[2:-1])
    cased = data.train_wordpiece(CORPUS, vocab_size=200, lowercase=False)
    assert cased.decode(cased.encode("To be Étude")) == "To be Étude" and not cased.lossless
    # a quarter of a small vocabulary is characters, and a word with another one is unknown
    small = data.train_wordpiece(CORPUS, vocab_size=40)
    assert small.vocab_size <= 40 and small.encode("世").tolist() == [small.special.unknown]
    with pytest.raises(ValueError, match="train side of 'x', came its 'validation' side"):
        data.train_wordpiece(CORPUS._replace(split="validation"), vocab_size=200)
    with pytest.raises(ValueError, match="32 or more, came 31"):
        data.train_wordpiece(CORPUS, vocab_size=31)


def test_special_tokens_of_bpe_have_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="259 or more .the bytes and 3 special tokens"):
        data.train_bpe(CORPUS, vocab_size=258, special=["<mask>", "<pad>"])
    with pytest.raises(ValueError, match="names of their own"):
        data.train_bpe(CORPUS, vocab_size=300, special=["<mask>", "<mask>"])


def words_of(tokenizer: data.Tokenizer, text: str) -> list[str]:
    parts, ids = word_parts(tokenizer), tokenizer.encode(text).astype(np.int64)
    joined = np.concatenate([[False], parts.continues[ids[1:]] & parts.open[ids[:-1]]])
    return [tokenizer.decode(word) for word in np.split(ids, np.flatnonzero(~joined)[1:])]


def test_words_begin_where_they_begin(wordpiece: data.Subwords) -> None:
    text = "unaffable, naïve[MASK]questions"
    assert words_of(wordpiece, text) == ["unaffable", ",", "naive", "[MASK]", "questions"]
    bpe = data.train_bpe(CORPUS, vocab_size=280, special=["<mask>"])
    text = "unaffable, naïve_1<mask>questions\n  世 (a.b)"
    found = words_of(bpe, text)
    assert "".join(found) == text
    assert found == [
        "unaffable",
        ",",
        " naïve_1",
        "<mask>",
        "questions",
        "\n",
        " ",
        " 世",
        " ",
        "(",
        "a",
        ".",
        "b",
        ")",
    ]
    with pytest.raises(ValueError, match="came Bytes; mask tokens, not whole words"):
        word_parts(data.Bytes())
