"""The search for a trial that breaks a law, and for the smallest one."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, NoSuchExample
from hypothesis.strategies import SearchStrategy

from functrain.testing.law import Trial
from functrain.testing.strategies import seeds
from functrain.tree import Params

__all__ = ["SearchStrategy", "exists", "trials_on"]


def trials_on(params: SearchStrategy[Params] | Params) -> SearchStrategy[Trial]:
    """Draw trials on params of a strategy, or on one tree."""
    return st.builds(Trial, params if isinstance(params, SearchStrategy) else st.just(params), seeds)


def exists(trials: SearchStrategy[Trial], breaks: Callable[[Trial], bool], examples: int, *, smallest: bool) -> bool:
    """Tell whether one of the drawn trials breaks a law; with `smallest` go on to smaller ones, of which the last that
    `breaks` was true of is the smallest. The trials are the same ones at every call."""
    chosen = settings(
        max_examples=examples,
        phases=[Phase.generate, Phase.shrink] if smallest else [Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        find(trials, breaks, settings=chosen, random=Random(0))
    except NoSuchExample:
        return False
    except Flaky:  # it broke once, and not again: what is not deterministic is broken all the same
        pass
    return True
