"""Small models of transformers' Llama family, whose every parameter matters, drawn with their configs."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import parity
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor

import functrain as ft
from functrain import losses, random, tree
from functrain.models import llama
from functrain.tree import Params

transformers.utils.logging.disable_progress_bar()
FAMILIES = {
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "mixtral": transformers.MixtralForCausalLM,
    "qwen3_moe": transformers.Qwen3MoeForCausalLM,
}
CONTEXT = 12


@st.composite
def fields_of(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Fields of a small config of transformers."""
    groups, share, layers = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads = groups * share
    mixture = family in ("mixtral", "qwen3_moe")  # whose rows must be whole 16 bytes there
    fields: dict[str, Any] = {
        "vocab_size": draw(st.integers(9, 40)), "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "hidden_size": heads * draw(st.sampled_from([4, 8] if mixture else [4, 6])),
        "intermediate_size": draw(st.sampled_from([8, 12] if mixture else [8, 10])), "max_position_embeddings": CONTEXT,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])), "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": draw(ropes()), "head_dim": draw(st.sampled_from([4, 6, 8])), "pad_token_id": None,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    window = draw(st.sampled_from([1, 3, 5]))
    if family == "llama":
        fields |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    if family in ("qwen3", "qwen3_moe"):
        fields["attention_bias"] = draw(st.booleans())
    if family in ("mistral", "mixtral"):
        fields["sliding_window"] = draw(st.sampled_from([None, window]))
    if family in ("qwen2", "qwen3"):
        kinds = st.sampled_from(["sliding_attention", "full_attention"])
        fields |= {"sliding_window": window, "use_sliding_window": draw(st.booleans())}
        if fields["use_sliding_window"]:
            fields["layer_types"] = draw(st.none() | st.lists(kinds, min_size=layers, max_size=layers))
            fields["max_window_layers"] = draw(st.integers(0, layers))
    if family == "qwen3_moe":
        fields |= {"sliding_window": window, "use_sliding_window": draw(st.booleans()), "moe_intermediate_size": 4}
        fields |= {"norm_topk_prob": draw(st.booleans()), "decoder_sparse_step": draw(st.sampled_from([1, 2]))}
        fields["mlp_only_layers"] = draw(st.lists(st.integers(0, layers - 1), max_size=1))
    if mixture:
        count = draw(st.integers(2, 5))
        fields["num_local_experts" if family == "mixtral" else "num_experts"] = count
        fields["num_experts_per_tok"] = draw(st.integers(1, count))
    return fields


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"]))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 10000.0]))}
    if kind != "default":
        rope["factor"] = draw(st.sampled_from([1.5, 4.0]))
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = 8
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "yarn" and draw(st.booleans()):
        rope |= {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}
    return rope


@st.composite
def cases(draw: st.DrawFn, family: str | None = None) -> parity.Case:
    """A model of a family, or of any, on tokens beyond the context of its config, for which the rope is made."""
    family = draw(st.sampled_from(sorted(FAMILIES))) if family is None else family
    fields, seed = draw(fields_of(family)), draw(st.integers(0, 99))
    tokens = random.randint(random.key(seed), (2, 15), 0, fields["vocab_size"])
    return parity.Case(
        about={"family": family, **fields},
        model=their_model(family, fields, seed),
        theirs=lambda model: [model(tokens).logits],
        from_hf=llama.from_hf,
        to_hf=llama.to_hf,
        ours=lambda params, config: [llama.apply(params, tokens, dataclasses.replace(config, context=20))],
        layout=next(layout for layout in llama.HF if layout.model_type == family),
        in_files=their_tensors,
        loaded_by=transformers.AutoModelForCausalLM,
    )


def their_model(family: str, fields: dict[str, Any], seed: int) -> Any:
    kind: Any = FAMILIES[family]
    config = kind.config_class(**fields, attn_implementation="eager")
    return parity.shaken(kind(config), seed)


def their_tensors(model: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name tensors of a model as its files do: experts apart, gate and up apart."""
    mixtral = model.config.model_type == "mixtral"
    names = {"gate": "w1", "up": "w3", "down": "w2"} if mixtral else {n: f"{n}_proj" for n in ("gate", "up", "down")}
    found = {}
    for name, value in values.items():
        place = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        stem = place.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(value):
                gate, up = both.chunk(2)
                found |= {f"{stem}.{e}.{names['gate']}.weight": gate, f"{stem}.{e}.{names['up']}.weight": up}
        elif name.endswith("experts.down_proj"):
            found |= {f"{stem}.{e}.{names['down']}.weight": down for e, down in enumerate(value)}
        else:
            found[place] = value
    return found


def shaken(config: llama.Config, seed: int = 0) -> Params:
    """Parameters of ours whose every leaf is random."""
    params = llama.init(config, random.key(seed))
    keys = random.split(random.key(seed + 1), len(tree.leaves(params)))
    noise = [0.3 * random.normal(key, leaf.shape) for key, leaf in zip(keys, tree.leaves(params), strict=True)]
    return tree.add(params, tree.unflatten(tree.structure(params), noise))


def trained(steps: int, accumulate: int) -> tuple[list[float], list[float]]:
    """Train a Mixtral of 4 experts on the same batches, as ours and as transformers' with torch's AdamW: the losses."""
    fields = {
        "vocab_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16,
        "intermediate_size": 16, "max_position_embeddings": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    model = their_model("mixtral", fields, 0).train()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        params, config = llama.from_hf(folder)
    batches = [random.randint(random.fold_in(random.key(1), t), (8, 12), 0, 8) for t in range(steps)]

    def loss_fn(params: Params, batch: Any, key: Any) -> losses.Loss:
        x, balance = llama.hidden_and_balance(params, batch["tokens"][:, :-1], config)
        loss = losses.next_token(x @ llama.head(params).mT, batch["tokens"][:, 1:])
        return loss._replace(total=loss.total + 0.02 * loss.weight * balance.total / balance.weight)

    optimizer = ft.optim.adamw(1e-2, weight_decay=0.1)
    step = ft.train_step(loss_fn, optimizer, accumulate=accumulate)
    state, ours, theirs = ft.init_state(params, optimizer, key=random.key(0)), [], []
    adamw = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    for tokens in batches:
        state, metrics = step(state, {"tokens": tokens})
        ours.append(float(metrics["loss"]))
        adamw.zero_grad()
        total = 0.0
        for part in tokens.chunk(accumulate):
            found = model(part[:, :-1], output_router_logits=True)
            mean = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), part[:, 1:].flatten())
            loss = (mean + 0.02 * found.aux_loss) / accumulate
            loss.backward()
            total += float(loss.detach())
        adamw.step()
        theirs.append(total)
    return ours, theirs
