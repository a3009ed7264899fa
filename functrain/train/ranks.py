"""The processes of torch.distributed, where they run."""

from __future__ import annotations

from typing import Any

from torch import distributed


def gathered(value: Any) -> list[Any]:
    """Return the value of every rank, in their order, in each of them; where no group of several runs, of this one."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found
