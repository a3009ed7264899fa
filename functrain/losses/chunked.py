"""Cross entropy over a vocabulary, chunk by chunk: all logits are never in memory together.

B batch, T tokens, N = B * T rows, C rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functrain.losses.chunked_total import total_of_chunks
from functrain.losses.cross_entropy import check_shapes, legal, total_of, weights_of
from functrain.losses.loss import Loss
from functrain.sharding.split import Split, cross_entropies


def next_token_from_hidden(
    hidden: Tensor, embedding: Tensor, targets: Tensor, mask: Tensor | None = None, *, chunk: int | None = None
) -> Loss:
    """Sum the cross entropy of the logits `hidden @ embedding.T`, with the logits of only `chunk` tokens in memory.

    Equals `next_token(hidden @ embedding.T, targets, mask)`, in value and in derivatives of every order. The first
    derivative is computed together with the value, so it costs the plain three matrix products, none of them twice;
    where nobody differentiates, only the value is computed.

    Shapes: hidden (B, T, D), embedding (V, D), targets and mask (B, T).
    Raises: ValueError for other shapes, and for a chunk below 1.

    >>> hidden, embedding, targets = torch.ones(1, 3, 2), torch.zeros(4, 2), torch.tensor([[1, 2, 3]])
    >>> loss = ft.losses.next_token_from_hidden(hidden, embedding, targets, chunk=2)
    >>> loss.total, loss.weight
    (tensor(4.1589), tensor(3.))
    """
    if isinstance(embedding, Split):  # of a plan with a tensor axis: no rank has all logits
        check_shapes("next_token_from_hidden", "hidden", hidden, targets, mask)
        weights = weights_of(hidden, targets, mask)
        each = cross_entropies(hidden.flatten(0, -2), embedding, legal(targets, mask).flatten())
        return Loss(torch.sum(each * weights.flatten()), total_of(weights, mask), {})
    if embedding.ndim != 2 or hidden.shape[-1] != embedding.shape[-1]:
        raise ValueError(
            f"next_token_from_hidden: expected hidden (B, T, D) and embedding (V, D), came {tuple(hidden.shape)} and "
            f"{tuple(embedding.shape)}; the embedding has a row per token, transpose a (D, V) matrix"
        )
    check_shapes("next_token_from_hidden", "hidden", hidden, targets, mask)
    rows = _rows(embedding) if chunk is None else chunk
    if rows < 1:
        raise ValueError(f"next_token_from_hidden: expected a chunk of at least 1 token, came {chunk}")
    weights = weights_of(hidden, targets, mask)  # (B, T)
    inputs = (hidden.flatten(0, -2), embedding, legal(targets, mask).flatten(), weights.flatten())
    if torch.compiler.is_dynamo_compiling():  # a torch.compile of the user's own
        # imported here because it imports the compiler, two seconds that eager code need not wait
        from functrain.losses.in_graph import total

        return Loss(total(*inputs, rows), total_of(weights, mask), {})
    return Loss(total_of_chunks(*inputs, rows), total_of(weights, mask), {})


def _rows(embedding: Tensor) -> int:
    # 4M logits at a time stay near the cache; but every chunk also reads and writes a whole gradient of the embedding,
    # which takes longer than its matrix products when a chunk has many fewer rows than the width
    vocab, width = embedding.shape
    return max(2**22 // vocab, width // 2, 1)
