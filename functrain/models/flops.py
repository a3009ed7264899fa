"""How much a transformer computes, for the model-FLOPs utilisation of a record."""

from __future__ import annotations


def training_flops(*, parameters: int, layers: int, width: int, context: int) -> float:
    """Count the floating-point operations of a training step of a transformer for each token, forward and backward.

    Equals 6 N + 12 L T D: two for each of N parameters and token, in the forward pass, and for the scores of attention
    and what is made of them, over all T tokens of the context, masked ones too; twice as many in the backward pass.
    What is computed again by `ft.recompute` does not count. N are the parameters that multiply: without those of
    positions, and without a token embedding that is not the head, too.

    Source: Chowdhery et al. 2022, "PaLM" (arXiv:2204.02311), appendix B.

    >>> per_token = ft.models.training_flops(parameters=124_000_000, layers=12, width=768, context=1024)
    >>> f"{per_token:.3g}"
    '8.57e+08'
    >>> record = ft.train.record("runs/mine", flops=16 * 1024 * per_token, peak_flops=312e12)  # of an A100
    """
    return 6.0 * parameters + 12.0 * layers * width * context
