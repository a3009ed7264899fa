"""Byte-level byte-pair encoding, trained by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence

from functrain.data.subwords import Subwords, library
from functrain.data.text import END, Corpus
from functrain.data.tokens import told
from functrain.progress import Progress


def train_bpe(
    corpus: Corpus, *, vocab_size: int, special: Sequence[str] = (), progress: Progress | None = None
) -> Subwords:
    """Learn the merges of a byte-level BPE from the train side of a corpus.

    Any text can be encoded: the 256 bytes are in the vocabulary, and token 0 is `END`. The next ones are those of
    `special`, by names that say what they are for: `special=["<mask>", "<pad>"]` for a masked language model. A text
    too small for `vocab_size` gives a smaller vocabulary. Deterministic: same corpus, same library version, same
    `tokenizer.json`.
    `progress` counts characters that were read; the merges that follow, some seconds, tell nothing.

    Raises: ValueError for the validation side, whose words must not leak; ImportError without `tokenizers`.
    Source: Radford et al. 2019, section 2.2 (the pattern that cuts words is GPT-2's).

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "text.txt").write_text("to be or not to be " * 10)
    ...     tokenizer = ft.data.train_bpe(ft.data.corpus(folder, validation=0.0), vocab_size=262)
    >>> [tokenizer.decode([token]) for token in tokenizer.encode("to be true")]
    ['to', ' be', ' ', 't', 'r', 'u', 'e']
    """
    if corpus.split != "train":
        raise ValueError(f"train_bpe: expected the train side of {corpus.name!r}, came its {corpus.split!r} side")
    names = [END, *special]
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"train_bpe: expected special tokens with names of their own, came {list(special)}")
    if vocab_size < (least := 256 + len(names)):
        raise ValueError(
            f"train_bpe: expected a vocabulary of {least} or more (the bytes and {len(names)} special tokens), came "
            f"{vocab_size}"
        )
    tokenizers = library()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[tokenizers.AddedToken(name, special=True, normalized=False) for name in names],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(told(corpus, progress), trainer)
    return Subwords(tokenizer.to_str(pretty=True))
