"""Bounds on gradients, updates and parameters: of norms, values, single examples, and of steps that are odd."""

__all__: list[str] = []  # what is public of it is in ft.optim
