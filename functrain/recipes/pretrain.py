"""Pre-train a GPT on text: corpus, tokens, model, optimizer, step, loop."""

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
from functrain.compiler import half_products
from functrain.compiler.cxx import check_compiler
from functrain.models import gpt2
from functrain.recipes import folder, precision, toml
from functrain.recipes import texts as texts_of
from functrain.recipes.config import Config
from functrain.recipes.record import Show, bits, readable, record_of
from functrain.recipes.texts import Texts, bits_per_byte
from functrain.train import Hook, Interrupted
from functrain.train.loop import Step
from functrain.train.signals import Signals


class Result(NamedTuple):
    state: ft.TrainState
    texts: Texts
    validation_loss: float  # nats per token, over the whole validation side
    validation_bits_per_byte: float


def main(
    config: Config, run: Path, show: Show, *, accept_changes: bool = False, bar: texts_of.Bar = texts_of.no_bar
) -> Result:
    """Pre-train as `config` says in the folder `run`, from its newest checkpoint if it has one.

    Equals, after any number of kills and starts, the run that was not killed: bit for bit, on the same machine with as
    many threads. A guard skips steps that are not finite, and `Diverged` ends a run that skips too many in a row.

    Nothing is written before everything is checked.

    Raises: ValueError if a checkpoint is of another config or text, unless `accept_changes`, and for a text that is too
    short; Diverged.
    """
    device = device_of(config.device)
    if config.compile and device.type == "cpu":
        check_compiler()
    folder.check_ours(run)
    there, newest = ft.checkpoint.list(run), ft.checkpoint.latest(run)
    config, told = precision.decided(config, device, None if newest is None else folder.read_config(run))
    if newest is not None:
        folder.check_same_config(run, config, accept_changes=accept_changes)
    sides = texts_of.read(config.data)
    fingerprints = {"train": sides.train.fingerprint, "validation": sides.validation.fingerprint}
    if newest is not None and not accept_changes:
        folder.check_same_text(newest, fingerprints)
    tokenizer = texts_of.tokenizer_of(sides, config.data, run, resumed=newest is not None, bar=bar)
    short = texts_of.check_lengths(sides, tokenizer, config.model.context)

    model, optimizer, schedule = model_of(config, tokenizer.vocab_size), optimizer_of(config), schedule_of(config)
    loss_fn, guard = loss_of(config, model), guard_of(config)
    key = ft.random.key(config.seed, device)
    state = ft.init_state(gpt2.init(model, key), optimizer, key=key, guard=guard)
    if newest is not None:
        state = folder.load_state(newest, state)
    done = int(state.step)
    folder.check_steps(run, done, config)

    # all is checked: only from here on something is written, and first what says who else writes here
    saves = ft.checkpoint.every(config.checkpoint_every, run, metadata=folder.metadata(fingerprints, model))
    folder.check_unchanged(run, there)
    folder.write(run / "config.toml", toml.dumps(config))
    texts = texts_of.encode(sides, tokenizer, run, bar=bar)
    describe(config, texts, show)
    for text in [*told, *([] if short is None else [short])]:
        show.note(text)
    if newest is not None:
        for change in folder.other_environment(newest):
            show.note(f"not the machine that saved the checkpoint, the last bits may differ: {change}")
    show.note(f"{ft.tree.size(state.params):,} parameters on {device}, {torch.get_num_threads()} threads")
    step: Step = ft.train_step(loss_fn, optimizer, accumulate=config.accumulate, guard=guard)
    if config.compile:
        step = ft.compile(step, donate=True, cache=run / "programs")
    batches = ft.data.windows(texts.train, batch=config.batch, context=config.model.context, seed=config.seed)

    def evaluate(t: int, state: ft.TrainState, metrics: Any) -> dict[str, float]:
        loss = validation_loss(state.params, model, config, texts, batches=config.evaluate_batches)
        return {"validation_loss": loss, "validation_bits_per_byte": bits_per_byte(loss, texts.validation)}

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
    hooks: list[Hook] = [
        bits(bits_per_byte(1.0, texts.train)),
        ft.train.every(config.evaluate_every, evaluate),
        record_of(
            run,
            every=config.log_every,
            learning_rate=schedule,
            show=show,
            hyperparameters=dataclasses.asdict(config),
        ),
        saving,
    ]
    state = ft.fit(step, state, batches, steps=config.steps, every=hooks)
    (loss,) = final_losses(state, [state.params], model, config, texts, show)
    result = Result(state, texts, loss, bits_per_byte(loss, texts.validation))
    folder.write(run / "summary.json", json.dumps(summary(result), indent=1) + "\n")
    return result


def describe(config: Config, texts: Texts, show: Show) -> None:
    show.note(
        f"{config.data.corpus}: {texts.train.size_bytes / 1e6:.2f} MB to train on, "
        f"{texts.validation.size_bytes / 1e6:.2f} MB to validate, {texts.train.bytes_per_token:.2f} bytes per token"
    )
    show.note(f"a trigram model: {texts.trigram:.4f} bits per byte (of tokens: {texts.token_trigram:.4f})")


