"""Optimizers: gradient transformations under optax's names, one file per family."""

# ruff: noqa: F401
# mypy: implicit-reexport

from functrain.optim.adabelief import ScaleByBeliefState, adabelief, scale_by_belief
from functrain.optim.adadelta import ScaleByAdaDeltaState, adadelta, scale_by_adadelta
from functrain.optim.adagrad import ScaleByRssState, adagrad, scale_by_rss
from functrain.optim.adam import ScaleByAdamState, adam, adamw, nadam, nadamw, scale_by_adam
from functrain.optim.adamax import adamax, adamaxw, scale_by_adamax
from functrain.optim.adan import ScaleByAdanState, adan, scale_by_adan
from functrain.optim.amsgrad import ScaleByAmsgradState, amsgrad, scale_by_amsgrad
from functrain.optim.clipping import (
    ClipByGlobalNormState,
    ClipState,
    clip,
    clip_by_block_rms,
    clip_by_global_norm,
    global_norm,
)
from functrain.optim.combining import chain, named_chain
from functrain.optim.decay import AddDecayedWeightsState, WeightDecaySchedule, add_decayed_weights
from functrain.optim.lion import ScaleByLionState, lion, scale_by_lion
from functrain.optim.masking import MaskedNode, MaskedState, MaskOrFn, freeze, masked
from functrain.optim.moments import (
    bias_correction,
    update_infinity_moment,
    update_moment,
    update_moment_per_elem_norm,
)
from functrain.optim.momentum import EmaState, TraceState, ema, sgd, trace
from functrain.optim.noise import AddNoiseState, add_noise, noisy_sgd
from functrain.optim.novograd import ScaleByNovogradState, novograd, scale_by_novograd
from functrain.optim.numerics import safe_increment, safe_norm, safe_root_mean_squares
from functrain.optim.optimistic import (
    ScaleByOptimisticGradientState,
    optimistic_adam,
    optimistic_adam_v2,
    optimistic_gradient_descent,
    scale_by_optimistic_gradient,
)
from functrain.optim.polyak import polyak_sgd, scale_by_polyak
from functrain.optim.radam import radam, scale_by_radam
from functrain.optim.rmsprop import (
    ScaleByRmsState,
    ScaleByRmsWithCountState,
    ScaleByRStdDevState,
    ScaleByRStdDevWithCountState,
    rmsprop,
    scale_by_rms,
    scale_by_stddev,
)
from functrain.optim.rprop import ScaleByRpropState, rprop, scale_by_rprop
from functrain.optim.scaling import (
    ScaleByScheduleState,
    ScaleState,
    scale,
    scale_by_learning_rate,
    scale_by_schedule,
)
from functrain.optim.sign import scale_by_sign, sign_sgd, signum
from functrain.optim.transformation import (
    EmptyState,
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    TransformInitFn,
    TransformUpdateExtraArgsFn,
    TransformUpdateFn,
    Updates,
    identity,
    init_empty_state,
    set_to_zero,
    stateless,
    stateless_with_tree_map,
    with_extra_args_support,
)
from functrain.optim.trust_ratio import (
    ScaleByTrustRatioState,
    fromage,
    lamb,
    lars,
    scale_by_param_block_norm,
    scale_by_param_block_rms,
    scale_by_trust_ratio,
)
from functrain.optim.updating import apply_updates, incremental_update, periodic_update
from functrain.optim.yogi import scale_by_yogi, yogi
