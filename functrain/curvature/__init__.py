"""Second derivatives of a loss, and what is made of them: products, spectra, influence, posteriors."""

from functrain.curvature import laplace
from functrain.curvature.implicit import implicit_grad, influence
from functrain.curvature.krylov import Estimate, Solution, Spectrum, conjugate_gradients, hutchinson, lanczos
from functrain.curvature.products import fisher_vp, ggnvp, hvp
from functrain.tree import elsewhere

__all__ = [
    "Estimate", "Solution", "Spectrum", "conjugate_gradients", "fisher_vp", "ggnvp", "hutchinson", "hvp",
    "implicit_grad", "influence", "lanczos", "laplace",
]  # fmt: skip

elsewhere.furnish(__name__)
