"""Time to the first step, from cold and from warm compiler caches, of GPTs of 4 and 12 layers, width 128.

    python benchmarks/first_step.py [--repeat 3] [--resumed]

Each figure is a process of its own: from building the model to the end of the first step, imports not counted. Cold
means an empty cache folder; warm, the folder that the cold run filled; bare, that torch's compiled C++ header is
missing, too, as on a new machine. Printed are medians. "Resumed" is the time from the start of the process, imports
included: of a run with `ft.compile(..., cache=FOLDER)` that finds its programs there, beside the module with its warm
cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

SHAPE = {"vocab": 65, "context": 64, "heads": 4, "width": 128}


def first_step(variant: str, layers: int) -> float:
    import torch
    from modules import GPT, stepper

    import functrain as ft
    from functrain.models import gpt2

    # rooms are imported where they are named first, and imports are not counted
    _ = ft.compile, ft.train_step, ft.init_state, ft.losses.next_token_from_hidden, ft.random.key, ft.optim.adamw
    tokens = torch.randint(65, (12, 65))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    start = time.perf_counter()
    if variant == "module":
        stepper(torch.compile(GPT(layers=layers, **SHAPE)), bf16=False)(inputs, targets).item()
        return time.perf_counter() - start
    from step import optimizer

    config = gpt2.Config(layers=layers, **SHAPE)

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        hidden = gpt2.hidden(params, batch["tokens"], config, key=key)
        return ft.losses.next_token_from_hidden(hidden, params["wte"], batch["targets"])

    tx, key = optimizer(), ft.random.key(0)
    step = ft.compile(ft.train_step(loss_fn, tx), donate=True, cache=os.environ.get("PROGRAMS"))
    _, metrics = step(ft.init_state(gpt2.init(config, key), tx, key=key), {"tokens": inputs, "targets": targets})
    metrics["loss"].item()
    return time.perf_counter() - start


def run(
    variant: str, layers: int, cache: str, programs: str | None = None, *, imports: bool = False, bare: bool = False
) -> float:
    command = [sys.executable, __file__, "--child", variant, str(layers)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache} | ({"PROGRAMS": programs} if programs else {})
    if bare:
        environment |= {"TMPDIR": cache}
    start = time.time()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[2:])}: it ended with {done.returncode}")
    seconds, end = map(float, done.stdout.split()[-2:])
    return end - start if imports else seconds


def resumed(repeat: int) -> None:
    for layers in (4, 12):
        times: dict[str, list[float]] = {"module": [], "functrain": []}
        for variant in times:
            with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as programs:
                kept = programs if variant == "functrain" else None
                run(variant, layers, cache, kept)
                for _ in range(repeat):
                    with tempfile.TemporaryDirectory() as empty:
                        times[variant].append(run(variant, layers, empty if kept else cache, kept, imports=True))
        module, ours = (statistics.median(values) for values in times.values())
        print(f"resumed, {layers} layers, imports included: module {module:.1f} s, functrain {ours:.1f} s, "
              f"{ours / module:.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--resumed", action="store_true", help="measure that alone")
    parser.add_argument("--child", nargs=2, metavar=("VARIANT", "LAYERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(first_step(options.child[0], int(options.child[1])), time.time())
        return
    if options.resumed:
        resumed(options.repeat)
        return
    cases = [("module", 4), ("functrain", 4), ("functrain", 12), ("module", 12)]
    times: dict[Any, list[float]] = {}
    for _ in range(options.repeat):
        for case in cases:
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    times.setdefault((*case, kind), []).append(run(*case, cache))
            with tempfile.TemporaryDirectory() as cache:
                times.setdefault((*case, "bare"), []).append(run(*case, cache, bare=True))
    middle = {case: statistics.median(values) for case, values in times.items()}
    print("| first step, s | layers | bare | cold | warm |\n|---|---|---|---|---|")
    names = {"module": "torch.compile(module) + fused AdamW", "functrain": "functrain compiled, donated"}
    for variant, layers in cases:
        bare, cold, warm = (middle[variant, layers, kind] for kind in ("bare", "cold", "warm"))
        print(f"| {names[variant]} | {layers} | {bare:.1f} | {cold:.1f} | {warm:.1f} |")
    ratio = middle["functrain", 4, "cold"] / middle["module", 4, "cold"]
    depth = middle["functrain", 12, "cold"] / middle["functrain", 4, "cold"]
    print(f"\ncold, 4 layers, to the module: {ratio:.2f}; cold, 12 layers to 4: {depth:.2f}")


if __name__ == "__main__":
    main()
