"""What a pre-training run is asked for, and the presets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from functrain.recipes.model_config import GPT2, Bert, Llama, Model, at_least, within


@dataclass(frozen=True, kw_only=True)
class Data:
    """The text and how it is cut into tokens."""

    corpus: str = "python"
    """"python" (the text that every Python carries), or a file or folder of UTF-8 text."""
    validation: float = 0.1
    """The part that is kept for validation."""
    vocabulary: int = 1024
    """256: the bytes are the tokens. More: byte pairs are merged until there are that many tokens. Of a bert: so many
    pieces of words."""

    def __post_init__(self) -> None:
        if not 0.0 < self.validation < 1.0:
            raise ValueError(
                f"data.validation: expected a part of the text above 0 and below 1, came {self.validation}; a run ends "
                "with its loss on text that it has not seen, for which 0.01 of a long one is enough"
            )
        at_least(self, "data.", {"vocabulary": 256})


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, or Muon for matrices, with warm-up and decay."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the blocks by Muon, at updates as large as AdamW's, and the rest by AdamW."""
    schedule: Literal["cosine", "linear", "stable-decay"] = "cosine"
    """How the learning rate falls after the warm-up; stable-decay: in a line, in the last fifth of the steps."""
    learning_rate: float = 1e-3
    """The highest, reached after the warm-up."""
    final_learning_rate: float = 1e-4
    """That of the last step."""
    warmup: float = 0.05
    """The part of the steps in which the learning rate rises from 0."""
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.1
    """On matrices, of muon those of the blocks alone; vectors are not decayed."""
    clip_norm: float | Literal["none"] = 1.0
    """The gradient's global norm is clipped to this; none: it is not clipped."""
    ema: float | Literal["none"] = "none"
    """The decay of an exponential moving average (EMA) of the weights, validated beside them, as validation_ema_loss;
    0.999 is usual."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "final_learning_rate", "weight_decay"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0.0):
                raise ValueError(f"optimizer.{name}: expected a finite number of at least 0, came {value}")
        within(self, "optimizer.", ["warmup", "b1", "b2"])
        clip = self.clip_norm
        if clip != "none" and not (math.isfinite(clip) and clip > 0.0):
            raise ValueError(f"optimizer.clip_norm: expected a finite number above 0, or none, came {clip}")
        if self.ema != "none" and not 0.0 < self.ema < 1.0:
            raise ValueError(f"optimizer.ema: expected a number above 0 and below 1, or none, came {self.ema}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All that a run depends on: equal configs give equal bits on one machine, whatever their `WATCHED`.

    Raises: ValueError naming a number that cannot be.
    """

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=GPT2)
    optimizer: Optimizer = field(default_factory=Optimizer)
    steps: int = 2000
    """Steps in all."""
    batch: int = 16
    """Rows of `context` tokens in a step."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after another, to save memory."""
    recompute: float = 0.0
    """The part of the layers that are computed again in the backward pass, to save memory; 1: all of them."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the forward and backward pass compute in; parameters and moments are float32. float16: with a dynamic loss
    scale, for a GPU without bfloat16. auto: bfloat16 where the device multiplies matrices faster in it, which is tried
    out when a run begins, and stays."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    mesh: str = "auto"
    """How ranks under torchrun are laid out: data=2,fsdp=4 splits params, gradients and moments over four neighbours,
    twice; tensor=2 splits layers. auto: data, as many as there are. The run is the same, to rounding, on any."""
    compile: bool = True
    """Compile the step; needs a C++ compiler."""
    log_every: int = 20
    evaluate_every: int = 200
    evaluate_batches: int = 16
    """Batches of the validation text that are evaluated along the way; the end evaluates all."""
    checkpoint_every: int = 200
    peak_flops: float | Literal["auto"] = "auto"
    """What the device can do in a second, in floating-point operations, for the model-FLOPs utilisation (MFU) in the
    record; auto: in half precision that of its data sheet, on a GPU that is known, and else nothing is recorded."""
    guard: Literal["nonfinite", "spikes"] = "nonfinite"
    """Which steps are skipped: those whose loss or gradient is NaN or infinite, or also those whose loss is a spike."""
    stop_after_nonfinite: int = 10
    """Skipped steps in a row that end the run, or send it back."""
    roll_backs: int = 0
    """Times that the run goes back to its last checkpoint, with the batches after such a row, before one ends it."""
    roll_back_skip: int = 0
    """Batches after such a row that are left out too."""

    def __post_init__(self) -> None:
        counts = ["steps", "batch", "accumulate", *CADENCES, "stop_after_nonfinite"]
        at_least(self, "", dict.fromkeys(counts, 1) | {"roll_backs": 0, "roll_back_skip": 0, "seed": 0})
        if self.seed >= 2**64:
            raise ValueError(f"seed: expected a number below 2 ** 64, came {self.seed}")
        if self.accumulate > self.batch:
            raise ValueError(f"accumulate: expected at most the batch of {self.batch}, came {self.accumulate}")
        mesh_of(self.mesh, 1)
        if self.peak_flops != "auto" and not 0.0 < self.peak_flops < math.inf:
            raise ValueError(f"peak_flops: expected a finite number above 0, or auto, came {self.peak_flops}")
        if not 0.0 <= self.recompute <= 1.0:
            raise ValueError(f"recompute: expected a part of the layers in [0, 1], came {self.recompute}")


def mesh_of(text: str, ranks: int) -> dict[str, int]:
    """Return the axes of a mesh and their sizes. Raises: ValueError for what is none."""
    if text == "auto":
        return {"data": ranks}
    found: dict[str, int] = {}
    for word in text.split(","):
        axis, equals, size = word.partition("=")
        if (
            axis not in ("data", "fsdp", "tensor")
            or not equals
            or not size.isdecimal()
            or int(size) < 1
            or axis in found
        ):
            raise ValueError(
                f"mesh: expected auto, or some of data=N, fsdp=N and tensor=N with commas between, came {text!r}"
            )
        found[axis] = int(size)
    return found


CADENCES = ["log_every", "evaluate_every", "evaluate_batches", "checkpoint_every"]
"""How often a run is looked at: no part of what it is, and another one when it goes on is no change."""

WATCHED = [*CADENCES, "peak_flops", "mesh"]
"""All that changes the record of a run, or where it runs, and not the run."""


PRESETS = {
    # 2.5 million tokens of the python corpus's 3.5: under 4 minutes on 2 CPU cores, compilation included
    "tiny": Config(
        model=GPT2(context=128, attention="math"),
        optimizer=Optimizer(learning_rate=3e-3, final_learning_rate=1e-4),
        steps=1200,
        precision="float32",
    ),
    "smoke": Config(
        model=GPT2(layers=2, heads=2, width=16, context=16),
        data=Data(vocabulary=256),
        optimizer=Optimizer(warmup=0.25),
        steps=8,
        batch=4,
        precision="float32",
        log_every=2,
        evaluate_every=4,
        evaluate_batches=2,
        checkpoint_every=3,
    ),
    "gpt2-124m": Config(
        data=Data(vocabulary=50304),
        model=GPT2(layers=12, heads=12, width=768, context=1024),
        optimizer=Optimizer(learning_rate=6e-4, final_learning_rate=6e-5, warmup=0.04, b2=0.95),
        steps=19000,
        batch=512,
        accumulate=32,
        evaluate_every=250,
        checkpoint_every=1000,
    ),
    # as many parameters and tokens as tiny has
    "llama-tiny": Config(
        model=Llama(inner=400, context=128, attention="math"),
        optimizer=Optimizer(learning_rate=3e-3, final_learning_rate=1e-4),
        steps=1200,
        precision="float32",
    ),
    "llama-smoke": Config(
        model=Llama(layers=2, heads=2, key_heads=1, width=16, inner=32, context=16, attention="math"),
        data=Data(vocabulary=256),
        optimizer=Optimizer(warmup=0.25),
        steps=8,
        batch=4,
        precision="float32",
        log_every=2,
        evaluate_every=4,
        evaluate_batches=2,
        checkpoint_every=3,
    ),
    # the shape of Llama 3.2 1B, at the context before its rotary positions were stretched
    "llama-1b": Config(
        data=Data(vocabulary=128256),
        model=Llama(
            layers=16, heads=32, key_heads=8, width=2048, inner=8192, context=8192, rope_base=500000.0, packed=True
        ),
        optimizer=Optimizer(learning_rate=3e-4, final_learning_rate=3e-5, warmup=0.02, b2=0.95),
        steps=100000,
        batch=128,
        accumulate=64,
        recompute=1.0,
        evaluate_every=500,
        checkpoint_every=1000,
    ),
    # the shape of Google's BERT-Tiny; how it leaves the plateau: benchmarks/results/bert_tiny-cpu.md
    "bert-tiny": Config(
        model=Bert(layers=2, heads=2, context=64, max_predictions=16, attention="math"),
        optimizer=Optimizer(name="muon", learning_rate=3e-3, final_learning_rate=1e-5, warmup=0.1, weight_decay=0.01),
        steps=4000,
        batch=32,
        precision="float32",
    ),
    "bert-smoke": Config(
        model=Bert(layers=2, heads=2, width=16, inner=32, context=16, max_predictions=5, attention="math"),
        data=Data(vocabulary=256),
        optimizer=Optimizer(warmup=0.25),
        steps=8,
        batch=4,
        precision="float32",
        log_every=2,
        evaluate_every=4,
        evaluate_batches=2,
        checkpoint_every=3,
    ),
    "bert-base": Config(
        data=Data(vocabulary=30522),
        model=Bert(layers=12, heads=12, width=768, inner=3072, context=512, max_predictions=80, dropout=0.1),
        optimizer=Optimizer(learning_rate=1e-4, final_learning_rate=0.0, warmup=0.01, b2=0.999, weight_decay=0.01),
        steps=1000000,
        batch=256,
        accumulate=16,
        evaluate_every=1000,
        checkpoint_every=5000,
    ),
}
