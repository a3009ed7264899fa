"""Optimizers and schedules that find their learning rate, or need none that falls."""
