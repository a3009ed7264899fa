"""Losses: `Loss`, what a loss function returns, and cross entropies, under optax's names where optax has them."""

from functrain.losses.chunked import next_token_from_hidden
from functrain.losses.cross_entropy import next_token, softmax_cross_entropy_with_integer_labels
from functrain.losses.loss import Loss

__all__ = ["Loss", "next_token", "next_token_from_hidden", "softmax_cross_entropy_with_integer_labels"]
