"""What is frozen keeps its bits and costs no gradient and no moment; what is trained is trained as if alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain import checkpoint, tree

KEY = ft.random.key(0)
HEAD = "head/**"
PARAMS = {
    "body": [{"w": ft.random.normal(ft.random.key(i), (3, 3))} for i in (1, 2)],
    "head": {"w": ft.random.normal(ft.random.key(3), (3,)), "b": torch.zeros(())},
}


def loss_fn(params: Any, batch: Any, key: Any) -> ft.Loss:
    h = batch["x"]  # (B, 3)
    for layer in params["body"]:
        h = torch.tanh(h @ layer["w"])
    errors = h @ params["head"]["w"] + params["head"]["b"] - batch["y"]  # (B,)
    return ft.Loss(torch.sum(errors**2), errors.new_full((), len(errors)), {})


def with_buffers(params: Any, buffers: Any, batch: Any, key: Any) -> Any:
    return loss_fn(params, batch, key), {"seen": buffers["seen"] + 1}


def batch(number: int) -> Any:
    x = ft.random.normal(ft.random.key(number), (4, 3))
    return {"x": x, "y": x.sum(1)}


def run(step: Any, state: Any, count: int = 3) -> Any:
    for number in range(count):
        state, metrics = step(state, batch(number))
    return state


def same(a: Any, b: Any) -> bool:
    return tree.structure(a) == tree.structure(b) and all(map(torch.equal, tree.leaves(a), tree.leaves(b)))


def head_alone(tx: Any, **options: Any) -> Any:
    """The run in which the body is no param: what training the head must equal, bit for bit."""

    def of_head(head: Any, *args: Any) -> Any:
        return loss_fn({**PARAMS, "head": head}, *args)

    return run(ft.train_step(of_head, tx, **options), ft.init_state(PARAMS["head"], tx, key=KEY))


ADAMW = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(0.1, weight_decay=0.1))


@pytest.mark.parametrize(
    "trainable",
    [
        HEAD,
        ["head/w", "head/b"],
        lambda path, leaf: path.startswith("head"),
        {"body": False, "head": True},
        tree.mask(HEAD, PARAMS),
    ],
    ids=["pattern", "patterns", "predicate", "prefix of bools", "tree of bools"],
)
def test_training_some_params_equals_training_them_alone(trainable: Any) -> None:
    state = run(
        ft.train_step(loss_fn, ADAMW, trainable=trainable), ft.init_state(PARAMS, ADAMW, key=KEY, trainable=trainable)
    )
    alone = head_alone(ADAMW)
    assert same(state.params["head"], alone.params) and same(state.params["body"], PARAMS["body"])
    assert same(tree.leaves(state.opt_state), tree.leaves(alone.opt_state))
    assert not any("body" in path for path in tree.paths(state.opt_state))


@pytest.mark.parametrize(("way", "accumulate"), [("eager", 1), ("eager", 2), ("compiled", 1)])
def test_every_option_works_with_frozen_params(accumulate: int, way: str) -> None:
    guard, scale = ft.train.skip_nonfinite(), ft.loss_scale.static(4.0)
    options: Any = {"guard": guard, "loss_scale": scale, "trainable": HEAD}
    step = ft.train_step(with_buffers, ADAMW, accumulate=accumulate, buffers=True, **options)
    step = ft.compile(step, donate=True) if way == "compiled" else step
    state = ft.init_state(PARAMS, ADAMW, key=KEY, buffers={"seen": torch.tensor(0)}, **options)
    state = run(step, state)
    alone = head_alone(ADAMW, accumulate=accumulate)
    # a scale of a power of two rounds nothing; slices and fused kernels add in another order
    assert tree.allclose(state.params["head"], alone.params, rtol=1e-5, atol=1e-6)
    assert same(state.params["body"], PARAMS["body"])
    assert int(state.buffers["seen"]) == 3 * accumulate
    before = tree.map(torch.clone, state)
    bad, metrics = step(state, batch(3) | {"y": torch.full((4,), torch.nan)})
    assert float(metrics["skipped"]) == 1.0 and same(bad.params, before.params)


def test_a_frozen_leaf_is_not_differentiated() -> None:
    seen: list[bool] = []

    def watching(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        seen.extend([leaf.requires_grad for leaf in tree.leaves(params)])
        return loss_fn(params, batch, key)

    step = ft.train_step(watching, ADAMW, trainable=HEAD)
    state = ft.init_state(PARAMS, ADAMW, key=KEY, trainable=HEAD)
    new, metrics = step(state, batch(0))
    assert seen == [False, False, True, True]
    assert new.params["body"][0]["w"] is state.params["body"][0]["w"]  # no copy either
    grads = ft.grad(lambda p: loss_fn(p, batch(0), KEY).total / 4)(PARAMS)
    assert torch.equal(metrics["grad_norm"], tree.norm(grads["head"]))


def test_a_saved_state_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    step = ft.train_step(loss_fn, ADAMW, trainable=HEAD)
    state = ft.init_state(PARAMS, ADAMW, key=KEY, trainable=HEAD)
    checkpoint.save(tmp_path / "state", run(step, state, 2))
    loaded = checkpoint.load(tmp_path / "state", like=state)
    assert same(run(step, loaded), run(step, run(step, state, 2)))
    # without like= too, the checkpoint says what is trained
    assert tree.structure(checkpoint.load(tmp_path / "state").trainable) == tree.structure(state.trainable)


def test_a_sweep_trains_the_same_params_in_every_lane() -> None:
    tx = ft.optim.inject_hyperparams(ft.optim.adam)(learning_rate=0.1)
    step = ft.train_step(loss_fn, tx, trainable=HEAD)
    swept = ft.sweep(step, {"learning_rate": [0.1, 0.02]})
    states = run(swept, swept.init(ft.init_state(PARAMS, tx, key=KEY, trainable=HEAD)))
    for lane, rate in enumerate((0.1, 0.02)):
        alone = head_alone(ft.optim.adam(rate))
        found = swept.lane(states, lane)
        assert tree.allclose(found.params["head"], alone.params, rtol=1e-5, atol=1e-6)
        assert same(found.params["body"], PARAMS["body"])


def test_masks_of_the_optimizer_are_by_path() -> None:
    tx = ft.optim.adamw(0.1, weight_decay=0.5, mask=lambda params: tree.mask("head/w", params))
    step = ft.train_step(loss_fn, tx, trainable=HEAD)
    state = run(step, ft.init_state(PARAMS, tx, key=KEY, trainable=HEAD))
    alone = head_alone(ft.optim.adamw(0.1, weight_decay=0.5, mask={"w": True, "b": False}))
    assert same(state.params["head"], alone.params)


def test_frozen_params_may_be_of_any_dtype_and_the_average_keeps_them() -> None:
    params = {**PARAMS, "codes": torch.arange(3)}
    tx = ft.optim.keep_ema(ft.optim.adam(0.1))
    step = ft.train_step(loss_fn, tx, trainable=HEAD)
    state = run(step, ft.init_state(params, tx, key=KEY, trainable=HEAD))
    found = ft.train.averaged(state)
    assert torch.equal(found["codes"], params["codes"]) and same(found["body"], PARAMS["body"])
    assert not torch.equal(found["head"]["w"], PARAMS["head"]["w"])
    with pytest.raises(TypeError, match="codes: expected a floating-point tensor to train"):
        ft.init_state(params, tx, key=KEY)


def test_a_pattern_that_fits_nothing_names_what_there_is() -> None:
    with pytest.raises(tree.PathError, match=r"init_state: trainable: heads/\*\*: .*fits no path; there is"):
        ft.init_state(PARAMS, ADAMW, key=KEY, trainable="heads/**")
    with pytest.raises(ValueError, match="trainable: expected to train some of params, came none of 'body/0/w'"):
        ft.init_state(PARAMS, ADAMW, key=KEY, trainable=lambda path, leaf: False)
    with pytest.raises(TypeError, match="expected True or False, came 0"):
        ft.init_state(PARAMS, ADAMW, key=KEY, trainable={"body": 0, "head": 1})


def test_a_step_and_a_state_of_another_trainable_are_told_apart() -> None:
    tx = ft.optim.sgd(0.1)  # whose state tells nothing
    state = ft.init_state(PARAMS, tx, key=KEY)
    frozen = ft.init_state(PARAMS, tx, key=KEY, trainable=HEAD)
    way_out = "give init_state and train_step the same trainable"
    with pytest.raises(ValueError, match=f"the state trains all of params and the step 'head/b', 'head/w'; {way_out}"):
        ft.train_step(loss_fn, tx, trainable=HEAD)(state, batch(0))
    with pytest.raises(ValueError, match=f"the state trains 'head/b', 'head/w' and the step all of params; {way_out}"):
        ft.train_step(loss_fn, tx)(frozen, batch(0))
    with pytest.raises(ValueError, match="the step 'body/0/w', 'body/1/w'"):
        ft.train_step(loss_fn, tx, trainable="body/**")(frozen, batch(0))
    for make in (ft.train.private_step, ft.train.noise_scale_step):
        with pytest.raises(ValueError, match=f"{make.__name__}: the state trains .* the step all of params; {way_out}"):
            make(loss_fn, tx)(frozen, batch(0))
        with pytest.raises(ValueError, match=f"{make.__name__}: the state trains all of params"):
            make(loss_fn, tx, trainable=HEAD)(state, batch(0))


PRIVATE = ft.optim.dpsgd(0.1, l2_norm_clip=0.5, noise_multiplier=1.0, seed=3, momentum=0.9)


@pytest.mark.parametrize(
    ("make", "tx", "way"),
    [
        (ft.train.private_step, PRIVATE, "eager"),
        (ft.train.noise_scale_step, ft.optim.sgd(0.1), "compiled"),  # private noise takes long to compile
        (ft.train.noise_scale_step, ADAMW, "eager"),
    ],
)
def test_a_step_by_examples_that_trains_some_params_equals_training_them_alone(make: Any, tx: Any, way: str) -> None:
    def of_head(head: Any, *args: Any) -> ft.Loss:
        return loss_fn({**PARAMS, "head": head}, *args)

    step, state = make(loss_fn, tx, chunk_size=2, trainable=HEAD), ft.init_state(PARAMS, tx, key=KEY, trainable=HEAD)
    step = ft.compile(step, donate=True) if way == "compiled" else step
    only, alone = make(of_head, tx, chunk_size=2), ft.init_state(PARAMS["head"], tx, key=KEY)
    for number in range(3):
        state, metrics = step(state, batch(number))
        alone, wanted = only(alone, batch(number))
        near = {"rtol": 1e-5, "atol": 1e-6} if way == "compiled" else {"rtol": 0.0, "atol": 0.0}  # fused kernels round
        assert tree.allclose(state.params["head"], alone.params, **near) and tree.allclose(metrics, wanted, **near)
    assert same(state.params["body"], PARAMS["body"])
    assert not any("body" in path for path in tree.paths(state.opt_state))


def test_a_private_step_clips_the_gradient_of_what_is_trained_and_differentiates_nothing_else() -> None:
    seen: list[bool] = []

    def watching(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        seen.extend([leaf.requires_grad for leaf in tree.leaves(params)])
        return loss_fn(params, batch, key)

    clip, rows = 1e-3, 4  # below the norm of every example's gradient
    tx = ft.optim.dpsgd(1.0, l2_norm_clip=clip, noise_multiplier=0.0, seed=0)
    state = ft.init_state(PARAMS, tx, key=KEY, trainable=HEAD)
    new, metrics = ft.train.private_step(watching, tx, trainable=HEAD)(state, batch(0))
    grads = ft.per_example_grad(lambda head, b: loss_fn({**PARAMS, "head": head}, b, KEY).total)(
        PARAMS["head"], batch(0)
    )
    norms = torch.sqrt(sum(torch.sum(g.reshape(rows, -1) ** 2, 1) for g in tree.leaves(grads)))
    wanted = tree.map(lambda p, g: p - torch.tensordot(clip / norms, g, 1) / rows, PARAMS["head"], grads)
    assert tree.allclose(new.params["head"], wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(metrics["gradient_norm_mean"], norms.mean())
    assert seen[:2] == [False, False] and new.params["body"][0]["w"] is state.params["body"][0]["w"]


def test_a_private_step_with_frozen_params_equals_opacus_with_a_frozen_layer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus' own, about its hooks
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        body, head = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 1)
        with torch.no_grad():
            body.weight.copy_(PARAMS["body"][0]["w"].T)
            head.weight.copy_(PARAMS["head"]["w"][None])
            head.bias.copy_(PARAMS["head"]["b"])
        body.weight.requires_grad_(False)
        hooked = GradSampleModule(torch.nn.Sequential(body, torch.nn.Tanh(), head), loss_reduction="sum")
        inner = torch.optim.SGD(head.parameters(), lr=0.1)
        theirs = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=0.7, expected_batch_size=4)
        for number in range(3):
            theirs.zero_grad()
            torch.sum((hooked(batch(number)["x"])[:, 0] - batch(number)["y"]) ** 2).backward()
            theirs.step()
    params, tx = {**PARAMS, "body": PARAMS["body"][:1]}, ft.optim.dpsgd(0.1, 0.7, 0.0, 0)
    state = run(ft.train.private_step(loss_fn, tx, trainable=HEAD), ft.init_state(params, tx, key=KEY, trainable=HEAD))
    # opacus divides by norm + 1e-6, and float32 rounds some times 1e-7 of numbers below 3
    torch.testing.assert_close(state.params["head"]["w"], head.weight.detach()[0], rtol=0, atol=3e-6)
    torch.testing.assert_close(state.params["head"]["b"], head.bias.detach()[0], rtol=0, atol=3e-6)
