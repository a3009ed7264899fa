"""Laws of functrain.models.llama."""

from __future__ import annotations

import dataclasses
from typing import Any

import llama_witness
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_witness import shaken
from torch import Tensor

import functrain as ft
from functrain import losses, nn, random, tree
from functrain.compiler import cutting, engine
from functrain.compiler.parts import Layer
from functrain.models import llama

DENSE = llama.Config(
    vocab=17, context=24, layers=3, heads=4, key_heads=2, width=16, inner=12, head_width=6, window=4,
    window_layers=(1, 2), qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True,
)  # fmt: skip
EXPERTS = llama.Config(
    vocab=17, context=24, layers=3, heads=2, width=8, inner=12, experts=4, expert_inner=6, dense_layers=(1,), tied=True,
    rope=nn.Rotary(kind="yarn", factor=4.0, original=8),
)  # fmt: skip
BOTH = [DENSE, EXPERTS]
PARAMS = {config: shaken(config) for config in BOTH}


def draw_tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return random.randint(random.key(seed), (batch, count), 0, 17)


TOKENS = draw_tokens(2, 10)


@pytest.mark.parametrize("config", BOTH, ids=["dense", "experts"])
def test_later_tokens_do_not_change_earlier_logits_and_a_window_hides_what_is_far(config: llama.Config) -> None:
    other = TOKENS.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 17
    logits, changed = (llama.apply(PARAMS[config], tokens, config) for tokens in (TOKENS, other))
    # experts multiply rows in another company: float32 rounding of logits of order 1
    torch.testing.assert_close(logits[:, :6], changed[:, :6], rtol=1e-5, atol=1e-5)
    assert not torch.isclose(logits[:, 6:], changed[:, 6:]).all(-1).any()
    windowed = dataclasses.replace(DENSE, window_layers=None, window=2)
    first = torch.cat([(TOKENS[:, :1] + 1) % 17, TOKENS[:, 1:]], 1)
    found, moved = (llama.apply(PARAMS[DENSE], tokens, windowed) for tokens in (TOKENS, first))
    same = torch.isclose(found, moved, rtol=1e-5, atol=1e-5).all(-1)[0]
    assert same.tolist() == [False] * 4 + [True] * 6  # three layers of a window of 2 reach 3 places back


@pytest.mark.parametrize("config", BOTH, ids=["dense", "experts"])
def test_each_document_in_a_row_equals_itself_alone_and_none_has_a_gradient_of_another(config: llama.Config) -> None:
    documents = torch.tensor([[3, 3, 3, 3, 1, 1, 2, 2, 2, 2], [0] * 5 + [1] * 5])
    params = PARAMS[config]
    packed = llama.apply(params, TOKENS, config, documents=documents)
    for row, a, b in ((0, 0, 4), (0, 4, 6), (0, 6, 10), (1, 0, 5), (1, 5, 10)):
        alone = llama.apply(params, TOKENS[row : row + 1, a:b], config)[0]
        torch.testing.assert_close(packed[row, a:b], alone, rtol=1e-5, atol=1e-5)

    def loss(embedded: Tensor) -> Tensor:
        rows = llama.hidden({**params, "embed": embedded}, torch.arange(10)[None], config, documents=documents[:1])
        return torch.sum(rows[:, 4:6] ** 2)

    slope = ft.grad(loss)(params["embed"])
    assert not slope[:4].any() and slope[4:6].any(-1).all() and not slope[6:10].any()


@pytest.mark.parametrize("config", BOTH, ids=["dense", "experts"])
def test_padding_on_either_side_changes_no_row(config: llama.Config) -> None:
    mask = torch.tensor([[False] * 3 + [True] * 7, [True] * 6 + [False] * 4])
    padded = llama.apply(PARAMS[config], TOKENS, config, mask=mask)
    assert padded.isfinite().all()
    for row, kept in enumerate(mask):
        alone = llama.apply(PARAMS[config], TOKENS[row : row + 1, kept], config)[0]
        torch.testing.assert_close(padded[row, kept], alone, rtol=1e-5, atol=1e-5)


def test_positions_that_are_given_are_those_that_turn() -> None:
    apart = llama.apply(PARAMS[DENSE], TOKENS, DENSE, positions=torch.arange(10).expand(2, 10) * 2)
    assert not torch.isclose(apart[:, 3:], llama.apply(PARAMS[DENSE], TOKENS, DENSE)[:, 3:]).all(-1).any()
    later = llama.apply(PARAMS[DENSE], TOKENS, DENSE, positions=torch.arange(10).expand(2, 10) + 7)
    # distances alone count: float32 angles of up to 17
    torch.testing.assert_close(later, llama.apply(PARAMS[DENSE], TOKENS, DENSE), rtol=1e-4, atol=1e-4)


