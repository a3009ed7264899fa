"""Data: corpora, tokenizers, token files, batches that are a pure function of the step."""

from functrain.data.background import prefetch
from functrain.data.batches import EvaluationWindows, Windows, crops, evaluation_windows, windows
from functrain.data.bpe import BPE, load_tokenizer, train_bpe
from functrain.data.sharding import Shard, shard
from functrain.data.text import END, Corpus, Document, corpus
from functrain.data.tokenizer import Bytes, Characters, Tokenizer
from functrain.data.tokens import Tokens, open_tokens, tokenize, write_tokens

__all__ = [
    "BPE",
    "END",
    "Bytes",
    "Characters",
    "Corpus",
    "Document",
    "EvaluationWindows",
    "Shard",
    "Tokenizer",
    "Tokens",
    "Windows",
    "corpus",
    "crops",
    "evaluation_windows",
    "load_tokenizer",
    "open_tokens",
    "prefetch",
    "shard",
    "tokenize",
    "train_bpe",
    "windows",
    "write_tokens",
]
