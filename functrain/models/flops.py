"""How much a transformer computes, for the model-FLOPs utilisation of a record."""

from __future__ import annotations

import torch

from functrain.models import bert, gpt2, llama, modernbert
from functrain.tree import items


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


def training_flops_of(
    config: gpt2.Config | llama.Config | bert.Config | modernbert.Config,
    context: int | None = None,
    *,
    predictions: int | None = None,
) -> float:
    """Count the floating-point operations of a training step for each token of a model of that config.

    As `training_flops` counts them, by the matrices that a token is multiplied with: of a mixture of experts, those of
    `experts_per_token`; of a BERT, without the matrices that see one vector of a row alone. The rows have `context`
    tokens, by default as many as the model sees; a window is of no effect, as it is to a kernel that masks. With
    `predictions`, a masked language model computes the logits of so many `places` of each row.

    Raises: TypeError for the config of something else; ValueError for predictions of a model that computes all logits.

    >>> config = ft.models.gpt2.Config(vocab=50257, context=1024, layers=12, heads=12, width=768)
    >>> f"{ft.models.training_flops_of(config):.3g}"
    '8.54e+08'
    """
    if not isinstance(config, gpt2.Config | llama.Config | bert.Config | modernbert.Config):
        raise TypeError(
            "training_flops_of: expected the Config of gpt2, llama, bert or modernbert, came "
            f"{type(config).__name__}; count the parameters of another model, and call training_flops"
        )
    once: tuple[str, ...]
    key, width, kept = torch.zeros(2, dtype=torch.int32, device="meta"), config.width, 1.0
    if isinstance(config, llama.Config):
        params, once = llama.init(config, key), () if config.tied else ("embed",)
        width = config.heads * config.width_of_head
        kept = config.experts_per_token / max(config.experts, 1)
    elif isinstance(config, bert.Config):
        params, once = bert.init(config, key), ("embeddings/positions", "embeddings/types", "pooler", "next_sentence")
        if config.head not in ("pretraining", "masked_lm"):  # the table is no head, too
            once += ("embeddings/tokens",)
        if config.head == "sequence":
            once += ("classifier",)
    elif isinstance(config, modernbert.Config):
        is_head = config.head == "masked_lm" and config.tied
        params, once = modernbert.init(config, key), () if is_head else ("embeddings/tokens",)
        if config.head == "sequence":
            once += ("head", "classifier")
    else:
        params, once = gpt2.init(config, key), ("wpe",)
    length = config.context if context is None else context
    head: tuple[str, ...] = ()  # what sees the places of predictions alone
    if predictions is not None:
        if not isinstance(config, bert.Config | modernbert.Config) or config.head not in ("pretraining", "masked_lm"):
            raise ValueError(
                f"training_flops_of: expected no predictions of a model that takes no places, came {predictions}"
            )
        head = ("embeddings/tokens", "masked_lm", "head", "decoder")
    found = [(path, x) for path, x in items(params) if x.dim() > 1 and not path.startswith(once)]
    # a leaf of three dimensions holds the matrices of all experts
    parameters = sum(
        x.numel() * (kept if x.dim() == 3 else 1.0) * ((predictions or 0) / length if path.startswith(head) else 1.0)
        for path, x in found
    )
    return 6.0 * parameters + 12.0 * config.layers * width * length
