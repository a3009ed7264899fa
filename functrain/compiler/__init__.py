"""A function run once on tensors without data, and compiled; what is public of it is `ft.compile`."""

__all__: list[str] = []