def test_logits_are_hidden_times_the_head_and_the_balance_is_of_real_tokens() -> None:
    for config, params in PARAMS.items():
        x = llama.hidden(params, TOKENS, config)
        assert torch.equal(llama.apply(params, TOKENS, config), x @ llama.head(params).mT)
    params = PARAMS[EXPERTS]
    mask = torch.tensor([[False] * 3 + [True] * 7, [True] * 10])
    other = torch.where(mask, TOKENS, (TOKENS + 1) % 17)
    (x, one), (_, two) = (llama.hidden_and_balance(params, tokens, EXPERTS, mask=mask) for tokens in (TOKENS, other))
    torch.testing.assert_close(x, llama.hidden(params, TOKENS, EXPERTS, mask=mask))
    assert one.weight == 2 * 17 and torch.isclose(one.total, two.total, rtol=1e-5)
    assert not torch.isclose(one.total, llama.hidden_and_balance(params, other, EXPERTS)[1].total, rtol=1e-3)
    with pytest.raises(ValueError, match="a config with experts, came none"):
        llama.hidden_and_balance(PARAMS[DENSE], TOKENS, DENSE)


def test_the_two_attentions_and_lanes_of_a_map_agree() -> None:
    for config, params in PARAMS.items():
        by_formula = dataclasses.replace(config, attention="math")
        logits = llama.apply(params, TOKENS, config)
        torch.testing.assert_close(llama.apply(params, TOKENS, by_formula), logits, rtol=1e-5, atol=1e-5)
        loss = lambda p, row, c=config: losses.next_token(llama.apply(p, row[None], c), row[None]).total  # noqa: E731
        lanes = ft.vmap(ft.grad(loss), in_dims=(None, 0))(params, TOKENS)
        alone = tree.map(lambda *g: torch.stack(g), *[ft.grad(loss)(params, row) for row in TOKENS])
        # float32 rounding of gradients of order 10
        assert tree.allclose(lanes, alone, rtol=1e-4, atol=1e-4)


def test_attention_weights_are_dropped_by_a_key() -> None:
    config = dataclasses.replace(DENSE, attention_dropout=0.3)
    one, two = random.split(random.key(0)).unbind()
    dropped = llama.apply(PARAMS[DENSE], TOKENS, config, key=one)
    whole = llama.apply(PARAMS[DENSE], TOKENS, DENSE)
    assert torch.equal(llama.apply(PARAMS[DENSE], TOKENS, config), whole)
    assert torch.equal(llama.apply(PARAMS[DENSE], TOKENS, config, key=one), dropped)
    for other in (whole, llama.apply(PARAMS[DENSE], TOKENS, config, key=two)):
        assert not torch.isclose(dropped[:, 1:], other[:, 1:]).all()


def test_init_draws_the_published_deviations_and_shapes_alone_on_the_meta_device() -> None:
    config = dataclasses.replace(EXPERTS, width=64, inner=64, vocab=300, qkv_bias=True, qk_norm=True, tied=False)
    params = llama.init(config, random.key(0))
    for path, leaf in tree.items(params):
        if path.endswith("bias"):
            assert not leaf.any(), path
        elif "norm" in path:
            assert torch.all(leaf == 1), path
        else:
            # five standard deviations of an estimated deviation, deviation / sqrt(2 n)
            assert abs(leaf.std() - 0.02) < 5 * 0.02 / (2 * leaf.numel()) ** 0.5, path
    drawn = [leaf for path, leaf in tree.items(params) if "norm" not in path and not path.endswith("bias")]
    assert len({tuple((leaf.flatten()[:100] > 0).tolist()) for leaf in drawn}) == len(drawn)  # no two from one key
    shapes = llama.init(config, torch.zeros(2, dtype=torch.int32, device="meta"))
    assert [leaf.shape for leaf in tree.leaves(shapes)] == [leaf.shape for leaf in tree.leaves(params)]


def test_the_published_sizes_have_their_numbers_of_parameters() -> None:
    meta = torch.zeros(2, dtype=torch.int32, device="meta")
    llama3 = llama.Config(
        vocab=128256, context=8192, layers=32, heads=32, key_heads=8, width=4096, inner=14336,
        rope=nn.Rotary(base=5e5),
    )  # fmt: skip
    assert tree.size(llama.init(llama3, meta)) == 8_030_261_248
    mixtral = dataclasses.replace(llama3, vocab=32000, experts=8)
    assert tree.size(llama.init(mixtral, meta)) == 46_702_792_704


@pytest.mark.parametrize("accumulate", [1, 4])
def test_training_with_experts_is_that_of_transformers_with_torch_adamw(accumulate: int) -> None:
    ours, theirs = llama_witness.trained(4, accumulate)
    assert ours[-1] < ours[0] - 0.05
    # float32 rounding, which Adam makes larger where gradients are small
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0.0)


# ---- compiled -----------------------------------------------------------------------------------------------------


def test_layers_of_mixed_windows_are_one_kind_and_dense_ones_beside_experts_another() -> None:
    class Counting:
        """What the compiler would cut apart, counted and run as it is."""

        kinds: set[Any] = set()

        def cuts_layers(self) -> bool:
            return True

        def layer(self, kind: Any, run: Any, layer: Any, x: Any, args: Any) -> Any:
            shapes = tuple((leaf.shape, leaf.dtype) for leaf in tree.leaves(layer))
            self.kinds.add((kind, tree.paths(layer).__repr__(), shapes))
            return run(layer, x, *args)

    for config, count in ((dataclasses.replace(DENSE, layers=4), 1), (EXPERTS, 2)):
        Counting.kinds = set()
        with engine.entered(cutter=Counting()):
            found = llama.apply(shaken(config), TOKENS, config)
        assert torch.equal(found, llama.apply(shaken(config), TOKENS, config))
        assert len(Counting.kinds) == count


