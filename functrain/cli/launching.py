"""Ranks of a command on one machine, started as torchrun does it."""

from __future__ import annotations

import os
from collections.abc import Sequence


def launch(words: Sequence[str], ranks: int) -> int:
    """Run `functrain` with these words in so many processes, each a rank; return the exit code.

    Where one fails, the others are ended, and its code is returned. A signal goes to all, and its code is 128 more.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # a share of the processors for each, where torchrun would take one thread
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    try:
        # behind --, what begins like an option of torchrun's is none
        run(parse_args(["--standalone", "--nproc-per-node", str(ranks), "-m", "--", "functrain", *words]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0
