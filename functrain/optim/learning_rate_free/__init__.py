"""Optimizers and schedules that find their learning rate, or need none that falls."""

__all__: list[str] = []  # what is public of it is in ft.optim
