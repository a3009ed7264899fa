"""A config and its TOML are one thing, and a wrong file is told where it is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain.recipes import toml
from functrain.recipes.config import PRESETS, Config, Data, Optimizer
from functrain.recipes.model_config import GPT2, Bert, Llama

CONFIGS = st.builds(
    Config,
    data=st.builds(Data, corpus=st.text(st.characters(exclude_categories=["Cs"]))),
    model=st.one_of(
        st.builds(GPT2, layers=st.integers(min_value=1)),
        st.builds(Llama, window=st.just("none") | st.integers(min_value=1), tied=st.booleans()),
        st.builds(Bert, mask_rate=st.floats(0, 1, exclude_min=True, exclude_max=True)),
    ),
    optimizer=st.builds(
        Optimizer,
        b1=st.floats(0, 1, exclude_max=True),
        clip_norm=st.just("none") | st.floats(0, exclude_min=True, allow_infinity=False),
    ),
    precision=st.sampled_from(["float32", "bfloat16"]),
    compile=st.booleans(),
)


@settings(deadline=None, derandomize=True)
@given(CONFIGS)
def test_loads_gives_back_what_dumps_wrote(config):
    assert toml.loads(toml.dumps(config), Config(), "file") == config
    assert toml.differences(config, toml.loads(toml.dumps(config), Config(), "file")) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_its_file(preset):
    assert toml.loads(toml.dumps(PRESETS[preset]), Config(), "file") == PRESETS[preset]


def test_a_file_changes_only_what_it_names():
    config = toml.loads("steps = 5\n[model]\nlayers = 7\n", PRESETS["smoke"], "file")
    assert config == replace(PRESETS["smoke"], steps=5, model=replace(PRESETS["smoke"].model, layers=7))
    assert toml.differences(PRESETS["smoke"], config) == ["model.layers: 2 -> 7", "steps: 8 -> 5"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps = ", "expected TOML"),
        ("step = 5", "unknown key step; did you mean steps?"),
        ("[model]\nlayer = 5", "unknown key model.layer; did you mean model.layers?"),
        ("[zebra]\nx = 1", "unknown key zebra; known are data, model"),
        ("model = 3", r"model: expected a table \[model\], came 3"),
        ("steps = 1.5", "steps: expected int, came 1.5"),
        ("steps = true", "steps: expected int, came True"),
        ("compile = 1", "compile: expected bool, came 1"),
        ('[optimizer]\nclip_norm = "off"', "optimizer.clip_norm: expected float or 'none', came 'off'"),
        ("[optimizer]\nb1 = 1.5", r"optimizer.b1: expected a number in \[0, 1\), came 1.5"),
        ("seed = -1", "seed: expected at least 0, came -1"),
        ('precision = "float8"', "precision: expected one of 'auto', 'float32', 'bfloat16', 'float16', came 'float8'"),
    ],
)
def test_a_wrong_file_is_told_where(text, says):
    with pytest.raises(ValueError, match=f"run.toml: .*{says}"):
        toml.loads(text, Config(), "run.toml")


def test_what_an_editor_puts_before_the_text_is_passed_over():
    assert toml.loads("\ufeffsteps = 5\n", Config(), "file").steps == 5


def test_an_integer_is_a_float_where_one_is_wanted():
    assert toml.loads("[optimizer]\nclip_norm = 2", Config(), "file").optimizer.clip_norm == 2.0
