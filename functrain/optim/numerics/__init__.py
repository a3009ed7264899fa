"""What all of `optim` counts with: moments, sums, safe roots, rounding, and loops that compile."""

__all__: list[str] = []  # what is public of it is in ft.optim
