"""Optimizers: gradient transformations under optax's names, one file per family."""

from functrain.optim import aggregating, assignment, microbatching, perturbations, projections, second_order
from functrain.optim.accumulation import (
    ApplyEvery,
    MultiSteps,
    MultiStepsState,
    ShouldSkipUpdateFunction,
    apply_every,
    skip_large_updates,
    skip_not_finite,
)
from functrain.optim.averaging import EmaState, TraceState, ema, trace
from functrain.optim.clipping.adaptive import (
    AdaptiveGradClipState,
    adaptive_grad_clip,
    unitwise_clip,
    unitwise_norm,
)
from functrain.optim.clipping.constraints import (
    NonNegativeParamsState,
    ZeroNansState,
    centralize,
    keep_params_nonnegative,
    normalize_by_update_norm,
    zero_nans,
)
from functrain.optim.clipping.gradient_scaling import scale_gradient
from functrain.optim.clipping.norms import (
    ClipByGlobalNormState,
    ClipState,
    clip,
    clip_by_block_rms,
    clip_by_global_norm,
    global_norm,
)
from functrain.optim.clipping.per_example import per_example_global_norm_clip, per_example_layer_norm_clip
from functrain.optim.clipping.privacy import (
    DifferentiallyPrivateAggregateState,
    differentially_private_aggregate,
    dpsgd,
)
from functrain.optim.clipping.spikes import SkipLossSpikesState, skip_loss_spikes
from functrain.optim.combining import chain, named_chain
from functrain.optim.complex_valued import SplitRealAndImaginaryState, split_real_and_imaginary
from functrain.optim.conditions import (
    ApplyIfFiniteState,
    ConditionallyMaskState,
    ConditionallyTransformState,
    ConditionFn,
    apply_if_finite,
    conditionally_mask,
    conditionally_transform,
)
from functrain.optim.decay import AddDecayedWeightsState, WeightDecaySchedule, add_decayed_weights
from functrain.optim.flattening import flatten
from functrain.optim.half_params import (
    MasterCopiesState,
    RoundedParamsState,
    keep_master_copies,
    round_params_stochastically,
)
from functrain.optim.injection import (
    InjectHyperparamsState,
    InjectStatefulHyperparamsState,
    StatefulSchedule,
    WrappedSchedule,
    WrappedScheduleState,
    inject_hyperparams,
    inject_stateful_hyperparams,
)
from functrain.optim.layerwise import LayerwiseDecayState, layerwise_decay
from functrain.optim.learning_rate_free.cocob import COCOBState, cocob, scale_by_cocob
from functrain.optim.learning_rate_free.dog import (
    DoGState,
    DoWGState,
    ScaleByDistanceOverGradientsState,
    dog,
    dowg,
    scale_by_distance_over_gradients,
    scale_by_dog,
    scale_by_dowg,
)
from functrain.optim.learning_rate_free.mechanic import MechanicState, mechanize
from functrain.optim.learning_rate_free.momo import MomoAdamState, MomoState, momo, momo_adam
from functrain.optim.learning_rate_free.plateau import ReduceLROnPlateauState, reduce_on_plateau
from functrain.optim.learning_rate_free.polyak import polyak_sgd, scale_by_polyak
from functrain.optim.learning_rate_free.prodigy import DAdaptAdamWState, ProdigyState, dadapt_adamw, prodigy
from functrain.optim.learning_rate_free.schedule_free import (
    ScheduleFreeState,
    schedule_free,
    schedule_free_adamw,
    schedule_free_eval_params,
    schedule_free_sgd,
)
from functrain.optim.line_search.backtracking import (
    ScaleByBacktrackingLinesearchState,
    scale_by_backtracking_linesearch,
)
from functrain.optim.line_search.lbfgs import ScaleByLBFGSState, lbfgs, scale_by_lbfgs
from functrain.optim.line_search.values import value_and_grad_from_state
from functrain.optim.line_search.zoom import (
    ScaleByZoomLinesearchState,
    ZoomLinesearchInfo,
    scale_by_zoom_linesearch,
)
from functrain.optim.masking import MaskedNode, MaskedState, MaskOrFn, freeze, masked
from functrain.optim.microbatching import microbatch
from functrain.optim.monitoring import MonitorState, SnapshotState, measure_with_ema, monitor, snapshot
from functrain.optim.numerics.moments import (
    bias_correction,
    update_infinity_moment,
    update_moment,
    update_moment_per_elem_norm,
)
from functrain.optim.numerics.normal import multi_normal
from functrain.optim.numerics.random_trees import random_like, split_key_like
from functrain.optim.numerics.rounding import RoundedState, round_state_stochastically, round_stochastically
from functrain.optim.numerics.safe import safe_increment, safe_norm, safe_root_mean_squares
from functrain.optim.optimizers.acprop import acprop, scale_by_acprop
from functrain.optim.optimizers.adabelief import ScaleByBeliefState, adabelief, scale_by_belief
from functrain.optim.optimizers.adadelta import ScaleByAdaDeltaState, adadelta, scale_by_adadelta
from functrain.optim.optimizers.adafactor import FactoredState, adafactor, scale_by_factored_rms
from functrain.optim.optimizers.adagrad import ScaleByRssState, adagrad, scale_by_rss
from functrain.optim.optimizers.adam import ScaleByAdamState, adam, adamw, nadam, nadamw, scale_by_adam
from functrain.optim.optimizers.adamax import adamax, adamaxw, scale_by_adamax
from functrain.optim.optimizers.adan import ScaleByAdanState, adan, scale_by_adan
from functrain.optim.optimizers.ademamix import (
    ScaleByAdemamixState,
    ScaleBySimplifiedAdEMAMixState,
    ademamix,
    scale_by_ademamix,
    scale_by_simplified_ademamix,
    simplified_ademamix,
)
from functrain.optim.optimizers.adopt import adopt, scale_by_adopt
from functrain.optim.optimizers.amsgrad import ScaleByAmsgradState, amsgrad, scale_by_amsgrad
from functrain.optim.optimizers.lion import ScaleByLionState, lion, scale_by_lion
from functrain.optim.optimizers.lookahead import LookaheadParams, LookaheadState, lookahead
from functrain.optim.optimizers.madgrad import MadgradState, madgrad, scale_by_madgrad
from functrain.optim.optimizers.noise import AddNoiseState, add_noise, noisy_sgd
from functrain.optim.optimizers.novograd import ScaleByNovogradState, novograd, scale_by_novograd
from functrain.optim.optimizers.optimistic import (
    ScaleByOptimisticGradientState,
    optimistic_adam,
    optimistic_adam_v2,
    optimistic_gradient_descent,
    scale_by_optimistic_gradient,
)
from functrain.optim.optimizers.radam import radam, scale_by_radam
from functrain.optim.optimizers.rmsprop import (
    ScaleByRmsState,
    ScaleByRmsWithCountState,
    ScaleByRStdDevState,
    ScaleByRStdDevWithCountState,
    rmsprop,
    scale_by_rms,
    scale_by_stddev,
)
from functrain.optim.optimizers.rprop import ScaleByRpropState, rprop, scale_by_rprop
from functrain.optim.optimizers.sgd import sgd
from functrain.optim.optimizers.sharpness import NormalizeState, SAMState, normalize, sam
from functrain.optim.optimizers.sign import scale_by_sign, sign_sgd, signum
from functrain.optim.optimizers.sm3 import ScaleBySM3State, scale_by_sm3, sm3
from functrain.optim.optimizers.trust_ratio import (
    ScaleByTrustRatioState,
    fromage,
    lamb,
    lars,
    scale_by_param_block_norm,
    scale_by_param_block_rms,
    scale_by_trust_ratio,
)
from functrain.optim.optimizers.yogi import scale_by_yogi, yogi
from functrain.optim.params_averages import ParamsEmaState, ParamsMeanState, keep_ema, keep_swa
from functrain.optim.params_in_state import tree_map_params
from functrain.optim.partitioning import (
    MultiTransformState,
    PartitionState,
    multi_transform,
    partition,
    selective_transform,
)
from functrain.optim.preconditioning.galore import GaLoreDimensionNumbers, GaLoreState, galore, scale_by_galore
from functrain.optim.preconditioning.kron import ScaleByKronState, kron, scale_by_kron
from functrain.optim.preconditioning.linear_algebra import matrix_inverse_pth_root, nnls, power_iteration
from functrain.optim.preconditioning.muon import MuonState, muon, scale_by_muon, scale_by_shape
from functrain.optim.preconditioning.newton_schulz import MuonDimensionNumbers, orthogonalize_via_newton_schulz
from functrain.optim.preconditioning.soap import ScaleBySoapState, scale_by_soap, soap
from functrain.optim.preconditioning.sophia import (
    HutchinsonState,
    SophiaState,
    hutchinson_estimator_diag_hessian,
    scale_by_sophia,
    sophia,
)
from functrain.optim.scaling import (
    ScaleByScheduleState,
    ScaleState,
    scale,
    scale_by_learning_rate,
    scale_by_schedule,
)
from functrain.optim.torch_states import from_torch_state, to_torch_state
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
from functrain.optim.updating import apply_updates, incremental_update, periodic_update
from functrain.tree import elsewhere

