"""Modules that no one here wrote, through `ft.from_module`, trained by the compiled step, beside torch.

    python benchmarks/zoo.py [--only resnet,bert] [--check right,time] [--rounds 7] [--out results.md]

Checks: `right`, without dropout: loss, gradients and new buffers in eager, compiled whole, and of the compiled step,
beside torch's autograd on the module. `dropout`, `accumulate` (in two slices), `sweep` (of two learning rates): the
compiled step beside the same step in eager, with dropout. `time`: a step of torch in eager, of torch.compile(module),
both with fused AdamW, and of ours, by turns, median. `memory`: the peak of one step, above what was held before it.
`first`: seconds of the first compiled step, with an empty and with a filled cache. Each case runs in a process of its
own; a check that fails is a cell that says how. An error in a cell is the worst over the leaves of the largest
difference to the leaf's largest entry; up to ten times what an other last bit of the params changes counts as rounding,
which is all there is of the gradient of a bias before a batch norm.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from step import peak_bytes, seconds_by_turns
from torch import Tensor, nn
from zoo_cases import CASES, Case

import functrain as ft

KEY = ft.random.key(0)
RATES = {"lr": 1e-3, "weight_decay": 0.01}
TOLERANCES = {"loss": 1e-5, "grads": 1e-4, "buffers": 1e-5, "params": 1e-5}
FLOOR, ROUNDINGS = 1e-6, 10  # of the largest entry of all leaves; times what a last bit of the params changes
Cells = dict[str, Any]
Run = Callable[[], Any]


# -- a case as functrain's loss, and as torch's


def loss_of(made: Case, functional: Any) -> Callable[..., Any]:
    """Make the loss `(params, buffers, batch, key) -> (Loss, new buffers)`: the mean, with the rows as its weight."""

    def loss(params: Any, buffers: Any, batch: Any, key: Tensor) -> Any:
        result, new = functional.apply(params, buffers, key, **batch["inputs"], **made.options)
        mean, rows = made.mean_loss(result, **batch["targets"]), len(next(iter(batch["inputs"].values())))
        return ft.Loss(mean * rows, mean.new_full((), rows), {}), new

    return loss


class WithLoss(nn.Module):
    """The module of a case, returning its mean loss."""

    def __init__(self, made: Case) -> None:
        super().__init__()
        self.module, self.made = copy.deepcopy(made.module), made._replace(module=None)

    def forward(self, batch: Any) -> Tensor:
        return self.made.mean_loss(self.module(**batch["inputs"], **self.made.options), **batch["targets"])


def batch_of(made: Case) -> Any:
    return {"inputs": made.inputs, "targets": made.targets}


def torch_step(made: Case, dtype: torch.dtype, *, compiled: bool) -> Run:
    module: Any = WithLoss(made)
    fused = all(p.is_floating_point() for p in module.parameters())  # torch has no fused AdamW of complex numbers
    optimizer, batch = torch.optim.AdamW(module.parameters(), fused=fused, **RATES), batch_of(made)
    loss_fn = torch.compile(module) if compiled else module

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_fn(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return run


def our_step(made: Case, dtype: torch.dtype) -> Run:
    functional = ft.from_module(made.module)
    loss, tx, batch = loss_of(made, functional), ft.optim.adamw(RATES["lr"], weight_decay=0.01), batch_of(made)
    if dtype != torch.float32:
        loss = ft.mixed_precision(loss, policy_of(functional, dtype))
    step = ft.compile(ft.train_step(loss, tx, buffers=True), donate=True)
    state = ft.init_state(functional.params, tx, key=KEY, buffers=functional.buffers)

    def run() -> Tensor:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return run


def policy_of(functional: Any, dtype: torch.dtype) -> ft.Policy:
    """Keep running statistics and rotary frequencies in float32: they would not move, and turn wrong angles."""
    kept = [path for path in ft.tree.paths(functional.buffers) if "running_" in path or "inv_freq" in path]
    return ft.Policy(compute=dtype, exceptions={path: torch.float32 for path in kept})


def variants(made: Case, dtype: torch.dtype) -> dict[str, Callable[[], Run]]:
    return {
        "eager": lambda: torch_step(made, dtype, compiled=False),
        "torch": lambda: torch_step(made, dtype, compiled=True),
        "ours": lambda: our_step(made, dtype),
    }


# -- comparing


class Outcome(NamedTuple):
    loss: Tensor
    grads: Any
    buffers: Any
    params: Any = None


def worst(found: Any, expected: Any, nudged: Any, tolerance: float) -> tuple[float, str]:
    """Return the largest error of a leaf relative to its largest entry, or what its rounding allows, and its path."""
    sizes = {path: _size(leaf) for path, leaf in ft.tree.items(expected)}
    floor = FLOOR * max(sizes.values(), default=0.0)
    errors = {}
    leaves = zip(ft.tree.items(expected), ft.tree.leaves(found), ft.tree.leaves(nudged), strict=True)
    for (path, leaf), other, near in leaves:
        noise = ROUNDINGS * _size(_wide(near) - leaf) / tolerance
        errors[path] = _size(_wide(other) - leaf) / max(sizes[path], floor, noise, 1e-30)
    path = max(errors, key=lambda p: (errors[p] != errors[p], errors[p]), default="")
    return errors.get(path, 0.0), path


def nudge(leaf: Tensor) -> Tensor:
    """Move each number up or down by about its last bit."""
    signs = torch.randint(2, leaf.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return leaf * (1 + signs * torch.finfo(leaf.dtype).eps).to(leaf.dtype)


def _wide(leaf: Tensor) -> Tensor:
    return leaf if leaf.is_complex() else leaf.double()


def _size(leaf: Tensor) -> float:
    return leaf.abs().max().item() if leaf.numel() else 0.0


def verdict(found: Outcome, expected: Outcome, nudged: Outcome) -> str:
    """Say ok and the error of the gradients, or what is farther off than its tolerance."""
    errors = {}
    for name, tolerance in TOLERANCES.items():
        errors[name] = worst(*[getattr(outcome, name) for outcome in (found, expected, nudged)], tolerance)
    wrong = [f"{n} {e:.0e} {path}".strip() for n, (e, path) in errors.items() if not e <= TOLERANCES[n]]
    return f"WRONG {', '.join(wrong)}" if wrong else f"ok {errors['grads'][0]:.0e}"


def attempt(fn: Callable[..., Any], *args: Any) -> Any:
    """Return the result, or what was raised as a short text."""
    try:
        return fn(*args)
    except Exception as error:
        return Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


class Failed(str):
    """Why there is no result."""


# -- checks: (made with dropout, options) to cells by column


def torch_outcome(made: Case, functional: Any, change: Callable[[Tensor], Tensor] = torch.clone) -> Outcome:
    module = copy.deepcopy(made.module)
    for p in module.parameters():
        p.data = change(p.data)
    loss = made.mean_loss(module(**made.inputs, **made.options), **made.targets)
    loss.backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    after = dict(module.named_buffers()) | dict(module.named_parameters())

    def grad_of(path: str, leaf: Tensor) -> Tensor:
        grad = grads[path.replace("/", ".")]
        return torch.zeros_like(leaf) if grad is None else grad

    buffers = ft.tree.map_with_path(lambda path, _: after[path.replace("/", ".")].detach(), functional.buffers)
    return Outcome(loss.detach(), ft.tree.map_with_path(grad_of, functional.params), buffers)


def keep_grads() -> Any:
    """Make the transformation whose state are the gradients of the last step."""

    def init(params: Any) -> Any:
        return ft.tree.map(torch.zeros_like, params)

    return ft.optim.GradientTransformation(init, lambda updates, state, params=None: (updates, updates))


def kept(learning_rate: Any) -> Any:
    return ft.optim.chain(keep_grads(), ft.optim.sgd(learning_rate))


def step_outcome(step: Callable[..., Any], state: Any, batch: Any) -> Outcome:
    new, metrics = step(state, batch)
    inner = getattr(new.opt_state, "inner_state", new.opt_state)
    return Outcome(metrics["loss"], inner[0], new.buffers, new.params)


def right(made: Case, options: argparse.Namespace) -> Iterator[Cells]:
    made = CASES[options.child](0.0)
    functional, tx, batch = ft.from_module(made.module), kept(0.1), batch_of(made)
    expected, near = torch_outcome(made, functional), torch_outcome(made, functional, nudge)
    loss = loss_of(made, functional)

    def mean(*args: Any) -> Any:
        found, new = loss(*args)
        return found.total / found.weight, new

    def by_gradient(gradient: Callable[..., Any]) -> str:
        (value, new), grads = gradient(functional.params, functional.buffers, batch, KEY)
        return verdict(Outcome(value, grads, new), expected, near)

    def by_step() -> str:
        step = ft.compile(ft.train_step(loss, tx, buffers=True))
        state = ft.init_state(functional.params, tx, key=KEY, buffers=functional.buffers)
        return verdict(step_outcome(step, state, batch)._replace(params=None), expected, near)

    gradient = ft.value_and_grad(mean, has_aux=True)
    yield {"right, eager": attempt(by_gradient, gradient)}
    if not options.eager:
        yield {"right, whole": attempt(by_gradient, ft.compile(gradient))}
        yield {"right, step": attempt(by_step)}


def compiled_equals_eager(made: Case, parts: int) -> str:
    functional, tx = ft.from_module(made.module), kept(0.1)
    step = ft.train_step(loss_of(made, functional), tx, buffers=True, accumulate=parts)
    state = ft.init_state(functional.params, tx, key=KEY, buffers=functional.buffers)
    return beside(step, state, batch_of(made))


def swept_equals_eager(made: Case) -> str:
    """Compare the second step, before which the lanes are no longer alike."""
    functional, tx = ft.from_module(made.module), ft.optim.inject_hyperparams(kept)(learning_rate=0.1)
    step = ft.train_step(loss_of(made, functional), tx, buffers=True)
    swept = ft.sweep(step, {"learning_rate": [0.01, 0.05]})
    first = ft.init_state(functional.params, tx, key=KEY, buffers=functional.buffers)
    try:
        states, _ = swept(swept.init(first), batch_of(made))
    except Exception as error:
        raise RuntimeError(f"in eager: {type(error).__name__}: {error}") from error
    return beside(swept, states, batch_of(made))


def beside(step: Callable[..., Any], state: Any, batch: Any) -> str:
    expected = step_outcome(step, state, batch)
    near = step_outcome(step, state._replace(params=ft.tree.map(nudge, state.params)), batch)
    return verdict(step_outcome(ft.compile(step), state, batch), expected, near)


def dropout(made: Case, options: argparse.Namespace) -> Iterator[Cells]:
    yield {"dropout": attempt(compiled_equals_eager, made, 1)}


def accumulate(made: Case, options: argparse.Namespace) -> Iterator[Cells]:
    yield {"accumulate": attempt(compiled_equals_eager, made, 2)}


def sweep(made: Case, options: argparse.Namespace) -> Iterator[Cells]:
    yield {"sweep": attempt(swept_equals_eager, made)}


def warmed(make: Callable[[], Run]) -> Any:
    def run_twice() -> Run:
        run = make()
        run(), run()
        return run

    return attempt(run_twice)


def times(made: Case, options: argparse.Namespace) -> Iterator[Cells]:
    runs = {name: warmed(make) for name, make in variants(made, getattr(torch, options.dtype)).items()}
    able = {name: run for name, run in runs.items() if not isinstance(run, Failed)}
    found = {name: seconds * 1e3 for name, seconds in seconds_by_turns(able, options.rounds).items()}
    yield {f"{name}, ms": found.get(name, runs[name]) for name in runs}
    for other in ("torch", "eager"):
        if "ours" in found and other in found:
            yield {f"ours/{other}": found["ours"] / found[other]}


def memory(made: Case, options: argparse.Namespace) -> Iterator[Cells]:
    makes, found = variants(made, getattr(torch, options.dtype)), {}
    for name in ("torch", "ours"):
        run = warmed(makes[name])
        found[name] = run if isinstance(run, Failed) else attempt(lambda run=run: peak_bytes(run) / 2**20)
        yield {f"{name}, MiB": found[name]}
    if not any(isinstance(peak, Failed) for peak in found.values()):
        yield {"ours/torch, MiB": found["ours"] / found["torch"]}


def first(made: Case, options: argparse.Namespace) -> Iterator[Cells]:
    for name in ("torch", "ours"):
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold", "warm"):
                yield {f"{name} {kind}, s": attempt(first_seconds, name, cache, options)}


def first_seconds(variant: str, cache: str, options: argparse.Namespace) -> float | Failed:
    command = [sys.executable, "-W", "ignore", __file__, "--first", options.child, variant, "--dtype", options.dtype,
               "--timeout", str(options.timeout)]  # fmt: skip
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = "timeout" if "Timeout (" in done.stderr else done.stderr[-200:]
        return Failed(f"process ended with {done.returncode}: {said}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Failed(found) if isinstance(found, str) else found


def time_first(name: str, variant: str, dtype: torch.dtype) -> float:
    made = CASES[name](1.0)
    start = time.perf_counter()
    variants(made, dtype)[variant]()().item()
    return time.perf_counter() - start


CHECKS = {
    "right": right, "dropout": dropout, "accumulate": accumulate, "sweep": sweep, "time": times, "memory": memory,
    "first": first,
}  # fmt: skip
COMPARISONS = ("right", "dropout", "accumulate", "sweep")


# -- processes, and the table


def run_child(options: argparse.Namespace) -> None:
    """Run the checks of one case; each is said when it is known, and written as a line of JSON."""
    faulthandler.enable()
    for check in options.check:
        # a hang, even in a kernel, ends this process; the parent goes on with the next check
        faulthandler.dump_traceback_later(options.timeout * (4 if check == "first" else 1), exit=True)
        made = CASES[options.child](1.0)
        cells: Cells = {"MiB": sum(p.nbytes for p in made.module.parameters()) / 2**20}
        failed = attempt(lambda check=check, made=made, cells=cells: [
            cells.update(more) for more in CHECKS[check](made, options)])  # fmt: skip
        if isinstance(failed, Failed):
            cells[check] = failed
        print(f"{options.child} {check}: " + "; ".join(f"{k} {shown(v)}" for k, v in cells.items()), flush=True)
        with open(options.results, "a") as file:
            file.write(json.dumps({"check": check, "cells": cells}) + "\n")
        torch._dynamo.reset()


def run_case(name: str, options: argparse.Namespace) -> Cells:
    """Run a case's checks in a process, and in a new one what comes after a check that ended it."""
    cells: Cells = {}
    left = list(options.check)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            results, log = Path(folder) / "results", Path(folder) / "log"
            results.touch()
            command = [sys.executable, "-W", "ignore", __file__, "--child", name, "--results", str(results),
                       "--check", ",".join(left), "--rounds", str(options.rounds), "--dtype", options.dtype,
                       "--timeout", str(options.timeout), *(["--eager"] if options.eager else [])]  # fmt: skip
            with log.open("w") as errors:
                ended = subprocess.run(command, stderr=errors).returncode
            lines = [json.loads(line) for line in results.read_text().splitlines()]
            for line in lines:
                cells |= line["cells"]
            left = left[len(lines) :]
            if left:
                said = " ".join(log.read_text(errors="replace").split())
                crash = said.find("Fatal Python error")
                shortly = said[crash:][:200] if crash >= 0 else said[-200:]
                cells[left[0]] = "timeout" if "Timeout (" in said else f"process ended with {ended}: {shortly}"
                print(f"{name} {left[0]}: {cells[left[0]]}", flush=True)
                left = left[1:]
    return cells


