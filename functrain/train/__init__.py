"""The step, the state it steps, and the loop around it."""

from functrain.train.loop import Interrupted, every, fit
from functrain.train.state import TrainState, init_state
from functrain.train.step import train_step

__all__ = ["Interrupted", "TrainState", "every", "fit", "init_state", "train_step"]
