"""Steps whose length is found by evaluating the loss along them."""

__all__: list[str] = []  # what is public of it is in ft.optim
