"""How a run ended, and with which hyper-parameters, as TensorBoard, MLflow and Weights & Biases show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.get_experiment import Handler as Experiment
from tensorboard.plugins.hparams.list_session_groups import Handler as SessionGroups

import functrain as ft
from functrain.train import TrainState, fit, record, watching

SETTINGS = {"optimizer": {"b1": 0.9}, "name": "tiny", "nesterov": True, "patterns": ["head/**"]}
END = [None, ValueError("on purpose"), KeyboardInterrupt()]


def step(state: Any, batch: Any) -> Any:
    return state._replace(step=state.step + 1), {"loss": state.params * batch}


def run(hooks: list[Any], error: BaseException | None = None, begin: int = 0) -> None:
    """Train from step `begin` to 4, and fail in the last step where there is an error."""

    def failing(t: int, state: Any, metrics: Any) -> None:
        if t == 4 and error is not None:
            raise error

    state = TrainState(torch.tensor(begin), torch.tensor(1.0), (), torch.zeros(2, dtype=torch.int32))
    fit(step, state, [torch.tensor(1.0)] * 4, steps=4, every=[*hooks, failing])


class Tab:
    """What the HPARAMS tab shows of a folder of runs, by the plugin's own code."""

    def __init__(self, folder: Path) -> None:
        multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
        multiplexer.Reload()
        context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(folder))))
        self.experiment = Experiment(RequestContext(), context, "", api_pb2.GetExperimentRequest()).run()
        request = api_pb2.ListSessionGroupsRequest(
            allowed_statuses=api_pb2.Status.values(),
            start_index=0,
            slice_size=100,
            aggregation_type=api_pb2.AGGREGATION_AVG,
            col_params=[api_pb2.ColParams(metric=info.name) for info in self.experiment.metric_infos],
        )
        self.groups = SessionGroups(RequestContext(), context, "", request).run().session_groups

    def sessions(self) -> dict[str, tuple[dict[str, Any], str]]:
        """The hyper-parameters and the status of each session."""
        found = {}
        for group in self.groups:
            values = {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()}
            for session in group.sessions:
                found[session.name] = values, api_pb2.Status.Name(session.status).removeprefix("STATUS_")
        return found


def recorded(folder: Path, settings: Any) -> Any:
    loggers = [watching.tensorboard(folder / "events")]
    return record(folder, every=2, loggers=loggers, hyperparameters=settings)


def test_runs_beside_one_another_are_compared_in_the_hparams_tab(tmp_path: Path) -> None:
    for name, rate in (("a", 0.1), ("b", 0.2)):
        run([recorded(tmp_path / name, SETTINGS | {"learning_rate": rate})])
    tab = Tab(tmp_path)
    wanted = {"optimizer.b1": 0.9, "name": "tiny", "nesterov": True, "patterns": "['head/**']"}
    assert tab.sessions() == {
        f"{name}/events": (wanted | {"learning_rate": rate}, "SUCCESS") for name, rate in (("a", 0.1), ("b", 0.2))
    }
    assert {info.name for info in tab.experiment.hparam_infos} == {*wanted, "learning_rate"}
    assert "loss" in {info.name.tag for info in tab.experiment.metric_infos}
    losses = [value.value for group in tab.groups for value in group.metric_values if value.name.tag == "loss"]
    assert losses == [1.0, 1.0]


def test_the_hparams_tab_tells_a_run_that_failed_until_it_has_gone_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on purpose"):
        run([recorded(tmp_path, SETTINGS)], END[1])
    assert [status for _, status in Tab(tmp_path).sessions().values()] == ["FAILURE"]
    hook = recorded(tmp_path, SETTINGS)
    hook.begin(2, 4, None)
    assert [status for _, status in Tab(tmp_path).sessions().values()] == ["UNKNOWN"]
    hook.close()
    assert [status for _, status in Tab(tmp_path).sessions().values()] == ["SUCCESS"]


def test_a_run_without_hyperparameters_is_no_session(tmp_path: Path) -> None:
    run([recorded(tmp_path, None)])
    assert not list(tmp_path.glob("events/*.end"))


@pytest.mark.filterwarnings("default")  # theirs
def test_mlflow_tells_how_a_run_ended_and_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    logger = watching.mlflow()

    def status() -> str:
        return str(mlflow.MlflowClient().get_run(logger.run_id).info.status)

    for error, wanted in zip([*END[1:], END[0]], ["FAILED", "KILLED", "FINISHED"], strict=True):
        seen: list[str] = []
        watch = lambda t, state, metrics, seen=seen: seen.append(status())  # noqa: E731
        if error is None:
            run([record(tmp_path, loggers=[logger]), watch])
        else:
            with pytest.raises(type(error)):
                run([record(tmp_path, loggers=[logger]), watch], error)
        assert (set(seen), status()) == ({"RUNNING"}, wanted)


def test_weights_and_biases_gets_the_exit_code_of_how_a_run_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs the package wandb")
    codes: list[int] = []
    init = wandb.init

    def watched(**options: Any) -> Any:
        made = init(**options)
        monkeypatch.setattr(made, "finish", lambda exit_code: codes.append(exit_code))
        return made

    monkeypatch.setattr(wandb, "init", watched)
    logger = watching.wandb(mode="disabled")
    for error in END:
        logger.begin(0)
        if error is not None:
            logger.fail(error)
        logger.close()
    assert codes == [0, 1, 255]


def test_a_hook_is_told_of_an_error_before_it_is_closed_and_its_own_failure_hides_nothing() -> None:
    said: list[Any] = []

    class Hook:
        def __call__(self, t: int, state: Any, metrics: Any) -> None: ...

        def fail(self, error: BaseException) -> None:
            said.append(error)
            raise OSError("the disk is full")

        def close(self) -> None:
            said.append("close")

    with pytest.raises(ValueError, match="on purpose") as caught:
        run([ft.train.every(2, Hook())], END[1])
    assert said == [END[1], "close"]
    assert caught.value.__notes__ == ["and closing a hook failed: OSError: the disk is full"]
    run([Hook()])
    assert said[2:] == ["close"]
