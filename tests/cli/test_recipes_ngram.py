"""The baseline that the main job is measured against is a probability, and the textbook's."""

from __future__ import annotations

import math
from collections import Counter

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain.recipes.ngram import surprisals

LAW = settings(deadline=None, derandomize=True, max_examples=40)
TEXTS = st.lists(st.integers(0, 4), min_size=3, max_size=60)


@LAW
@given(TEXTS, st.integers(0, 4), st.integers(0, 4), st.integers(1, 3))
def test_the_probabilities_of_all_next_tokens_add_to_one(train, a, b, order):
    last = [surprisals(numpy.array(train), numpy.array([a, b, w]), vocabulary=5, order=order)[-1] for w in range(5)]
    # 1e-12: five float64 probabilities, each a handful of roundings of 1e-16
    assert abs(sum(math.exp(-s) for s in last) - 1.0) < 1e-12


@LAW
@given(TEXTS, TEXTS, st.integers(1, 3))
def test_it_equals_the_formula_written_out(train, text, order):
    found = surprisals(numpy.array(train), numpy.array(text), vocabulary=5, order=order)
    wanted = [
        -math.log(_probability(train, tuple(text[max(0, i - order + 1) : i]), text[i], order)) for i in range(len(text))
    ]
    # float64, a handful of roundings of 1e-16 in each probability
    numpy.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


def _probability(train: list[int], history: tuple[int, ...], word: int, order: int) -> float:
    """Chen and Goodman's recursion over plain dictionaries."""
    counts = {order: Counter(tuple(train[i : i + order]) for i in range(len(train) - order + 1))}
    for n in range(order - 1, 0, -1):
        counts[n] = Counter(gram[1:] for gram in counts[n + 1])

    def at(n: int, h: tuple[int, ...]) -> float:
        if n == 0:
            return 1 / 5
        lower = at(n - 1, h[1:])
        of_history = {gram: c for gram, c in counts[n].items() if gram[:-1] == h}
        if not of_history:
            return lower
        once, twice = (sum(c == k for c in counts[n].values()) for k in (1, 2))
        d = once / (once + 2 * twice) if once and twice else 0.5
        kept = max(of_history.get((*h, word), 0) - d, 0.0)
        return (kept + d * len(of_history) * lower) / sum(of_history.values())

    return at(len(history) + 1, history)


def test_a_repeating_text_is_learnt():
    train = numpy.tile([0, 1, 2, 3], 1000)
    assert surprisals(train, train[:100], vocabulary=4)[2:].max() < 0.01


def test_wrong_tokens_are_named():
    with pytest.raises(ValueError, match="text of shape"):
        surprisals(numpy.array([0, 1, 2]), numpy.array([7]), vocabulary=5)
    with pytest.raises(ValueError, match="order 3 needs 3 tokens"):
        surprisals(numpy.array([0, 1]), numpy.array([1]), vocabulary=5)
