"""How transformers keeps the Llama family: the names of its tensors and the fields of its config.json, as data.

One layout for each of llama, mistral, qwen2, qwen3, mixtral and qwen3_moe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from functrain.checkpoint import UnsupportedError
from functrain.models.config_fields import write_config
from functrain.models.layout import Field, Group, Layout, Refused
from functrain.models.llama_config import Config
from functrain.models.names import Names
from functrain.models.shared_fields import absent, of_rotary, rotary, rotary_of
from functrain.tree import Params

_EXPERTS = {
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts.#.", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": ("mlp.gate", "mlp.experts.#.", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}

# what neighbours of the family have and compute otherwise
_ABSENT = ("add_cross_attention", "num_nextn_predict_layers", "kv_lora_rank", "q_lora_rank")


def layouts(init: Callable[[Any, Tensor], Params]) -> list[Layout]:
    """Return how transformers keeps each of the family's models, of these parameters."""
    bias = {"qkv_bias": Field("attention_bias", False)}
    windowed = Field("sliding_window", 4096, null=lambda ours: None)
    moe = {"output_router_logits", "router_aux_loss_coef"}
    few_experts = {
        "experts": Field("num_local_experts", 8, older=("num_experts",)),
        "experts_per_token": Field("num_experts_per_tok", 2),
    }
    many_experts = {
        "experts": Field("num_experts", 128, older=("num_local_experts",)),
        "experts_per_token": Field("num_experts_per_tok", 8),
        "expert_inner": Field("moe_intermediate_size", 768),
        "experts_normalized": Field("norm_topk_prob", False),
    }
    whole_heads = _Made(whole_heads=True)
    return [
        _layout(init, "llama", "Llama", _fields(**bias, mlp_bias=Field("mlp_bias", False)), whole_heads, context=2048,
                silent=("pretraining_tp",), lacking=("layer_types",)),
        _layout(init, "mistral", "Mistral", _fields(inner=14336, key_heads=8, window=windowed), _Made(),
                lacking=("layer_types",)),
        _layout(init, "qwen2", "Qwen2", _fields(**_QWEN), _Made(qkv_bias=True, out_bias=False), [_windows()], 32768),
        _layout(init, "qwen3", "Qwen3", _fields(**_QWEN, **bias, head_width=128), _Made(qk_norm=True), [_windows()],
                32768),
        _layout(init, "mixtral", "Mixtral", _fields(
            inner=14336, key_heads=8, eps=1e-5, **few_experts,
            window=Field("sliding_window", None, kind=int, null=lambda ours: None),
        ), _Made(expert_inner="inner"), silent=moe, theta=1e6, lacking=("layer_types", "router_jitter_noise")),
        _layout(init, "qwen3_moe", "Qwen3Moe", _fields(
            vocab=151936, width=2048, inner=6144, layers=24, key_heads=4, **bias, **many_experts,
        ), _Made(qk_norm=True), [_window_of_all(), _dense_layers()], 32768, silent={"max_window_layers", *moe},
                lacking=("layer_types",)),
    ]  # fmt: skip


_QWEN: dict[str, Any] = {"vocab": 151936, "inner": 22016, "key_heads": 32}


def layout_of(config: Config, among: list[Layout], where: str) -> Layout:
    """Return the first layout that says this config. Raises: UnsupportedError."""
    reasons = []
    for layout in among:
        try:
            write_config(config, layout, where)
            return layout
        except UnsupportedError as error:
            reasons.append(f"  {layout.architecture}: {error.expected}, came {error.came}")
    raise UnsupportedError(
        where,
        expected=f"a config of one of {', '.join(str(layout.architecture) for layout in among)}",
        came="one that none of them computes",
        way_out="train a model that has one, or keep it as a functrain checkpoint",
        details="\n".join(reasons),
    )


