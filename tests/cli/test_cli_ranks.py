"""`functrain train` on several ranks: the run of one process, that goes on with fewer; who fails, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import functrain as ft
from functrain import cli
from functrain.recipes import ranks
from functrain.recipes.config import Config, mesh_of


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("texts")
    for i in range(12):
        lines = [f"line {j} of file {i} says that {i * j} is a number" for j in range(30)]
        (where / f"f{i + 1}.txt").write_text("\n".join(lines) + "\n")
    return where


def words(run: Path, texts: Path, *more: str) -> list[str]:
    given = ["train", "smoke", "--no-compile", "--device", "cpu", "--run", str(run), "--data.corpus", str(texts)]
    return [*given, "--data.validation", "0.3", "--model.dropout", "0.1", "--checkpoint-every", "3", *more]


def command(given: list[str], **more: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "functrain", *given], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **more,
    )  # fmt: skip


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, wanted: Path, rel: float = 2e-5) -> None:
    found, expected = rows(run), rows(wanted)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for a, b in zip(found, expected, strict=True):
        names = {name for name in b if name in ("loss", "grad_norm", "validation_loss")}
        assert {name: a[name] for name in names} == pytest.approx({name: b[name] for name in names}, rel=rel)


@pytest.fixture(scope="module")
def alone(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, with the batch in two parts, as two ranks have it."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main(words(run, texts, "--accumulate", "2")) == 0
    return run


def test_two_ranks_with_split_params_are_the_run_of_one_process(alone: Path, texts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command(words(run, texts, "--accumulate", "2", "--ranks", "2", "--mesh", "fsdp=2"))
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert_same_run(run, alone)
    assert out.count("parameters on cpu, 1 threads, 2 ranks: fsdp=2") == 1 and out.count("learning curve") == 1
    of_two, of_one = (json.loads((where / "summary.json").read_text()) for where in (run, alone))
    assert of_two == pytest.approx(of_one, rel=2e-5)
    # what two have saved is a run like any other
    newest = ft.checkpoint.latest(run)
    assert newest is not None and len([name for name in os.listdir(newest) if name.startswith("tensors-")]) == 2
    assert cli.main(["generate", str(run), "--prompt", "line", "--tokens", "3"]) == 0
    assert cli.main(["export", str(run), "--to", str(tmp_path / "exported")]) == 0


def test_a_run_that_is_told_to_stop_goes_on_on_one_process(texts: Path, tmp_path: Path) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    # so many steps that the signal comes before their end
    more = ["--accumulate", "2", "--log-every", "1", "--steps", "80", "--checkpoint-every", "40"]
    assert cli.main(words(alone, texts, *more)) == 0
    given = words(run, texts, *more)
    process = command([*given, "--ranks", "2", "--mesh", "data=2"])
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    newest = ft.checkpoint.latest(run)
    assert newest is not None and 0 < int(newest.name.removeprefix("step-")) < 80
    assert cli.main(given) == 0
    assert_same_run(run, alone, rel=1e-3)


def ranks_below(pid: int) -> dict[str, int]:
    """Return the processes of ranks below one, by rank."""
    found: dict[str, int] = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        words = Path(f"/proc/{child}/environ").read_text().split("\0")
        said = dict(word.split("=", 1) for word in words if "=" in word)
        if "RANK" in said and "functrain" in Path(f"/proc/{child}/cmdline").read_text():
            found[said["RANK"]] = int(child)
        found |= ranks_below(int(child))
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_under_torchrun_a_killed_rank_starts_all_again(texts: Path, tmp_path: Path) -> None:
    """Killed at once, by nobody asked, as where memory is short: torchrun starts all ranks again, from a checkpoint."""
    runs = [tmp_path / "alone", tmp_path / "run"]
    more = ["--accumulate", "2", "--steps", "30", "--checkpoint-every", "1"]
    assert cli.main(words(runs[0], texts, *more)) == 0
    given = [*words(runs[1], texts, *more), "--mesh", "fsdp=2"]
    torchrun = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "--", "functrain"]
    with (tmp_path / "said.txt").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *torchrun, *given],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=said, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        while process.poll() is None and len(ft.checkpoint.list(runs[1])) < 2:
            time.sleep(0.02)
        os.kill(ranks_below(process.pid)["1"], signal.SIGKILL)
        process.wait(timeout=280)
    told = (tmp_path / "said.txt").read_text()
    assert process.returncode == 0, told
    assert told.count("parameters on cpu") == 2  # it has begun twice
    assert_same_run(runs[1], runs[0], rel=1e-3)


def test_a_rank_that_fails_ends_all_with_what_it_says(texts: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    done = command(words(tmp_path / "run", texts, "--ranks", "2", "--mesh", "fsdp=4"))
    _, err = done.communicate(timeout=120)
    assert done.returncode == 2 and time.monotonic() - begun < 60
    assert "expected as many ranks as the mesh fsdp=4 has places, 4, came 2" in err and "Traceback" not in err


@pytest.mark.parametrize("text", ["", "data", "data=0", "stage=2", "data=2,data=2", "data=-1", "data=2;fsdp=2"])
def test_a_mesh_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="mesh: expected auto, or some of data=N, fsdp=N and tensor=N"):
        Config(mesh=text)


def test_meshes() -> None:
    assert mesh_of("auto", 3) == {"data": 3} and mesh_of("data=2,fsdp=4", 8) == {"data": 2, "fsdp": 4}
    assert ranks.plan_of(Config(), torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--ranks", "0"], "--ranks: expected at least 1 process, came 0"),
        (["--ranks", "2", "--sweep", "learning_rate=1,2"], "--sweep: expected one process, came --ranks"),
    ],
)
def test_options_that_do_not_go_together(
    more: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "smoke", "--run", str(tmp_path / "run"), *more]) == 2
    assert told in capsys.readouterr().err


def test_under_torchrun_there_are_ranks_already(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for more in (["--ranks", "2"], ["--sweep", "learning_rate=1,2"]):
        assert cli.main(["train", "smoke", "--run", str(tmp_path / "run"), *more]) == 2
    told = capsys.readouterr().err
    assert "--ranks: torchrun has started the processes already" in told and "came several ranks" in told
