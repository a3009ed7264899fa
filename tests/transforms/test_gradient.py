"""Laws of value_and_grad, grad and vmap."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from later import Later
from torch import Tensor
from torch.nn.functional import embedding, one_hot

import functrain as ft
from functrain import tree

jax = Later("jax")
jnp = Later("jax.numpy")

law = settings(deadline=None, derandomize=True, max_examples=20)
# two orders of the same few dozen float64 operations of size about 1: each rounds by 2**-53
CLOSE = {"rtol": 1e-13, "atol": 1e-13}


@tree.dataclass
class Layer:
    weight: Tensor
    bias: Tensor | None


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def trees(draw_: Any) -> Any:
    """Small trees of float64 leaves, nodes of every kind."""
    seeds = st.integers(0, 10**6)
    leaf = st.builds(draw, seeds, st.integers(1, 3), st.integers(1, 2)) | st.builds(draw, seeds)
    inner = st.recursive(
        leaf,
        lambda below: (
            st.dictionaries(st.sampled_from(["a", "b", "c"]), below, max_size=3)
            | st.lists(below, max_size=2)
            | st.tuples(below, st.none())
            | st.builds(Layer, below, st.none())
        ),
        max_leaves=5,
    )
    return {"first": draw_(leaf), "rest": draw_(inner)}


def smooth(params: Any, scale: Tensor | float = 1.0) -> Tensor:
    """A function of every leaf, in which the leaves' gradients depend on each other."""
    sums = torch.stack([torch.sum(torch.sin(leaf) * (i + 1)) for i, leaf in enumerate(tree.leaves(params))])
    return torch.tanh(torch.sum(sums) * scale) + torch.sum(sums**2)


def mlp(params: Any, x: Tensor) -> Tensor:
    return torch.mean((torch.tanh(x @ params["w"] + params["b"]) @ params["v"]) ** 2)


def mlp_params() -> dict[str, Tensor]:
    return {"w": draw(1, 4, 3), "b": draw(2, 3), "v": draw(3, 3, 2)}


def assert_close(a: Any, b: Any) -> None:
    tree.map(lambda x, y: torch.testing.assert_close(x, y, **CLOSE), a, b)


# ---- one level ----------------------------------------------------------------------------------------------------


@law
@given(trees())
def test_value_and_grad_equals_autograd_grad(params: Any) -> None:
    value, grads = ft.value_and_grad(smooth)(params)
    leaves, structure = tree.flatten(params)
    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = smooth(tree.unflatten(structure, inputs))
    assert tree.structure(grads) == structure
    assert torch.equal(value, expected.detach())
    for got, want in zip(tree.leaves(grads), torch.autograd.grad(expected, inputs), strict=True):
        assert torch.equal(got, want)


@law
@given(trees())
def test_value_and_grad_is_pure_and_keeps_no_graph(params: Any) -> None:
    before = tree.map(torch.clone, params)
    first, second = (ft.value_and_grad(smooth)(params) for _ in range(2))
    tree.map(lambda a, b: None if torch.equal(a, b) else pytest.fail("changed"), (first, params), (second, before))
    assert not any(leaf.requires_grad for leaf in tree.leaves((first, params)))
    assert all(leaf.grad is None for leaf in tree.leaves(params))


def test_grad_equals_torch_func_and_jax() -> None:
    params, x = mlp_params(), draw(4, 5, 4)
    value, grads = ft.value_and_grad(mlp)(params, x)
    assert_close(grads, torch.func.grad(mlp)(params, x))

    def in_jax(params: Any, x: Any) -> Any:
        return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]) ** 2)

    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(leaf.numpy()) for name, leaf in params.items()}
        expected, witness = jax.value_and_grad(in_jax)(arrays, jnp.asarray(x.numpy()))
    assert_close((value, grads), tree.map(lambda a: torch.from_numpy(np.array(a)), (expected, witness)))


