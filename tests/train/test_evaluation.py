"""An evaluation equals the loss of all batches as one; validation changes no bit of training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_crashes import forked
from hypothesis import given, settings
from hypothesis import strategies as st
from later import Later
from torch import distributed

import functrain as ft
from functrain.train import evaluation

sklearn = Later("sklearn")
torchmetrics = Later("torchmetrics")

LAW = settings(deadline=None, derandomize=True, max_examples=10)
PARAMS = {"w": torch.tensor([1.0, -2.0, 0.5])}


def loss_fn(params: Any, batch: Any, key: Any) -> ft.Loss:
    assert key is None or key.shape == (2,)
    x = batch["x"] if key is None else batch["x"] * ft.random.bernoulli(key, 0.8, (3,))
    errors = (x @ params["w"] - batch["y"]) ** 2 * batch["mask"]
    return ft.Loss(errors.sum(), batch["mask"].sum(), {"large": ((errors > 1) * batch["mask"]).sum()})


def rows(first: int, count: int) -> Any:
    key = ft.random.key(first)
    return {
        "x": ft.random.normal(key, (count, 3)),
        "y": ft.random.normal(ft.random.fold_in(key, 1), (count,)),
        "mask": ft.random.bernoulli(ft.random.fold_in(key, 2), 0.7, (count,)).float(),
    }


def joined(batches: list[Any]) -> Any:
    return ft.tree.map(lambda *leaves: torch.cat(leaves), *batches)


@LAW
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 9))
def test_it_equals_the_loss_of_all_batches_as_one(sizes: list[int], seed: int) -> None:
    batches = [rows(seed + i, size) for i, size in enumerate(sizes)]
    batches[0]["mask"][0] = 1.0
    whole = loss_fn(PARAMS, joined(batches), None)
    for given_as in (batches, iter(batches), (batch for batch in batches)):
        found = ft.evaluate(loss_fn, PARAMS, given_as, compile=False)
        # float32 sums of up to 30 squares in another order
        assert found["loss"] == pytest.approx(float(whole.total / whole.weight), rel=1e-5)
        assert found["large"] == pytest.approx(float(whole.metrics["large"] / whole.weight), rel=1e-6)
        assert set(found) == {"loss", "large"}


def test_sums_of_many_batches_lose_nothing() -> None:
    batches = [torch.tensor([2.0**24]), *[torch.tensor([1.0])] * 600]
    found = ft.evaluate(lambda p, b, key: ft.Loss(b.sum(), torch.tensor(1.0), {}), {}, batches, compile=False)
    assert found["loss"] == (2**24 + 600) / 601


def test_compiled_it_runs_once_for_each_shape_and_never_again() -> None:
    runs = list[int]()

    def counted(params: Any, batch: Any, key: Any) -> Any:
        runs.append(len(batch["x"]))
        return loss_fn(params, batch, key)

    batches = [rows(0, 4), rows(1, 4), rows(2, 4), rows(3, 3)]
    more: Any = {"metrics": {"mean": lambda scores, labels: float(scores.mean())}, "predict": predict}
    eager = ft.evaluate(loss_fn, PARAMS, batches, compile=False, **more)
    for _ in range(3):
        found = ft.evaluate(counted, PARAMS, batches, **more)
        assert found == pytest.approx(eager, rel=1e-6)
    assert set(runs) == {4, 3} and len(runs) <= 4, "the tracer runs it at most twice for each shape"
    found = ft.evaluate(counted, {"w": PARAMS["w"] + 1}, batches, **more)
    assert len(runs) <= 4 and found["loss"] != eager["loss"]


def test_programs_of_eight_functions_are_kept() -> None:
    def of(number: int) -> Any:
        return lambda params, batch, key: ft.Loss(batch.sum(), torch.tensor(1.0), {})

    functions = [of(i) for i in range(10)]
    alone = evaluation.Bound(None, None)
    made = [evaluation._compiled(fn, None, False, alone) for fn in functions]
    assert len(evaluation._programs) == 8 and evaluation._compiled(functions[9], None, False, alone) is made[9]
    assert evaluation._compiled(functions[0], None, False, alone) is not made[0]


@pytest.mark.parametrize(("at", "count"), [(1, 3), (2, 3), (300, 400)])
def test_ctrl_c_gives_what_was_evaluated_until_then(at: int, count: int) -> None:
    def interrupted(params: Any, batch: Any, key: Any) -> ft.Loss:
        if int(batch) == at:
            raise KeyboardInterrupt
        return ft.Loss(batch**2, batch, {"three": 3 * batch})

    batches = [torch.tensor(float(t)) for t in range(count)]
    with pytest.raises(ft.train.EvaluationInterrupted) as caught:
        ft.evaluate(interrupted, {}, batches, compile=False)
    assert (caught.value.done, caught.value.of) == (at, count)
    # the weight of batch 0 is 0, of which alone there is no mean
    part = [t for t in range(at) if at > 1]
    assert caught.value.metrics == ({"loss": sum(t * t for t in part) / sum(part), "three": 3.0} if part else {})


@pytest.mark.parametrize("metrics", [False, True])
def test_a_mean_is_weighted_by_the_rows_of_its_batch(metrics: bool) -> None:
    def mean(params: Any, batch: Any, key: Any) -> Any:
        error = ((batch["x"] @ params["w"] - batch["y"]) ** 2).mean()
        return (error, {"half": error / 2}) if metrics else error

    batches = [rows(0, 4), rows(1, 1)]
    found = ft.evaluate(mean, PARAMS, batches, compile=False)
    whole = mean(PARAMS, joined(batches), None)
    assert found["loss"] == pytest.approx(float(whole[0] if metrics else whole), rel=1e-6)
    if metrics:
        assert found["half"] == pytest.approx(found["loss"] / 2)
    with pytest.raises(ValueError, match="by which the mean is weighted, came leaves of .* rows; return ft.Loss"):
        ft.evaluate(mean, PARAMS, [batches[0] | {"x1": torch.zeros(9)}], compile=False)


def test_a_module_is_evaluated_in_its_evaluation_mode_and_its_buffers_stay() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1)
    )
    net = ft.from_module(module)
    assert module.training

    def loss(params: Any, buffers: Any, batch: Any, key: Any) -> Any:
        call = net.evaluate if key is None else net.apply
        found, new = call(params, buffers, key, batch["x"])
        return ft.Loss(((found[:, 0] - batch["y"]) ** 2).sum(), torch.tensor(float(len(found))), {}), new

    batches = [rows(0, 5), rows(1, 2)]
    tx = ft.optim.sgd(0.1)
    state = ft.init_state(net.params, tx, key=ft.random.key(0), buffers=net.buffers)
    state, _ = ft.train_step(loss, tx, buffers=True)(state, batches[0])
    trained = ft.to_module(module, state.params, state.buffers).eval()
    with torch.no_grad():
        whole = joined(batches)
        wanted = float(((trained(whole["x"])[:, 0] - whole["y"]) ** 2).mean())
    found = ft.evaluate(loss, state.params, batches, buffers=state.buffers, compile=False)
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    result, new = net.evaluate(state.params, state.buffers, None, whole["x"])
    assert torch.equal(result, trained(whole["x"]))
    assert all(map(torch.equal, ft.tree.leaves(new), ft.tree.leaves(state.buffers)))


def predict(params: Any, batch: Any) -> Any:
    return torch.sigmoid(batch["x"] @ params["w"]), (batch["y"] > 0).long()


def test_what_is_no_sum_is_measured_by_torchmetrics_and_by_scikit_learn() -> None:
    batches = [rows(i, size) for i, size in enumerate((8, 8, 3))]
    metrics = {
        "auc": torchmetrics.classification.BinaryAUROC(),
        "sklearn_auc": lambda scores, labels: sklearn.metrics.roc_auc_score(labels, scores),
        "counts": torchmetrics.MetricCollection(
            {"f1": torchmetrics.classification.BinaryF1Score(), "recall": torchmetrics.classification.BinaryRecall()}
        ),
    }
    scores, labels = predict(PARAMS, joined(batches))
    for _ in range(2):  # an object begins anew each time
        found = ft.evaluate(loss_fn, PARAMS, batches, metrics=metrics, predict=predict, compile=False)
        wanted = sklearn.metrics.roc_auc_score(labels, scores)
        assert [found["auc"], found["sklearn_auc"]] == pytest.approx([wanted, wanted], rel=1e-6)
        assert found["counts_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, scores > 0.5), rel=1e-6)
        assert found["counts_recall"] == pytest.approx(sklearn.metrics.recall_score(labels, scores > 0.5), rel=1e-6)
    by_name = lambda params, batch: dict(zip(("y_score", "y_true"), predict(params, batch), strict=True))  # noqa: E731
    named = ft.evaluate(
        loss_fn, PARAMS, batches, metrics={"auc": sklearn.metrics.roc_auc_score}, predict=by_name, compile=False
    )
    assert named["auc"] == found["sklearn_auc"]


def test_how_far_it_is_is_told() -> None:
    told = list[Any]()
    ft.evaluate(loss_fn, PARAMS, [rows(0, 4)] * 2, compile=False, progress=lambda done, of: told.append((done, of)))
    ft.evaluate(loss_fn, PARAMS, iter([rows(0, 4)]), compile=False, progress=lambda done, of: told.append((done, of)))
    assert told == [(0, 2), (1, 2), (2, 2), (0, None), (1, None)]


class Endless:
    def __getitem__(self, t: int) -> Any:
        return rows(t, 2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"batches": rows(0, 2)}, TypeError, r"came a dict; write \[batch\] for one batch"),
        ({"batches": (torch.zeros(2), torch.zeros(2))}, TypeError, "came a tuple"),
        ({"batches": Endless()}, ValueError, "come to an end, came Endless, which has no length"),
        ({"batches": []}, ValueError, "expected at least one batch, came none"),
        ({"batches": [rows(0, 2) | {"mask": torch.zeros(2)}]}, ValueError, "add up to 0, of which there is no mean"),
        ({"batches": [{"x": torch.zeros(2).numpy()}]}, TypeError, "batch 1: x: expected a tensor, came an array"),
        ({"metrics": {"auc": predict}}, ValueError, "predict.*which gives the metrics auc their arguments"),
        ({"predict": predict}, ValueError, "for what predict returns, came none"),
        ({"metrics": {"a": lambda *x: x}, "predict": predict}, TypeError, "metrics: a: expected a number, came tuple"),
        ({"metrics": {"loss": lambda *x: 1}, "predict": predict}, ValueError, "'loss' is a metric of the loss already"),
        ({"loss_fn": lambda params, batch: 0}, TypeError, r"expected loss_fn\(params, batch, key\), came"),
        ({"loss_fn": lambda params, batch, key: batch["x"]}, TypeError, r"came a tensor of shape \(4, 3\)"),
        ({"buffers": {}, "loss_fn": lambda *args: 0.0}, TypeError, r"return \(loss, new_buffers\)"),
    ],
)  # fmt: skip
def test_mistakes_are_told(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"loss_fn": loss_fn, "params": PARAMS, "batches": [rows(0, 4)], "compile": False} | change
    with pytest.raises(error, match=words):
        ft.evaluate(**arguments)


def test_a_metric_that_is_not_made_yet_is_told() -> None:
    metrics = {"a": torchmetrics.MeanMetric}
    with pytest.raises(TypeError, match=r"write a=MeanMetric\(...\)"):
        ft.evaluate(loss_fn, PARAMS, [rows(0, 4)], metrics=metrics, predict=predict, compile=False)


def test_a_loss_that_draws_is_told_what_a_key_of_none_means() -> None:
    def draws(params: Any, batch: Any, key: Any) -> Any:
        return ft.random.bernoulli(key, 0.5, (2,)).float().sum()

    with pytest.raises(Exception) as caught:  # noqa: B017, PT011
        ft.evaluate(draws, PARAMS, [rows(0, 2)], compile=False)
    assert "key=None, which means evaluation" in caught.value.__notes__[0]


OPTIMIZER = ft.optim.adamw(1e-2)


def start() -> Any:
    return ft.init_state({"w": torch.zeros(3)}, OPTIMIZER, key=ft.random.key(0))


def test_validation_is_seen_by_all_hooks_and_changes_no_bit_of_training() -> None:
    batches, held_out = [rows(t, 4) for t in range(6)], [rows(9, 4), rows(10, 2)]
    seen = list[Any]()
    step = ft.train_step(loss_fn, OPTIMIZER)
    validation = ft.train.every(3, ft.train.validate(loss_fn, held_out, compile=False))
    look = lambda t, state, metrics: seen.append(dict(metrics))  # noqa: E731
    state = ft.fit(step, start(), batches, steps=6, every=[look, validation])
    plain = ft.fit(step, start(), batches, steps=6)
    assert torch.equal(state.params["w"], plain.params["w"])
    assert [t for t, metrics in enumerate(seen, 1) if "validation_loss" in metrics] == [3, 6]
    wanted = ft.evaluate(loss_fn, state.params, held_out, compile=False)
    assert seen[-1]["validation_loss"] == wanted["loss"] and seen[-1]["validation_large"] == wanted["large"]


def test_other_params_of_the_state_and_other_names() -> None:
    twice = lambda state: {"w": state.params["w"] * 2}  # noqa: E731
    hook: Any = ft.train.validate(loss_fn, [rows(0, 4)], name="test", params=twice, compile=False)
    state = start()._replace(params={"w": torch.ones(3)})
    wanted = ft.evaluate(loss_fn, {"w": torch.full((3,), 2.0)}, [rows(0, 4)], compile=False)
    assert hook(1, state, {}) == {"test_loss": wanted["loss"], "test_large": wanted["large"]}
    with pytest.raises(ValueError, match="came the lanes of a sweep"):
        hook(1, state._replace(step=torch.zeros(2, dtype=torch.int64)), {})
    with pytest.raises(TypeError, match="which is at its end after the first"):
        ft.train.validate(loss_fn, iter([rows(0, 4)]))


def test_two_ranks_evaluate_as_one_and_a_stop_in_one_stops_both(tmp_path: Path) -> None:
    """Rank 0 has three batches and rank 1 has one; in training, a hook of rank 1 stops."""
    batches = [rows(i, size) for i, size in enumerate((6, 4, 5, 3))]

    def evaluate(batches: Any) -> Any:
        mean = lambda scores, labels: float((scores * labels).mean())  # noqa: E731
        metrics = {"auc": torchmetrics.classification.BinaryAUROC(), "mean": mean}
        return ft.evaluate(loss_fn, PARAMS, batches, metrics=metrics, predict=predict, compile=False)

    def work(rank: int) -> None:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=2)
        found = evaluate(batches[3:] if rank else batches[:3])
        stops: Any = lambda t, state, metrics: ft.train.Stop("enough") if rank == 1 and t == 3 else None  # noqa: E731
        step: Any = lambda state, batch: (state._replace(step=state.step + 1), {})  # noqa: E731
        state = ft.fit(step, start(), range(9), steps=9, every=[stops])
        distributed.barrier()
        (tmp_path / str(rank)).write_text(repr((found, int(state.step))))

    children = [forked(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    for rank in range(2):
        found, stopped = eval((tmp_path / str(rank)).read_text())
        assert found == pytest.approx(evaluate(batches), rel=1e-6) and stopped == 3


def test_without_a_compiler_the_way_out_is_named_at_once() -> None:
    program = (
        "import torch, functrain as ft\n"
        "loss = lambda params, batch, key: torch.mean((params - batch) ** 2)\n"
        "for call in (lambda: ft.train.validate(loss, [torch.ones(2)]),\n"
        "             lambda: ft.evaluate(loss, torch.zeros(()), [torch.ones(2)])):\n"
        "    try:\n        call()\n    except ft.transforms.CompilerNotFoundError as error:\n        print(error)\n"
        "print(ft.evaluate(loss, torch.zeros(()), [torch.ones(2)], compile=False))\n"
    )
    environment = os.environ | {"CXX": "/no/such/compiler", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, found = done.stdout.splitlines()
    assert first.startswith("validate: no C++ compiler") and second.startswith("evaluate: no C++ compiler")
    assert all("pass compile=False" in line for line in (first, second)) and found == "{'loss': 1.0}"