def resolved(config: Config) -> Config:
    """Return the config with what follows from others said, as `from_hf` has it."""
    chosen = tuple(i for i, window in enumerate(config.windows) if window is not None)
    return replace(
        config,
        key_heads=config.heads_of_keys,
        head_width=config.width_of_head,
        window=config.window if chosen else None,
        window_layers=None if not chosen or len(chosen) == config.layers else chosen,
        experts=config.experts if config.expert_layers else 0,
        expert_inner=config.inner_of_expert if config.expert_layers else None,
        experts_per_token=config.experts_per_token if config.expert_layers else 2,
        experts_normalized=config.experts_normalized or not config.expert_layers,
        dense_layers=tuple(sorted(set(config.dense_layers))) if config.expert_layers else (),
    )


class _Made:
    """Makes a config of the fields read and of what a family has without saying it."""

    def __init__(self, whole_heads: bool = False, **always: Any) -> None:
        self.whole_heads, self.always = whole_heads, always

    def __call__(self, **fields: Any) -> Config:
        if self.whole_heads and fields["width"] % fields["heads"]:
            expected = f"a multiple of the {fields['heads']} heads, as transformers' Llama has it"
            raise Refused("hidden_size", expected=expected, came=fields["width"])
        always = {name: fields[value] if value == "inner" else value for name, value in self.always.items()}
        if "qkv_bias" in fields:
            always["out_bias"] = fields["qkv_bias"]
        return resolved(Config(**fields, **always))


def _fields(**changed: Any) -> dict[str, Field]:
    """Return what the families have in common, with other defaults or fields of their own."""
    numbers = {
        "vocab": ("vocab_size", 32000), "layers": ("num_hidden_layers", 32), "heads": ("num_attention_heads", 32),
        "width": ("hidden_size", 4096), "inner": ("intermediate_size", 11008), "eps": ("rms_norm_eps", 1e-6),
    }  # fmt: skip
    fields = {ours: Field(theirs, changed.pop(ours, default)) for ours, (theirs, default) in numbers.items()}
    fields |= {
        "key_heads": Field(
            "num_key_value_heads", changed.pop("key_heads", None), kind=int, null=lambda ours: ours["heads"]
        ),
        "head_width": Field(
            "head_dim", changed.pop("head_width", None), kind=int,
            null=lambda ours: ours["width"] // max(ours["heads"], 1),
        ),
        "attention_dropout": Field("attention_dropout", 0.0, null=lambda ours: 0.0),
        "tied": Field("tie_word_embeddings", False),
    }  # fmt: skip
    return fields | changed


def _layout(
    init: Callable[[Any, Tensor], Params],
    model_type: str,
    name: str,
    fields: dict[str, Field],
    made: _Made,
    groups: list[Group] | None = None,
    context: int = 4096 * 32,
    theta: float = 1e4,
    silent: Any = (),
    lacking: tuple[str, ...] = (),
) -> Layout:
    return Layout(
        model_type=model_type,
        architecture=f"{name}ForCausalLM",
        prefix="model.",
        names=lambda config: _names(config, _EXPERTS.get(model_type)),
        tied=lambda config: {"lm_head.weight": "embed"} if config.tied else {},
        ignored=("layers.*.self_attn.rotary_emb.inv_freq",),
        fields={"context": Field("max_position_embeddings", context), **fields},
        config=made,
        init=init,
        fixed=lambda config: {"hidden_act": ("silu", "swish")},
        groups=[_rope(theta), absent(*_ABSENT, *lacking), *(groups or [])],
        silent=tuple(silent),
        ours=("attention",),
    )


