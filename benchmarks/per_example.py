"""Gradients of single examples of a small GPT, beside a loop of gradients and beside opacus; and private steps.

    python benchmarks/per_example.py [--only small|larger|compile] [--rounds 5]

Every variant of the first table makes the same gradients, (B, ...) for each parameter, which is checked first. In the
second table a step clips them and adds the noise, beside the ordinary compiled step. The last table is of first steps
of the small model, each in a process with an empty cache folder: the wall's seconds, and those of CPUs, the C++
compiler's among them, which other work on the host changes less. Peak is what torch's allocator held at most in one
call, above what it held before. Variants take turns, round by round, in one process; times are medians.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from step import peak_bytes, seconds_by_turns
from torch import Tensor, nn

import functrain as ft
from functrain.models import gpt2

KEY, CLIP, NOISE = ft.random.key(0), 1.0, 1.0
SIZES = {
    "small": ({"vocab": 256, "context": 64, "layers": 2, "heads": 2, "width": 64}, 32),
    "larger": ({"vocab": 256, "context": 64, "layers": 4, "heads": 4, "width": 128}, 16),
}
Run = Callable[[], Any]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.ln_1(x)), "b t (n h k) -> n b h t k", n=3, h=self.heads)  # (B, H, T, K)
        scores = q @ k.mT / k.shape[-1] ** 0.5
        seen = torch.softmax(scores + torch.full_like(scores[0, 0], -torch.inf).triu(1), -1) @ v
        x = x + self.out(rearrange(seen, "b h t k -> b t (h k)"))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """The model of functrain.models.gpt2 with a head of its own, of layers that opacus knows."""

    def __init__(self, vocab: int, context: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)  # opacus wants a batch everywhere
        return self.head(self.ln_f(self.blocks(self.wte(tokens) + self.wpe(positions))))


def from_ours(params: Any) -> dict[str, Tensor]:
    """Parameters, or gradients of examples, under the names and in the layout of GPT."""
    found = {"wte.weight": params["gpt"]["wte"], "wpe.weight": params["gpt"]["wpe"], "head.weight": params["head"]}
    for path, leaf in ft.tree.items({"blocks": params["gpt"]["blocks"], "ln_f": params["gpt"]["ln_f"]}):
        name = path.replace("/attn/", "/").replace("/mlp/", "/").replace("/", ".")
        found[name] = leaf.mT if name.endswith("weight") and "ln_" not in name else leaf
    return found


class Problem:
    def __init__(self, shape: dict[str, int], examples: int) -> None:
        self.shape = shape
        config = gpt2.Config(**shape, attention="math")
        gpt = gpt2.init(config, KEY)
        self.params = {"gpt": gpt, "head": gpt["wte"] + 0.01}
        tokens = ft.random.randint(ft.random.key(1), (examples, shape["context"] + 1), 0, shape["vocab"])
        self.batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}

        def loss_fn(params: Any, batch: Any, key: Any = None) -> ft.Loss:
            logits = gpt2.hidden(params["gpt"], batch["tokens"], config) @ params["head"].mT  # (B, T, V)
            return ft.losses.next_token(logits, batch["targets"], torch.ones_like(batch["targets"]))

        self.loss_fn = loss_fn

    def mean(self, params: Any, batch: Any) -> Tensor:
        loss = self.loss_fn(params, batch)
        return loss.total / loss.weight

    def module(self) -> GPT:
        module = GPT(**self.shape)
        module.load_state_dict(from_ours(self.params))
        return module

    def losses(self, logits: Tensor) -> Tensor:
        """The mean over the tokens of each example, (B,)."""
        return F.cross_entropy(logits.mT, self.batch["targets"], reduction="none").mean(1)


def gradients(problem: Problem) -> dict[str, Run]:
    params, batch = problem.params, problem.batch
    count = len(batch["tokens"])

    def loop(grad: Callable[..., Any]) -> Run:
        def run() -> Any:
            found = [grad(params, ft.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)) for i in range(count)]
            return from_ours(ft.tree.map(lambda *leaves: torch.stack(leaves), *found))

        return run

    eager, plain = ft.per_example_grad(problem.mean), ft.grad(problem.mean)
    compiled = {size: ft.compile(ft.per_example_grad(problem.mean, chunk_size=size)) for size in (None, 4)}
    variants = {
        "loop of ft.grad, eager": loop(plain),
        "loop of ft.grad, ft.compile": loop(ft.compile(plain)),
        "ft.per_example_grad, eager": lambda: from_ours(eager(params, batch)),
        "ft.per_example_grad, ft.compile": lambda: from_ours(compiled[None](params, batch)),
        "ft.per_example_grad, ft.compile, chunk_size=4": lambda: from_ours(compiled[4](params, batch)),
    }
    for mode in ("hooks", "functorch", "ew"):
        variants[f"opacus, {mode}"] = opacus_gradients(problem, mode)
    return variants


def opacus_gradients(problem: Problem, mode: str) -> Run:
    from opacus.grad_sample import wrap_model

    module = problem.module()
    names = [name for name, _ in module.named_parameters()]
    wrapped = wrap_model(module, grad_sample_mode=mode, loss_reduction="sum")

    def run() -> Any:
        for p in module.parameters():
            p.grad = p.grad_sample = None
        problem.losses(wrapped(problem.batch["tokens"])).sum().backward()
        return {name: p.grad_sample for name, p in zip(names, module.parameters(), strict=True)}

    return run


def steps(problem: Problem) -> dict[str, Run]:
    from opacus.grad_sample import wrap_model
    from opacus.optimizers import DPOptimizer
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    count = len(problem.batch["tokens"])
    hooked = problem.module()
    wrapped = wrap_model(hooked, grad_sample_mode="hooks", loss_reduction="sum")
    noisy = {"noise_multiplier": NOISE, "max_grad_norm": CLIP, "expected_batch_size": count, "loss_reduction": "sum"}
    inner = DPOptimizer(torch.optim.SGD(hooked.parameters(), 1e-3), **noisy)

    def hooks() -> None:
        inner.zero_grad()
        problem.losses(wrapped(problem.batch["tokens"])).sum().backward()
        inner.step()

    module = problem.module()
    ghostly = wrap_model(
        module, grad_sample_mode="ghost", loss_reduction="sum", max_grad_norm=CLIP, use_ghost_clipping=True
    )
    outer = DPOptimizerFastGradientClipping(torch.optim.SGD(module.parameters(), 1e-3), **noisy)

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        return problem.losses(logits)

    criterion.reduction = "sum"  # type: ignore[attr-defined]  # what opacus reads of a loss
    loss = DPLossFastGradientClipping(ghostly, outer, criterion, loss_reduction="sum")

    def ghost() -> None:
        outer.zero_grad()
        loss(ghostly(problem.batch["tokens"]), problem.batch["targets"]).backward()
        outer.step()

    ours = {f"ft.train.{name}, ft.compile": compiled_step(problem, name) for name in STEPS}
    return ours | {"opacus, hooks": hooks, "opacus, ghost clipping": ghost}


STEPS = ("train_step", "private_step")


def compiled_step(problem: Problem, name: str) -> Run:
    private = name == "private_step"
    optimizer = ft.optim.dpsgd(1e-3, CLIP, NOISE, seed=0) if private else ft.optim.sgd(1e-3)
    make = ft.train.private_step if private else ft.train_step
    step = ft.compile(make(problem.loss_fn, optimizer), donate=True)
    state = ft.init_state(ft.tree.map(torch.clone, problem.params), optimizer, key=KEY)

    def run() -> None:
        nonlocal state
        state, _ = step(state, problem.batch)

    return run


def first_step(name: str) -> None:
    run = compiled_step(Problem(*SIZES["small"]), name)
    start = time.perf_counter()
    run()
    print(time.perf_counter() - start, sum(os.times()[:4]))


def compile_times() -> None:
    print("\n| | first step s | CPU s |\n|---|---|---|")
    for name in STEPS:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--child", name]
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        seconds, cpu = map(float, done.stdout.split()[-2:])
        print(f"| {name} | {seconds:.1f} | {cpu:.1f} |", flush=True)


def measure(title: str, variants: dict[str, Run], rounds: int) -> None:
    for run in variants.values():
        for _ in range(2):
            run()
    seconds = seconds_by_turns(variants, rounds)
    print(f"\n{title}\n\n| | ms | peak MB |\n|---|---|---|")
    for name, run in variants.items():
        print(f"| {name} | {seconds[name] * 1e3:.1f} | {peak_bytes(run) / 1e6:.1f} |", flush=True)


def check(variants: dict[str, Run]) -> None:
    first, *others = [run() for run in variants.values()]
    for found in others:
        for name, want in first.items():
            # float32 sums of some hundred products, in other orders
            torch.testing.assert_close(found[name], want, rtol=1e-3, atol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=(*SIZES, "compile"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return first_step(options.child)
    warnings.simplefilter("ignore")  # opacus' own, about its hooks
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, (shape, examples) in SIZES.items():
        if options.only in (None, name):
            problem = Problem(shape, examples)
            variants = gradients(problem)
            check(variants)
            measure(f"gradients of {examples} examples, {shape}", variants, options.rounds)
            measure(f"private steps of {examples} examples, {shape}", steps(problem), options.rounds)
    if options.only in (None, "compile"):
        compile_times()


if __name__ == "__main__":
    main()
