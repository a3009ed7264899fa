"""Losses where optax is no witness: what it has as NaN, other witnesses, transforms, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from functrain import losses

torch.manual_seed(0)
X, Y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1])
ONE_HOT = F.one_hot(LABELS, 4).double()


def gradient(loss, x):
    x = x.detach().requires_grad_()
    out = loss(x)
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


def test_a_row_that_keeps_no_class_loses_zero_and_has_a_zero_gradient():
    where = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    for loss in (losses.softmax_cross_entropy, losses.poly_loss_cross_entropy):
        out, grad = gradient(lambda x, loss=loss: loss(x, ONE_HOT, where=where), X)
        assert out[1] == 0 and torch.equal(grad[1], torch.zeros(4, dtype=X.dtype)) and grad.isfinite().all()
    out, grad = gradient(lambda x: losses.ranking_softmax_loss(x, ONE_HOT, where=where), X)
    one, _ = gradient(lambda x: losses.ranking_softmax_loss(x, ONE_HOT, where=where, reduce_fn=torch.sum), X)
    assert torch.isclose(one / 2, out) and torch.equal(grad[1], torch.zeros(4, dtype=X.dtype))
    nothing = torch.zeros_like(where)
    assert losses.ranking_softmax_loss(X, ONE_HOT, where=nothing) == 0


def test_what_a_mask_leaves_out_may_be_anything():
    spoilt = X.clone()
    spoilt[:, 2] = torch.tensor([math.nan, math.inf, -math.inf])
    where = torch.tensor([True, True, False, True]).expand(3, 4)
    targets = torch.softmax(Y, -1)
    for loss in (losses.softmax_cross_entropy, losses.kl_divergence, losses.generalized_kl_divergence,
                 losses.poly_loss_cross_entropy, losses.cosine_similarity):  # fmt: skip
        out, grad = gradient(lambda x, loss=loss: loss(x, targets, where=where), spoilt)
        clean, clean_grad = gradient(lambda x, loss=loss: loss(x, targets, where=where), torch.where(where, X, 0.0))
        assert torch.equal(out, clean) and torch.equal(grad[:, :2], clean_grad[:, :2]), loss.__name__


def test_the_derivative_by_a_target_of_zero_is_finite():
    _, grad = gradient(lambda t: losses.kl_divergence(X, t), ONE_HOT)
    # d/dt (t log t - t x) at t = 1 is 1 - x; at t = 0 the first term counts as 0
    assert torch.allclose(grad, torch.where(ONE_HOT == 1, 1.0, 0.0) - X)


def test_a_label_of_zero_takes_a_logit_of_minus_infinity():
    logits = X.clone()
    logits[0, 1] = -math.inf
    out, grad = gradient(lambda x: losses.safe_softmax_cross_entropy(x, ONE_HOT), logits)
    assert out.isfinite().all() and grad.isfinite().all() and grad[0, 1] == 0
    assert losses.softmax_cross_entropy(logits, ONE_HOT)[0].isnan()
    impossible = torch.tensor([1])
    assert losses.safe_softmax_cross_entropy(logits[:1], F.one_hot(impossible, 4)) == math.inf


def test_ntxent_of_one_kind_has_a_zero_gradient():
    out, grad = gradient(lambda x: losses.ntxent(x, torch.zeros(3, dtype=torch.long)), X)
    assert out == 0 and torch.equal(grad, torch.zeros_like(X))


def test_ctc_loss_is_that_of_torch():
    logits = torch.randn(2, 7, 5, dtype=torch.float64)
    labels, lengths, label_lengths = torch.tensor([[1, 1, 3], [2, 4, 0]]), torch.tensor([7, 5]), torch.tensor([3, 2])
    paddings = (torch.arange(7) >= lengths[:, None]).double(), (torch.arange(3) >= label_lengths[:, None]).double()
    mine = gradient(lambda x: losses.ctc_loss(x, paddings[0], labels, paddings[1]), logits)
    theirs = gradient(
        lambda x: F.ctc_loss(
            F.log_softmax(x, -1).transpose(0, 1), labels, lengths, label_lengths, reduction="none"
        ), logits)  # fmt: skip
    # float64; exp(-1e5) is 0
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sure", [9.0, 17.0, 40.0])
def test_ctc_loss_is_never_negative_and_keeps_its_slope(dtype, sure):
    logits = torch.tensor([[[0.0, sure]] * 2], dtype=dtype)
    pads = torch.zeros(1, 2), torch.zeros(1, 1)
    loss, slope = gradient(lambda x: losses.ctc_loss(x, pads[0], torch.tensor([[1]]), pads[1]).sum(), logits)
    exact = -math.log1p(-math.exp(-2 * math.log1p(math.exp(sure))))
    assert 0.0 <= float(loss) and abs(float(loss) - exact) < 4 * torch.finfo(dtype).eps
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_triplet_distances_are_norms_of_any_degree(degree):
    z = torch.randn(3, 4, dtype=torch.float64)
    out = losses.triplet_margin_loss(X, Y, z, norm_degree=degree, margin=0.5, eps=0.0)
    norms = [torch.linalg.vector_norm(X - other, degree, -1) for other in (Y, z)]
    assert torch.allclose(out, F.relu(norms[0] - norms[1] + 0.5))


def test_binary_dice_takes_probabilities():
    p = torch.sigmoid(X)
    targets = (Y > 0).double()
    given = losses.binary_dice_loss(p, targets, apply_sigmoid=False)
    assert torch.allclose(given, losses.binary_dice_loss(X, targets))
    hits = (p * targets).sum(1)
    assert torch.allclose(given, 1 - (2 * hits + 2) / (p.sum(1) + targets.sum(1) + 2))


def test_sparsemax_is_the_nearest_distribution_and_the_gradient_of_its_loss():
    scores = torch.tensor([[0.5, 2.0, 1.9], [1e4, 1e4, 0.0], [-math.inf, 0.0, 0.0]], dtype=torch.float64)
    p = losses.sparsemax(scores)
    want = torch.tensor([[0.0, 0.55, 0.45], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    assert torch.allclose(p, want)
    labels = torch.tensor([1, 0, 2])
    out, grad = gradient(lambda s: losses.multiclass_sparsemax_loss(s, labels), scores)
    assert torch.allclose(grad, p - F.one_hot(labels, 3)) and (out >= 0).all()
    right, _ = gradient(lambda s: losses.multiclass_sparsemax_loss(s, torch.tensor([1])), torch.tensor([[0.0, 1.5]]))
    assert right == 0
    assert torch.autograd.gradcheck(losses.sparsemax, (X.clone().requires_grad_(),))


def test_the_fenchel_young_loss_of_logsumexp_is_softmax_cross_entropy():
    loss = losses.make_fenchel_young_loss(lambda s, scale=1.0: torch.logsumexp(s * scale, -1))
    assert torch.allclose(loss(X, ONE_HOT), losses.softmax_cross_entropy(X, ONE_HOT))
    assert loss(X[0], ONE_HOT[0]).shape == () and loss(X.expand(2, 3, 4), ONE_HOT).shape == (2, 3)
    assert torch.allclose(loss(X, ONE_HOT, scale=2.0), torch.logsumexp(2 * X, -1) - (X * ONE_HOT).sum(-1))
    _, grad = gradient(lambda x: loss(x, ONE_HOT), X)
    assert torch.allclose(grad, torch.softmax(X, -1) - ONE_HOT)


WHERE = torch.tensor([True, True, False, True]).expand(3, 4)
PAD, FRAMES = torch.zeros(3, 4, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
ALL = {
    "sigmoid_binary_cross_entropy": lambda x: losses.sigmoid_binary_cross_entropy(x, ONE_HOT),
    "sigmoid_focal_loss": lambda x: losses.sigmoid_focal_loss(x, ONE_HOT, alpha=0.25),
    "hinge_loss": lambda x: losses.hinge_loss(x, ONE_HOT * 2 - 1),
    "perceptron_loss": lambda x: losses.perceptron_loss(x, ONE_HOT * 2 - 1),
    "sparsemax_loss": lambda x: losses.sparsemax_loss(x, ONE_HOT),
    "multiclass_hinge_loss": lambda x: losses.multiclass_hinge_loss(x, LABELS),
    "multiclass_perceptron_loss": lambda x: losses.multiclass_perceptron_loss(x, LABELS),
    "multiclass_sparsemax_loss": lambda x: losses.multiclass_sparsemax_loss(x, LABELS),
    "softmax_cross_entropy": lambda x: losses.softmax_cross_entropy(x, ONE_HOT, where=WHERE),
    "safe_softmax_cross_entropy": lambda x: losses.safe_softmax_cross_entropy(x, ONE_HOT),
    "poly_loss_cross_entropy": lambda x: losses.poly_loss_cross_entropy(x, ONE_HOT, where=WHERE),
    "smooth_labels": lambda x: losses.smooth_labels(x, 0.1, where=WHERE),
    "kl_divergence": lambda x: losses.kl_divergence(x, ONE_HOT, where=WHERE),
    "kl_divergence_with_log_targets": lambda x: losses.kl_divergence_with_log_targets(x, Y),
    "generalized_kl_divergence": lambda x: losses.generalized_kl_divergence(x, ONE_HOT),
    "squared_error": lambda x: losses.squared_error(x, Y),
    "huber_loss": lambda x: losses.huber_loss(x, Y),
    "log_cosh": lambda x: losses.log_cosh(x, Y),
    "cosine_distance": lambda x: losses.cosine_distance(x, Y, where=WHERE),
    "ctc_loss": lambda x: losses.ctc_loss(FRAMES * x.sum(), PAD, torch.tensor([[1, 1], [2, 4], [3, 0]]), PAD[:, :2]),
    "ntxent": lambda x: losses.ntxent(x, torch.tensor([0, 0, 1])),
    "triplet_margin_loss": lambda x: losses.triplet_margin_loss(x, Y, ONE_HOT),
    "dice_loss": lambda x: losses.dice_loss(x, ONE_HOT, alpha=0.3, beta=0.7),
    "multiclass_generalized_dice_loss": lambda x: losses.multiclass_generalized_dice_loss(x, ONE_HOT),
    "binary_dice_loss": lambda x: losses.binary_dice_loss(x, ONE_HOT),
    "ranking_softmax_loss": lambda x: losses.ranking_softmax_loss(x, ONE_HOT, where=WHERE),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_a_mapped_lane_equals_alone(name):
    loss = ALL[name]
    lanes = torch.stack([X, Y, X * 3])
    value_and_grad = torch.func.grad_and_value(lambda x: loss(x).sum())
    for lane, g, v in zip(lanes, *torch.func.vmap(value_and_grad)(lanes), strict=True):
        grad, value = value_and_grad(lane)
        # float64; sums in another order
        assert torch.allclose(grad, g, atol=1e-12) and torch.allclose(value, v, atol=1e-12)


def test_traced_equals_eager():
    def all_of(x):
        return [torch.func.grad_and_value(lambda x, loss=loss: loss(x).sum())(x) for loss in ALL.values()]

    traced = torch.compile(all_of, fullgraph=True, backend="aot_eager")(X)
    for name, mine, eager in zip(ALL, traced, all_of(X), strict=True):
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(mine, eager, strict=True)), name


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="softmax_cross_entropy: expected floating-point logits, came torch.int64"):
        losses.softmax_cross_entropy(LABELS, ONE_HOT)
    with pytest.raises(ValueError, match=r"squared_error: .* one shape, came \(3, 4\) and \(3,\); expand one"):
        losses.squared_error(X, LABELS)
    with pytest.raises(ValueError, match=r"class_weights \(4,\), came \(3,\)"):
        losses.dice_loss(X, ONE_HOT, class_weights=torch.ones(3))
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none', came 'max'"):
        losses.dice_loss(X, ONE_HOT, reduction="max")
    with pytest.raises(ValueError, match=r"ctc_loss: expected logits \(B, T, K\).*came \(3, 4\)"):
        losses.ctc_loss(X, X, LABELS[:, None], X)
    with pytest.raises(ValueError, match=r"embeddings \(B, D\) and labels \(B,\), came \(3, 4\) and \(2,\)"):
        losses.ntxent(X, LABELS[:2])
    with pytest.raises(TypeError, match="expected integer labels, came torch.float64"):
        losses.multiclass_sparsemax_loss(X, X[:, 0])
