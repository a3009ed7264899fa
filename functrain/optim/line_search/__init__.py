"""Steps whose length is found by evaluating the loss along them."""
