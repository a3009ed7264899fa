"""Training steps that one process and many take: what `test_data_parallel` runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import functrain as ft
from functrain.models import gpt2

ROWS, WIDTH = 12, 6


def batches(rows: int = ROWS) -> Any:
    key = ft.random.key(5)
    x = ft.random.normal(key, (3 * rows, WIDTH)).double()
    mask = ft.random.bernoulli(ft.random.fold_in(key, 1), 0.6, (3 * rows,))
    return ft.data.batches({"x": x, "y": x.sin().sum(1), "mask": mask}, batch=rows, shuffle=False)


def params() -> Any:
    keys = ft.random.split(ft.random.key(2), 3)
    return {
        "in": ft.random.normal(keys[0], (WIDTH, 16)).double() / 3,
        "out": ft.random.normal(keys[1], (16,)).double() / 4,
        "bias": torch.zeros(16, dtype=torch.float64),
    }


def loss_fn(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    hidden = torch.tanh(batch["x"] @ params["in"] + params["bias"])
    hidden = ft.nn.dropout(hidden, 0.3, key)
    wrong = (hidden @ params["out"] - batch["y"]) ** 2
    mask = batch["mask"]
    return ft.Loss((wrong * mask).sum(), mask.sum().to(wrong.dtype), {"wrong": (wrong.abs() * mask).sum()})


def with_buffers(params: Any, buffers: Any, batch: Any, key: Tensor) -> Any:
    loss = loss_fn(params, batch, key)
    return loss, {"mean": 0.9 * buffers["mean"] + 0.1 * batch["x"].mean(0), "steps": buffers["steps"] + 1}


def optimizer() -> Any:
    return ft.optim.chain(ft.optim.clip_by_global_norm(0.5), ft.optim.adamw(1e-2))


def train(
    world: int,
    accumulate: int,
    scaled: bool = False,
    buffers: bool = False,
    spoilt: int | None = None,
    rows: int = ROWS,
    programs: str | None = None,
) -> Any:
    """Take steps on `world` ranks, or as one process with as many slices; return the state and all metrics.

    With a folder for `programs`, compiled.
    """
    plan = ft.sharding.Plan({"data": world}, device="cpu") if world > 1 else None
    data = batches(rows)
    options: dict[str, Any] = {"loss_scale": ft.loss_scale.dynamic(2.0**10), "guard": ft.train.skip_nonfinite()}
    options = options if scaled else {}
    step: Any = ft.train_step(
        with_buffers if buffers else loss_fn, optimizer(), accumulate=accumulate, buffers=buffers, plan=plan, **options
    )
    if programs is not None:
        step = ft.compile(step, donate=True, cache=programs)
    state = ft.init_state(
        params(), optimizer(), key=ft.random.key(3), **options,
        **({"buffers": {"mean": torch.zeros(WIDTH).double(), "steps": torch.tensor(0)}} if buffers else {}),
    )  # fmt: skip
    parts = data if plan is None else ft.data.shard(data, plan=plan, accumulate=accumulate)
    seen = []
    for t in range(3):
        batch = {name: leaf.clone() for name, leaf in parts[t].items()}
        if spoilt == t and (plan is None or plan.rank == world - 1):
            batch["x"][-1] = float("inf")
            batch["mask"][-1] = True
        state, metrics = step(state, batch)
        seen.append({name: value.item() for name, value in metrics.items()})
    return ft.tree.map(lambda x: x.clone(), state), seen


def train_plain(world: int, dtype: str | None = None, split: bool = False) -> Any:
    """Take steps without dropout, on ranks, whose params may be split, or on the batch as a whole."""

    def plain(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        wrong = (torch.tanh(batch["x"] @ params["in"] + params["bias"]) @ params["out"] - batch["y"]) ** 2
        return ft.Loss(wrong.sum(), wrong.new_tensor(len(wrong)), {})

    added = None if dtype is None else torch.bfloat16
    rules: Any = [("**", ft.sharding.largest("data") if split else ft.sharding.P())]
    plan = ft.sharding.Plan({"data": world}, rules, device="cpu", reduce_dtype=added) if world > 1 else None
    step = ft.train_step(plain, optimizer(), plan=plan)
    begun = params() if plan is None else plan.shard(params())
    state, seen = ft.init_state(begun, optimizer(), key=ft.random.key(3)), []
    parts: Any = batches(7) if plan is None else ft.data.shard(batches(7), plan=plan)
    for t in range(3):
        state, metrics = step(state, parts[t])
        seen.append({name: value.item() for name, value in metrics.items()})
    return state if plan is None else plan.whole(state), seen


RULES = {
    "gpt, whole": [("**", ft.sharding.P())],
    "mlp": [("in", ft.sharding.P(None, "fsdp")), ("**", ft.sharding.largest("fsdp"))],
    "gpt": [("blocks/*/attn/qkv/weight", ft.sharding.P(None, "fsdp")), ("**", ft.sharding.largest("fsdp"))],
}


def split(
    mesh: dict[str, int],
    model: str,
    accumulate: int = 1,
    scaled: bool = False,
    recompute: bool = False,
    programs: str | None = None,
) -> Any:
    """Take steps with params that are split over "fsdp", or as one process with as many slices; return the whole state,
    all metrics, and the bytes of params and moments here. With a folder for `programs`, compiled."""
    ranks = 1
    for size in mesh.values():
        ranks *= size
    plan = ft.sharding.Plan(mesh, RULES[model], device="cpu") if ranks > 1 else None
    config = gpt2.Config(vocab=32, context=8, layers=2, heads=2, width=8, dropout=0.2, attention="math")

    def gpt_loss(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        logits = gpt2.apply(params, batch["tokens"], config, key=key)
        return ft.losses.next_token(logits, batch["targets"])

    if model == "mlp":
        begun, loss, data = params(), loss_fn, batches()
    else:
        begun = ft.tree.cast(gpt2.init(config, ft.random.key(1)), torch.float64)
        loss = ft.recompute_layers(gpt_loss) if recompute else gpt_loss
        data = ft.data.windows(ft.random.randint(ft.random.key(4), (400,), 0, 32), batch=8, context=8, seed=0)
    options: dict[str, Any] = {"loss_scale": ft.loss_scale.dynamic(2.0**10)} if scaled else {}
    step: Any = ft.train_step(loss, optimizer(), accumulate=accumulate, plan=plan, **options)
    if programs is not None:
        step = ft.compile(step, donate=True, cache=programs)
    begun = begun if plan is None else plan.shard(begun)
    state = ft.init_state(begun, optimizer(), key=ft.random.key(3), **options)
    here = sum(leaf.to_local().nbytes if hasattr(leaf, "to_local") else leaf.nbytes for leaf in ft.tree.leaves(state))
    parts = data if plan is None else ft.data.shard(data, plan=plan, accumulate=accumulate)
    seen = []
    for t in range(3):
        state, metrics = step(state, parts[t])
        seen.append({name: value.item() for name, value in metrics.items()})
    return (state if plan is None else plan.whole(state)), seen, here


def swept() -> str:
    step = ft.train_step(loss_fn, optimizer(), plan=ft.sharding.Plan({"data": 2}, device="cpu"))
    try:
        ft.sweep(step, {"seed": [0, 1]})
    except ValueError as error:
        return str(error)
    return ""


def evaluated(mesh: dict[str, int], count: int, compiled: bool = False, as_list: bool = True) -> Any:
    """Evaluate params, split over "fsdp" if the mesh has it, on batches of different numbers of rows."""
    ranks = 1
    for size in mesh.values():
        ranks *= size
    plan = ft.sharding.Plan(mesh, RULES["gpt"] if "fsdp" in mesh else RULES["gpt, whole"], device="cpu")
    config = gpt2.Config(vocab=32, context=8, layers=2, heads=2, width=8, attention="math")

    def gpt_loss(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        loss = ft.losses.next_token(gpt2.apply(params, batch["tokens"], config, key=key), batch["targets"])
        return loss._replace(metrics={"half": loss.total.detach() / 2})

    params = ft.tree.cast(gpt2.init(config, ft.random.key(1)), torch.float64)
    windows = ft.data.windows(ft.random.randint(ft.random.key(4), (400,), 0, 32), batch=8, context=8, seed=0)
    batches: Any = [{name: leaf[: 3 + 2 * (t % 2)] for name, leaf in windows[t].items()} for t in range(count)]
    seen: list[Any] = []
    found = ft.evaluate(
        gpt_loss, params if ranks == 1 else plan.shard(params), batches if as_list else iter(batches), plan=plan,
        compile=compiled, progress=lambda done, of: seen.append((done, of)),
    )  # fmt: skip
    return found, len(seen)