def test_argnums_choose_the_arguments() -> None:
    a, b, c = {"x": draw(0, 3)}, draw(1, 3), draw(2, 3)

    def fn(a: Any, b: Tensor, *, c: Tensor) -> Tensor:
        return torch.sum(a["x"] * b**2 * c)

    da, db = {"x": b**2 * c}, 2 * a["x"] * b * c
    assert_close(ft.grad(fn)(a, b, c=c), da)
    assert_close(ft.grad(fn, argnums=1)(a, b, c=c), db)
    assert_close(ft.grad(fn, argnums=-1)(a, b, c=c), db)
    assert_close(ft.grad(fn, argnums=(0,))(a, b, c=c), (da,))
    assert_close(ft.grad(fn, argnums=(1, 0))(a, b, c=c), (db, da))


@pytest.mark.parametrize("argnums", [2, -3, (0, 0), (1, -1)])
def test_argnums_that_name_nothing_or_one_twice_are_refused(argnums: Any) -> None:
    with pytest.raises(ValueError, match="argnums"):
        ft.grad(lambda a, b: torch.sum(a * b), argnums=argnums)(draw(0, 2), draw(1, 2))


def test_has_aux_returns_the_aux_without_a_graph() -> None:
    x = draw(0, 3)

    def fn(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return torch.sum(x**2), {"double": 2 * x, "name": "x", "none": None, "layer": Layer(x, None)}

    (value, aux), grads = ft.value_and_grad(fn, has_aux=True)(x)
    assert torch.equal(aux["double"], 2 * x) and aux["name"] == "x" and aux["none"] is None
    assert not value.requires_grad and not aux["double"].requires_grad and not aux["layer"].weight.requires_grad
    only, again = ft.grad(fn, has_aux=True)(x)
    assert torch.equal(only, grads) and torch.equal(again["double"], aux["double"])


def test_a_loss_is_differentiated_by_its_total() -> None:
    x = draw(0, 3)
    loss, grads = ft.value_and_grad(lambda x: ft.Loss(torch.sum(x**2), torch.sum(x), {"max": x.max()}))(x)
    assert isinstance(loss, ft.Loss) and not any(leaf.requires_grad for leaf in tree.leaves(loss))
    assert_close(grads, 2 * x)
    assert torch.equal(loss.metrics["max"], x.max())


def test_an_unused_leaf_has_a_zero_gradient() -> None:
    params = {"used": draw(0, 2), "unused": draw(1, 2, 3)}
    for fn in (ft.grad(lambda p: torch.sum(p["used"])), torch.func.vmap(ft.grad(lambda p: torch.sum(p["used"])))):
        assert torch.equal(fn(params)["unused"], torch.zeros(2, 3, dtype=torch.float64))


def test_the_identity_has_gradient_one() -> None:
    x = draw(0)
    assert torch.equal(ft.grad(lambda x: x)(x), torch.ones_like(x))
    assert torch.equal(ft.grad(ft.grad(lambda x: x * x))(x), torch.full_like(x, 2))


def test_one_tensor_as_two_leaves_has_a_gradient_for_each() -> None:
    x = draw(0, 2)
    grads = ft.grad(lambda p: torch.sum(p["a"] * p["b"] ** 2))({"a": x, "b": x})
    assert_close(grads, {"a": x**2, "b": 2 * x * x})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_have_the_leaves_dtype(dtype: torch.dtype) -> None:
    assert ft.grad(lambda x: torch.sum(x.float() ** 2))(torch.ones(2, dtype=dtype)).dtype == dtype


def test_a_complex_gradient_is_torchs_the_conjugate_of_jaxs() -> None:
    z = torch.tensor([1 + 2j, -0.5j])
    assert torch.equal(ft.grad(lambda z: torch.sum(z.real**2 + z.imag**2))(z), 2 * z)
    assert np.array_equal(jax.grad(lambda z: jnp.sum(z.real**2 + z.imag**2))(z.numpy()), 2 * z.numpy().conj())


# ---- nested -------------------------------------------------------------------------------------------------------


@law
@given(trees())
def test_hessian_vector_product_equals_double_backward(params: Any) -> None:
    vector = tree.map(lambda leaf: torch.cos(3 * leaf), params)
    got = ft.grad(lambda p: tree.vdot(ft.grad(smooth)(p), vector))(params)
    leaves, structure = tree.flatten(params)
    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    first = torch.autograd.grad(smooth(tree.unflatten(structure, inputs)), inputs, create_graph=True)
    dot = sum(torch.sum(a * b) for a, b in zip(first, tree.leaves(vector), strict=True))
    expected = torch.autograd.grad(dot, inputs)
    assert not any(leaf.requires_grad for leaf in tree.leaves(got))
    for a, b in zip(tree.leaves(got), expected, strict=True):
        # sums of up to 30 terms of size up to 100, rounded by 2**-53 each
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_third_derivative_equals_its_closed_form() -> None:
    x = draw(0)
    assert_close(ft.grad(ft.grad(ft.grad(torch.sin)))(x), -torch.cos(x))


MAPS: dict[str, Callable[..., Any]] = {"ft": ft.vmap, "torch": torch.func.vmap}


@pytest.mark.parametrize("which", MAPS)
@law
@given(seed=st.integers(0, 10**6), lanes=st.integers(1, 4))
def test_vmap_of_grad_equals_a_loop(which: str, seed: int, lanes: int) -> None:
    params = tree.map(lambda leaf: draw(seed, lanes, *leaf.shape), mlp_params())
    x = draw(seed + 1, lanes, 5, 4)
    mapped = MAPS[which](ft.value_and_grad(mlp))(params, x)
    for lane in range(lanes):
        alone = ft.value_and_grad(mlp)(tree.map(lambda leaf, lane=lane: leaf[lane], params), x[lane])
        assert_close(tree.map(lambda leaf, lane=lane: leaf[lane], mapped), alone)


def test_per_example_gradients_average_to_the_gradient_of_the_mean() -> None:
    params, x = mlp_params(), draw(4, 6, 4)
    each = ft.vmap(ft.grad(mlp), in_dims=(None, 0))(params, x[:, None])
    assert_close(tree.map(lambda leaf: leaf.mean(0), each), ft.grad(mlp)(params, x))


def test_grad_of_vmap_equals_grad_of_a_loop() -> None:
    params, x = mlp_params(), draw(4, 6, 4)
    got = ft.grad(lambda p: torch.mean(ft.vmap(mlp, in_dims=(None, 0))(p, x[:, None])))(params)
    assert_close(got, ft.grad(mlp)(params, x))


def test_vmap_takes_dims_and_chunks() -> None:
    x = draw(0, 3, 5)
    expected = torch.stack([torch.cumsum(x[:, i], 0) for i in range(5)], 1)
    for chunk in (None, 1, 2):
        got = ft.vmap(lambda column: torch.cumsum(column, 0), in_dims=1, out_dims=1, chunk_size=chunk)(x)
        assert torch.equal(got, expected)


def test_vmap_refuses_the_global_generator() -> None:
    with pytest.raises(TypeError, match="expected random numbers from a key"):
        ft.vmap(lambda x: x + torch.randn(()))(draw(0, 2))


UNMAPPABLE: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x * torch.sum(x).item(),
    "if": lambda x: x if torch.sum(x) > 0 else -x,
    "boolean index": lambda x: torch.sum(x[x > 0]),
    "masked_select": lambda x: torch.sum(torch.masked_select(x, x > 0)),
    "nonzero": lambda x: torch.sum(torch.nonzero(x)),
    "list": lambda x: torch.tensor(x.tolist()),
    "equal": lambda x: x if torch.equal(x, 2 * x) else -x,
    "allclose": lambda x: x if torch.allclose(x, 2 * x) else -x,
    "one_hot": lambda x: one_hot(x.abs().long()),
}


