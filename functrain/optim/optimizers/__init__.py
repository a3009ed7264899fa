"""Optimizers, one file an algorithm: the scaling by which it is known, its state, and the chain that is used."""

__all__: list[str] = []  # what is public of it is in ft.optim
