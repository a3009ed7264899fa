"""Optimizers that look at a leaf as a matrix, or at curvature: and the linear algebra that they stand on."""

__all__: list[str] = []  # what is public of it is in ft.optim
