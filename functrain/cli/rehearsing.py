"""What `functrain dry-run` does."""

from __future__ import annotations

import math
from collections.abc import Mapping

from functrain.recipes import dry_run
from functrain.recipes.config import Config
from functrain.recipes.dry_run import Estimate, Gpu


def rehearse(config: Config, what: str, mesh: Mapping[str, int], name: str, *, network: float, node: int) -> None:
    """Rehearse a step, and show what it takes.

    Raises: ValueError for what does not divide.
    """
    gpu = dry_run.GPUS[name]
    found = dry_run.estimate(config, mesh, gpu, network_bytes=network, node=node)
    shape = ",".join(f"{axis}={size}" for axis, size in mesh.items())
    print(f"{what}: {found.parameters:,} parameters on {found.ranks} ranks: {shape}\n")
    for line in lines(found, mesh, gpu, network, node):
        print(line)


def propose(config: Config, what: str, gpus: int, name: str, *, network: float, node: int) -> dict[str, int]:
    """Show meshes of so many GPUs, and return the first.

    Raises: ValueError where none will do.
    """
    gpu = dry_run.GPUS[name]
    found = dry_run.propose(config, gpus, gpu, network_bytes=network, node=node)
    print(f"{what} on {gpus} {gpu.name}, by models of two and three layers:\n")
    print("  mesh                            peak   fits   a step, s, at best   at worst")
    for mesh, peak, best, worst in found:
        fits = "yes" if peak <= gpu.memory_bytes else "no"
        shown = ",".join(f"{axis}={size}" for axis, size in mesh.items())
        print(f"  {shown:26}{_size(peak):>12}   {fits:4}   {best:18.3g}   {worst:8.3g}")
    print()
    return found[0].mesh


def lines(found: Estimate, mesh: Mapping[str, int], gpu: Gpu, network: float, node: int) -> list[str]:
    """Return what is shown of an estimate."""
    step, wide = found.found, max(map(len, found.found.at_peak))
    rows = [f"a rank's memory, at most {_size(step.peak_bytes)} at once, without what the compiler saves:"]
    for name, size in sorted(step.at_peak.items(), key=lambda pair: -pair[1]):
        share = size / step.peak_bytes
        rows.append(f"  {name:{wide}}  {_size(size):>10}  {share:6.1%}  {'#' * round(40 * share)}")
    rows += ["", "collectives of a step          calls       bytes"]
    for row in step.collectives:
        rows.append(f"  {row.kind:8} along {row.axes:12} {row.calls:7,}  {_size(row.size_bytes):>10}")
    if not step.collectives:
        rows.append("  none")
    best, worst = found.best_seconds, found.worst_seconds
    used = [found.model_flops / found.ranks / gpu.peak_flops / seconds for seconds in (best, worst)]
    rows += [
        "",
        f"arithmetic: {step.flops:.3g} floating-point operations, {found.compute_seconds:.3g} s at a {gpu.name}'s peak",
    ]
    rows[-1] += " in half precision"  # of which alone the data sheets are kept; in float32 it takes longer
    for axes, seconds in sorted(found.sending_seconds.items()):
        inside = dry_run.within_machine(axes, mesh, node)
        by, rate = ("links in a machine", gpu.link_bytes) if inside else ("the network", network)
        rows.append(f"sending along {axes}: {seconds:.3g} s by {by}, {rate:.3g} bytes/s")
    rows.append(
        f"a step takes {best:.3g} s at best, if all that is sent goes beside what is computed, and {worst:.3g} s if "
        f"nothing does: MFU of at most {used[0]:.0%} and {used[1]:.0%}"
    )
    return rows + ["", fit(found, gpu)]


def fit(found: Estimate, gpu: Gpu) -> str:
    """Tell whether a rank fits into a GPU, and what would help."""
    need, there = found.found.peak_bytes, gpu.memory_bytes
    if need <= there:
        return f"fits into a {gpu.name} of {_size(there)}: {need / there:.0%} of it"
    largest = sorted(found.found.at_peak.items(), key=lambda pair: -pair[1])[:2]
    names = " and ".join(f"{name} with {_size(size)}" for name, size in largest)
    ways = {
        "state": "more ranks along fsdp", "gathered params": "more ranks along tensor, which split the vocabulary",
        "forward": "--recompute 1, or a larger --accumulate", "backward": "a larger --accumulate, or tensor=2",
        "update": "more ranks along fsdp",
    }  # fmt: skip
    return (
        f"does not fit into a {gpu.name} of {_size(there)}: the largest are {names}; try "
        f"{ways.get(largest[0][0], 'more ranks')}"
    )


def _size(count: float) -> str:
    power = min(int(math.log(max(count, 1.0), 1024)), 4)
    return f"{count / 1024**power:.4g} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}"
