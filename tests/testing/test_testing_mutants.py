"""The test of the laws: transformations with one fault each, and the law that must find it.

Each mutant is a working transformation but for the line that its name tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from functrain import optim, tree
from functrain.optim import EmptyState, GradientTransformation
from functrain.testing import laws, strategies


class Memory(NamedTuple):
    count: Any  # (), int64
    mean: Any  # like params


def start(params: Any) -> Memory:
    return Memory(torch.zeros((), dtype=torch.int64), tree.zeros_like(params))


def averaging(step: Callable[..., Any], init: Callable[[Any], Any] = start) -> GradientTransformation:
    """Make a transformation of `step(g, mean, count) -> (update, mean)`."""

    def update(updates: Any, state: Memory, params: Any = None) -> Any:
        made = tree.map(lambda g, m: Both(*step(g, m, state.count)), updates, state.mean)
        pairs, structure = boxes(made), tree.structure(updates)
        new = tree.unflatten(structure, [pair.update for pair in pairs])
        return new, Memory(state.count + 1, tree.unflatten(structure, [pair.mean for pair in pairs]))

    return GradientTransformation(init, update)


class Both:
    """A leaf that holds two tensors."""

    def __init__(self, update: Tensor, mean: Tensor) -> None:
        self.update, self.mean = update, mean


def boxes(values: Any) -> list[Both]:
    return tree.leaves(values)


def each(fn: Callable[[Tensor], Any]) -> GradientTransformation:
    return optim.stateless(lambda updates, params: tree.map(fn, updates))


def whole(fn: Callable[[Any, Any], Any]) -> GradientTransformation:
    return optim.stateless(fn)


def sound(g: Tensor, mean: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    mean = 0.9 * mean + 0.1 * g
    return mean / (1 - 0.9 ** (count + 1)).to(mean.dtype), mean


# ---- purity ---------------------------------------------------------------------------------------------------------


def hidden_counter() -> GradientTransformation:
    calls = []

    def update(g: Tensor) -> Tensor:
        calls.append(g)
        return g / len(calls)

    return each(update)


def writes_to_the_gradient() -> GradientTransformation:
    return each(lambda g: g.mul_(0.5))


def writes_to_the_state() -> GradientTransformation:
    return averaging(lambda g, mean, count: (g + 0.0, mean.mul_(0.9).add_(g)))


def returns_the_buffer_that_it_reuses() -> GradientTransformation:
    buffers: dict[Any, Tensor] = {}

    def update(g: Tensor, mean: Tensor, count: Tensor) -> Any:
        buffer = buffers.setdefault((g.shape, g.dtype), torch.zeros_like(g))
        return buffer.copy_(mean + g), mean + g

    return averaging(update)


def random_without_a_key() -> GradientTransformation:
    return each(lambda g: g + torch.randn_like(g))


def seeded_by_the_global_seed() -> GradientTransformation:
    def update(g: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
        return g + torch.randn(g.shape, generator=generator).to(g.dtype)

    return each(update)


def the_average_becomes_float32() -> GradientTransformation:
    return averaging(lambda g, mean, count: (g, mean.float() * 0.9 + g))


def the_update_becomes_float32() -> GradientTransformation:
    return each(lambda g: g * torch.ones(1, dtype=torch.float32).squeeze() if g.dim() else g.float())


def numbers_become_vectors() -> GradientTransformation:
    return each(torch.atleast_1d)


def empty_leaves_are_dropped() -> GradientTransformation:
    return each(lambda g: g if g.numel() else None)


def a_field_is_dropped() -> GradientTransformation:
    def update(updates: Any, state: Memory, params: Any = None) -> Any:
        return updates, Memory(state.count + 1, None)

    return GradientTransformation(start, update)


def the_state_keeps_params_themselves() -> GradientTransformation:
    return averaging(sound, lambda params: Memory(torch.zeros((), dtype=torch.int64), params))


def two_moments_are_one_tensor() -> GradientTransformation:
    def init(params: Any) -> Any:
        zeros = tree.zeros_like(params)
        return zeros, zeros

    return GradientTransformation(init, lambda g, state, params=None: (g, (g, g)))


def leaves_are_numbered_as_they_were_put_in() -> GradientTransformation:
    def scaled(node: Any, numbers: Any) -> Any:
        if isinstance(node, dict):
            return {key: scaled(value, numbers) for key, value in node.items()}
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return type(node)(*[scaled(value, numbers) for value in node])
        if isinstance(node, (list, tuple)):
            return type(node)(scaled(value, numbers) for value in node)
        return node if node is None else node * next(numbers)

    return whole(lambda updates, params: scaled(updates, iter(range(1, 100))))


# ---- algebra --------------------------------------------------------------------------------------------------------


def remembers_outside(memory: dict[int, Any]) -> GradientTransformation:
    """Adds the gradient of the step before, which it keeps by the step's number."""

    def update(updates: Any, state: Tensor, params: Any = None) -> Any:
        memory[int(state)] = updates
        before = memory.get(int(state) - 1, updates)
        return tree.add(updates, before if tree.paths(before) == tree.paths(updates) else updates), state + 1

    return GradientTransformation(lambda params: torch.zeros((), dtype=torch.int64), update)


