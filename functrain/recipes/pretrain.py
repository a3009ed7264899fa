"""Pre-train a language model on text: corpus, tokens, model, optimizer, step, loop."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import functrain as ft
from functrain.checkpoint.crew import Crew
from functrain.compiler import half_products
from functrain.compiler.cxx import check_compiler
from functrain.recipes import architectures, folder, optimizers, precision, ranks, toml
from functrain.recipes import texts as texts_of
from functrain.recipes.architectures import Architecture
from functrain.recipes.config import Config
from functrain.recipes.record import Show, readable, record_of, utilization
from functrain.sharding.mesh import check_alike
from functrain.train import Hook, Interrupted
from functrain.train.loop import Step
from functrain.train.signals import Signals


class Result(NamedTuple):
    state: ft.TrainState
    texts: Any  # what the architecture's objective has made of both sides
    validation: dict[str, float]  # over the whole validation side
    baselines: dict[str, float]  # what simpler models reach
    leads: bool = True  # of several ranks, the one that writes and speaks

    @property
    def validation_loss(self) -> float:
        return self.validation["loss"]


def main(
    config: Config, run: Path, show: Show, *, accept_changes: bool = False, bar: texts_of.Bar = texts_of.no_bar
) -> Result:
    """Pre-train as `config` says in the folder `run`, from its newest checkpoint if it has one.

    Equals, after any number of kills and starts, the run that was not killed: bit for bit, on the same machine with as
    many threads. A guard skips steps that are not finite, and `Diverged` ends a run that skips too many in a row.

    Under torchrun every rank calls it, with a folder that all of them see: the first one writes and speaks, and each
    saves its part of a state that is split. Nothing is written before everything is checked.

    Raises: ValueError if a checkpoint is of another config or text, unless `accept_changes`, and for a text that is too
    short; Diverged.
    """
    device = device_of(config.device)
    if config.compile and device.type == "cpu":
        check_compiler()
    plan = ranks.plan_of(config, device)
    crew, device = Crew(plan), device if plan is None else plan.device
    if not crew.leads:
        show, bar = ranks.Quiet(), texts_of.no_bar
    folder.check_ours(run)
    there, newest = ft.checkpoint.list(run), ft.checkpoint.latest(run, plan=plan)
    config, told = crew.led(
        run, lambda: precision.decided(config, device, None if newest is None else folder.read_config(run))
    )
    if newest is not None:
        folder.check_same_config(run, config, accept_changes=accept_changes)
    sides = texts_of.read(config.data)
    fingerprints = {"train": sides.train.fingerprint, "validation": sides.validation.fingerprint}
    if plan is not None:
        check_alike({"config": toml.dumps(config), "text": str(fingerprints)})
    if newest is not None and not accept_changes:
        folder.check_same_text(newest, fingerprints)
    architecture = architectures.of(config.model)
    objective = architecture.objective
    tokenizer = crew.led(
        run,
        lambda: texts_of.tokenizer_of(
            sides, config.data, run, resumed=newest is not None, learn=objective.tokenizer_of, bar=bar
        ),
    )
    short, slices = objective.check(sides, tokenizer, config.model.context), ranks.slices_of(config, plan)

    model, optimizer, schedule = (
        model_of(config, tokenizer.vocab_size),
        optimizers.optimizer_of(config),
        optimizers.schedule_of(config),
    )
    loss_fn, guard, scale = loss_of(config, model), guard_of(config), precision.loss_scale_of(config)
    key = ft.random.key(config.seed, device)
    params = architecture.module.init(model, key)
    if plan is not None:
        params = plan.shard(params)
    state = ft.init_state(params, optimizer, key=key, loss_scale=scale, guard=guard)
    if newest is not None:
        state = folder.load_state(newest, state, plan)
    done = int(state.step)
    folder.check_steps(run, done, config)

    # all is checked: only from here on something is written, and first what says who else writes here
    saves = ft.checkpoint.every(
        config.checkpoint_every, run, metadata=folder.metadata(fingerprints, architecture, model), plan=plan
    )

    def begin() -> None:
        folder.check_unchanged(run, there)
        folder.write(run / "config.toml", toml.dumps(config))

    crew.led(run, begin)
    # the first rank writes the tokens that the others open
    texts = crew.in_turn(run, lambda: objective.encode(sides, tokenizer, config, run, bar))
    for text in [*objective.described(config, texts), *told, *([] if short is None else [short])]:
        show.note(text)
    if newest is not None:
        for change in folder.other_environment(newest):
            show.note(f"not the machine that saved the checkpoint, the last bits may differ: {change}")
    where = "" if plan is None else f", {plan.mesh.world} ranks: {plan.mesh.name}"
    show.note(f"{ft.tree.size(state.params):,} parameters on {device}, {torch.get_num_threads()} threads{where}")
    step: Step = ft.train_step(loss_fn, optimizer, accumulate=slices, loss_scale=scale, guard=guard, plan=plan)
    if config.compile:
        step = ft.compile(step, donate=True, cache=run / "programs")

    def evaluate(t: int, state: ft.TrainState, metrics: Any) -> dict[str, float]:
        found = validated(state, model, config, texts, config.evaluate_batches, plan=plan)
        return {f"validation_{name}": value for name, value in found.items()}

    vars(evaluate)["measures"] = True
    saving = ft.train.roll_back(
        saves,
        after=config.stop_after_nonfinite,
        times=config.roll_backs,
        skip=config.roll_back_skip,
        read_every=config.log_every,
    )
    if newest is None and config.roll_backs:
        saves(0, state)
    show.begin(done, config.steps)
    hooks: list[Hook] = [*objective.hooks(texts), ft.train.every(config.evaluate_every, evaluate)]
    if crew.leads:
        hooks.append(
            record_of(
                run,
                every=config.log_every,
                learning_rate=schedule,
                show=show,
                counted=objective.counted(config),
                utilization=utilization(config, model, device, crew.count),
                hyperparameters=dataclasses.asdict(config),
            )
        )
    batches = objective.batches(config, texts)
    if plan is not None:
        batches = ft.data.shard(batches, plan=plan, accumulate=slices)
    state = ft.fit(step, state, batches, steps=config.steps, every=[*hooks, saving])
    (found,) = final_validation(state, [state], model, config, texts, show, plan)
    result = Result(state, texts, found, objective.baselines(texts), crew.leads)
    if crew.leads:
        folder.write(run / "summary.json", json.dumps(summary(result), indent=1) + "\n")
    return result


def summary(result: Result) -> dict[str, float | str]:
    found = {f"validation_{name}": value for name, value in result.validation.items()} | result.baselines
    return {"steps": int(result.state.step)} | {name: readable(value) for name, value in found.items()}


class NotFinite(ArithmeticError):
    """A run has ended, and its model is not finite."""


def check_finite(result: Result) -> None:
    """Raise NotFinite, naming a parameter, where a model is not finite at the end of its run."""
    bad = [path for path, leaf in ft.tree.items(result.state.params) if not leaf.isfinite().all()]
    if bad or not math.isfinite(result.validation_loss):
        raise NotFinite(
            f"the model is not finite at the end: validation loss {result.validation_loss}"
            + (f", {bad[0]} and {len(bad) - 1} other parameters" if bad else "")
            + "; begin another run with a smaller learning rate or another precision"
        )


def loss_of(config: Config, model: Any) -> Any:
    """Return the loss of the architecture in the precision asked for, which must be decided."""
    architecture, dtype = architectures.of(config.model), precision.dtype_of(config)
    loss_fn = ft.recompute_layers(architecture.loss(model, config.model), budget=1.0 - config.recompute)
    if dtype == torch.float32:
        return loss_fn
    return ft.mixed_precision(loss_fn, ft.Policy(compute=dtype, exceptions=architecture.objective.FLOAT32))


def model_of(config: Config, vocabulary: int) -> Any:
    """Return the Config of the architecture's module."""
    return architectures.of(config.model).model(config.model, vocabulary)


