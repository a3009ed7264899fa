"""The optimizer that a run is asked for, and its learning rate."""

from __future__ import annotations

import dataclasses
from typing import Any

import functrain as ft
from functrain.recipes import architectures
from functrain.recipes.config import Config


def schedule_of(config: Config) -> Any:
    """Return the learning rate by the count of updates."""
    chosen = config.optimizer
    return _schedule(config, chosen.learning_rate, chosen.final_learning_rate)


def optimizer_of(config: Config) -> ft.optim.GradientTransformationExtraArgs:
    """Return the optimizer of a config."""
    fixed = ("name", "schedule", "warmup", "ema")
    numbers = {name: value for name, value in dataclasses.asdict(config.optimizer).items() if name not in fixed}
    return optimizer_with(config, **numbers)


def optimizer_with(
    config: Config,
    *,
    learning_rate: Any,
    final_learning_rate: Any,
    b1: Any,
    b2: Any,
    weight_decay: Any,
    clip_norm: Any,
) -> ft.optim.GradientTransformationExtraArgs:
    """Return the optimizer of a config with other numbers, which may be tensors; a `clip_norm` of "none" clips none."""
    schedule = _schedule(config, learning_rate, final_learning_rate)
    if config.optimizer.name == "muon":
        architecture = architectures.of(config.model)
        labels = architecture.module.labels(architecture.model(config.model, config.data.vocabulary))
        # 0.2 is the root mean square of an update of AdamW, so that both take one learning rate: Liu et al. 2025
        inner = ft.optim.muon(
            schedule,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            muon_weight_dimension_numbers=labels.matrices,
            consistent_rms=0.2,
        )
    else:
        inner = ft.optim.adamw(
            schedule,
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            mask=lambda params: ft.tree.map(lambda p: p.ndim >= 2, params),
        )
    clip = ft.optim.identity() if isinstance(clip_norm, str) else ft.optim.clip_by_global_norm(clip_norm)
    made = ft.optim.chain(clip, inner)
    return made if config.optimizer.ema == "none" else ft.optim.keep_ema(made, config.optimizer.ema)


def _schedule(config: Config, highest: Any, last: Any) -> Any:
    warmup = int(config.optimizer.warmup * config.steps)
    if config.optimizer.schedule == "cosine":
        return ft.schedules.warmup_cosine_decay_schedule(0.0, highest, warmup, config.steps, last)
    falling = config.steps - warmup
    if config.optimizer.schedule == "stable-decay":
        falling = min(falling, -(-config.steps // 5))
    stable = config.steps - warmup - falling
    return ft.schedules.warmup_stable_decay_schedule(0.0, highest, warmup, stable, falling, last)
