"""The step, the state it steps, and the loop around it."""

from functrain.train import privacy, watching
from functrain.train.averaging import averaged
from functrain.train.evaluation import EvaluationInterrupted, evaluate
from functrain.train.guard import Diverged, Guard, skip_nonfinite, skip_spikes, stop_after
from functrain.train.hooks import Hook, Stop, every
from functrain.train.loop import Interrupted, fit
from functrain.train.per_example import noise_scale_step, private_step
from functrain.train.predictions import Metric
from functrain.train.protocols import Batches, LossFn, LossFnWithBuffers
from functrain.train.recovery import roll_back
from functrain.train.state import TrainState, init_state
from functrain.train.step import train_step
from functrain.train.stopping import early_stopping
from functrain.train.sweeping import Sweep, grid, sweep
from functrain.train.unrolling import unroll
from functrain.train.validation import validate
from functrain.train.watching.progress import progress
from functrain.train.watching.recording import record
from functrain.tree import elsewhere

__all__ = [
    "Batches", "Diverged", "EvaluationInterrupted", "Guard", "Hook", "Interrupted", "LossFn", "LossFnWithBuffers",
    "Metric", "Stop", "Sweep", "TrainState", "averaged", "early_stopping", "evaluate", "every", "fit", "grid",
    "init_state", "noise_scale_step", "privacy", "private_step", "progress", "record", "roll_back", "skip_nonfinite",
    "skip_spikes", "stop_after", "sweep", "train_step", "unroll", "validate", "watching",
]  # fmt: skip

elsewhere.furnish(__name__)