@pytest.mark.parametrize("name", UNMAPPABLE)
def test_a_map_names_the_line_that_reads_the_numbers_of_one_lane(name: str) -> None:
    with pytest.raises(TypeError, match=rf"test_gradient.py:\d+: \"{name}\".*same for all examples or lanes"):
        ft.vmap(UNMAPPABLE[name])(draw(0, 3, 4))


def test_a_map_names_the_line_that_writes_into_what_all_lanes_share() -> None:
    with pytest.raises(TypeError, match=r"index_put_.*expected a write into a tensor that each example or lane has"):
        ft.vmap(lambda x: torch.zeros(4).index_put_((torch.tensor([0]),), x[0]))(draw(0, 3, 4))
    found = ft.vmap(lambda x: x.new_zeros(4).index_put_((torch.tensor([0]),), x[0]))(x := draw(0, 3, 4))
    assert torch.equal(found[:, 0], x[:, 0])


def test_dataclasses_and_any_aux_pass_through_every_engine() -> None:
    layer = Layer(draw(0, 2, 3), draw(1, 2, 3))

    def fn(layer: Layer) -> tuple[Tensor, Any]:
        return torch.sum(layer.weight**2 * layer.bias), {"layer": layer, "name": "text", "none": None}

    expected = {"weight": 2 * layer.weight * layer.bias, "bias": layer.weight**2}
    for transform in (ft.vmap, torch.func.vmap):
        grads = transform(lambda w, b: _grads_of(fn, Layer(w, b)))(layer.weight, layer.bias)
        assert_close(grads, (expected["weight"], expected["bias"]))
    leaf = layer.weight.clone().requires_grad_()
    (_, aux), grads = ft.value_and_grad(fn, has_aux=True)(Layer(leaf, layer.bias))
    assert aux["name"] == "text" and aux["none"] is None and isinstance(aux["layer"], Layer)
    assert isinstance(grads, Layer)
    assert_close(grads.weight.detach(), expected["weight"])


