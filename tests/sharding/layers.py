"""Steps of models whose layers compute with parts: what `test_tensor_parallel` runs."""

from __future__ import annotations

from typing import Any

import steps
import torch
from torch import Tensor

import functrain as ft
from functrain.models import bert, gpt2, llama, modernbert, vit

TEXT: dict[str, Any] = {"vocab": 32, "context": 8, "layers": 2, "width": 16, "heads": 4}
CONFIGS: dict[str, Any] = {
    "gpt2": gpt2.Config(**TEXT, dropout=0.2, attention_dropout=0.1, attention="math"),
    "llama": llama.Config(**TEXT, key_heads=2, inner=24, qkv_bias=True, qk_norm=True, attention="math"),
    "llama, tied": llama.Config(**TEXT, key_heads=2, inner=24, tied=True, window=3),
    "bert": bert.Config(**TEXT, inner=24, dropout=0.1, attention_dropout=0.1, head="masked_lm", attention="math"),
    "modernbert": modernbert.Config(
        **TEXT, inner=24, window=4, mlp_dropout=0.2, attention_dropout=0.1, attention="math"
    ),
    "vit": vit.Config(image=16, patch=4, layers=2, width=16, heads=4, inner=24, num_labels=8, dropout=0.1),
}  # fmt: skip
MODULES: dict[str, Any] = {
    "gpt2": gpt2, "llama": llama, "llama, tied": llama, "bert": bert, "modernbert": modernbert, "vit": vit,
}  # fmt: skip


def loss_of(name: str) -> Any:
    module, config = MODULES[name], CONFIGS[name]

    def loss_fn(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        if name == "vit":
            return ft.losses.classification(module.apply(params, batch["images"], config, key=key), batch["labels"])
        if name in ("bert", "modernbert"):
            logits = module.apply(params, batch["tokens"], config, key=key)
            return ft.losses.next_token(logits, batch["targets"], batch["mask"])
        hidden = module.hidden(params, batch["tokens"], config, key=key)
        table = params["wte"] if name == "gpt2" else module.head(params)
        return ft.losses.next_token_from_hidden(hidden, table, batch["targets"], batch["mask"])

    return loss_fn


class Batches:
    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, t: int) -> Any:
        key = ft.random.fold_in(ft.random.key(4), t)
        if self.name == "vit":
            images = ft.random.normal(key, (4, 3, 16, 16), torch.float64)
            return {"images": images, "labels": torch.arange(4) + t}
        tokens = ft.random.randint(key, (4, 9), 0, 32)
        mask = ft.random.bernoulli(ft.random.fold_in(key, 1), 0.7, (4, 8))
        return {"tokens": tokens[:, :-1].clone(), "targets": tokens[:, 1:].clone(), "mask": mask}


def train(
    mesh: dict[str, int],
    name: str,
    accumulate: int = 1,
    stream: bool = False,
    programs: str | None = None,
    recompute: bool = False,
    scaled: bool = False,
) -> Any:
    """Take steps on a mesh, or, where it has one rank, in one process; return the whole state, metrics, and how many
    bytes of params and moments are here."""
    world = 1
    for size in mesh.values():
        world *= size
    plan = None
    if world > 1:
        axes = {axis: axis for axis in ("fsdp", "tensor") if axis in mesh}
        tensor = "tensor" if "tensor" in mesh else None
        plan = ft.sharding.Plan(mesh, MODULES[name].sharding(**axes), tensor=tensor, stream=stream, device="cpu")
    options: dict[str, Any] = {"loss_scale": ft.loss_scale.dynamic(2.0**10)} if scaled else {}
    loss_fn = ft.recompute_layers(loss_of(name)) if recompute else loss_of(name)
    step: Any = ft.train_step(loss_fn, steps.optimizer(), accumulate=accumulate, plan=plan, **options)
    if programs is not None:
        step = ft.compile(step, donate=True, cache=programs)
    params = ft.tree.cast(MODULES[name].init(CONFIGS[name], ft.random.key(1)), torch.float64)
    params = ft.tree.map(lambda x: x + 0.01, params)  # biases that are not zero
    state = ft.init_state(
        params if plan is None else plan.shard(params), steps.optimizer(), key=ft.random.key(3), **options
    )
    here = sum(leaf.to_local().nbytes if hasattr(leaf, "to_local") else leaf.nbytes for leaf in ft.tree.leaves(state))
    batches: Any = Batches(name) if plan is None else ft.data.shard(Batches(name), plan=plan, accumulate=accumulate)
    seen = []
    for t in range(3):
        state, metrics = step(state, batches[t])
        seen.append({metric: value.item() for metric, value in metrics.items()})
    return (state if plan is None else plan.whole(state)), seen, here


