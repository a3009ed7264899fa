"""Pre-train several runs that differ in numbers of the optimizer as one, and keep the best.

In the folder of the run, beside what every run has (those are the best lane's):

sweep/sweep.json            the numbers swept, and at the end the validation loss of each lane
sweep/lane-00/metrics.jsonl the record of each lane
sweep/checkpoints/          the training states of all lanes
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import functrain as ft
from functrain.compiler.cxx import check_compiler
from functrain.recipes import architectures, folder, optimizers, precision, pretrain, toml
from functrain.recipes import texts as texts_of
from functrain.recipes.config import Config, Optimizer
from functrain.recipes.pretrain import NotFinite, Result
from functrain.recipes.record import Row, Show, readable, record_of, utilization
from functrain.train import Hook

SWEPT = [
    field.name for field in dataclasses.fields(Optimizer) if field.name not in ("name", "schedule", "warmup", "ema")
]


def main(
    config: Config,
    over: Mapping[str, Sequence[float]],
    run: Path,
    show: Show,
    *,
    bar: texts_of.Bar = texts_of.no_bar,
) -> tuple[Config, Result]:
    """Pre-train a lane for every combination of the numbers in `over`; return the best one's config and result.

    Lane by lane equals `pretrain.main` with these numbers, to floating-point rounding: all lanes see the same batches.
    The run's folder ends as that of the best lane, by the loss over the whole validation side. Goes on from the newest
    checkpoint of the sweep.

    Raises: ValueError for a name that is no number of the optimizer, and for a folder that holds another run or sweep;
    Diverged once every lane skips as many steps in a row as `config.stop_after_nonfinite` says, and NotFinite when
    every lane ends with NaN.
    """
    check(over)
    if config.roll_backs:
        raise ValueError("sweep: expected roll_backs of 0, since lanes share their batches; leave it out")
    grid = ft.train.grid(over)
    device, inside = pretrain.device_of(config.device), run / "sweep"
    begun = (inside / "config.toml").is_file()
    config, told = precision.decided(config, device, folder.read_config(inside) if begun else None)
    configs = [_with(config, {name: grid[name][i] for name in grid}) for i in range(len(next(iter(grid.values()))))]
    if config.compile and device.type == "cpu":
        check_compiler()
    folder.check_ours(run)
    _check_same_sweep(run, inside, config, over)
    there, newest = ft.checkpoint.list(inside), ft.checkpoint.latest(inside)
    sides = texts_of.read(config.data)
    fingerprints = {"train": sides.train.fingerprint, "validation": sides.validation.fingerprint}
    if newest is not None:
        folder.check_same_text(newest, fingerprints)
    architecture = architectures.of(config.model)
    objective = architecture.objective
    tokenizer = texts_of.tokenizer_of(
        sides, config.data, run, resumed=newest is not None, learn=objective.tokenizer_of, bar=bar
    )
    short = objective.check(sides, tokenizer, config.model.context)

    model, optimizer = pretrain.model_of(config, tokenizer.vocab_size), _injected(config)
    fused = model.attention != "math"
    if fused:
        # torch has no rule to map its fused kernel, and runs it lane by lane with a warning
        model = dataclasses.replace(model, attention="math")
    loss_fn = pretrain.loss_of(config, model)
    pairs: Any = {"loss_scale": precision.loss_scale_of(config), "guard": pretrain.guard_of(config)}
    swept = ft.sweep(ft.train_step(loss_fn, optimizer, accumulate=config.accumulate, **pairs), grid)
    key = ft.random.key(config.seed, device)
    states = swept.init(ft.init_state(architecture.module.init(model, key), optimizer, key=key, **pairs))
    if newest is not None:
        states = folder.load_state(newest, states)
    done = int(states.step[0])
    folder.check_steps(run, done, config)

    # all is checked: only from here on something is written
    about = folder.metadata(fingerprints, architecture, model)
    saves = ft.checkpoint.every(config.checkpoint_every, inside, metadata=about)
    folder.check_unchanged(inside, there)
    if newest is None:
        folder.write(run / "config.toml", toml.dumps(config))
    folder.write(inside / "config.toml", toml.dumps(config))
    folder.write(inside / "sweep.json", json.dumps({"over": dict(over)}, indent=1) + "\n")
    texts = objective.encode(sides, tokenizer, config, run, bar)
    for text in [*objective.described(config, texts), *told, *([] if short is None else [short])]:
        show.note(text)
    if fused:
        show.note("attention: the lanes compute it by its formula, as with --model.attention math")
    show.note(f"{swept.lanes} lanes of {ft.tree.size(states.params) // swept.lanes:,} parameters")
    step = ft.compile(swept, donate=True, cache=run / "programs") if config.compile else swept

    lanes = _Lanes(inside, configs, show, swept, utilization(config, model, device))
    show.begin(done, config.steps)

    def evaluate(t: int, states: ft.TrainState, metrics: Any) -> None:
        for i in range(swept.lanes):
            lanes.add(i, pretrain.validated(swept.lane(states, i), model, config, texts, config.evaluate_batches))

    stop = ft.train.stop_after(config.stop_after_nonfinite, read_every=config.log_every)
    vars(evaluate)["measures"] = True
    hooks: list[Hook] = [
        ft.train.every(config.evaluate_every, evaluate),
        *objective.hooks(texts),
        lanes,
        stop,
        saves,
    ]
    states = ft.fit(step, states, objective.batches(config, texts), steps=config.steps, every=hooks)
    ends = pretrain.final_validation(
        states, [swept.lane(states, i) for i in range(swept.lanes)], model, config, texts, show
    )
    losses = [found["loss"] for found in ends]
    rows = [{**swept.values(i), "validation_loss": readable(loss)} for i, loss in enumerate(losses)]
    if all(math.isnan(loss) for loss in losses):
        folder.write(inside / "sweep.json", json.dumps({"over": dict(over), "lanes": rows}, indent=1) + "\n")
        raise NotFinite("the validation loss of every lane is nan at the end; sweep smaller learning rates")
    best = swept.best(torch.tensor(losses, dtype=torch.float64))
    folder.write(inside / "sweep.json", json.dumps({"over": dict(over), "lanes": rows, "best": best}, indent=1) + "\n")
    for i in range(swept.lanes):
        show.note(f"{'best ' if i == best else '     '}lane {i}: {_named(swept.values(i))}: loss {losses[i]:.4f}")
    lane = swept.lane(states, best)
    # the optimizer of a solo run has its numbers in Python, and its state inside of ours
    state = lane._replace(opt_state=lane.opt_state.inner_state)
    result = Result(state, texts, ends[best], objective.baselines(texts))
    _keep(run, inside / f"lane-{best:02d}", configs[best], result, about)
    return configs[best], result


def check(over: Mapping[str, Sequence[float]]) -> None:
    """Raise a ValueError for a name that is no number of the optimizer, or one without values."""
    for name, values in over.items():
        if name not in SWEPT:
            raise ValueError(f"sweep: {name!r} is no number of the optimizer; there are {', '.join(SWEPT)}")
        if not values:
            raise ValueError(f"sweep: {name}: expected at least one value, came none")
    if not over:
        raise ValueError(f"sweep: expected a number to sweep, came none; there are {', '.join(SWEPT)}")


class _Lanes:
    """A hook that records every lane, and shows the one whose loss is the smallest."""

    def __init__(
        self, inside: Path, configs: list[Config], show: Show, swept: ft.train.Sweep, used: Mapping[str, Any]
    ) -> None:
        self._show, self._swept = show, swept
        self._added: dict[int, Row] = {}
        self._quiet = [_Last() for _ in configs]
        self._records = [
            record_of(
                inside / f"lane-{i:02d}",
                every=config.log_every,
                learning_rate=optimizers.schedule_of(config),
                show=quiet,
                counted=architectures.of(config.model).objective.counted(config),
                utilization=used,
            )
            for i, (config, quiet) in enumerate(zip(configs, self._quiet, strict=True))
        ]

    def __call__(self, t: int, states: ft.TrainState, metrics: dict[str, Any]) -> None:
        for i, record in enumerate(self._records):
            record(t, states, {name: value[i] for name, value in metrics.items()} | self._added.pop(i, {}))
        rows = [quiet.row_shown for quiet in self._quiet]
        if rows[0] and rows[0]["step"] == t:
            best = min(rows, key=lambda row: (row["loss"] != row["loss"], row["loss"]))
            rates = [name for name in best if name.endswith(("_per_second", "_utilization"))]
            self._show.row(best | {name: sum(row[name] for row in rows) for name in rates})

    def begin(self, t: int, steps: int, states: ft.TrainState) -> None:
        for record in self._records:
            record.begin(t, steps, states)

    def flush(self) -> None:
        for record in self._records:
            record.flush()

    def aside(self, seconds: float) -> None:
        for record in self._records:
            record.aside(seconds)

    def add(self, lane: int, found: Mapping[str, float]) -> None:
        """Put a lane's evaluation into the line of the step that comes next."""
        self._added[lane] = {f"validation_{name}": value for name, value in found.items()}

    def close(self) -> None:
        for record in self._records:
            record.close()