def summary(result: Result) -> dict[str, float | str]:
    return {
        "steps": int(result.state.step),
        "validation_loss": readable(result.validation_loss),
        "validation_bits_per_byte": readable(result.validation_bits_per_byte),
        "trigram_bits_per_byte": readable(result.texts.trigram),
        "token_trigram_bits_per_byte": readable(result.texts.token_trigram),
    }


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


def loss_of(config: Config, model: gpt2.Config) -> Any:
    """Return the loss: next tokens, from hidden states, in the precision asked for, which must be decided."""
    assert config.precision != "auto"

    def loss_fn(params: ft.tree.Params, batch: ft.tree.Batch, key: torch.Tensor) -> ft.Loss:
        hidden = gpt2.hidden(params, batch["tokens"], model, key=key)  # (B, T, D)
        return ft.losses.next_token_from_hidden(hidden, params["wte"], batch["targets"], batch["mask"])

    loss_fn = ft.recompute_layers(loss_fn, budget=1.0 - config.recompute)
    return loss_fn if config.precision == "float32" else ft.mixed_precision(loss_fn, ft.Policy(compute=torch.bfloat16))


def model_of(config: Config, vocabulary: int) -> gpt2.Config:
    shape = config.model
    return gpt2.Config(
        vocab=vocabulary,
        context=shape.context,
        layers=shape.layers,
        heads=shape.heads,
        width=shape.width,
        dropout=shape.dropout,
        attention=shape.attention,
    )


def model_at(run: Path, found: Path, tokenizer: ft.data.Tokenizer) -> gpt2.Config:
    """Return the shape of the model in a checkpoint of a run."""
    # beside a checkpoint of before they said it stands the config that the run was last asked for
    return folder.model_in(found) or model_of(folder.read_config(run), tokenizer.vocab_size)


def guard_of(config: Config) -> ft.train.Guard:
    return ft.train.skip_nonfinite() if config.guard == "nonfinite" else ft.train.skip_spikes()


def schedule_of(config: Config) -> Any:
    chosen = config.optimizer
    return _schedule(config, chosen.learning_rate, chosen.final_learning_rate)


def optimizer_of(config: Config) -> ft.optim.GradientTransformation:
    numbers = dataclasses.asdict(config.optimizer)
    del numbers["warmup"]
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
    return ft.optim.chain(
        ft.optim.identity() if isinstance(clip_norm, str) else ft.optim.clip_by_global_norm(clip_norm),
        ft.optim.adamw(
            _schedule(config, learning_rate, final_learning_rate),
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            mask=lambda params: ft.tree.map(lambda p: p.ndim >= 2, params),
        ),
    )


def _schedule(config: Config, highest: Any, last: Any) -> Any:
    warmup_steps = int(config.optimizer.warmup * config.steps)
    return ft.schedules.warmup_cosine_decay_schedule(0.0, highest, warmup_steps, config.steps, last)


def device_of(name: str) -> torch.device:
    """Return the device of that name; "auto" is cuda where there is one.

    Raises: ValueError if it is cuda and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device, and torch sees none; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)
def evaluation_of(config: Config, model: gpt2.Config) -> tuple[Any, bool]:
    """Return the loss as it is evaluated, always the same function, and whether it is compiled: where products in eager
    would take 200 times as long."""
    on_cpu = config.precision == "bfloat16" and device_of(config.device).type == "cpu"
    return loss_of(config, model), on_cpu and config.compile and half_products.are_slow(torch.bfloat16)


def validation_loss(
    params: ft.tree.Params,
    model: gpt2.Config,
    config: Config,
    texts: Texts,
    *,
    batches: int | None = None,
    before: Callable[[int], object] = lambda batch: None,
) -> float:
    """Compute the mean loss in nats per token over the first `batches` batches of the validation side, or all of it.

    `before` is called with the number of each batch.

    Every token but the first is predicted once, from what precedes it in its window.
    """
    loss_fn, compiled = evaluation_of(config, model)
    windows = texts_of.validation_windows(texts, config.batch, model.context, batches)

    def progress(done: int, of: int | None) -> None:
        if done != of:
            before(done)

    return ft.evaluate(loss_fn, params, windows, compile=compiled, progress=progress)["loss"]


def final_losses(
    state: ft.TrainState, lanes: Sequence[ft.tree.Params], model: gpt2.Config, config: Config, texts: Texts, show: Show
) -> list[float]:
    """Compute the loss over all of the validation side for each params, and show how far that is.

    Raises: Interrupted with the state, which is saved already, after a signal.
    """
    each, losses = len(texts_of.validation_windows(texts, config.batch, model.context)), list[float]()
    with Signals() as signals:

        def before(batch: int) -> None:
            if signals.first is not None:
                raise Interrupted(signals.first, state)
            show.evaluating(len(losses) * each + batch, len(lanes) * each)

        for params in lanes:
            losses.append(validation_loss(params, model, config, texts, before=before))
        show.evaluating(len(lanes) * each, len(lanes) * each)
    return losses
