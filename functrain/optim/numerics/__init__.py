"""What all of `optim` counts with: moments, sums, safe roots, rounding, and loops that compile."""
