"""The folder of a run: what it was asked for, and whether a run may go on in it.

config.toml      all options, as resolved
tokenizer.json   how text becomes tokens
tokens/          the corpus as tokens, of a BERT its sentences
metrics.jsonl    one line per step; tensorboard/ holds the same as events
checkpoints/     the training state, the newest last
programs/        compiled code, for a resumed run
summary.json     the end: validation loss and measures, and what simpler models reach
sample.txt, loss.png
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from functrain import checkpoint, tree
from functrain.data.atomic import replacing
from functrain.recipes import architectures, toml
from functrain.recipes.architectures import Architecture
from functrain.recipes.config import WATCHED, Config
from functrain.sharding import Plan
from functrain.train import TrainState


def check_ours(run: Path) -> None:
    """Refuse a folder that holds something else than a run.

    Raises: ValueError.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run}: expected a folder for the run, came a file; choose another --run")
    if run.exists() and any(run.iterdir()) and not {"config.toml", "checkpoints"} & {p.name for p in run.iterdir()}:
        raise ValueError(f"{run}: expected the folder of a run or an empty one, came other files; choose another --run")


def read_config(run: Path) -> Config:
    """Read what a run was asked for.

    Raises: ValueError if `run` is no run's folder.
    """
    file = run / "config.toml"
    if not file.is_file():
        raise ValueError(f"{run}: expected the folder of a run, and it has no config.toml")
    return toml.loads(file.read_text(encoding="utf-8", errors="surrogateescape"), Config(), str(file))


def newest(run: Path) -> Path:
    """Return the newest whole checkpoint of a run.

    Raises: ValueError if `run` is no run's folder, or has none yet.
    """
    if not (run / "config.toml").is_file():
        raise ValueError(f"{run}: expected the folder of a run, and it has no config.toml")
    found = checkpoint.latest(run)
    if found is None:
        raise ValueError(f"{run}: no checkpoint yet; functrain train makes one")
    return found


def write(file: Path, text: str) -> None:
    """Write a file whole or not at all. What in it came of a file's name in another encoding keeps its bytes."""
    with replacing(file) as stream:
        stream.write(text.encode("utf-8", "surrogateescape"))


def check_same_config(run: Path, config: Config, *, accept_changes: bool = False) -> None:
    """Refuse to go on with a run under another config, but for what it is watched by; the error is the difference.

    Raises: ValueError, also with `accept_changes` where what was trained would be of another shape.
    """
    changes = [line for line in toml.differences(read_config(run), config) if line.partition(":")[0] not in WATCHED]
    if any(line.partition(":")[0] in _SHAPE for line in changes):
        raise ValueError(f"{run} holds a model of another shape; choose another --run:{_lines(changes)}")
    if any(_is_of_state(line) for line in changes):
        raise ValueError(f"{run} holds the state of another optimizer; choose another --run:{_lines(changes)}")
    if changes and not accept_changes:
        raise ValueError(
            f"{run} was started with another config; choose another --run, or go on with "
            f"--accept-changes:{_lines(changes)}"
        )


_SHAPE = {
    "data.vocabulary",
    *(f"model.{name}" for name in ("architecture", "layers", "width", "context", "inner", "key_heads")),
    *(f"model.{name}" for name in ("qkv_bias", "qk_norm", "tied", "experts")),
}


def _is_of_state(line: str) -> bool:
    """Tell whether the state of the optimizer is another one: an average goes on under another decay."""
    return line.startswith("optimizer.name:") or line.startswith("optimizer.ema:") and '"none"' in line


def check_steps(run: Path, done: int, config: Config) -> None:
    """Refuse a run that has done more steps than it is asked for. Raises: ValueError."""
    if done > config.steps:
        raise ValueError(f"{run}: expected steps of at least the {done} that it has done, came {config.steps}")


def check_unchanged(run: Path, there: list[Path]) -> None:
    """Refuse where another process saved since the run's checkpoints were listed. Raises: ValueError."""
    if checkpoint.list(run) != there:
        raise ValueError(f"{run}: another process has saved here meanwhile; the same command again goes on from there")


def check_same_text(newest: Path, fingerprints: dict[str, str]) -> None:
    """Refuse to go on with a checkpoint on another text than it was trained on.

    Raises: ValueError naming both fingerprints.
    """
    saved = checkpoint.contents(newest).metadata
    changes = checkpoint.differences(
        newest, {key: saved[key] for key in saved if key in _OURS} | {"text": fingerprints}
    )
    if changes:
        raise ValueError(
            f"{newest}: the corpus is not the one it was trained on; choose another --run, or go on with "
            f"--accept-changes:{_lines(changes)}"
        )


_OURS = {"text", "model", "architecture"}


def metadata(fingerprints: dict[str, str], architecture: Architecture, model: Any) -> dict[str, Any]:
    """Return what each checkpoint of a run says: the text, and the shape of the model, so no file beside it does."""
    fields = {name: _listed(value) for name, value in dataclasses.asdict(model).items()}
    return {"text": fingerprints, "architecture": architecture.name, "model": fields}


def _listed(value: Any) -> Any:
    """Make of a tuple what JSON keeps."""
    return list(value) if isinstance(value, tuple) else value


def model_in(found: Path) -> tuple[Architecture, Any] | None:
    """Return the architecture and the shape of the model in a checkpoint; None of one that was saved before they said
    it."""
    said = checkpoint.contents(found).metadata
    if said.get("model") is None:
        return None
    # before there were others, all were of GPT-2
    name = said.get("architecture", "gpt2")
    if name not in architectures.ARCHITECTURES:
        known = ", ".join(architectures.ARCHITECTURES)
        raise ValueError(f"{found}: expected a model of {known}, came {name!r}; upgrade functrain")
    return architectures.ARCHITECTURES[name], architectures.saved(name, said["model"])


def _lines(changes: list[str]) -> str:
    return "".join(f"\n  {change}" for change in changes)


def load_state(newest: Path, like: TrainState, plan: Plan | None = None) -> TrainState:
    """Load a run's state, under a plan each rank its part of what they have verified; of a guard that the checkpoint
    lacks, or that is of another kind, the rest begins anew, as does the loss scale of a run that went on in another
    precision."""
    saved, wanted = set(checkpoint.contents(newest).leaves), tree.paths(like)
    absent = {path for path in wanted if path.startswith(_MAY_BEGIN) and path not in saved}
    other = absent or {path for path in saved if path.startswith(_MAY_BEGIN) and path not in wanted}
    only = [path for path in wanted if path not in absent] if other else None
    state: TrainState = checkpoint.load(newest, like=like, only=only, verify=plan is None)
    return state


_MAY_BEGIN = ("guard/", "loss_scale/")


def other_environment(newest: Path) -> list[str]:
    """List in what this machine differs from the one that saved; where nothing does, a run resumes bit for bit."""
    before, now = checkpoint.contents(newest).environment, checkpoint.environment()
    return [f"{name}: {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