def _names(config: Config, experts: Any) -> Names:
    layer, attn, mlp = "model.layers.*.", "model.layers.*.self_attn.", "model.layers.*.mlp."
    modules = {
        "embed": "model.embed_tokens.weight", "norm": "model.norm", "head": "lm_head.weight",
        "blocks/*/norm_1": f"{layer}input_layernorm", "blocks/*/norm_2": f"{layer}post_attention_layernorm",
        **{f"blocks/*/attn/{name}": f"{attn}{name}_proj" for name in "qkv"}, "blocks/*/attn/out": f"{attn}o_proj",
        **{f"blocks/*/attn/{name}": f"{attn}{name}" for name in ("q_norm", "k_norm")},
        **{f"blocks/*/mlp/{name}": f"{mlp}{name}_proj" for name in ("gate", "up", "down")},
    }  # fmt: skip
    transposed = [f"blocks/*/attn/{name}/weight" for name in ("q", "k", "v", "out")]
    if len(config.expert_layers) < config.layers:
        transposed.append("blocks/*/mlp/*/weight")
    if config.expert_layers and experts is not None:
        router, each, names = experts
        modules["blocks/*/experts/router"] = f"{layer}{router}.weight"
        modules |= {f"blocks/*/experts/{ours}": f"{layer}{each}{theirs}.weight" for ours, theirs in names.items()}
        transposed.append("blocks/*/experts/*")
    return Names(modules=modules, transposed=transposed)


def _rope(theta: float) -> Group:
    shared = rotary(theta=theta, read=dict, write=of_rotary)

    def read(table: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        return {"rope": rotary_of(shared.read(table, ours)["rope"], ours["context"])}

    return Group(names=shared.names, read=read, write=shared.write)


def _windows() -> Group:
    """The window and the layers that have it, as Qwen says them."""

    def read(table: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        window, layers = _window(table), ours["layers"]
        first, types = table.get("max_window_layers", 28), table.get("layer_types")
        if type(first) is not int:
            raise Refused("max_window_layers", expected="a number such as 28", came=first)
        if types is None:
            return {"window": window, "window_layers": tuple(range(first, layers)) if window else None}
        kinds = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or not all(one in kinds for one in types):
            raise Refused("layer_types", expected=f"one of {' or '.join(kinds)} for each layer", came=types)
        chosen = tuple(i for i, one in enumerate(types) if one == kinds[1])
        if chosen and window is None:
            raise Refused("layer_types", expected="a sliding_window, and use_sliding_window, for its layers", came=None)
        return {"window": window, "window_layers": chosen if window else None}

    def write(config: Config) -> dict[str, Any]:
        types = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
        return {**_window_fields(config), "max_window_layers": config.layers, "layer_types": types}

    return Group(names=(*_WINDOW, "max_window_layers", "layer_types"), read=read, write=write)


def _window_of_all() -> Group:
    return Group(
        names=_WINDOW, read=lambda table, ours: {"window": _window(table)}, write=lambda config: _window_fields(config)
    )


_WINDOW = ("use_sliding_window", "sliding_window")


def _window(table: Mapping[str, Any]) -> int | None:
    used, window = table.get("use_sliding_window", False), table.get("sliding_window", 4096)
    if type(used) is not bool:
        raise Refused("use_sliding_window", expected="true or false", came=used)
    if window is not None and type(window) is not int:
        raise Refused("sliding_window", expected="a number such as 4096", came=window)
    return window if used else None


def _window_fields(config: Config) -> dict[str, Any]:
    return {"use_sliding_window": config.window is not None, "sliding_window": config.window}


def _dense_layers() -> Group:
    def read(table: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        step, dense = table.get("decoder_sparse_step", 1), table.get("mlp_only_layers") or []
        if type(step) is not int or step < 1:
            raise Refused("decoder_sparse_step", expected="a number such as 1", came=step)
        if not isinstance(dense, list) or not all(type(i) is int for i in dense):
            raise Refused("mlp_only_layers", expected="a list of numbers of layers", came=dense)
        return {"dense_layers": tuple(i for i in range(ours["layers"]) if i in dense or (i + 1) % step)}

    return Group(
        names=("decoder_sparse_step", "mlp_only_layers"),
        read=read,
        write=lambda config: {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)},
    )