def _grads_of(fn: Any, layer: Layer) -> tuple[Tensor, Tensor | None]:
    grads, aux = ft.grad(fn, has_aux=True)(layer)
    assert aux["name"] == "text"
    return grads.weight, grads.bias


# ---- differentiated from outside ----------------------------------------------------------------------------------


def test_meta_gradient_through_one_sgd_step_equals_finite_differences() -> None:
    params, x, held_out = mlp_params(), draw(4, 5, 4), draw(5, 5, 4)

    def after_a_step(lr: Tensor) -> Tensor:
        _, grads = ft.value_and_grad(mlp)(params, x)
        return mlp(tree.map(lambda p, g: p - lr * g, params, grads), held_out)

    def from_other_params(start: Any) -> Tensor:
        _, grads = ft.value_and_grad(mlp)(start, x)
        return mlp(tree.map(lambda p, g: p - 0.1 * g, start, grads), held_out)

    lr, h = torch.tensor(0.1, dtype=torch.float64), 1e-5
    # central differences: h**2 = 1e-10 times a third derivative of size 10, and 2**-53 / h = 1e-11 of rounding
    close = {"rtol": 1e-8, "atol": 1e-8}
    expected = (after_a_step(lr + h) - after_a_step(lr - h)) / (2 * h)
    torch.testing.assert_close(ft.grad(after_a_step)(lr), expected, **close)
    direction = tree.map(torch.cos, params)
    got = tree.vdot(ft.grad(from_other_params)(params), direction)
    ends = [from_other_params(tree.add_scale(params, sign * h, direction)) for sign in (1, -1)]
    torch.testing.assert_close(got, (ends[0] - ends[1]) / (2 * h), **close)


def test_plain_autograd_differentiates_through_a_gradient() -> None:
    params, x = mlp_params(), draw(4, 5, 4)
    expected = ft.grad(lambda p: tree.vdot(ft.grad(mlp)(p, x), ft.grad(mlp)(p, x)))(params)
    live = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    value, grads = ft.value_and_grad(mlp)(live, x)
    assert value.requires_grad and all(leaf.requires_grad for leaf in tree.leaves(grads))
    tree.vdot(grads, grads).backward()
    assert_close(tree.map(lambda leaf: leaf.grad, live), expected)


