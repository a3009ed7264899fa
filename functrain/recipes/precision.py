"""What a run computes in: asked for by name, or chosen by what its device does fast."""

from __future__ import annotations

import dataclasses

import torch

from functrain.compiler import half_products
from functrain.recipes.config import Config


def decided(config: Config, device: torch.device, before: Config | None) -> tuple[Config, list[str]]:
    """Return the config with a precision in the place of "auto", and what to tell of it.

    A run that goes on keeps the precision that it has, `before`; a new one computes in bfloat16 where its device
    multiplies matrices in it faster than in float32.
    """
    if config.precision == "auto" and before is not None:
        config = dataclasses.replace(config, precision=before.precision)
    if config.precision != "auto":
        half_on_cpu = config.precision == "bfloat16" and device.type == "cpu"
        words = half_products.once_if_slow(torch.bfloat16) if half_on_cpu else None
        return config, [] if words is None else [f"precision bfloat16: {words}"]
    if device.type == "cpu":
        factor = half_products.factor(torch.bfloat16)
        fast, why = (
            factor < 1.0,
            f"a matrix product in bfloat16 takes this CPU {factor:.2g} times as long as in float32",
        )
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        why = f"this device has {'' if fast else 'no '}matrix products in bfloat16"
    chosen = dataclasses.replace(config, precision="bfloat16" if fast else "float32")
    return chosen, [f"precision {chosen.precision}: {why}"]
