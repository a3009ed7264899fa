"""What architectures are trained for: batches as the config asks, and losses that add up over the parts of a batch."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import functrain as ft
from functrain.models import bert
from functrain.recipes import architectures, masked_pairs, pretrain
from functrain.recipes import texts as texts_of
from functrain.recipes.config import PRESETS, Config
from functrain.recipes.model_config import Bert, Llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("texts")
    for i in range(12):
        lines = [f"line {j} of file {i} says that {i * j} is a number" for j in range(30)]
        (where / f"f{i + 1}.txt").write_text("\n".join(lines) + "\n")
    return where


def made(name: str, folder: Path, run: Path, batch: int, **fields: Any) -> tuple[Config, Any, Any]:
    """Return a config, the Config of its model, and its texts."""
    preset = PRESETS[name]
    data = dataclasses.replace(preset.data, corpus=str(folder), validation=0.3)
    config = dataclasses.replace(preset, data=data, model=dataclasses.replace(preset.model, **fields), batch=batch)
    objective, sides = architectures.of(config.model).objective, texts_of.read(data)
    tokenizer = texts_of.tokenizer_of(sides, data, run, resumed=False, learn=objective.tokenizer_of)
    texts = objective.encode(sides, tokenizer, config, run, texts_of.no_bar)
    return config, pretrain.model_of(config, tokenizer.vocab_size), texts


@pytest.mark.parametrize(("name", "fields"), [("bert-smoke", {}), ("llama-smoke", {"packed": True}), ("smoke", {})])
def test_parts_of_a_batch_add_up_to_it(name: str, fields: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    config, model, texts = made(name, folder, tmp_path, 6, **fields)
    architecture = architectures.of(config.model)
    params = architecture.module.init(model, ft.random.key(0))
    batch, loss_fn, metrics = architecture.objective.batches(config, texts)[3], pretrain.loss_of(config, model), []
    for parts in (1, 2, 3):
        step = ft.train_step(loss_fn, ft.optim.sgd(1.0), accumulate=parts)
        state = ft.init_state(params, ft.optim.sgd(1.0), key=ft.random.key(1))
        metrics.append(step(state, batch)[1])
    for found in metrics[1:]:
        for key, value in metrics[0].items():
            # float32: sums in another order
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_a_bert_that_is_started_again_encodes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, texts = made("bert-smoke", folder, tmp_path, 6)
    monkeypatch.setattr(type(texts.tokenizer), "encode", None)
    sides = texts_of.read(config.data)
    again = masked_pairs.encode(sides, texts.tokenizer, config, tmp_path, texts_of.no_bar)
    for of in (masked_pairs.batches, masked_pairs.validation):
        left, right = of(config, texts)[1], of(config, again)[1]
        assert list(left) == list(right) and all(torch.equal(left[leaf], right[leaf]) for leaf in left)
    assert masked_pairs.described(config, again) == masked_pairs.described(config, texts)


def test_a_bert_is_masked_as_asked(folder: Path, tmp_path: Path) -> None:
    for rate in (0.15, 0.5):
        config, _, texts = made("bert-smoke", folder, tmp_path, 64, mask_rate=rate, max_predictions="all")
        batches = masked_pairs.batches(config, texts)
        assert {*batches[0], "places"} == {*masked_pairs._LEAVES, "weights"}
        chosen, real = 0.0, 0.0
        for t in range(8):
            weights, tokens = batches[t]["weights"], batches[t]["targets"]
            torch.testing.assert_close(weights.sum(), torch.tensor(64.0))
            ordinary = ~torch.isin(tokens, torch.tensor(texts.tokenizer.special.ids))
            assert not (weights[~ordinary] > 0).any()
            chosen, real = chosen + float((weights > 0).sum()), real + float(ordinary.sum())
        # five standard deviations
        assert abs(chosen / real - rate) < 5 * math.sqrt(rate * (1 - rate) / real)


@pytest.mark.parametrize("of", [masked_pairs.batches, masked_pairs.validation])
def test_at_most_so_many_tokens_of_a_row_are_predicted(of: Any, folder: Path, tmp_path: Path) -> None:
    config, _, texts = made("bert-smoke", folder, tmp_path, 8, mask_rate=0.5, max_predictions=3)
    batch = of(config, texts)[0]
    assert set(batch) == {*masked_pairs._LEAVES, "weights"} and batch["places"].shape == (8, 3)
    assert (batch["weights"] > 0).sum() > 16 and batch["weights"].shape == batch["targets"].shape == (8, 3)
    drawn = masked_pairs.drawn(config, 64, [])[0]
    assert {name: (x.shape, x.dtype) for name, x in drawn.items()} == {
        name: (x.shape, x.dtype) for name, x in batch.items()
    }
    held_out = masked_pairs.validation(config, texts)
    assert sum(len(batch["tokens"]) for batch in (held_out[i] for i in range(len(held_out)))) == len(
        texts.validation.chunks.first
    )


def test_weights_of_masked_tokens_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(PRESETS["bert-smoke"], precision="bfloat16")
    model, seen = pretrain.model_of(config, 64), []
    loss = bert.pretraining_loss
    monkeypatch.setattr(bert, "pretraining_loss", lambda *args: seen.append([args[0][0], args[2]]) or loss(*args))
    params = bert.init(model, ft.random.key(0))
    with torch.no_grad():
        pretrain.loss_of(config, model)(params, masked_pairs.drawn(config, 64, [])[0], ft.random.key(1))
    assert [x.dtype for x in seen[0]] == [torch.bfloat16, torch.float32]


def test_a_balance_is_added_in_training_alone(folder: Path, tmp_path: Path) -> None:
    fields = {"experts": 4, "experts_per_token": 2, "balance": 0.5, "packed": True}
    config, model, texts = made("llama-smoke", folder, tmp_path, 4, context=200, **fields)
    architecture = architectures.of(config.model)
    params, batch = architecture.module.init(model, ft.random.key(0)), architecture.objective.batches(config, texts)[0]
    loss_fn = pretrain.loss_of(config, model)
    training, evaluated = (loss_fn(params, batch, key) for key in (ft.random.key(1), None))
    assert set(evaluated.metrics) == set() and torch.equal(training.metrics["next_token_loss"], evaluated.total)
    # padding has no say in the balance: that of the tokens that there are is the same
    _, load = architecture.module.hidden_and_balance(
        params, batch["tokens"], model, documents=batch["documents"], positions=batch["positions"], mask=batch["mask"]
    )
    assert load.weight == 2 * batch["mask"].sum() < 2 * batch["mask"].numel()  # of two layers
    torch.testing.assert_close(training.total, evaluated.total + 0.5 * evaluated.weight * load.total / load.weight)


def test_a_unigram_model_counts_ordinary_tokens(folder: Path, tmp_path: Path) -> None:
    _, _, texts = made("bert-smoke", folder, tmp_path, 4)
    size, special = texts.tokenizer.vocab_size, len(texts.tokenizer.special.ids)
    train, text = numpy.array([10, 10, 11]), numpy.array([10, 12, 0])
    expected = -(math.log(3 / (3 + size - special)) + math.log(1 / (3 + size - special))) / 2
    assert masked_pairs._unigram(train, text, texts.tokenizer) == pytest.approx(expected)


def test_an_architecture_has_its_own_fields_and_what_it_is_asked_for() -> None:
    llama = architectures.of(Llama()).model(Llama(window=7, rope_base=5e5, qkv_bias=True), 99)
    assert (llama.vocab, llama.window, llama.rope.base, llama.qkv_bias, llama.experts) == (99, 7, 5e5, True, 0)
    found = architectures.of(Bert()).model(Bert(dropout=0.1), 99)
    assert (found.head, found.dropout, found.inner, found.padding) == ("pretraining", 0.1, 512, 0)
    for architecture in architectures.ARCHITECTURES.values():
        assert architecture.module.HF is not None and all(isinstance(kind, str) for kind in architecture.types)


def test_a_bert_sees_which_part_a_token_is_of_and_no_padding(folder: Path, tmp_path: Path) -> None:
    config, model, texts = made("bert-smoke", folder, tmp_path, 4, context=900)
    params, batch = bert.init(model, ft.random.key(0)), masked_pairs.batches(config, texts)[0]
    assert not batch["attention_mask"].all() and batch["token_types"].any()
    rows = {"types": batch["token_types"], "mask": batch["attention_mask"], "places": batch["places"]}
    predictions = bert.apply(params, batch["tokens"], model, **rows)
    wanted = bert.pretraining_loss(predictions, batch["targets"], batch["weights"], batch["next_sentence"])
    assert torch.equal(pretrain.loss_of(config, model)(params, batch, None).total, wanted.total)


@pytest.mark.parametrize("packed", [True, False])
def test_a_packed_run_is_validated_with_its_documents_apart(packed: bool, folder: Path, tmp_path: Path) -> None:
    config, _, texts = made("llama-smoke", folder, tmp_path, 4, packed=packed)
    objective = architectures.of(config.model).objective
    for batches in (objective.batches(config, texts), objective.validation(config, texts)):
        assert ({"documents", "positions"} <= set(batches[0])) == packed
    found = objective.validation(config, texts)
    targets = sum(int(found[i]["mask"].sum()) for i in range(len(found)))
    assert targets == len(texts.validation.ids) - 1
