"""Train on characters of a text to nanoGPT's published CPU figure, validation loss 1.885 on tinyshakespeare.

    python benchmarks/shakespeare.py --text FILE [--preset nanogpt|fast|module] [--seed 1]

`nanogpt` is the published recipe: 4 layers, 4 heads, width 128, context 64, batch 12, 2000 steps, learning rate 1e-3
with 100 warm-up steps and cosine decay to 1e-4, AdamW with b2 0.99 and weight decay 0.1, clip 1.0, no dropout, no
biases; first 90% train, last 10% validation. `fast` reaches the same loss by other means: Muon on the matrices of the
blocks, a third of the tokens, a linear decay to zero. `module` is the published recipe again, in eager
`torch.nn.Module` with fused AdamW: what the recipe comes to without us, on the same batches.

The validation loss is of the whole validation side, every token predicted once from what precedes it in windows of the
context. nanoGPT's own figure is the mean over 20 batches of 12 random windows; printed beside ours is what that
estimate gives for the same parameters, its mean and spread over 50 draws. The wall time is the whole command's, imports
and compilation included, without those draws.
"""

from __future__ import annotations

import argparse
import statistics
import time

START = time.perf_counter()

from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any  # noqa: E402

import modules  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

import functrain as ft  # noqa: E402
from functrain.models import gpt2  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Preset:
    batch: int = 12
    steps: int = 2000
    peak: float = 1e-3
    final: float = 1e-4
    warmup: int = 100
    muon_peak: float | None = None
    attention: Any = "fused"


PRESETS = {
    "nanogpt": Preset(),
    "module": Preset(),
    "fast": Preset(batch=16, steps=450, peak=6e-3, warmup=20, muon_peak=0.03, attention="math"),
}


def optimizer_of(preset: Preset) -> Any:
    if preset.muon_peak is None:
        rate = ft.schedules.warmup_cosine_decay_schedule(0.0, preset.peak, preset.warmup, preset.steps, preset.final)
        decayed = ft.optim.adamw(rate, b2=0.99, weight_decay=0.1, mask=lambda p: ft.tree.map(lambda x: x.dim() > 1, p))
        return ft.optim.chain(ft.optim.clip_by_global_norm(1.0), decayed)

    def up_and_down(peak: float) -> Any:
        up = ft.schedules.linear_schedule(0.0, peak, preset.warmup)
        down = ft.schedules.linear_schedule(peak, 0.0, preset.steps - preset.warmup)
        return ft.schedules.join_schedules([up, down], [preset.warmup])

    def matrices_of_blocks(params: Any) -> Any:
        matrix = ft.optim.MuonDimensionNumbers()
        return ft.tree.map_with_path(lambda path, p: matrix if "blocks" in path and p.dim() == 2 else None, params)

    rates = {"learning_rate": up_and_down(preset.muon_peak), "adam_learning_rate": up_and_down(preset.peak)}
    return ft.optim.muon(**rates, adam_b2=0.99, muon_weight_dimension_numbers=matrices_of_blocks)


LossOf = Callable[[Any], ft.Loss]  # of a batch, with what training left


def train_ours(preset: Preset, config: gpt2.Config, crops: Any, seed: int) -> tuple[LossOf, int, float]:
    """Train; return the loss of a batch, the number of parameters, and when the first step was done."""

    def loss_fn(params: Any, batch: Any, key: Any) -> ft.Loss:
        hidden = gpt2.hidden(params, batch["tokens"], config, key=key)
        return ft.losses.next_token_from_hidden(hidden, params["wte"], batch["targets"], batch["mask"])

    optimizer = optimizer_of(preset)
    step = ft.compile(ft.train_step(loss_fn, optimizer), donate=True)
    key = ft.random.key(seed)
    state = ft.init_state(gpt2.init(config, key), optimizer, key=key)
    state = ft.fit(step, state, crops, steps=1)
    first = time.perf_counter()
    state = ft.fit(step, state, crops, steps=preset.steps)
    return lambda batch: loss_fn(state.params, batch, None), ft.tree.size(state.params), first


def train_module(preset: Preset, config: gpt2.Config, crops: Any, seed: int) -> tuple[LossOf, int, float]:
    """Do the same with `torch.nn.Module`, eager, and fused AdamW."""
    torch.manual_seed(seed)
    shape = {"vocab": config.vocab, "context": config.context, "layers": config.layers, "heads": config.heads}
    module = modules.GPT(**shape, width=config.width, bias=False)
    schedule = ft.schedules.warmup_cosine_decay_schedule(0.0, preset.peak, preset.warmup, preset.steps, preset.final)
    step = modules.stepper(module, bf16=False, learning_rate=lambda t: float(schedule(torch.tensor(t))))
    first = 0.0
    for t in range(preset.steps):
        batch = crops[t]
        step(batch["tokens"], batch["targets"])
        first = first or time.perf_counter()

    def loss_of(batch: Any) -> ft.Loss:
        return ft.losses.next_token(module.logits(batch["tokens"]), batch["targets"], batch["mask"])

    return loss_of, sum(p.numel() for p in module.parameters()), first


def nanogpt_estimate(loss_of: LossOf, validation: Any, *, seed: int) -> float:
    crops = ft.data.crops(validation, batch=12, context=64, seed=seed)
    sums = [loss_of(crops[i]) for i in range(20)]
    return float(sum(s.total / s.weight for s in sums) / len(sums))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a text file, such as tinyshakespeare.txt")
    parser.add_argument("--preset", choices=PRESETS, default="nanogpt")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    preset = PRESETS[options.preset]

    characters = ft.data.Characters(ft.data.corpus(options.text, validation=0.0).text)
    sides = [ft.data.corpus(options.text, split=side) for side in ("train", "validation")]
    train, validation = (ft.data.tokenize(side, characters) for side in sides)
    config = gpt2.Config(
        vocab=characters.vocab_size, context=64, layers=4, heads=4, width=128, bias=False, attention=preset.attention
    )
    crops = ft.data.crops(train, batch=preset.batch, context=64, seed=options.seed)
    begin = time.perf_counter()
    train_one = train_module if options.preset == "module" else train_ours
    loss_of, parameters, first = train_one(preset, config, crops, options.seed)
    trained = time.perf_counter()

    windows = ft.data.evaluation_windows(validation, batch=64, context=64)
    with torch.no_grad():
        sums = [loss_of(windows[i]) for i in range(len(windows))]
        loss = float(sum(s.total for s in sums) / sum(s.weight for s in sums))
        end = time.perf_counter()
        process = time.time() - psutil.Process().create_time()
        draws = [nanogpt_estimate(loss_of, validation, seed=seed) for seed in range(50)]
    print(f"preset {options.preset}, {parameters:,} parameters, {preset.steps * preset.batch * 64:,} tokens")
    print(f"validation loss {loss:.4f}")
    print(f"by nanoGPT's estimate {statistics.mean(draws):.4f} +- {statistics.stdev(draws):.4f}")
    print(
        f"wall time {process:.1f} s: imports and data {begin - START:.1f}, first step {first - begin:.1f}, "
        f"training {trained - first:.1f} ({(trained - first) / (preset.steps - 1) * 1e3:.1f} ms a step), "
        f"evaluation {end - trained:.1f}"
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
