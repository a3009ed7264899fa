"""Whether documents that lie in one row see each other. B batch, T tokens, V vocabulary, D width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain import tree
from functrain.compiler.compilation import Compiled
from functrain.transforms import grad
from functrain.tree import Params

Apply = Callable[..., Tensor]


class _Piece(NamedTuple):
    row: int
    document: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"document {self.document} of row {self.row} (cells {self.start} to {self.stop - 1})"


def assert_no_leak(
    apply: Apply,
    params: Params,
    *,
    embedding: str,
    lengths: Sequence[int] = (5, 2, 7, 1),
    padding: int = 2,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> None:
    """Assert that `apply` keeps the documents of a packed row apart, as rows of `ft.data.packed` need it.

    `apply(params, tokens, documents=, positions=)` gives a tensor (B, T, ...), logits or hidden states; wrap a model
    that is called otherwise, and drop nothing. One that is mapped or recomputes is taken as it is. Of one by
    `ft.compile`, whose documents and positions have a place, the gradient is compiled, too; each length is a program.

    It is called on two rows of documents of these `lengths`, in both orders, with cells of padding behind them; and
    asserted is of each document that

    - its output is the one of the document alone in a row, within `tolerance` times the largest output;
    - a loss on it has a gradient of exactly 0.0 in the embeddings of all other documents and of padding.

    `embedding` is the path of the embedding table (V, D) in params, such as "wte": each document has tokens of its own,
    so that rows of the table are inputs of one document. A table that is the head, too, is none there: a loss on logits
    (B, T, V) is one of the document's own tokens.

    Raises: AssertionError naming the documents, and how far they see each other; ValueError for a path that is no
    table of enough rows, or that no document's output depends on, and for an output of another shape.

    >>> def apply(params, tokens, *, documents, positions):  # a document's mean, in each of its cells
    ...     same = (documents[:, :, None] == documents[:, None, :]).float()  # (B, T, T)
    ...     return (same / same.sum(-1, keepdim=True)) @ params["table"][tokens]
    >>> ft.testing.assert_no_leak(apply, {"table": torch.randn(20, 4)}, embedding="table")
    """
    table = _table(params, embedding, len(lengths))
    if min(lengths, default=0) < 1 or len(lengths) < 2 or padding < 0:
        raise ValueError(
            "assert_no_leak: expected two documents of 1 token or more and padding of 0 or more, came "
            f"lengths={lengths}, padding={padding}"
        )
    tokens, documents, positions, pieces = _rows(lengths, padding, len(table), seed, table.device)
    together = _checked(apply(params, tokens, documents=documents, positions=positions), tokens)
    scale = float(together.detach().abs().max())
    for piece in pieces:
        span = slice(piece.start, piece.stop)
        row = slice(piece.row, piece.row + 1)
        alone = apply(params, tokens[row, span], documents=documents[row, span], positions=positions[row, span])
        off = float((together[row, span] - _checked(alone, tokens[row, span])).detach().abs().max())
        if not off <= tolerance * scale:
            raise AssertionError(
                f"assert_no_leak: {piece} is not itself alone: expected outputs within {tolerance * scale:.3g}, came a "
                f"difference of {off:.3g}; let a cell attend where `documents` is its own, and place it by `positions`"
            )

    gradient = _gradient_of(apply, embedding)
    for piece in pieces:
        weights = _weights(piece, together, table, tokens, seed)
        found = gradient(table, params, weights, tokens, documents, positions)
        _assert_gradient_within(piece, found, tokens)


def _gradient_of(apply: Apply, embedding: str) -> Callable[..., Tensor]:
    def loss(table: Tensor, params: Params, weights: Tensor, tokens: Tensor, *places: Tensor) -> Tensor:
        documents, positions = places
        found = apply(tree.set_at(params, embedding, table), tokens, documents=documents, positions=positions)
        # the table times 0: an output that does not depend on it has a gradient then, which is told below
        return torch.sum(found * weights) + 0.0 * table.sum()

    gradient = grad(loss)
    # a compiled function is differentiated within a program alone
    return Compiled(gradient, False, interpreted=apply.interpreted) if isinstance(apply, Compiled) else gradient


def _weights(piece: _Piece, together: Tensor, table: Tensor, tokens: Tensor, seed: int) -> Tensor:
    """Draw what a loss on a piece weighs the output by, 0 elsewhere."""
    own = tokens[piece.row, piece.start : piece.stop].unique()
    drawn = torch.randn(together.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = torch.zeros(together.shape, dtype=torch.bool)
    chosen[piece.row, piece.start : piece.stop] = True
    if together.shape[-1] == len(table):  # logits, maybe of the table: those of the piece's own tokens
        chosen &= torch.isin(torch.arange(len(table)), own.cpu())
    return torch.where(chosen, drawn, 0.0).to(together)


def _assert_gradient_within(piece: _Piece, found: Tensor, tokens: Tensor) -> None:
    own = tokens[piece.row, piece.start : piece.stop].unique()
    others = tokens.unique()
    others = others[~torch.isin(others, own)]
    if not torch.count_nonzero(found[own]):
        raise ValueError(
            f"assert_no_leak: expected the output of {piece} to depend on its embeddings, came a gradient of 0; name "
            "the table that apply reads with embedding="
        )
    leaking = others[found[others].flatten(1).ne(0).any(1)]  # NaN is not 0
    if len(leaking):
        row, cell = (int(i) for i in (tokens == leaking[0]).nonzero()[0])
        raise AssertionError(
            f"assert_no_leak: a loss on {piece} has a gradient in embeddings of others: expected exactly 0.0, came up "
            f"to {float(found[leaking].abs().max()):.3g} in tokens such as that of row {row}, cell {cell}; mask "
            "attention by `documents`, and let nothing else look along a row"
        )


def _rows(
    lengths: Sequence[int], padding: int, vocab: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, list[_Piece]]:
    """Make tokens, documents and positions (2, T), and the pieces: no token is in two of them, or in padding."""
    generator = torch.Generator().manual_seed(seed)
    kinds = 2 * len(lengths) + 1
    rows, pieces = [], []
    for row, order in enumerate((lengths, list(reversed(lengths)))):
        cells: list[tuple[int, int, int]] = []
        for document, length in enumerate(order):
            pieces.append(_Piece(row, document, len(cells), len(cells) + length))
            kind = row * len(lengths) + document
            draws = torch.randint((vocab - kind - 1) // kinds + 1, (length,), generator=generator).tolist()
            cells += [(draw * kinds + kind, document, position) for position, draw in enumerate(draws)]
        rows.append(cells + [(kinds - 1, -1, 0)] * padding)
    tokens, documents, positions = torch.tensor(rows, device=device).unbind(-1)
    return tokens, documents, positions, pieces


def _table(params: Params, path: str, documents: int) -> Tensor:
    tables: dict[str, Any] = dict(tree.items(params))
    if not isinstance(table := tables.get(path), Tensor) or table.ndim != 2 or len(table) <= 2 * documents:
        came = f"{tuple(table.shape)}" if isinstance(table, Tensor) else f"none of {', '.join(list(tables)[:8])}"
        raise ValueError(
            f"assert_no_leak: expected embedding={path!r} to be the path of a table (V, D) with V of "
            f"{2 * documents + 1} or more, came {came}"
        )
    return table.detach()


def _checked(found: Any, tokens: Tensor) -> Tensor:
    if not isinstance(found, Tensor) or found.shape[:2] != tokens.shape or not found.is_floating_point():
        came = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"assert_no_leak: expected apply to give logits or hidden states {(*tokens.shape, '...')}, "
            f"came {came}; wrap it to return that alone"
        )
    return found
