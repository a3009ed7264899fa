"""Bounds on gradients, updates and parameters: of norms, values, single examples, and of steps that are odd."""