class _Last:
    """What a lane shows: kept, for the sweep to choose from. A lane that diverges ends nobody's run."""

    row_shown: Row = {}

    def begin(self, done: int, steps: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def row(self, row: Row) -> None:
        self.row_shown = row

    def evaluating(self, done: int, batches: int | None) -> None:
        pass

    def end(self) -> None:
        pass


def _injected(config: Config) -> Any:
    def build(
        learning_rate: Any, final_learning_rate: Any, b1: Any, b2: Any, weight_decay: Any, clip_norm: Any
    ) -> ft.optim.GradientTransformationExtraArgs:
        return optimizers.optimizer_with(
            config,
            learning_rate=learning_rate,
            final_learning_rate=final_learning_rate,
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
        )

    return ft.optim.inject_hyperparams(build)(**{name: getattr(config.optimizer, name) for name in SWEPT})


def _keep(run: Path, lane: Path, config: Config, result: Result, about: dict[str, Any]) -> None:
    """Make the run's folder that of the best lane."""
    folder.write(run / "config.toml", toml.dumps(config))
    # numbered by its own count, so that `functrain train` goes on from it as from any run
    ft.checkpoint.every(config.checkpoint_every, run, metadata=about).save(config.steps, result.state)
    shutil.copyfile(lane / "metrics.jsonl", run / "metrics.jsonl")
    folder.write(run / "summary.json", json.dumps(pretrain.summary(result), indent=1) + "\n")


def _check_same_sweep(run: Path, inside: Path, config: Config, over: Mapping[str, Sequence[float]]) -> None:
    if not (inside / "sweep.json").is_file():
        if ft.checkpoint.latest(run) is not None:
            raise ValueError(f"{run}: expected a folder for a sweep, and it holds another run; choose another --run")
        return
    before = _over(inside / "sweep.json")
    if before != {name: list(values) for name, values in over.items()}:
        raise ValueError(f"{run}: holds a sweep over {before}; choose another --run, or sweep the same again")
    folder.check_same_config(inside, config)


def _over(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())["over"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{file}: expected the numbers of a sweep, and it is damaged; choose another --run") from None


def _with(config: Config, numbers: Mapping[str, Any]) -> Config:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **numbers))


def _named(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
