"""The Laplace approximation: a Gaussian posterior around trained parameters, from the curvature of the loss there.

A fit (`diagonal_ggn`, `diagonal_fisher`, `full_ggn`) goes once over the data, for all parameters or for those that
`where` chooses, such as a last layer. The rest are functions of the posterior.
"""

from functrain.curvature.laplace.evidence import log_marginal_likelihood, maximize_evidence
from functrain.curvature.laplace.fitting import diagonal_fisher, diagonal_ggn, full_ggn
from functrain.curvature.laplace.posterior import Diagonal, Full, sample
from functrain.curvature.laplace.predicting import Prediction, moderate, predict
from functrain.tree import elsewhere

__all__ = [
    "Diagonal", "Full", "Prediction", "diagonal_fisher", "diagonal_ggn", "full_ggn", "log_marginal_likelihood",
    "maximize_evidence", "moderate", "predict", "sample",
]  # fmt: skip

elsewhere.furnish(__name__)