def test_plain_autograd_differentiates_an_argument_that_is_not_ours() -> None:
    params = mlp_params()
    x = draw(4, 5, 4).requires_grad_()
    tree.norm(ft.grad(mlp)(params, x)).backward()
    assert x.grad is not None
    assert_close(x.grad, ft.grad(lambda x: tree.norm(ft.grad(mlp)(params, x)))(x.detach()))


def test_under_no_grad_nothing_is_differentiated_from_outside() -> None:
    params, x = mlp_params(), draw(4, 5, 4)
    expected = ft.value_and_grad(mlp)(params, x)
    live = tree.map(lambda leaf: leaf.clone().requires_grad_(), (params, x))
    with torch.no_grad():
        got = ft.value_and_grad(mlp)(*live)
        assert not torch.is_grad_enabled()
    assert not any(leaf.requires_grad for leaf in tree.leaves(got))
    assert_close(got, expected)


@pytest.mark.parametrize("nested", [False, True])
def test_compiled_gradients_equal_eager(nested: bool) -> None:
    params, x = mlp_params(), draw(4, 5, 4)
    inner = ft.grad(mlp)
    fn = ft.grad(lambda p, x: tree.norm(inner(p, x))) if nested else inner
    with torch.no_grad(), torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(fn, fullgraph=True, backend="eager")(params, x)
    assert_close(compiled, fn(params, x))


# ---- traps --------------------------------------------------------------------------------------------------------


X = draw(9, 2, 3)
LOST: dict[str, Callable[[Tensor], Tensor]] = {
    "detached": lambda x: torch.sum(x**2).detach(),
    "from a number": lambda x: torch.tensor(torch.sum(x**2).numel() * 1.0),
    "argmax": lambda x: torch.argmax(x).double(),
    "integer": lambda x: torch.sum(x.long()).double(),
    "no_grad": torch.no_grad()(lambda x: torch.sum(x**2)),
    "of another tensor": lambda x: torch.sum(X**2),
}


@pytest.mark.parametrize("trap", LOST)
def test_a_value_that_lost_its_gradient_is_an_error(trap: str) -> None:
    fn = ft.grad(LOST[trap])
    for call in (fn, ft.vmap(fn), torch.func.vmap(fn), lambda x: ft.grad(lambda y: torch.sum(fn(y) + y))(x)):
        with pytest.raises(ValueError, match="does not depend on any leaf.*no_grad.*detached.*argmax"):
            call(X)
    with pytest.raises(ValueError, match="does not depend on any leaf"):
        fn(X.clone().requires_grad_())


WRITES: dict[str, tuple[Any, type[Exception], str]] = {
    "in place": (lambda p: torch.sum(p["e"].detach().mul_(2) * p["e"]), ValueError, "e: fn has written into"),
    "embedding": (lambda p: torch.sum(embedding(ROW, p["e"], max_norm=0.1)), ValueError, "e: fn has written into"),
    "sparse": (lambda p: torch.sum(embedding(ROW, p["e"], sparse=True)), TypeError, "e: expected a dense gradient"),
}
ROW = torch.tensor([1])


@pytest.mark.parametrize("case", WRITES)
def test_a_function_that_writes_or_gives_a_sparse_gradient_is_an_error(case: str) -> None:
    fn, error, says = WRITES[case]
    with pytest.raises(error, match=f"value_and_grad: {says}"):
        ft.grad(fn)({"a": torch.ones(1), "e": torch.ones(2, 3)})


def test_inference_mode_is_named() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match="use torch.no_grad there"):
        ft.grad(torch.sum)(torch.ones(2))


def test_a_value_without_leaves_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not depend on any leaf"):
        ft.grad(lambda params, x: torch.sum(x))({}, X)


