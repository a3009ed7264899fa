"""What a run computes in: asked for by name, or chosen by what its device does fast."""

from __future__ import annotations

import dataclasses

import torch

import functrain as ft
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
        words = half_products.once_if_slow(dtype_of(config)) if device.type == "cpu" else None
        return config, [] if words is None else [f"precision {config.precision}: {words}"]
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


def dtype_of(config: Config) -> torch.dtype:
    """Return the dtype of a precision, which must be decided."""
    assert config.precision != "auto"
    dtype: torch.dtype = getattr(torch, config.precision)
    return dtype


def loss_scale_of(config: Config) -> ft.loss_scale.LossScale | None:
    """Return the loss scale of a run's steps: in float16 one that follows overflows, else none."""
    return ft.loss_scale.dynamic() if config.precision == "float16" else None
