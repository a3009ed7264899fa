"""Data: rows of your own, tables, corpora, tokenizers, token files; batches that are a pure function of the step."""

from functrain.data.background import prefetch
from functrain.data.bpe import train_bpe
from functrain.data.categories import categories
from functrain.data.csv_files import read_csv
from functrain.data.jsonl_files import read_jsonl
from functrain.data.loading import Loader, loader
from functrain.data.pretraining import Masked, PackedRows, SentencePairs, masked, packed, sentence_pairs
from functrain.data.rows import Batches, FiniteBatches, batches
from functrain.data.sharding import Shard, shard
from functrain.data.special_tokens import SpecialTokens
from functrain.data.splitting import split
from functrain.data.subwords import Subwords
from functrain.data.tables import read_parquet
from functrain.data.text import END, Corpus, Document, corpus
from functrain.data.token_windows import EvaluationWindows, Windows, crops, evaluation_windows, windows
from functrain.data.tokenizer import Bytes, Characters, Tokenizer
from functrain.data.tokenizer_files import load_tokenizer
from functrain.data.tokens import Tokens, open_tokens, tokenize, write_tokens
from functrain.data.wordpiece import train_wordpiece
from functrain.tree import elsewhere

__all__ = [
    "Batches",
    "Bytes",
    "Characters",
    "Corpus",
    "Document",
    "END",
    "EvaluationWindows",
    "FiniteBatches",
    "Loader",
    "Masked",
    "PackedRows",
    "SentencePairs",
    "Shard",
    "SpecialTokens",
    "Subwords",
    "Tokenizer",
    "Tokens",
    "Windows",
    "batches",
    "categories",
    "corpus",
    "crops",
    "evaluation_windows",
    "load_tokenizer",
    "loader",
    "masked",
    "open_tokens",
    "packed",
    "prefetch",
    "read_csv",
    "read_jsonl",
    "read_parquet",
    "sentence_pairs",
    "shard",
    "split",
    "tokenize",
    "train_bpe",
    "train_wordpiece",
    "windows",
    "write_tokens",
]

elsewhere.furnish(__name__)
