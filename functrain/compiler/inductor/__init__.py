"""torch's compiler, as we use it: its private names stand in this folder alone."""

__all__: list[str] = []