EVERYWHERE: dict[int, Any] = {}


def does_not_say_that_it_takes_a_value() -> GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None, *, value: float = 1.0) -> Any:
        return tree.scale(value, updates), state

    return GradientTransformation(lambda params: EmptyState(), update)


def stacks_all_norms() -> GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        norm = torch.stack([torch.sum(g.double() ** 2) for g in tree.leaves(updates)]).sum()
        return tree.map(lambda g: (g / (1 + norm)).to(g.dtype), updates)

    return whole(update)


def the_largest_of_all_leaves() -> GradientTransformation:
    return whole(lambda updates, params: tree.map(lambda g: g / (1 + tree.norm(updates)).to(g.dtype), updates))


def times_its_place() -> GradientTransformation:
    def placed(updates: Any, params: Any) -> Any:
        leaves, structure = tree.flatten(updates)
        return tree.unflatten(structure, [(i + 1) * g for i, g in enumerate(leaves)])

    return whole(placed)


def times_its_place_from_the_end() -> GradientTransformation:
    def placed(updates: Any, params: Any) -> Any:
        leaves, structure = tree.flatten(updates)
        return tree.unflatten(structure, [(len(leaves) - i) * g for i, g in enumerate(leaves)])

    return whole(placed)


# ---- execution ------------------------------------------------------------------------------------------------------


def looks_at_a_value() -> GradientTransformation:
    return each(lambda g: g * 0.5 if g.numel() and float(g.flatten()[0]) > 0 else g)


def a_python_count() -> GradientTransformation:
    return GradientTransformation(
        lambda params: 0, lambda g, count, params=None: (tree.scale(1 / (count + 1), g), count + 1)
    )


def turns_its_matrices() -> GradientTransformation:
    def init(params: Any) -> Any:
        return tree.zeros_like(params)

    def turned(x: Tensor) -> Tensor:
        return x.t().contiguous().t() if x.dim() == 2 and x.is_contiguous() else x.contiguous()

    return GradientTransformation(init, lambda g, state, params=None: (g, tree.map(turned, state)))


@tree.dataclass
class Fields:
    mean: Any


def a_number_beside_the_fields() -> GradientTransformation:
    def made(mean: Any, count: int) -> Fields:
        state = Fields(mean)
        object.__setattr__(state, "count", count)
        return state

    def update(updates: Any, state: Fields, params: Any = None) -> Any:
        count = getattr(state, "count", 0) + 1
        return tree.scale(1 / count, updates), made(state.mean, count)

    return GradientTransformation(lambda params: made(tree.zeros_like(params), 0), update)


def pulls_towards_params_that_init_saw(rate: Any) -> GradientTransformation:
    seen = []

    def init(params: Any) -> EmptyState:
        seen[:] = [params]
        return EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return tree.map(lambda g, p, q: g + (p - q), updates, params, seen[0]), state

    return GradientTransformation(init, update)


def the_rate_becomes_a_float(rate: Any) -> GradientTransformation:
    return optim.sgd(float(rate))


def digits_are_lost_in_short_floats() -> GradientTransformation:
    return each(lambda g: (g + 1000.0) - 1000.0)


# ---- edges ----------------------------------------------------------------------------------------------------------


def divides_by_the_norm_of_each_leaf() -> GradientTransformation:
    return each(lambda g: (g / torch.linalg.vector_norm(g.double())).to(g.dtype))


