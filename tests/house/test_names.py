"""State dicts of modules become trees and trees become state dicts, by name, with nothing lost on the way."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from functrain import checkpoint, models, tree
from functrain.nn import linear

MLP = models.Names(modules={"up": "0", "down": "2"}, transposed=["*/weight"])
LIKE = {
    "up": {"weight": torch.empty(3, 5, device="meta"), "bias": torch.empty(5, device="meta")},
    "down": {"weight": torch.empty(5, 2, device="meta"), "bias": torch.empty(2, device="meta")},
}


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def test_a_module_and_its_tree_compute_the_same() -> None:
    theirs, x = module(), torch.randn(4, 3)
    params = models.from_state_dict(theirs.state_dict(), like=LIKE, names=MLP)
    assert all(type(leaf) is torch.Tensor and leaf.is_contiguous() for leaf in tree.leaves(params))
    y = linear(torch.tanh(linear(x, **params["up"])), **params["down"])
    # float32 rounding of sums of at most 5 products of order 1
    torch.testing.assert_close(y, theirs(x), rtol=1e-6, atol=1e-6)


def test_trained_parameters_go_back_into_the_module() -> None:
    theirs = module()
    params = tree.scale(2.0, models.from_state_dict(theirs.state_dict(), like=LIKE, names=MLP))
    wanted = {name: 2 * tensor for name, tensor in theirs.state_dict().items()}
    other = module()
    other.load_state_dict(models.to_state_dict(params, MLP))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in other.state_dict().items())


MODULES = {
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),  # with buffers, one an int64
    "twelve layers": lambda: nn.ModuleList([nn.Linear(1, 2) for _ in range(12)]),  # 10 sorts before 2
    "one tensor": lambda: nn.ParameterDict({"w": nn.Parameter(torch.randn(2))}),
}


@pytest.mark.parametrize("name", MODULES)
def test_any_state_dict_comes_back_bit_for_bit_through_a_tree_and_a_file(name: str, tmp_path: Path) -> None:
    theirs = MODULES[name]()
    params = models.from_state_dict(theirs.state_dict())
    checkpoint.save(tmp_path / "tree", params)
    state = models.to_state_dict(checkpoint.load(tmp_path / "tree"))
    checkpoint.save_folder(tmp_path / "folder", state, {}, max_file_bytes=1 << 30)
    read = load_file(tmp_path / "folder" / "model.safetensors")
    assert set(state) == set(read) == set(theirs.state_dict())
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(state[key], tensor) and torch.equal(read[key], tensor) and read[key].dtype == tensor.dtype
    MODULES[name]().load_state_dict(read)
    again = models.from_state_dict(read, like=params)
    assert tree.structure(again) == tree.structure(params)


KEYS = st.text("abé_0", min_size=1, max_size=3)
TREES = st.recursive(st.just(None).map(lambda _: torch.ones(2, 3)), lambda t: st.dictionaries(KEYS, t, min_size=1))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(TREES.filter(lambda t: isinstance(t, dict)))
def test_from_state_dict_undoes_to_state_dict(params: tree.Tree) -> None:
    leaves = [torch.tensor([[i, -i]]) for i in range(len(tree.leaves(params)))]
    numbered = tree.unflatten(tree.structure(params), leaves)
    for names in (models.Names(), models.Names(transposed=["**"])):
        back = models.from_state_dict(models.to_state_dict(numbered, names), like=params_like(numbered), names=names)
        assert tree.structure(back) == tree.structure(numbered)
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(back), tree.leaves(numbered), strict=True))
    assert models.to_state_dict(models.from_state_dict(models.to_state_dict(numbered))).keys() == (
        models.to_state_dict(numbered).keys()
    )


def params_like(params: tree.Tree) -> tree.Tree:
    return tree.map(lambda leaf: leaf.to("meta"), params)


def test_a_star_stands_for_one_part_and_the_longest_beginning_wins() -> None:
    names = models.Names(modules={"blocks": "h", "blocks/*/mlp/*": "h.*.ffn.x_*", "wte": "emb.weight"})
    assert names.of("blocks/10/mlp/up/bias") == "h.10.ffn.x_up.bias"
    assert names.of("blocks/10/ln/weight") == "h.10.ln.weight"
    assert names.of("wte") == "emb.weight" and names.of("other/w") == "other.w"


# ---- errors -------------------------------------------------------------------------------------------------------


def test_all_differences_are_told_at_once_with_what_may_be_meant() -> None:
    state = module().state_dict() | {"2.weigth": torch.zeros(2, 5), "0.bias": torch.zeros(6)}
    del state["2.weight"]
    with pytest.raises(checkpoint.MismatchError) as caught:
        models.from_state_dict(state, like=LIKE, names=MLP, where="mlp.pt")
    assert str(caught.value).splitlines() == [
        "mlp.pt: expected the names and shapes of the model, came 3 differences; "
        "use the config that belongs to these tensors, or leave out what is extra",
        "  missing (1): '2.weight' (did you mean '2.weigth'?)",
        "  extra (1): '2.weigth' (did you mean '2.weight'?)",
        "  shape of '0.bias' (up/bias here): expected (5,), came (6,)",
    ]
    square = {"w": torch.empty(2, 3)}
    with pytest.raises(checkpoint.MismatchError, match=r"expected \(3, 2\), came \(2, 3\)"):
        models.from_state_dict({"w": torch.zeros(2, 3)}, like=square, names=models.Names(transposed=["w"]))


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"a": torch.zeros(1), "b._extra_state": {}}, "'b._extra_state': expected a tensor, came dict"),
        ({"a": torch.zeros(1), "a.b": torch.zeros(1)}, "'a.b': expected no tensor above another's name"),
        ({"a.b": torch.zeros(1), "a": torch.zeros(1)}, "'a': expected no tensor above another's name"),
        ({"a/b": torch.zeros(1)}, "names of parts joined by dots, came 'a/b'"),
        ({"a..b": torch.zeros(1)}, "names of parts joined by dots, came 'a..b'"),
    ],
)
def test_a_state_dict_that_no_tree_can_hold_is_named(state: dict[str, object], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        models.from_state_dict(state)


def test_a_tree_that_no_state_dict_can_hold_is_named() -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=r"a.b: expected a name of its own, came 'a.b' again"):
        models.to_state_dict({"a.b": one, "a": {"b": one}})
    with pytest.raises(TypeError, match="a: expected a tensor, came 3"):
        models.to_state_dict({"a": 3})
    with pytest.raises(tree.PathError, match="fits no path"):
        models.to_state_dict({"a": one}, models.Names(transposed=["b"]))
    with pytest.raises(ValueError, match="expected like= beside names="):
        models.from_state_dict({"a": one}, names=models.Names(modules={"b": "a"}))


# ---- folders ------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=15)
@given(sizes=st.lists(st.integers(0, 40), max_size=6), most=st.integers(1, 100))
def test_a_folder_of_any_division_gives_its_tensors_back(sizes: list[int], most: int) -> None:
    tensors = {f"t{i}": torch.arange(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    with tempfile.TemporaryDirectory() as parent:
        folder = checkpoint.save_folder(f"{parent}/model", tensors, {"config.json": b"{}"}, max_file_bytes=most)
        read = checkpoint.load_folder(folder)
        files = list(folder.glob("*.safetensors"))
        assert {path.name for path in folder.iterdir()} - {f.name for f in files} <= {
            "config.json",
            "model.safetensors.index.json",
        }
        assert all(sum(t.nbytes for t in load_file(f).values()) <= most or len(load_file(f)) == 1 for f in files)
    assert set(read) == set(tensors) and all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_names_of_wrapped_modules_are_passed_over() -> None:
    theirs = module()
    plain = models.from_state_dict(theirs.state_dict(), like=LIKE, names=MLP)
    inside = nn.Sequential(torch.compile(theirs[0]), theirs[1], theirs[2])  # a part alone
    wrapped = [torch.compile(theirs), nn.DataParallel(theirs), nn.DataParallel(torch.compile(theirs)), inside]
    for wrapper in (*wrapped, torch.compile(nn.DataParallel(theirs))):
        found = models.from_state_dict(wrapper.state_dict(), like=LIKE, names=MLP)
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(found), tree.leaves(plain), strict=True))


def test_a_part_that_is_called_module_keeps_its_name() -> None:
    like = {"module": {"weight": torch.empty(2)}, "weight": torch.empty(2)}
    state = {"module.weight": torch.ones(2), "weight": torch.zeros(2)}
    assert torch.equal(models.from_state_dict(state, like=like)["module"]["weight"], torch.ones(2))
    with pytest.raises(checkpoint.MismatchError, match="'module.other'"):
        models.from_state_dict({"module.other": torch.ones(2)}, like=like)