@pytest.mark.parametrize("leaf", [torch.ones(2).long(), torch.ones(2).bool(), 1.5, "text", X.numpy()])
def test_a_leaf_that_is_no_float_tensor_is_named(leaf: Any) -> None:
    fn = ft.grad(lambda p: torch.sum(p["good"]))
    with pytest.raises(TypeError, match=r"(?s)value_and_grad: blocks/0/count: expected .*tree\.partition"):
        fn({"good": X, "blocks": [{"count": leaf}]})
    with pytest.raises(TypeError, match=r"value_and_grad: 1/count:"):
        ft.grad(lambda a, p: torch.sum(a), argnums=(0, 1))(X, [X, {"count": leaf}])
    with pytest.raises(TypeError, match="value_and_grad: the argument:"):
        ft.grad(torch.sum)(leaf)


RESULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "vector": (lambda x: x, r"shape \(2, 3\); take its sum or mean"),
    "one row": (lambda x: torch.sum(x)[None], r"shape \(1,\)"),
    "integer": (lambda x: torch.sum(x.long()), r"torch\.int64 of shape \(\)"),
    "bool": (lambda x: torch.sum(x) > 0, r"torch\.bool"),
    "float": (lambda x: 3.0, "float"),
    "item": (lambda x: torch.sum(x).item(), "float"),
    "None": (lambda x: None, "NoneType"),
    "aux without has_aux": (lambda x: (torch.sum(x), {}), "has_aux=True"),
}


@pytest.mark.parametrize("result", RESULTS)
def test_a_result_that_is_no_scalar_is_an_error(result: str) -> None:
    fn, message = RESULTS[result]
    with pytest.raises(TypeError, match="value_and_grad: expected a floating-point tensor of shape.*" + message):
        ft.grad(fn)(X)


@pytest.mark.parametrize("fn", [torch.sum, lambda x: (x.sum(), 1, 2), lambda x: ft.Loss(x.sum(), x.max(), {})])
def test_has_aux_without_an_aux_is_an_error(fn: Any) -> None:
    with pytest.raises(TypeError, match=r"expected fn to return \(value, aux\)"):
        ft.grad(fn, has_aux=True)(X)


CLOSED = draw(8, 3).requires_grad_()
CLOSED_NON_LEAF = CLOSED * 2


@pytest.mark.parametrize("closed", [CLOSED, CLOSED_NON_LEAF])
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_a_differentiated_tensor_that_is_no_argument_is_an_error(closed: Tensor, grad_enabled: bool) -> None:
    with torch.set_grad_enabled(grad_enabled):
        for fn in (lambda x: torch.sum(x * closed), lambda x: torch.sum(x) + torch.sum(torch.exp(closed) ** 2)):
            with pytest.raises(ValueError, match=r"shape \(3,\) that requires grad and is not an argument.*detach"):
                ft.grad(fn)(X)
    assert_close(ft.grad(lambda x: torch.sum(x * closed.detach()))(X), closed.detach().expand(2, 3))


AMBIGUOUS = [{"a/b": X}, {"a/b": X, "a": {"b": X}}, {"": X}, OrderedDict({0: X, "0": X}), {"x": {("k",): X}}]


@pytest.mark.parametrize("params", AMBIGUOUS)
def test_init_state_refuses_ambiguous_paths(params: Any) -> None:
    with pytest.raises(ValueError, match="tree: .*key"):
        ft.init_state(params, ft.optim.sgd(0.1), key=ft.random.key(0))


def test_init_state_names_a_leaf_that_does_not_train() -> None:
    with pytest.raises(TypeError, match="init_state: layer/count: expected a floating-point"):
        ft.init_state({"layer": {"count": torch.ones(2, dtype=torch.int64)}}, ft.optim.sgd(0.1), key=ft.random.key(0))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


@pytest.mark.parametrize("compiled", [False, True])
def test_an_operation_that_has_no_rule_for_maps_is_named(compiled: bool) -> None:
    grad = ft.vmap(ft.grad(lambda x: torch.sum(Cube.apply(x))))
    with pytest.raises(TypeError, match=r"ft.vmap: .*Cube.apply\(x\).*give it setup_context and generate_vmap_rule"):
        (ft.compile(grad) if compiled else grad)(torch.ones(2, 3))
