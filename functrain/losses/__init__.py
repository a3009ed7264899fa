"""Losses: `Loss`, what a loss function returns; losses of optax, under its names; cross entropies over a vocabulary.

A loss of optax's returns one number per example, and takes `dim` where optax has `axis`: a loss function sums them
into a `Loss`, or returns their mean.
"""

from functrain.losses.binary import (
    hinge_loss,
    perceptron_loss,
    sigmoid_binary_cross_entropy,
    sigmoid_focal_loss,
    sparsemax_loss,
)
from functrain.losses.chunked import next_token_from_hidden
from functrain.losses.classification import classification
from functrain.losses.cross_entropy import next_token, softmax_cross_entropy_with_integer_labels
from functrain.losses.ctc import ctc_loss, ctc_loss_with_forward_probs
from functrain.losses.divergences import (
    convex_kl_divergence,
    generalized_kl_divergence,
    kl_divergence,
    kl_divergence_with_log_targets,
)
from functrain.losses.embeddings import ntxent, triplet_margin_loss
from functrain.losses.fenchel_young import make_fenchel_young_loss
from functrain.losses.load_balancing import ExpertLoad, expert_load, load_balancing
from functrain.losses.loss import Loss, LossResult
from functrain.losses.multiclass import (
    multiclass_hinge_loss,
    multiclass_perceptron_loss,
    multiclass_sparsemax_loss,
    sparsemax,
)
from functrain.losses.ranking import ranking_softmax_loss
from functrain.losses.regression import (
    cosine_distance,
    cosine_similarity,
    huber_loss,
    l2_loss,
    log_cosh,
    squared_error,
)
from functrain.losses.segmentation import binary_dice_loss, dice_loss, multiclass_generalized_dice_loss
from functrain.losses.soft_labels import (
    poly_loss_cross_entropy,
    safe_softmax_cross_entropy,
    smooth_labels,
    softmax_cross_entropy,
)
from functrain.tree import elsewhere

__all__ = [
    "ExpertLoad", "Loss", "LossResult", "binary_dice_loss", "classification", "convex_kl_divergence",
    "cosine_distance", "cosine_similarity", "ctc_loss", "ctc_loss_with_forward_probs", "dice_loss", "expert_load",
    "generalized_kl_divergence", "hinge_loss", "huber_loss", "kl_divergence", "kl_divergence_with_log_targets",
    "l2_loss", "load_balancing", "log_cosh", "make_fenchel_young_loss", "multiclass_generalized_dice_loss",
    "multiclass_hinge_loss", "multiclass_perceptron_loss", "multiclass_sparsemax_loss", "next_token",
    "next_token_from_hidden", "ntxent", "perceptron_loss", "poly_loss_cross_entropy", "ranking_softmax_loss",
    "safe_softmax_cross_entropy", "sigmoid_binary_cross_entropy", "sigmoid_focal_loss", "smooth_labels",
    "softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels", "sparsemax", "sparsemax_loss",
    "squared_error", "triplet_margin_loss",
]  # fmt: skip

elsewhere.furnish(__name__)
