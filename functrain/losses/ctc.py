"""Connectionist temporal classification: the probability of a label sequence, over all its alignments in time.

B batch, T frames, K classes, N labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.losses.reduction import Scalar, check_integer


def ctc_loss_with_forward_probs(
    logits: Tensor,
    logit_paddings: Tensor,
    labels: Tensor,
    label_paddings: Tensor,
    *,
    blank_id: int = 0,
    log_epsilon: Scalar = -1e5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute minus the log-probability of each label sequence, and the forward probabilities that it is made of.

    Paddings are 1 where a frame or label does not count, else 0; labels are padded on the right, with any integers.
    `log_epsilon` stands for log 0. Equals `optax.losses.ctc_loss_with_forward_probs`, and its loss
    `torch.nn.functional.ctc_loss` without reduction, but for a rounding below 0, which is 0.

    Returns the losses (B,), and the logarithms of the probabilities that after frame t, n labels are out and the
    last frame was a blank (T, B, N + 1) or label n + 1 (T, B, N).

    Source: Graves et al. 2006, Connectionist temporal classification.

    Shapes: logits (B, T, K), logit_paddings (B, T), labels and label_paddings (B, N).
    Raises: ValueError for other shapes, TypeError for labels that are no integers.

    >>> logits, labels = torch.zeros(1, 2, 3), torch.tensor([[1]])  # two frames, three classes, one label
    >>> none = torch.zeros(1, 2)
    >>> losses, blanks, emitted = ft.losses.ctc_loss_with_forward_probs(logits, none, labels, none[:, :1])
    >>> losses, blanks.shape, emitted.shape
    (tensor([1.0986]), torch.Size([2, 1, 2]), torch.Size([2, 1, 1]))
    """
    _check(logits, logit_paddings, labels, label_paddings)
    batch, classes, most = logits.shape[0], logits.shape[2], labels.shape[1]
    paddings = logit_paddings.to(logits.dtype)  # (B, T)
    logs = F.log_softmax(logits, -1)  # (B, T, K)
    blanks = logs[:, :, blank_id : blank_id + 1].transpose(0, 1)  # (T, B, 1)
    # an integer of the padding that is no class gets log-probability 0, as a product with its one-hot code gives
    known = (labels >= 0) & (labels < classes)  # (B, N)
    index = torch.where(known, labels, 0).long()[:, None].expand(batch, logits.shape[1], most)  # (B, T, N)
    emits = torch.where(known[:, None], logs.gather(-1, index), 0.0).transpose(0, 1)  # (T, B, N)
    # 1 where the next label is the same: then a blank must come between
    repeat = F.pad((labels[:, :-1] == labels[:, 1:]).to(logits.dtype), (0, 1))  # (B, N)

    phi = torch.cat([logits.new_zeros(batch, 1), logits.new_zeros(batch, most) + log_epsilon], 1)  # (B, N + 1)
    emit = logits.new_zeros(batch, most) + log_epsilon  # (B, N)
    phis, all_emits = [], []
    for blank, now, pad in zip(blanks, emits, paddings.t().unsqueeze(-1), strict=True):
        free = _advance(phi, emit + log_epsilon * repeat)
        next_emit = torch.logaddexp(free[:, :-1] + now, emit + now)
        next_phi = _advance(free + blank, emit + blank + log_epsilon * (1.0 - repeat))
        emit = pad * emit + (1.0 - pad) * next_emit
        phi = pad * phi + (1.0 - pad) * next_phi
        phis.append(phi)
        all_emits.append(emit)
    phis[-1] = _advance(phi, emit)
    lengths = most - torch.sum(label_paddings.to(logits.dtype), 1).long()  # (B,)
    losses = -phis[-1].gather(1, lengths[:, None]).squeeze(1)  # (B,)
    # the probabilities of all paths may add up to 1 and a rounding; the slope stays
    losses = torch.where(losses < 0, losses - losses.detach(), losses)
    return losses, torch.stack(phis), torch.stack(all_emits)


def ctc_loss(
    logits: Tensor,
    logit_paddings: Tensor,
    labels: Tensor,
    label_paddings: Tensor,
    *,
    blank_id: int = 0,
    log_epsilon: Scalar = -1e5,
) -> Tensor:
    """Compute the losses of `ctc_loss_with_forward_probs` alone, (B,).

    Equals `optax.losses.ctc_loss`.

    >>> logits, labels = torch.zeros(1, 2, 3), torch.tensor([[1]])  # of nine paths, three read as the label
    >>> ft.losses.ctc_loss(logits, torch.zeros(1, 2), labels, torch.zeros(1, 1))
    tensor([1.0986])
    """
    return ctc_loss_with_forward_probs(
        logits, logit_paddings, labels, label_paddings, blank_id=blank_id, log_epsilon=log_epsilon
    )[0]


def _advance(phi: Tensor, more: Tensor) -> Tensor:
    """Add the probabilities `more` of having put out one label more."""
    return torch.cat([phi[:, :1], torch.logaddexp(phi[:, 1:], more)], 1)


def _check(logits: Tensor, logit_paddings: Tensor, labels: Tensor, label_paddings: Tensor) -> None:
    check_integer("ctc_loss", labels=labels)
    right = logits.ndim == 3 and labels.ndim == 2 and logits.shape[:2] == logit_paddings.shape
    if not right or labels.shape != label_paddings.shape or labels.shape[0] != logits.shape[0]:
        came = ", ".join(str(tuple(x.shape)) for x in (logits, logit_paddings, labels, label_paddings))
        raise ValueError(
            f"ctc_loss: expected logits (B, T, K), logit_paddings (B, T), labels and label_paddings (B, N); came {came}"
        )
    if logits.shape[1] == 0 or labels.shape[1] == 0:
        raise ValueError(
            f"ctc_loss: expected at least one frame and one label, came {logits.shape[1]} and {labels.shape[1]}; "
            "pad with one"
        )
