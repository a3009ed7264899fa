"""The n-gram model that a trained model has to beat: interpolated Kneser-Ney over tokens, in numpy."""

from __future__ import annotations

from typing import TypeAlias

import numpy
from numpy.typing import NDArray

Tokens: TypeAlias = NDArray[numpy.integer]
Integers: TypeAlias = NDArray[numpy.int64]
Floats: TypeAlias = NDArray[numpy.float64]
Counts: TypeAlias = tuple[Integers, Integers]  # sorted keys, how often each


def surprisals(train: Tokens, text: Tokens, *, vocabulary: int, order: int = 3) -> Floats:
    """Compute -ln P(token | the `order - 1` tokens before it) for every token of `text`, in nats, counted on `train`.

    Equals P(w | h) = (max(c(hw) - d, 0) + d kinds(h) P(w | h without its first token)) / c(h), down to the uniform
    distribution, where c counts n-grams at the highest order and the different tokens seen before an n-gram below it,
    kinds(h) counts the different tokens seen after h, and d = n1 / (n1 + 2 n2) for the n1 n-grams of an order with
    count one and the n2 with count two. The first tokens of `text` have shorter histories.

    Source: Ney, Essen and Kneser 1994, as in Chen and Goodman 1999, section 2.7 and equation 12.
    """
    train, text = _checked("train", train, vocabulary), _checked("text", text, vocabulary)
    if len(train) < order or vocabulary**order >= 2**63:
        raise ValueError(
            f"surprisals: order {order} needs {order} tokens to count, came {len(train)}, "
            f"and vocabulary ** order below 2 ** 63, came {vocabulary} ** {order}"
        )
    by_order = [numpy.unique(_ngrams(train, order, vocabulary), return_counts=True)]
    for n in range(order - 1, 0, -1):
        by_order.insert(0, numpy.unique(by_order[0][0] % vocabulary**n, return_counts=True))
    probability = numpy.full(len(text), 1.0 / vocabulary)
    for n, counts in enumerate(by_order, start=1):
        if len(text) >= n:
            probability[n - 1 :] = _interpolate(counts, _ngrams(text, n, vocabulary), probability[n - 1 :], vocabulary)
    return -numpy.log(probability)


def _checked(name: str, tokens: Tokens, vocabulary: int) -> Integers:
    if tokens.ndim != 1 or (len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary):
        raise ValueError(f"surprisals: expected {name} of shape (N,) with tokens below {vocabulary}")
    return tokens.astype(numpy.int64)


def _ngrams(tokens: Integers, n: int, vocabulary: int) -> Integers:
    keys = numpy.zeros(len(tokens) - n + 1, numpy.int64)
    for i in range(n):
        keys = keys * vocabulary + tokens[i : len(tokens) - n + 1 + i]
    return keys


def _interpolate(counts: Counts, wanted: Integers, lower: Floats, vocabulary: int) -> Floats:
    keys, times = counts
    once, twice = int((times == 1).sum()), int((times == 2).sum())
    # single bytes of a long text are all seen often; with a discount of zero an unseen one would be impossible
    discount = once / (once + 2 * twice) if once and twice else 0.5
    histories, first = numpy.unique(keys // vocabulary, return_index=True)
    total, kinds = numpy.add.reduceat(times, first), numpy.diff(numpy.append(first, len(keys)))
    count = _look_up(keys, times, wanted)
    total_here = _look_up(histories, total, wanted // vocabulary)
    kinds_here = _look_up(histories, kinds, wanted // vocabulary)
    seen = numpy.maximum(total_here, 1)
    mixed = (numpy.maximum(count - discount, 0.0) + discount * kinds_here * lower) / seen
    return numpy.where(total_here > 0, mixed, lower)


def _look_up(keys: Integers, values: Integers, wanted: Integers) -> Integers:
    place = numpy.minimum(numpy.searchsorted(keys, wanted), len(keys) - 1)
    return numpy.where(keys[place] == wanted, values[place], 0)
