"""`recompute` while Dynamo traces: torch's checkpoint and the partitioner do it. Imports the compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from functrain.transforms import engine
from functrain.transforms.tape import DOTS, Policy


def recompute(of_tensors: Callable[..., Any], tensors: Sequence[Tensor], policy: Policy, offloaded: Any) -> Any:
    if offloaded:
        raise NotImplementedError(
            "recompute: arguments wait in host memory in eager only; leave out offload or compile"
        )
    if not (engine.here.piecewise or isinstance(policy, str)):
        raise NotImplementedError(
            f"recompute: the policy {policy!r} needs ft.compile, and would be lost in a torch.compile of your "
            "own; use ft.compile, or the policy 'nothing' or 'dots'"
        )
    if isinstance(policy, (int, float)):
        _ask_for(float(policy))
        return of_tensors(*tensors)
    if engine.here.depth > 1:
        raise NotImplementedError(
            "recompute: a gradient or map inside of a loss that ft.compile compiles in pieces cannot recompute "
            "in torch 2.13; take recompute out of the inner function, or leave out ft.compile"
        )
    options: dict[str, Any] = {}
    if policy == "dots":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_dots)
    elif policy != "nothing":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_keep_names, policy))
    before, engine.here.recomputing = engine.here.recomputing, True
    result = checkpoint(of_tensors, *tensors, use_reentrant=False, preserve_rng_state=False, **options)
    engine.here.recomputing = before
    return result


def name_value(x: Tensor, name: str) -> Tensor:
    """Mark x in the graph of a recomputed function; `keep_named` takes the marks away again."""
    return _mark(x, name) if engine.here.recomputing else x


def keep_named(graph: fx.Graph) -> None:
    """Let the partitioner keep the values themselves that marks to be kept name, and take all marks away."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.functrain.checkpoint_name.default):
        value: Any = node.args[0]
        if node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE and value.op == "call_function":
            value.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        node.replace_all_uses_with(value)
        graph.erase_node(node)


@torch.library.custom_op("functrain::checkpoint_name", mutates_args=())
def _mark(x: Tensor, name: str) -> Tensor:
    return x.clone()  # a result of its own, as custom operations must have


_mark.register_fake(lambda x, name: torch.empty_like(x))
_mark.register_autograd(lambda ctx, grad: (grad, None))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _ask_for(budget: float) -> None:
    # run by Dynamo as it traces, and read by the backend right afterwards
    engine.here.memory_budgets.append(budget)


def _keep_dots(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in DOTS else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_names(names: Sequence[str], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    named = op is torch.ops.functrain.checkpoint_name.default and args[1] in names
    return CheckpointPolicy.MUST_SAVE if named else CheckpointPolicy.PREFER_RECOMPUTE
