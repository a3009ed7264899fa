"""How fast an average of parameters forgets."""

from __future__ import annotations

import torch
from torch import Tensor

from functrain.schedules.schedule import Count, Schedule, steps_of


def ema_warmup(decay: float, gamma: float = 1.0, power: float = 2 / 3) -> Schedule:
    """Return a decay for `ft.optim.keep_ema` that grows with the steps, to `decay`: 1 - (1 + count / gamma)**-power.

    An average that begins so forgets the first params soon, in runs of any length. A power of 2/3 suits runs of a
    million steps, 3/4 shorter ones: it reaches 0.999 after 31,000 steps, or 10,000.

    Source: Crowson, as `timm.utils.ModelEmaV3` has it with `use_warmup`.

    >>> schedule = ft.schedules.ema_warmup(0.99, power=0.5)
    >>> schedule(torch.tensor([0, 3, 99, 1_000_000]))
    tensor([0.0000, 0.5000, 0.9000, 0.9900], dtype=torch.float64)
    """
    if not 0.0 <= decay < 1.0 or gamma <= 0.0 or power <= 0.0:
        raise ValueError(
            f"ema_warmup: expected a decay in [0, 1), and positive gamma and power, came {decay}, {gamma} and {power}"
        )

    def schedule(count: Count) -> Tensor:
        return torch.clamp(1 - (1 + steps_of(count) / gamma) ** -power, max=decay)

    return schedule
