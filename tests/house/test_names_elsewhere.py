"""A name that does not exist says what may be meant: a slip, or what optax, jax, torch and others call it."""

from __future__ import annotations

import pickle
from types import ModuleType

import pytest
import torch

import functrain as ft
from functrain.tree import elsewhere

ROOMS = ["optim", "schedules", "losses", "tree", "random", "nn", "transforms", "train", "checkpoint", "data", "models"]


@pytest.mark.parametrize(
    ("place", "name", "meant"),
    [
        ("", "jit", "ft.compile"),
        ("", "pmap", "ft.vmap"),
        ("", "tree_map", "ft.tree.map"),
        ("", "adamw", "ft.optim.adamw"),
        ("", "value_and_grads", "ft.value_and_grad"),
        ("", "PRNGKey", "ft.random.key"),
        ("", "save", "ft.checkpoint.save"),
        ("", "jvp", "torch.func.jvp"),
        ("", "Trainer", "ft.fit"),
        ("", "compil", "ft.compile"),
        ("optim", "adam_w", "ft.optim.adamw"),
        ("optim", "AdamW", "ft.optim.adamw"),
        ("optim", "SGD", "ft.optim.sgd"),
        ("optim", "lr_scheduler", "ft.schedules"),
        ("optim", "clip_grad_norm_", "ft.optim.clip_by_global_norm"),
        ("optim", "cosine_decay_schedule", "ft.schedules.cosine_decay_schedule"),
        ("optim", "ReduceLROnPlateau", "ft.optim.reduce_on_plateau"),
        ("optim", "losses", "ft.losses"),
        ("optim", "apply_update", "ft.optim.apply_updates"),
        ("losses", "CrossEntropyLoss", "ft.losses.softmax_cross_entropy_with_integer_labels"),
        ("losses", "mse_loss", "ft.losses.squared_error"),
        ("losses", "ctcloss", "ft.losses.ctc_loss"),
        ("schedules", "cosine_decay", "ft.schedules.cosine_decay_schedule"),
        ("schedules", "CosineAnnealingLR", "ft.schedules.cosine_decay_schedule"),
        ("random", "PRNGKey", "ft.random.key"),
        ("random", "randn", "ft.random.normal"),
        ("tree", "tree_map", "ft.tree.map"),
        ("tree", "tree_leaves", "ft.tree.leaves"),
        ("nn", "Linear", "ft.nn.linear"),
        ("nn", "LayerNorm", "ft.nn.layer_norm"),
        ("nn", "Module", "ft.from_module"),
        ("nn", "relu", "torch.nn.functional.relu"),
        ("nn", "Conv2d", "ft.nn.conv"),
        ("nn", "Softmin", r"ft.from_module\(torch.nn.Softmin"),
        ("transforms", "remat", "ft.recompute"),
        ("train", "Trainer", "ft.fit"),
        ("train", "EarlyStopping", "ft.train.early_stopping"),
        ("train", "TensorBoardLogger", "ft.train.watching.tensorboard"),
        ("train", "Callback", "ft.train.Hook"),
        ("data", "DataLoader", "ft.data.batches"),
        ("checkpoint", "restore", "ft.checkpoint.load"),
        ("curvature", "hessian", "ft.hvp"),
        ("models", "GPT2", "ft.models.gpt2"),
    ],
)
def test_a_name_that_does_not_exist_says_what_may_be_meant(place: str, name: str, meant: str) -> None:
    room = getattr(ft, place) if place else ft
    with pytest.raises(AttributeError, match=rf"'{room.__name__}' has no attribute '{name}'; did you mean {meant}"):
        getattr(room, name)


def test_what_is_said_to_be_meant_is_there() -> None:
    for name, meant in elsewhere._CALLED.items():
        found: object = {"ft": ft, "torch": torch}[meant.partition(".")[0]]
        for part in meant.split(".")[1:]:
            found = getattr(found, part)
        assert found is not None, name


@pytest.mark.parametrize("place", ["", *ROOMS])
def test_a_name_that_nothing_is_near_to_is_the_plain_error(place: str) -> None:
    room: ModuleType = getattr(ft, place) if place else ft
    for name in ("zzqqxx", "__wrapped__", "_private"):
        with pytest.raises(AttributeError, match=f"module '{room.__name__}' has no attribute '{name}'$"):
            getattr(room, name)
        assert not hasattr(room, name)
    assert ft.testing.laws and pickle.loads(pickle.dumps(ft.optim.adamw)) is ft.optim.adamw
