"""WordPiece, the vocabulary of BERT, trained by the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from functrain.data.subwords import Subwords, library
from functrain.data.text import Corpus
from functrain.data.tokens import told
from functrain.progress import Progress

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_INSIDE = "##"  # before a token that goes on with a word


def train_wordpiece(
    corpus: Corpus, *, vocab_size: int, lowercase: bool = True, progress: Progress | None = None
) -> Subwords:
    """Learn a WordPiece vocabulary from the train side of a corpus, as BERT has one.

    Text is cut at spaces and punctuation; a token that goes on with a word begins with `##`. Tokens 0 to 4 are [PAD],
    [UNK], [CLS], [SEP], [MASK]. `lowercase` takes case and accents away, as in the uncased BERT. It is never lossless:
    spaces are lost, and so are words with characters that are rare: those beyond the 1,000 most frequent, or beyond
    a quarter of the vocabulary, are [UNK]. A text too small for `vocab_size` gives a smaller vocabulary.
    Deterministic: same corpus, same library version, same `tokenizer.json`. `progress` counts characters that were
    read; the merges that follow, some seconds, tell nothing.

    Raises: ValueError for the validation side, whose words must not leak, and for a vocabulary under 32; ImportError
    without `tokenizers`.
    Source: Wu et al. 2016 (arXiv:1609.08144), section 4.1; Devlin et al. 2019 (arXiv:1810.04805).

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "text.txt").write_text("to be or not to be, that is the question " * 10)
    ...     tokenizer = ft.data.train_wordpiece(ft.data.corpus(folder, validation=0.0), vocab_size=80)
    >>> [tokenizer.decode([token]) for token in tokenizer.encode("To be stone")]
    ['to', 'be', 's', '##t', '##o', '##n', '##e']
    >>> tokenizer.special.mask, tokenizer.lossless
    (4, False)
    """
    if corpus.split != "train":
        raise ValueError(f"train_wordpiece: expected the train side of {corpus.name!r}, came its {corpus.split!r} side")
    if vocab_size < 32:
        raise ValueError(f"train_wordpiece: expected a vocabulary of 32 or more, came {vocab_size}")
    tokenizers = library()
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    texts = [normalizer.normalize_str(text) for text in told(corpus, progress)]
    alphabet = _frequent(texts, min(1000, (vocab_size - len(_SPECIAL)) // 4))
    # the library numbers what stands inside words in an order of its own each time, by which ties are broken: so it is
    # asked which there are, and given them in order
    inside = sorted(
        token for token in _trained(texts, alphabet, 0, []) if token.startswith(_INSIDE) and len(token) == 3
    )
    vocabulary = _trained(texts, alphabet, vocab_size, inside)
    made = _tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizer
    made.decoder = tokenizers.decoders.WordPiece(prefix=_INSIDE)
    made.add_special_tokens(list(_SPECIAL))
    cls, sep = ((name, vocabulary[name]) for name in ("[CLS]", "[SEP]"))
    made.post_processor = tokenizers.processors.BertProcessing(sep, cls)  # for other programs: `encode` adds nothing
    return Subwords(made.to_str(pretty=True))


def _trained(texts: Iterable[str], alphabet: list[str], vocab_size: int, inside: list[str]) -> dict[str, int]:
    """Give the vocabulary that the library learns from normalized texts, with the tokens of `inside` in that order."""
    tokenizers = library()
    tokenizer = _tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_SPECIAL, *inside],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_INSIDE,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary: dict[str, int] = json.loads(tokenizer.to_str())["model"]["vocab"]
    return vocabulary


def _tokenizer(model: Any) -> Any:
    tokenizer = library().Tokenizer(model)
    tokenizer.pre_tokenizer = library().pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _frequent(texts: list[str], most: int) -> list[str]:
    """Give the `most` frequent characters, of equal ones those of the lower number, sorted."""
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))
        found, times = np.unique(points, return_counts=True)
        counts[found] += times
    counts[[ord(space) for space in " \t\n\r"]] = 0
    chosen = np.argsort(-counts, kind="stable")[:most]
    return sorted(chr(point) for point in chosen if counts[point])