def squares_in_the_dtype_of_the_leaf() -> GradientTransformation:
    def step(g: Tensor, mean: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        mean = 0.9 * mean + 0.1 * g * g
        return g / (torch.sqrt(mean) + 1e-3), mean

    return averaging(step)


def refuses_float16_in_words_of_torch() -> GradientTransformation:
    def update(g: Tensor) -> Tensor:
        if g.dtype == torch.float16:
            raise RuntimeError("not implemented for 'Half'")
        return g

    return each(update)


# ---- declared -------------------------------------------------------------------------------------------------------


def wrong_sign() -> GradientTransformation:
    return optim.chain(optim.scale_by_adam(), optim.scale_by_learning_rate(0.1, flip_sign=False))


def corrected_by_the_count_before() -> GradientTransformation:
    return averaging(lambda g, m, count: (sound(g, m, count + 1)[0], sound(g, m, count)[1]))


def clips_by_the_square() -> GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        norm = tree.norm(updates, squared=True)
        return tree.scale(torch.clamp(1 / norm, max=1.0), updates)

    return whole(update)


def clips_less() -> GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        return tree.scale(torch.clamp(1 / torch.sqrt(tree.norm(updates)), max=1.0), updates)

    return whole(update)


def takes_a_root_of_zero(rate: Any) -> GradientTransformation:
    return each(lambda g: (-rate * g / (torch.sqrt(g * g) + 1e-3)).to(g.dtype))


def detaches(rate: Any) -> GradientTransformation:
    return each(lambda g: (-rate * g.detach()).to(g.dtype))


FLOATS = strategies.params(dtypes=[torch.float32])
norm_of_one: Any = {"bounded": (tree.norm, 1.0), "params": FLOATS}

MUTANTS: list[tuple[str, Any, dict[str, Any]]] = [
    ("pure", hidden_counter(), {}),
    ("pure", writes_to_the_gradient(), {}),
    ("pure", writes_to_the_state(), {}),
    ("pure", returns_the_buffer_that_it_reuses(), {}),
    ("pure", random_without_a_key(), {}),
    ("kept", the_average_becomes_float32(), {}),
    ("kept", the_update_becomes_float32(), {}),
    ("kept", numbers_become_vectors(), {}),
    ("kept", empty_leaves_are_dropped(), {}),
    ("kept", a_field_is_dropped(), {}),
    ("deterministic", seeded_by_the_global_seed(), {}),
    ("owned", the_state_keeps_params_themselves(), {}),
    ("owned", two_moments_are_one_tensor(), {}),
    ("unordered", leaves_are_numbered_as_they_were_put_in(), {}),
    ("neutral", does_not_say_that_it_takes_a_value(), {"extra_args": lambda step: {"value": 2.0}}),
    ("associative", remembers_outside({}), {}),
    ("masked_everywhere", does_not_say_that_it_takes_a_value(),
     {"extra_args": lambda step: {"value": 2.0}, "without": ["neutral", "associative"]}),
    ("masked_nowhere", stacks_all_norms(), {}),
    ("partitioned", remembers_outside(EVERYWHERE), {"without": ["associative"]}),
    ("uncounted", times_its_place(), {}),
    ("uncounted", times_its_place_from_the_end(), {}),
    ("leafwise", the_largest_of_all_leaves(), {"leafwise": True}),
    ("vmapped", looks_at_a_value(), {}),
    ("vmapped_rate", the_rate_becomes_a_float, {}),
    ("saved", a_number_beside_the_fields(), {}),
    ("saved", pulls_towards_params_that_init_saw, {}),
    ("finite_at_edges", divides_by_the_norm_of_each_leaf(), {}),
    ("finite_at_edges", squares_in_the_dtype_of_the_leaf(), {}),
    ("finite_at_edges", refuses_float16_in_words_of_torch(), {}),
    ("traced", looks_at_a_value(), {"without": ["vmapped"]}),
    ("traced_once", a_python_count(), {}),
    ("traced_once", turns_its_matrices(), {"params": {"w": torch.ones(2, 3)}}),
    ("compiled", digits_are_lost_in_short_floats(),
     {"compiled": True, "params": {"w": torch.ones(8, dtype=torch.bfloat16)}}),
    ("bounded", clips_by_the_square(), norm_of_one),
    ("bounded", clips_less(), norm_of_one),
    ("debiased", corrected_by_the_count_before(), {"debiased": True}),
    ("descends", wrong_sign(), {"descends": True}),
    ("differentiable", detaches, {"differentiable": True}),
    ("differentiable", takes_a_root_of_zero, {"differentiable": True, "without": ["finite_at_edges"]}),
]  # fmt: skip


@pytest.mark.parametrize(("law", "mutant", "options"), MUTANTS)
def test_the_law_finds_the_mutant(law: str, mutant: Any, options: dict[str, Any]) -> None:
    with pytest.raises(laws.LawError) as caught:
        laws.check(mutant, **{"compiled": False, **options})
    assert caught.value.law == law, str(caught.value)


def test_every_law_finds_one() -> None:
    assert {law for law, _, _ in MUTANTS} == set(laws.LAWS)