def shown(value: Any) -> str:
    return str(value).replace("|", "/") if isinstance(value, str) else f"{value:.3g}"


def tables(rows: dict[str, Cells]) -> str:
    """Make two Markdown tables: what is equal to what, and what was measured."""
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    said = [c for c in columns if c.startswith(COMPARISONS)]
    parts = []
    for chosen in (said, [c for c in columns if c not in said]):
        lines = [f"| {name} | " + " | ".join(shown(cells.get(c, "")) for c in chosen) + " |" for name, cells in
                 rows.items()]  # fmt: skip
        head = f"| case | {' | '.join(chosen)} |\n|{'---|' * (len(chosen) + 1)}\n"
        parts.append(head + "\n".join(lines) if chosen else "")
    return "\n\n".join(filter(None, parts))


def machine(options: argparse.Namespace) -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in info.splitlines() if ":" in line}
    flags = fields.get("flags", "").split()
    wanted = {"avx2": "avx2", "avx512": "avx512f", "avx512_bf16": "avx512_bf16", "amx": "amx_tile"}
    has = ", ".join(f"{name} {'yes' if flag in flags else 'no'}" for name, flag in wanted.items())
    from transformers import __version__ as transformers_version

    kind = f"family {fields.get('cpu family')}, model {fields.get('model')}"
    model = f"{fields.get('model name', platform.machine())} ({kind})"
    versions = f"torch {torch.__version__}, transformers {transformers_version}, Python {platform.python_version()}"
    load = " ".join(f"{average:.1f}" for average in os.getloadavg())
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load average at the start {load}"
    asked = f"{options.dtype}, {options.rounds} rounds; {Path(ft.__file__).parent}"
    return "; ".join([f"{model}, {has}", threads, versions, asked])


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=words, default=list(CASES), help="names of cases, with commas")
    parser.add_argument("--check", type=words, default=list(CHECKS), help="names of checks, with commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a check of a case")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of time, memory and first")
    parser.add_argument("--eager", action="store_true", help="compile nothing in the check `right`")
    parser.add_argument("--out", type=Path, help="a Markdown file to which the tables are appended")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    parser.add_argument("--first", nargs=2, metavar=("NAME", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for what, known in (("only", CASES), ("check", CHECKS)):
        unknown = [name for name in getattr(options, what) if name not in known]
        if unknown:
            parser.error(f"--{what}: expected some of {', '.join(known)}, came {', '.join(unknown)}")
    return options


def main() -> None:
    options = parsed()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.list:
        print("\n".join(CASES))
    elif options.first:
        faulthandler.dump_traceback_later(options.timeout, exit=True)
        print(json.dumps(attempt(time_first, *options.first, getattr(torch, options.dtype))))
    elif options.child:
        run_child(options)
    else:
        heading = machine(options)
        print(heading, flush=True)
        rows = {name: run_case(name, options) for name in options.only}
        text = f"\n{heading}\n\n{tables(rows)}\n"
        print(text)
        if options.out:
            with options.out.open("a") as file:
                file.write(text)


if __name__ == "__main__":
    main()
