"""Models as pure functions of their parameters: each module has `Config`, `init` and `apply`."""

from functrain.models import gpt2

__all__ = ["gpt2"]
