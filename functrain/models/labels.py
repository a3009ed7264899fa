"""What an optimizer should know of a model's parameters: which decay, how deep they lie, which are hidden matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from functrain import tree
from functrain.tree import Params, Tree
from functrain.tree.selection import Pattern


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What parts of a model's tree are, by patterns of paths, and what `ft.optim` asks about them, as functions.

    `embeddings` are tables whose rows are looked up or added. `first` is what lies before the blocks, `blocks` the name
    of the list of them; what else there is lies after them.

    >>> config = ft.models.gpt2.Config(vocab=256, context=16, layers=2, heads=2, width=8)
    >>> labels = ft.models.gpt2.labels(config)
    >>> adamw = ft.optim.adamw(1e-3, weight_decay=0.1, mask=labels.decayed)
    >>> layerwise = ft.optim.chain(ft.optim.adamw(1e-3), ft.optim.layerwise_decay(0.8, labels.depth))
    >>> muon = ft.optim.muon(0.02, muon_weight_dimension_numbers=labels.matrices)
    """

    layers: int
    embeddings: Sequence[str]
    first: Sequence[str]
    blocks: str = "blocks"

    def decayed(self, params: Params) -> Tree:
        """Return where weight decay belongs: weights of two or more dimensions, but no embeddings.

        Norms and biases have one dimension. For `mask` of `ft.optim.adamw` and others.

        >>> labels = ft.models.Labels(layers=1, embeddings=["wte"], first=["wte"])
        >>> labels.decayed({"wte": torch.ones(3, 2), "head": {"weight": torch.ones(2, 3), "bias": torch.ones(3)}})
        {'wte': False, 'head': {'weight': True, 'bias': False}}
        """
        return tree.map_with_path(lambda path, leaf: _is_weight(leaf) and not _fits(path, self.embeddings), params)

    def matrices(self, params: Params) -> Tree:
        """Return the dimensions of the matrices of hidden layers, the last two of each weight in a block, and None for
        all other leaves.

        For `muon_weight_dimension_numbers` of `ft.optim.muon`, which gives what is None to AdamW.

        >>> labels = ft.models.Labels(layers=1, embeddings=["wte"], first=["wte"])
        >>> labels.matrices({"wte": torch.ones(3, 2), "blocks": [{"up": torch.ones(2, 8), "bias": torch.ones(8)}]})
        {'wte': None, 'blocks': [{'up': MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), 'bias': None}]}
        """
        from functrain.optim import MuonDimensionNumbers  # a model that is not trained needs no optimizers

        numbers = MuonDimensionNumbers(-2, -1)
        hidden = f"{self.blocks}/**"
        return tree.map_with_path(
            lambda path, leaf: numbers if _is_weight(leaf) and _fits(path, [hidden]) else None, params
        )

    def depth(self, path: str) -> int:
        """Return 0 for what is before the blocks, i + 1 for block i, and one more than the last for what is after them.

        For `depth` of `ft.optim.layerwise_decay`.

        >>> labels = ft.models.Labels(layers=12, embeddings=["wte"], first=["wte"])
        >>> labels.depth("wte"), labels.depth("blocks/11/mlp/up/weight"), labels.depth("ln_f/bias")
        (0, 12, 13)
        """
        if _fits(path, self.first):
            return 0
        top, *below = path.split("/")
        return int(below[0]) + 1 if top == self.blocks else self.layers + 1


def _is_weight(leaf: Tensor) -> bool:
    return leaf.dim() >= 2


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(Pattern(pattern).fits(path) for pattern in patterns)
