"""Batches to pre-train language models on: packed documents, masked tokens, pairs of sentences."""

from functrain.data.pretraining.masking import Masked, masked
from functrain.data.pretraining.packed_rows import PackedRows, packed
from functrain.data.pretraining.pairs import SentencePairs, sentence_pairs

__all__ = ["Masked", "PackedRows", "SentencePairs", "masked", "packed", "sentence_pairs"]