__all__ = [
    "AdaptiveGradClipState", "AddDecayedWeightsState", "AddNoiseState", "ApplyEvery", "ApplyIfFiniteState",
    "COCOBState", "ClipByGlobalNormState", "ClipState", "ConditionFn", "ConditionallyMaskState",
    "ConditionallyTransformState", "DAdaptAdamWState", "DifferentiallyPrivateAggregateState", "DoGState",
    "DoWGState", "EmaState", "EmptyState", "FactoredState", "GaLoreDimensionNumbers", "GaLoreState",
    "GradientTransformation", "GradientTransformationExtraArgs", "HutchinsonState", "InjectHyperparamsState",
    "InjectStatefulHyperparamsState", "LayerwiseDecayState", "LookaheadParams", "LookaheadState", "MadgradState",
    "MaskOrFn", "MaskedNode", "MaskedState", "MasterCopiesState", "MechanicState", "MomoAdamState", "MomoState",
    "MonitorState", "MultiSteps", "MultiStepsState", "MultiTransformState", "MuonDimensionNumbers", "MuonState",
    "NonNegativeParamsState", "NormalizeState", "OptState", "ParamsEmaState", "ParamsMeanState", "PartitionState",
    "ProdigyState", "ReduceLROnPlateauState", "RoundedParamsState", "RoundedState", "SAMState",
    "ScaleByAdaDeltaState", "ScaleByAdamState", "ScaleByAdanState", "ScaleByAdemamixState", "ScaleByAmsgradState",
    "ScaleByBacktrackingLinesearchState", "ScaleByBeliefState", "ScaleByDistanceOverGradientsState",
    "ScaleByKronState", "ScaleByLBFGSState", "ScaleByLionState", "ScaleByNovogradState",
    "ScaleByOptimisticGradientState", "ScaleByRStdDevState", "ScaleByRStdDevWithCountState", "ScaleByRmsState",
    "ScaleByRmsWithCountState", "ScaleByRpropState", "ScaleByRssState", "ScaleBySM3State", "ScaleByScheduleState",
    "ScaleBySimplifiedAdEMAMixState", "ScaleBySoapState", "ScaleByTrustRatioState", "ScaleByZoomLinesearchState",
    "ScaleState", "ScheduleFreeState", "ShouldSkipUpdateFunction", "SkipLossSpikesState", "SnapshotState",
    "SophiaState", "SplitRealAndImaginaryState", "StatefulSchedule", "TraceState", "TransformInitFn",
    "TransformUpdateExtraArgsFn", "TransformUpdateFn", "Updates", "WeightDecaySchedule", "WrappedSchedule",
    "WrappedScheduleState", "ZeroNansState", "ZoomLinesearchInfo", "acprop", "adabelief", "adadelta", "adafactor",
    "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "adaptive_grad_clip", "add_decayed_weights",
    "add_noise", "ademamix", "adopt", "aggregating", "amsgrad", "apply_every", "apply_if_finite", "apply_updates",
    "assignment", "bias_correction", "centralize", "chain", "clip", "clip_by_block_rms", "clip_by_global_norm",
    "cocob", "conditionally_mask", "conditionally_transform", "dadapt_adamw", "differentially_private_aggregate",
    "dog", "dowg", "dpsgd", "ema", "flatten", "freeze", "from_torch_state", "fromage", "galore", "global_norm",
    "hutchinson_estimator_diag_hessian", "identity", "incremental_update", "init_empty_state", "inject_hyperparams",
    "inject_stateful_hyperparams", "keep_ema", "keep_master_copies", "keep_params_nonnegative", "keep_swa", "kron",
    "lamb", "lars", "layerwise_decay", "lbfgs", "lion", "lookahead", "madgrad", "masked", "matrix_inverse_pth_root",
    "measure_with_ema", "mechanize", "microbatch", "microbatching", "momo", "momo_adam", "monitor", "multi_normal",
    "multi_transform", "muon", "nadam", "nadamw", "named_chain", "nnls", "noisy_sgd", "normalize",
    "normalize_by_update_norm", "novograd", "optimistic_adam", "optimistic_adam_v2", "optimistic_gradient_descent",
    "orthogonalize_via_newton_schulz", "partition", "per_example_global_norm_clip", "per_example_layer_norm_clip",
    "periodic_update", "perturbations", "polyak_sgd", "power_iteration", "prodigy", "projections", "radam",
    "random_like", "reduce_on_plateau", "rmsprop", "round_params_stochastically", "round_state_stochastically",
    "round_stochastically", "rprop", "safe_increment", "safe_norm", "safe_root_mean_squares", "sam", "scale",
    "scale_by_acprop", "scale_by_adadelta", "scale_by_adam", "scale_by_adamax", "scale_by_adan",
    "scale_by_ademamix", "scale_by_adopt", "scale_by_amsgrad", "scale_by_backtracking_linesearch",
    "scale_by_belief", "scale_by_cocob", "scale_by_distance_over_gradients", "scale_by_dog", "scale_by_dowg",
    "scale_by_factored_rms", "scale_by_galore", "scale_by_kron", "scale_by_lbfgs", "scale_by_learning_rate",
    "scale_by_lion", "scale_by_madgrad", "scale_by_muon", "scale_by_novograd", "scale_by_optimistic_gradient",
    "scale_by_param_block_norm", "scale_by_param_block_rms", "scale_by_polyak", "scale_by_radam", "scale_by_rms",
    "scale_by_rprop", "scale_by_rss", "scale_by_schedule", "scale_by_shape", "scale_by_sign",
    "scale_by_simplified_ademamix", "scale_by_sm3", "scale_by_soap", "scale_by_sophia", "scale_by_stddev",
    "scale_by_trust_ratio", "scale_by_yogi", "scale_by_zoom_linesearch", "scale_gradient", "schedule_free",
    "schedule_free_adamw", "schedule_free_eval_params", "schedule_free_sgd", "second_order", "selective_transform",
    "set_to_zero", "sgd", "sign_sgd", "signum", "simplified_ademamix", "skip_large_updates", "skip_loss_spikes",
    "skip_not_finite", "sm3", "snapshot", "soap", "sophia", "split_key_like", "split_real_and_imaginary",
    "stateless", "stateless_with_tree_map", "to_torch_state", "trace", "tree_map_params", "unitwise_clip",
    "unitwise_norm", "update_infinity_moment", "update_moment", "update_moment_per_elem_norm",
    "value_and_grad_from_state", "with_extra_args_support", "yogi", "zero_nans",
]  # fmt: skip

elsewhere.furnish(__name__)
