"""`functrain dry-run`: a step on GPUs that are not there."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from functrain.cli import architecture
from functrain.cli.options import UsageError, parse
from functrain.recipes.config import PRESETS, Config, mesh_of

DESCRIPTION = """Rehearse a training step of a preset on a mesh of any size, on this machine, without GPUs: what each
rank holds in memory and what of, which collectives it takes, how many floating-point operations, and what time that is
at best on a GPU that is named. --mesh data=16,fsdp=8,tensor=8 is a mesh of 1024."""


@dataclass(frozen=True, kw_only=True)
class Options:
    config: Annotated[Config, tyro.conf.arg(name="")]
    gpus: int = 0
    """In place of --mesh: propose meshes of so many, those that fit and are the fastest first."""
    gpu: Literal["a100", "h100", "h200", "b200"] = "h200"
    """Whose memory, arithmetic and links count."""
    node: int = 8
    """GPUs of one machine, which links join."""
    network: float = 50e9
    """What each GPU sends to other machines, in bytes a second; 50e9 is 400 Gbit/s."""


def main(words: Sequence[str]) -> None:
    if not words or words[0].startswith("-") and not {"-h", "--help"} & set(words):
        raise UsageError("dry-run: expected a preset; functrain dry-run PRESET --mesh data=2,fsdp=8")
    what, rest = ("tiny", words) if words[0].startswith("-") else (words[0], words[1:])
    if what not in PRESETS:
        close = difflib.get_close_matches(what, PRESETS, 1)
        known = f"did you mean {close[0]}?" if close else f"there are {', '.join(PRESETS)}"
        raise UsageError(f"no preset {what!r}; {known}")
    config, rest = architecture.chosen(PRESETS[what], list(rest))
    options = parse(
        Options, rest, prog="functrain dry-run PRESET", description=DESCRIPTION, default=Options(config=config)
    )
    if options.node < 1 or not 0.0 < options.network < float("inf"):
        raise UsageError(
            f"dry-run: expected --node of at least 1 and --network above 0, came {options.node}, {options.network}"
        )
    mesh = mesh_of(options.config.mesh, 1)
    if options.gpus < 0 or options.gpus and options.config.mesh != "auto":
        raise UsageError(f"dry-run: expected --mesh or --gpus of at least 1, came {options.gpus} and a mesh")
    # help and a wrong option need no torch, which takes seconds to load
    from functrain.cli import rehearsing

    if options.gpus:
        asked = options.config, what, options.gpus, options.gpu
        mesh = rehearsing.propose(*asked, network=options.network, node=options.node)
    rehearsing.rehearse(options.config, what, mesh, options.gpu, network=options.network, node=options.node)
