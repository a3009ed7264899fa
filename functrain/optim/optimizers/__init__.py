"""Optimizers, one file an algorithm: the scaling by which it is known, its state, and the chain that is used."""
