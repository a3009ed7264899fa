"""A mixture of experts: of E gated MLPs a token is sent to the few that a router finds best.

N tokens, ... any dims of them; D width, E experts, F width of one inside, K experts a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.compiler import engine
from functrain.losses import ExpertLoad, expert_load
from functrain.nn.grouped import grouped_product
from functrain.nn.layers import swiglu


def experts(
    x: Tensor,
    router: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    per_token: int,
    normalized: bool = True,
    mask: Tensor | None = None,
) -> tuple[Tensor, ExpertLoad]:
    """Send each token to the `per_token` experts of largest probability, and add what they make of it, times that.

    The probabilities are softmax(x @ router), in float32, and, `normalized`, those of a token's experts are divided by
    their sum. An expert is swiglu(x @ gate, x @ up) @ down. Also returns what `ft.losses.load_balancing` takes, of the
    tokens that `mask` keeps: padding goes through the experts, and does not count as their load. No token is dropped.

    The rows of an expert are multiplied together, at the cost of `per_token` experts; where transforms differentiate
    twice or in forward mode all experts see all tokens, which equals it.

    Shapes: x (..., D), router (D, E), gate and up (E, D, F), down (E, F, D), mask (...).
    Raises: ValueError for more experts a token than there are, and for shapes that do not fit.
    Source: Shazeer et al. 2017 (arXiv:1701.06538); Jiang et al. 2024 (arXiv:2401.04088), as Mixtral has it.

    >>> x, router = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> gate, up, down = torch.ones(2, 2, 1), torch.ones(2, 2, 1), torch.tensor([[[1.0, 1.0]], [[5.0, 5.0]]])
    >>> y, load = ft.nn.experts(x, router, gate, up, down, per_token=1)  # the first expert is the likelier one
    >>> y, load.chosen
    (tensor([[0.7311, 0.7311]]), tensor([1., 0.]))
    """
    _check(x, router, gate, up, down, per_token)
    rows = x.reshape(-1, x.shape[-1])  # (N, D)
    probabilities = F.softmax(rows @ router, -1, dtype=torch.promote_types(x.dtype, torch.float32))  # (N, E)
    weights, chosen = torch.topk(probabilities, per_token, dim=-1)  # (N, K)
    if normalized:
        weights = weights / torch.sum(weights, -1, keepdim=True)
    compute = _of_all if engine.twice() else _of_chosen
    y = compute(rows, weights.to(x.dtype), chosen, gate, up, down)  # (N, D)
    return y.reshape(x.shape), expert_load(probabilities, chosen, None if mask is None else mask.reshape(-1))


def _of_chosen(x: Tensor, weights: Tensor, chosen: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sort the tokens by expert, once for each that they have, and multiply the rows of an expert together."""
    product = grouped_product
    if torch.compiler.is_dynamo_compiling():  # a torch.compile of the user's own
        # imported here because it imports the compiler, two seconds that eager code need not wait
        from functrain.nn.in_graph import product
    tokens, per_token = chosen.shape
    flat = chosen.reshape(-1)  # (N K,)
    order = torch.argsort(flat, stable=True)  # (N K,)
    place = torch.argsort(order)  # (N K,): where in the order a token's expert stands
    numbers = torch.arange(gate.shape[0], device=x.device)
    ends = torch.sum(flat[:, None] <= numbers, 0, dtype=torch.int32)  # (E,)
    rows = x[order // per_token]  # (N K, D)
    inside = swiglu(product(rows, gate, ends), product(rows, up, ends))  # (N K, F)
    made = product(inside, down, ends)[place].reshape(tokens, per_token, -1)  # (N, K, D)
    return torch.sum(made * weights[..., None], 1)


def _of_all(x: Tensor, weights: Tensor, chosen: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Let all experts see all tokens, and weigh those that were not chosen by 0."""
    numbers = torch.arange(gate.shape[0], device=x.device)
    spread = torch.sum(torch.where(chosen[..., None] == numbers, weights[..., None], 0.0), 1)  # (N, E)
    made = swiglu(x @ gate, x @ up) @ down  # (E, N, D)
    return torch.sum(made * spread.mT[..., None], 0)


def _check(x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, per_token: int) -> None:
    count, width, inner = gate.shape if gate.dim() == 3 else (0, 0, 0)
    shapes = {"router": router, "gate": gate, "up": up, "down": down}
    wanted = {
        "router": (x.shape[-1], count),
        "gate": (count, x.shape[-1], inner),
        "up": (count, width, inner),
        "down": (count, inner, width),
    }
    for name, tensor in shapes.items():
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(
                f"experts: expected {name} {wanted[name]} beside x {tuple(x.shape)} and gate {tuple(gate.shape)}, came "
                f"{tuple(tensor.shape)}; see the shapes of ft.nn.experts"
            )
    if not 1 <= per_token <= count:
        raise ValueError(
            f"experts: expected per_token from 1 to the {count} experts, came {per_token}; choose fewer a token"
        )
