"""Optimizers that look at a leaf as a matrix, or at curvature: and the linear algebra that they stand on."""
