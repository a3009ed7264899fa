"""The folder of a run: what it was asked for, and whether a run may go on in it.

config.toml      all options, as resolved
tokenizer.json   how text becomes tokens
tokens/          the corpus as tokens
metrics.jsonl    one line per step; tensorboard/ holds the same as events
checkpoints/     the training state, the newest last
programs/        compiled code, for a resumed run
summary.json     the end: validation loss, bits per byte, the trigram model's
sample.txt, loss.png
"""

from __future__ import annotations

from pathlib import Path

from functrain import checkpoint, tree
from functrain.data.atomic import replacing
from functrain.recipes import toml
from functrain.recipes.config import Config
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
    return toml.loads(file.read_text(encoding="utf-8"), Config(), str(file))


def write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(file) as stream:
        stream.write(text.encode("utf-8"))


def check_same_config(run: Path, config: Config) -> None:
    """Refuse to go on with a run under another config; the error is the difference.

    Raises: ValueError.
    """
    changes = toml.differences(read_config(run), config)
    if changes:
        raise ValueError(
            f"{run} was started with another config; choose another --run, or go on with "
            f"--accept-changes:{_lines(changes)}"
        )


def check_same_text(newest: Path, fingerprints: dict[str, str]) -> None:
    """Refuse to go on with a checkpoint on another text than it was trained on.

    Raises: ValueError naming both fingerprints.
    """
    changes = checkpoint.differences(newest, {"text": fingerprints})
    if changes:
        raise ValueError(
            f"{newest}: the corpus is not the one it was trained on; choose another --run, or go on with "
            f"--accept-changes:{_lines(changes)}"
        )


def _lines(changes: list[str]) -> str:
    return "".join(f"\n  {change}" for change in changes)


def load_state(newest: Path, like: TrainState) -> TrainState:
    """Load a run's state; of a guard that the checkpoint lacks, or that is of another kind, the rest begins anew."""
    saved, wanted = set(checkpoint.contents(newest).leaves), tree.paths(like)
    absent = {path for path in wanted if path.startswith("guard/") and path not in saved}
    other = absent or {path for path in saved if path.startswith("guard/") and path not in wanted}
    only = [path for path in wanted if path not in absent] if other else None
    state: TrainState = checkpoint.load(newest, like=like, only=only)
    return state


def other_environment(newest: Path) -> list[str]:
    """List in what this machine differs from the one that saved; where nothing does, a run resumes bit for bit."""
    before, now = checkpoint.contents(newest).environment, checkpoint.environment()
    return [f"{name}: {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
