"""Where rows begin, which are of different length, and where they end.

B batch, T tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.generation.choosing import count


class Ending(NamedTuple):
    """The tokens that end a row, and what fills it afterwards."""

    tokens: tuple[int, ...]
    padding: int

    def is_end(self, chosen: Tensor) -> Tensor:
        """Tell which of the tokens (B,) end their row."""
        return torch.any(torch.stack([chosen == token for token in self.tokens]), 0)


def ending(end: int | Sequence[int] | None, padding: int | None) -> Ending | None:
    """Return what ends a row, as `generate` says. Raises: TypeError, ValueError."""
    if end is None:
        if padding is not None:
            raise ValueError(
                f"generate: expected end beside padding={padding}, which fills a row after its end, came None; leave "
                "padding out"
            )
        return None
    several = end if isinstance(end, (list, tuple)) else [end]
    tokens = tuple(count("end", token, 0, "; the number of a token, or several") for token in several)
    if not tokens:
        raise ValueError("generate: expected a token in end, came none; None goes on to the last step")
    return Ending(tokens, tokens[0] if padding is None else count("padding", padding, 0, ""))


def check_mask(mask: Any, tokens: Tensor) -> Tensor | None:
    """Return a mask (B, T) that is true from the first token of each row on. Raises: TypeError, ValueError."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = f"{mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"generate: expected a boolean mask, true where a token stands, came {came}; pass mask.bool()")
    if mask.shape != tokens.shape:
        raise ValueError(
            f"generate: expected a mask in the shape of the prompt {tuple(tokens.shape)}, came {tuple(mask.shape)}"
        )
    holes = (mask[:, :-1] & ~mask[:, 1:]).any(1) | ~mask[:, -1]
    if holes.any():
        raise ValueError(
            f"generate: expected padding before the tokens of each row alone, came some after in row "
            f"{int(holes.long().argmax())}; pad on the left"
        )
    return mask
