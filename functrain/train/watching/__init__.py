"""What a run tells while it goes on: rows of numbers in a file, on a screen, in TensorBoard and elsewhere."""

from functrain.train.watching.logger import Logger
from functrain.train.watching.peak import peak_flops
from functrain.train.watching.progress import Progress, progress
from functrain.train.watching.recording import Record, record
from functrain.train.watching.rows import Row, rows
from functrain.train.watching.to_csv import csv
from functrain.train.watching.to_mlflow import mlflow
from functrain.train.watching.to_tensorboard import tensorboard
from functrain.train.watching.to_wandb import wandb
from functrain.tree import elsewhere

__all__ = [
    "Logger", "Progress", "Record", "Row", "csv", "mlflow", "peak_flops", "progress", "record", "rows", "tensorboard",
    "wandb",
]  # fmt: skip

elsewhere.furnish(__name__)