def test_layers_that_add_to_a_load_are_traced_once() -> None:
    config = dataclasses.replace(EXPERTS, dense_layers=(), layers=3)
    params = shaken(config)
    leaves, structure = tree.flatten(params)

    def total(params: Any) -> Tensor:
        x, balance = llama.hidden_and_balance(params, TOKENS, config)
        return torch.sum(x**2) + balance.total

    cutter = cutting.Cutter(layers=True)
    with torch.no_grad(), engine.tracing_operations(cutter):
        cutter.trace(lambda *given: (tree.leaves(ft.grad(total)(tree.unflatten(structure, given))), []), leaves)
    assert sum(isinstance(part, Layer) for part in cutter.parts.values()) == 1


# ---- the cache ----------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=8)
@given(seed=st.integers(0, 10**6), pieces=st.lists(st.integers(1, 7), min_size=1, max_size=4), data=st.data())
def test_pieces_through_the_cache_equal_the_whole(seed: int, pieces: list[int], data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(BOTH))
    config = dataclasses.replace(config, window=data.draw(st.sampled_from([1, 3, 8, 40])), window_layers=(0, 2))
    params, tokens = PARAMS[DENSE if config.qk_norm else EXPERTS], draw_tokens(2, 28, seed)[:, : min(sum(pieces), 24)]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, : data.draw(st.integers(0, tokens.shape[1] - 1))] = False
    whole = llama.apply(params, tokens, config, mask=mask)
    cache, logits, begin = llama.init_cache(config, 2), [], 0
    for piece in pieces:
        end = min(begin + piece, tokens.shape[1])
        if begin == end:
            break
        before = tree.map(torch.clone, cache)
        found, after = llama.apply_cached(params, tokens[:, begin:end], cache, config, mask=mask[:, begin:end])
        assert tree.allclose(before, cache, rtol=0, atol=0)  # the old cache is as it was
        logits.append(found)
        cache, begin = after, end
    assert cache.length == tokens.shape[1]
    found = torch.cat(logits, 1)
    # float32 rounding of logits of order 1: sums over the context instead of the tokens
    torch.testing.assert_close(found[mask], whole[mask], rtol=1e-5, atol=2e-5)
    assert found.isfinite().all()


def test_a_window_keeps_a_cache_no_longer_than_it_needs() -> None:
    cache = llama.init_cache(DENSE, 2)
    for _ in range(2):
        assert [keys.shape[2] for keys in cache.keys] == [value.shape[2] for value in cache.values] == [24, 3, 3]
        _, cache = llama.apply_cached(PARAMS[DENSE], TOKENS, cache, DENSE)


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_width": None, "heads": 3, "key_heads": 3}, "width 16 does not divide into 3 heads; .* or head_width"),
        ({"key_heads": 3}, "4 heads do not divide into 3 groups; choose key_heads that divides 4"),
        ({"head_width": 5}, "heads of an even width.* came 5"),
        ({"layers": 0}, "layers of at least 1, came 0"),
        ({"window": 0}, "window of at least 1 or None, came 0"),
        ({"window_layers": (3,)}, r"window_layers in \[0, 3\), came 3"),
        ({"window": None}, "a window beside window_layers, came None"),
        ({"experts": 2, "experts_per_token": 3}, "experts_per_token of at most the 2 experts, came 3"),
        ({"expert_inner": 4}, "experts beside dense_layers and expert_inner, came 0"),
        ({"attention_dropout": 1.0}, r"attention_dropout in \[0, 1\), came 1.0"),
        ({"attention": "flash"}, "attention 'fused' or 'math', came 'flash'"),
    ],
)
def test_a_config_that_cannot_be_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DENSE, **change)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"tokens": draw_tokens(1, 25)}, ValueError, r"T from 1 to the context 24, came \(1, 25\); cut the text"),
        ({"tokens": TOKENS[0]}, ValueError, r"tokens \(B, T\).*came \(10,\)"),
        ({"tokens": TOKENS.float()}, TypeError, "int64 or int32 tokens, came torch.float32"),
        ({"tokens": TOKENS + 17}, IndexError, r"expected tokens in \[0, 17\)"),
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, ValueError, r"mask in the shape of .*\(2, 10\), came \(2, 9\)"),
        ({"mask": torch.ones(2, 10)}, TypeError, "a boolean mask, false at padding, came torch.float32"),
        ({"documents": torch.zeros(2, 10)}, TypeError, "int64 or int32 documents, came torch.float32"),
        ({"positions": torch.arange(10)}, ValueError, r"positions in the shape of .*came \(10,\)"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], error: type[Exception], says: str) -> None:
    options = {"tokens": TOKENS} | change
    with pytest.raises(error, match=says):
        llama.apply(PARAMS[DENSE], options.pop("tokens"), DENSE, **options)
