"""Initializers draw what jax's and torch's draw."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from later import Later

import functrain as ft
from functrain.nn import init

jax = Later("jax")

THEIRS = Later("jax.nn.initializers")
KEY = ft.random.key(7)
# normal numbers are jax's to float rounding, in the tails to a few, and what jax scales in float32 we scale by a float
CLOSE: Any = {"rtol": 3e-6, "atol": 1e-7}


@pytest.fixture
def jax_key() -> Any:
    return jax.random.key(7)


def same(ours: torch.Tensor, theirs: Any, **close: Any) -> None:
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), **close)


@pytest.mark.parametrize("name", [n for n in init.__all__ if n.startswith(("lecun", "he", "glorot", "xavier", "kaim"))])
def test_scaled_weights_equal_those_of_jax(name: str, jax_key: Any) -> None:
    same(getattr(init, name)()(KEY, (31, 17)), getattr(THEIRS, name)()(jax_key, (31, 17)), **CLOSE)
    # dims of a convolution's weight as ours lie, whose flat order is that of the draw
    theirs = getattr(THEIRS, name)(in_axis=1, out_axis=0)(jax_key, (6, 5, 3, 2))
    same(getattr(init, name)(in_dim=1, out_dim=0)(KEY, (6, 5, 3, 2)), theirs, **CLOSE)


@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg", "fan_geo_avg"])
@pytest.mark.parametrize("distribution", ["truncated_normal", "normal", "uniform"])
def test_variance_scaling_equals_that_of_jax(mode: Any, distribution: Any, jax_key: Any) -> None:
    ours = init.variance_scaling(3.0, mode, distribution, in_dim=(0, 1), out_dim=-1, batch_dim=2)
    theirs = THEIRS.variance_scaling(3.0, mode, distribution, in_axis=(0, 1), out_axis=-1, batch_axis=2)
    same(ours(KEY, (4, 3, 2, 5)), theirs(jax_key, (4, 3, 2, 5)), **CLOSE)


def test_plain_weights_equal_those_of_jax(jax_key: Any) -> None:
    pairs: list[Any] = [
        (init.normal(0.3), THEIRS.normal(0.3)),
        (init.uniform(0.3), THEIRS.uniform(0.3)),
        (init.truncated_normal(0.3, -1.0, 2.0), THEIRS.truncated_normal(0.3, lower=-1.0, upper=2.0)),
        (init.constant(0.3), THEIRS.constant(0.3)),
        (init.zeros, THEIRS.zeros),
        (init.ones, THEIRS.ones),
    ]
    for ours, theirs in pairs:
        same(ours(KEY, (5, 3)), theirs(jax_key, (5, 3)), **CLOSE)
        assert ours(KEY, (5, 3), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("shape", "column"), [((5, 3), -1), ((3, 5), -1), ((2, 3, 4), 0), ((4, 4), 0)])
def test_orthogonal_weights_equal_those_of_jax(shape: Any, column: int, jax_key: Any) -> None:
    ours = init.orthogonal(2.0, column_dim=column)(KEY, shape)
    # two QR decompositions of well-conditioned matrices
    same(ours, THEIRS.orthogonal(2.0, column_axis=column)(jax_key, shape), rtol=1e-5, atol=1e-5)
    matrix = torch.movedim(ours, column, -1).reshape(-1, shape[column]) / 2
    gram = matrix.mT @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.mT
    torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (3, 1, 4)])
def test_delta_orthogonal_equals_that_of_jax_in_our_layout(kernel: Any, jax_key: Any) -> None:
    theirs = np.asarray(THEIRS.delta_orthogonal(2.0)(jax_key, (*kernel, 3, 5)))
    same(init.delta_orthogonal(2.0)(KEY, (5, 3, *kernel)), np.moveaxis(theirs, (-1, -2), (0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "groups"), [((4, 2, 3), 2), ((3, 5, 2, 3), 1), ((6, 2, 3, 3, 3), 3)])
def test_dirac_and_eye_equal_those_of_torch(shape: Any, groups: int) -> None:
    expected = torch.nn.init.dirac_(torch.empty(shape), groups)
    assert torch.equal(init.dirac(groups)(KEY, shape), expected)
    assert torch.equal(init.eye(KEY, shape[:2]), torch.nn.init.eye_(torch.empty(shape[:2])))


def test_moments_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    shape, like = (400, 250), torch.empty(250, 400)  # torch's (O, I)
    for ours, theirs in (
        (init.variance_scaling(2.0, "fan_in", "normal"), torch.nn.init.kaiming_normal_),
        (init.he_uniform(), lambda x, generator: torch.nn.init.kaiming_uniform_(x, generator=generator)),
        (init.xavier_uniform(), torch.nn.init.xavier_uniform_),
        (init.variance_scaling(1.0, "fan_avg", "normal"), torch.nn.init.xavier_normal_),
        (init.he_normal(), torch.nn.init.kaiming_normal_),
    ):
        a, b = ours(KEY, shape), theirs(like, generator=generator)
        # 100,000 numbers: a standard error of 0.3 % of the deviation
        assert float(a.std() / b.std()) == pytest.approx(1.0, abs=0.015) and abs(float(a.mean())) < 0.015 * float(
            a.std()
        )


def test_sparse_weights_have_as_many_zeros_for_every_output() -> None:
    weight = init.sparse(0.31, 0.5)(KEY, (10, 300))
    theirs = torch.nn.init.sparse_(torch.empty(300, 10).T, 0.31)
    assert torch.equal((weight == 0).sum(0), (theirs == 0).sum(0)) and int((weight == 0).sum(0)[0]) == 4
    assert float((weight == 0).float().mean(1).min()) > 0.3  # the zeros are anywhere
    assert float(weight[weight != 0].std()) == pytest.approx(0.5, rel=0.05)


def test_draws_are_of_the_key_alone_mapped_and_in_half_precision() -> None:
    keys = ft.random.split(KEY, 3)
    for make in (init.he_normal(), init.orthogonal(), init.sparse(0.5)):
        mapped = torch.vmap(lambda key, make=make: make(key, (4, 3)))(keys)
        torch.testing.assert_close(mapped[1], make(keys[1], (4, 3)), rtol=1e-5, atol=1e-6)
        half = make(KEY, (4, 3), torch.bfloat16)
        torch.testing.assert_close(half, make(KEY, (4, 3)).to(torch.bfloat16))


def test_a_shape_whose_inputs_nobody_knows_is_refused() -> None:
    for shape in ((3,), (8, 4, 3, 3)):
        with pytest.raises(ValueError, match=r"expected a shape \(I, O\).*in_dim=1 and out_dim=0 for a convolution"):
            init.he_normal()(KEY, shape)
    assert math.isclose(
        float(init.he_normal(in_dim=1, out_dim=0)(KEY, (8, 4, 3, 3)).std()), math.sqrt(2 / 36), rel_tol=0.2
    )
    for wrong in (
        lambda: init.variance_scaling(1.0, "fan", "normal"),  # type: ignore[arg-type]
        lambda: init.variance_scaling(1.0, "fan_in", "gaussian"),  # type: ignore[arg-type]
        lambda: init.variance_scaling(0.0, "fan_in", "normal"),
        lambda: init.sparse(1.5),
        lambda: init.orthogonal()(KEY, (3,)),
        lambda: init.delta_orthogonal()(KEY, (2, 3, 1)),
        lambda: init.delta_orthogonal()(KEY, (2, 3)),
        lambda: init.dirac(2)(KEY, (3, 1, 1)),
        lambda: init.eye(KEY, (3,)),
    ):
        with pytest.raises(ValueError, match="expected"):
            wrong()