def model_at(run: Path, found: Path, tokenizer: ft.data.Tokenizer) -> tuple[Architecture, Any]:
    """Return the architecture of a checkpoint of a run, and the shape of the model."""
    if (said := folder.model_in(found)) is not None:
        return said
    # beside a checkpoint of before they said it stands the config that the run was last asked for
    config = folder.read_config(run)
    return architectures.of(config.model), model_of(config, tokenizer.vocab_size)


def guard_of(config: Config) -> ft.train.Guard:
    return ft.train.skip_nonfinite() if config.guard == "nonfinite" else ft.train.skip_spikes()


def device_of(name: str) -> torch.device:
    """Return the device of that name; "auto" is cuda where there is one.

    Raises: ValueError if it is cuda and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device, and torch sees none; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)
def evaluation_of(config: Config, model: Any) -> tuple[Any, bool]:
    """Return the loss as it is evaluated, always the same function, and whether it is compiled: where products in eager
    would take 200 times as long."""
    on_cpu = device_of(config.device).type == "cpu"
    return loss_of(config, model), on_cpu and config.compile and half_products.are_slow(precision.dtype_of(config))


def validation(
    params: ft.tree.Params,
    model: Any,
    config: Config,
    texts: Any,
    *,
    batches: int | None = None,
    before: Callable[[int], object] = lambda batch: None,
    plan: ft.sharding.Plan | None = None,
) -> dict[str, float]:
    """Compute the loss, and what is measured beside it, over the first `batches` batches of the validation side, or all
    of it. `before` is called with the number of each batch.
    """
    loss_fn, compiled = evaluation_of(config, model)
    objective = architectures.of(config.model).objective

    def progress(done: int, of: int | None) -> None:
        if done != of:
            before(done)

    rows = objective.validation(config, texts, batches)
    found = ft.evaluate(loss_fn, params, rows, compile=compiled, progress=progress, plan=plan)
    return dict(objective.measured(found, texts.validation))


def validated(
    state: ft.TrainState,
    model: Any,
    config: Config,
    texts: Any,
    batches: int | None = None,
    before: Callable[[int], object] = lambda batch: None,
    plan: ft.sharding.Plan | None = None,
) -> dict[str, float]:
    """Validate the params of a state and, as "ema_loss" and so on, their average if there is one."""
    how: dict[str, Any] = {"batches": batches, "before": before, "plan": plan}
    found = validation(state.params, model, config, texts, **how)
    if config.optimizer.ema == "none":
        return found
    of_average = validation(ft.train.averaged(state), model, config, texts, **how)
    return found | {f"ema_{name}": value for name, value in of_average.items()}


def final_validation(
    state: ft.TrainState,
    lanes: Sequence[ft.TrainState],
    model: Any,
    config: Config,
    texts: Any,
    show: Show,
    plan: ft.sharding.Plan | None = None,
) -> list[dict[str, float]]:
    """Compute loss and measures over all of the validation side for each lane, and show how far that is.

    Raises: Interrupted with the state, which is saved already, after a signal.
    """
    rows, found, done = len(architectures.of(config.model).objective.validation(config, texts)), [], 0
    rows = rows if plan is None else -(-rows // plan.ranks)
    whole = rows * len(lanes) * (1 if config.optimizer.ema == "none" else 2)
    with Signals() as signals:

        def before(batch: int) -> None:
            nonlocal done
            if signals.first is not None:
                raise Interrupted(signals.first, state)
            show.evaluating(done, whole)
            done += 1

        for lane in lanes:
            found.append(validated(lane, model, config, texts, before=before, plan=plan))
        show.evaluating(whole, whole)
    return found