def refusals() -> list[str]:
    """Return what is said of layers that do not fit together."""
    P = ft.sharding.P
    key, said = ft.random.key(0), []

    def tell(rules: Any, apply: Any, params: Any, x: Tensor, **more: Any) -> None:
        plan = ft.sharding.Plan({"tensor": 2}, [*rules, ("**", P())], tensor="tensor", device="cpu", **more)

        def loss_fn(params: Any, x: Any, key: Any) -> ft.Loss:
            return ft.Loss(apply(params, x).sum(), x.new_ones(()), {})

        step = ft.train_step(loss_fn, ft.optim.sgd(0.1), plan=plan)
        try:
            step(ft.init_state(plan.shard(params), ft.optim.sgd(0.1), key=key), x)
            said.append("")
        except (ValueError, RuntimeError, AttributeError) as error:
            said.append(f"{type(error).__name__}: {error}")

    def layer(*shape: int) -> Any:
        return {"weight": torch.ones(*shape), "bias": torch.ones(shape[-1])}

    x = torch.ones(2, 4, 4)
    tell([("a/weight", P(None, "tensor"))], lambda p, x: ft.nn.linear(x, **p["a"]), {"a": layer(4, 4)}, x)
    tell([("a/*", P("tensor"))], lambda p, x: ft.nn.linear(x[..., :2], **p["a"]), {"a": layer(4, 4)}, x)
    tell([("a/weight", P("tensor"))], lambda p, x: ft.nn.linear(x, **p["a"]), {"a": layer(4, 4)}, x)
    tell([("a", P("tensor"))], lambda p, x: x @ p["a"], {"a": torch.ones(4, 4)}, x)
    tell([("a", P("tensor"))], lambda p, x: x @ p["a"].mT, {"a": torch.ones(4, 4)}, x)
    tell(
        [("a", P(None, "tensor"))],
        lambda p, x: ft.losses.next_token_from_hidden(x, p["a"], torch.zeros(2, 4).long()).total,
        {"a": torch.ones(8, 4)}, x,
    )  # fmt: skip

    def alone(p: Any, x: Tensor) -> Any:
        return ft.nn.stack(lambda w, x: ft.nn.attention(*[(x @ w)[:, None]] * 3)[:, 0], [p["a"]], x)

    tell([], alone, {"a": torch.ones(4, 4)}, x, stream=True)
    tell([], lambda p, x: ft.nn.stack(lambda w, x: x @ w, [p["a"]], x), {"a": torch.ones(4, 4)}, x[:, :3], stream=True)
    for more in ({"tensor": "x"}, {"stream": True}):
        try:
            ft.sharding.Plan({"tensor": 2}, device="cpu", **more)  # type: ignore[arg-type]
        except ValueError as error:
            said.append(f"ValueError: {error}")
    return said


def heads_beyond() -> str:
    """Return what is said of more ranks than heads of keys."""
    config = llama.Config(vocab=32, context=8, layers=1, heads=4, key_heads=1, width=16, inner=24, tied=True)
    plan = ft.sharding.Plan({"tensor": 2}, llama.sharding(tensor="tensor"), tensor="tensor", device="cpu")
    params = plan.shard(llama.init(config, ft.random.key(0)))
    step = ft.train_step(loss_of("llama"), ft.optim.sgd(0.1), plan=plan)
    try:
        with plan.entered():
            step(ft.init_state(params, ft.optim.sgd(0.1), key=ft.random.key(0)), Batches("llama")[0])
    except ValueError as error:
        return str(error)
    return ""


def layer_by_layer() -> list[bool]:
    """Compare layers of split weights with the whole ones, in value and first derivative."""
    from functrain.sharding.pieces import local

    P, key = ft.sharding.P, ft.random.key(2)
    a, b, c = (ft.random.normal(k, (8, 8), torch.float64) for k in ft.random.split(key, 3).unbind())
    x = ft.random.normal(ft.random.fold_in(key, 9), (2, 4, 8), torch.float64)
    tokens = torch.tensor([[0, 7, 3, 4], [1, 1, 6, 5]])
    rules = [("a", P(None, "tensor")), ("b", P("tensor")), ("c", P("tensor"))]
    plan = ft.sharding.Plan({"tensor": 2}, rules, tensor="tensor", device="cpu")

    def both(params: Any, x: Tensor) -> Tensor:
        hidden = ft.nn.linear(torch.tanh(ft.nn.linear(x, params["a"])), params["b"])
        hidden = hidden + ft.nn.embedding(tokens, params["c"])
        return ft.losses.next_token_from_hidden(hidden, params["c"], tokens.flip(1)).total

    whole = {"a": a, "b": b, "c": c}
    spread = plan.spread(plan.shard(whole))
    assert spread is not None

    def bound(params: Any, x: Tensor) -> Tensor:
        return both(plan.bind(params, spread), x) / plan.duplicates

    with plan.entered():
        mine = local(plan.shard(whole))
        found, (grads, along) = ft.value_and_grad(bound, argnums=(0, 1))(mine, x)
    wanted, (expected, of_x) = ft.value_and_grad(both, argnums=(0, 1))(whole, x)
    expected = local(plan.shard(expected))
    summed = plan.mesh.group("tensor")
    torch.distributed.all_reduce(along, group=summed)
    close = [torch.allclose(found * plan.duplicates, wanted, rtol=1e-12), torch.allclose(along, of_x, rtol=1e-10)]
    return close + [torch.allclose(grads[name], expected[name], rtol=1e-10) for name in whole]
