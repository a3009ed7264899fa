"""Optimizers: gradient transformations under optax's names, one file per family."""

# ruff: noqa: F401
# mypy: implicit-reexport

from functrain.optim.adam import ScaleByAdamState, adam, adamw, nadam, nadamw, scale_by_adam
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
from functrain.optim.numerics import safe_increment, safe_norm, safe_root_mean_squares
from functrain.optim.scaling import (
    ScaleByScheduleState,
    ScaleState,
    scale,
    scale_by_learning_rate,
    scale_by_schedule,
)
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
