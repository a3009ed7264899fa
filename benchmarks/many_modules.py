"""Small modules of transformers and torch through `ft.from_module`: right in eager, whole and in pieces, or why not.

    python benchmarks/many_modules.py [--only swin,ctc] [--out results.md]

Beside `zoo.py`, whose sixteen are large and are timed, these are many and look hard: routing, relative positions,
shared and tied parts, parametrizations, complex numbers, state that is written in place, transforms inside,
decompositions of matrices. Each gradient and new buffer is compared with torch.autograd's on the module itself, as in
`zoo.py`; a refusal is printed as it is raised. transformers' in evaluation mode, torch's in training mode.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo import Outcome, attempt, nudge, verdict

import functrain as ft
from functrain.compiler import compilation


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: dict[str, Any]
    loss: Callable[[Any], Tensor]
    called_before: bool = False  # attributes that follow from the shapes of a batch


CASES: dict[str, Case] = {}
IDS, MASK = torch.randint(5, 90, (2, 16), generator=torch.Generator().manual_seed(0)), torch.ones(2, 16).long()
MASK[1, 10:] = 0
TEXT = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
IMAGES = {
    "pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin(),
    "labels": torch.tensor([0, 1]),
}
SMALL = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = SMALL | dict(num_key_value_heads=2, head_dim=8)
VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
)


def of_transformers(name: str, model: str, inputs: dict[str, Any], called_before: bool = False, **config: Any) -> None:
    def build() -> nn.Module:
        kind = getattr(transformers, model)
        return kind(kind.config_class(**config)).eval()

    CASES[name] = Case(build, inputs, lambda result: result.loss, called_before)


of_transformers("roberta", "RobertaForMaskedLM", TEXT, **SMALL)
of_transformers("electra", "ElectraForMaskedLM", TEXT, **SMALL, embedding_size=16)
of_transformers("albert", "AlbertForMaskedLM", TEXT, **SMALL, embedding_size=16)
of_transformers("deberta-v2", "DebertaV2ForMaskedLM", TEXT, **SMALL, relative_attention=True,
                pos_att_type=["p2c", "c2p"], position_buckets=8)  # fmt: skip
of_transformers(
    "distilbert", "DistilBertForMaskedLM", TEXT, vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48
)
of_transformers("mpnet", "MPNetForMaskedLM", TEXT, **SMALL)
of_transformers("bigbird", "BigBirdForMaskedLM", TEXT, **SMALL, attention_type="original_full")
of_transformers("longformer", "LongformerForMaskedLM", TEXT, **SMALL, attention_window=4)
of_transformers("perceiver", "PerceiverForMaskedLM", {"inputs": IDS, "attention_mask": MASK, "labels": IDS},
                vocab_size=99, d_latents=32, d_model=32, num_latents=8, num_blocks=1, num_self_attends_per_block=1,
                num_self_attention_heads=4, num_cross_attention_heads=4, max_position_embeddings=16)  # fmt: skip
of_transformers("opt", "OPTForCausalLM", TEXT, **SMALL, ffn_dim=48, word_embed_proj_dim=32)
of_transformers("bloom", "BloomForCausalLM", TEXT, vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
of_transformers("falcon", "FalconForCausalLM", TEXT, **SMALL)
of_transformers("gpt-neox", "GPTNeoXForCausalLM", TEXT, **SMALL)
of_transformers("phi", "PhiForCausalLM", TEXT, **SMALL)
of_transformers("gemma2", "Gemma2ForCausalLM", TEXT, **GROUPED)
of_transformers("gemma3", "Gemma3ForCausalLM", TEXT, **GROUPED)
of_transformers("qwen3", "Qwen3ForCausalLM", TEXT, **GROUPED)
of_transformers("qwen2-moe", "Qwen2MoeForCausalLM", TEXT, **SMALL, num_key_value_heads=2, moe_intermediate_size=16,
                shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2)  # fmt: skip
of_transformers("gpt-oss", "GptOssForCausalLM", TEXT, **GROUPED, num_local_experts=4, num_experts_per_tok=2)
of_transformers("deepseek-v3", "DeepseekV3ForCausalLM", TEXT, **SMALL, num_key_value_heads=4, n_routed_experts=4,
                n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16, kv_lora_rank=8, q_lora_rank=8,
                qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1)  # fmt: skip
of_transformers("bart", "BartForConditionalGeneration", TEXT, vocab_size=99, d_model=32, encoder_layers=2,
                decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                decoder_ffn_dim=48, max_position_embeddings=64)  # fmt: skip
of_transformers("xlnet", "XLNetLMHeadModel", TEXT, vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48)
of_transformers("mamba2", "Mamba2ForCausalLM", {"input_ids": IDS, "labels": IDS}, vocab_size=99, hidden_size=32,
                num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8)  # fmt: skip
of_transformers("swin", "SwinForImageClassification", IMAGES, True, image_size=32, patch_size=4, embed_dim=16,
                depths=[2, 2], num_heads=[2, 4], window_size=4)  # fmt: skip
of_transformers("segformer", "SegformerForImageClassification", IMAGES, hidden_sizes=[8, 16, 24, 32],
                depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 2], decoder_hidden_size=16)  # fmt: skip
of_transformers("resnet", "ResNetForImageClassification", IMAGES, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
of_transformers("deit", "DeiTForImageClassification", IMAGES, **VISION)
of_transformers("dinov2", "Dinov2ForImageClassification", IMAGES, **VISION)
of_transformers("vit-mae", "ViTMAEForPreTraining", {"pixel_values": IMAGES["pixel_values"], "noise": torch.rand(2, 16)},
                **VISION, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
                decoder_intermediate_size=48)  # fmt: skip
of_transformers("hubert", "HubertForCTC", {"input_values": torch.randn(2, 4000), "labels": IDS[:, :5] % 30 + 1},
                vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)  # fmt: skip
of_transformers("patchtst", "PatchTSTForPrediction", {"past_values": torch.randn(2, 32, 3),
                "future_values": torch.randn(2, 8, 3)}, num_input_channels=3, context_length=32, prediction_length=8,
                patch_length=8, patch_stride=8, d_model=32, num_attention_heads=4, num_hidden_layers=2,
                ffn_dim=48)  # fmt: skip

X = torch.linspace(-2, 2, 48).view(6, 8).sin()


class Net(nn.Module):
    """Parts and buffers by name, and what is done with them: `fn(self, x)`."""

    def __init__(self, fn: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, input: Tensor) -> Any:
        return self.fn(self, input)


def of_torch(name: str, build: Callable[[], nn.Module]) -> None:
    CASES[name] = Case(lambda: build().train(), {"input": X}, lambda result: torch.sum(torch.sin(result)))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def quantize(net: Any, x: Tensor) -> Tensor:
    nearest = torch.cdist(x, net.book).argmin(1)
    chosen = net.book[nearest]
    with torch.no_grad():
        net.count.index_add_(0, nearest, torch.ones(len(x)))
        net.book.mul_(0.9).index_add_(0, nearest, 0.1 * x)
    return net.out(x + (chosen - x).detach())


def packed(net: Any, x: Tensor) -> Tensor:
    rows = nn.utils.rnn.pack_padded_sequence(x.view(2, 3, 8), torch.tensor([3, 2]), batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(net.rnn(rows)[0], batch_first=True)[0]


def routed(net: Any, x: Tensor) -> Tensor:
    chosen, total = net.gate(x).argmax(-1), torch.zeros_like(x)
    for k, expert in enumerate(net.experts):
        rows = (chosen == k).nonzero()[:, 0]
        total = total.index_put((rows,), expert(x[rows]))
    return total


def routed_densely(net: Any, x: Tensor) -> Tensor:
    weights, chosen = torch.topk(torch.softmax(net.gate(x), -1), 1)
    mixed = torch.stack([expert(x) for expert in net.experts], 1)
    return weights * mixed.gather(1, chosen[..., None].expand(-1, -1, 8))[:, 0]


def settled(net: Any, x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(6):
        z = torch.tanh(net.linear(z) + x)
    return z


def unrolled(net: Any, x: Tensor) -> Tensor:
    states = [x]
    for _ in range(3):
        states.append(net.cell(x, states[-1]))
    return torch.stack(states)


def counted(net: Any, x: Tensor) -> Tensor:
    net.calls.add_(1)
    return net.linear(x) * net.calls


def hooked() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.register_forward_pre_hook(
        lambda module, args, given: (args, {"input": given["input"].sin()}), with_kwargs=True
    )
    linear.register_forward_hook(lambda module, inputs, output: output * 2)
    return linear


def attended(net: Any, x: Tensor) -> Tensor:
    rows, padding = x.view(2, 3, 8), torch.tensor([[False, False, True]] * 2)
    return net.attention(rows, rows, rows, key_padding_mask=padding)[0]


def definite(net: Any) -> Tensor:
    return net.weight @ net.weight.mT + torch.eye(8)


def square() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-3, 3, 64).view(8, 8).sin())


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


of_torch("weight norm", lambda: parametrizations.weight_norm(linear()))
of_torch("spectral norm", lambda: parametrizations.spectral_norm(linear()))
of_torch("orthogonal", lambda: parametrizations.orthogonal(linear()))
of_torch("weight norm old", lambda: nn.utils.weight_norm(linear()))
of_torch("vector quantization", lambda: Net(quantize, book=torch.eye(8)[:4], count=torch.zeros(4), out=linear()))
of_torch("fourier", lambda: Net(lambda n, x: n.l(torch.fft.fft(torch.fft.fft(x, dim=-1), dim=0).real), l=linear()))
of_torch(
    "complex parameter",
    lambda: Net(
        lambda n, x: torch.fft.irfft(torch.fft.rfft(x) * n.w), w=nn.Parameter(torch.ones(5, dtype=torch.complex64))
    ),
)
of_torch(
    "tied", lambda: Net(lambda n, x: F.linear(n.embed(x.long().abs() % 5), n.embed.weight), embed=nn.Embedding(5, 8))
)
of_torch("shared", lambda: Net(lambda n, x: n.l(torch.tanh(n.l(torch.tanh(n.l(x))))), l=linear()))
of_torch("autograd.Function", lambda: Net(lambda n, x: Square.apply(n.l(x)), l=linear()))
of_torch(
    "checkpoint",
    lambda: Net(
        lambda n, x: torch.utils.checkpoint.checkpoint(lambda y: torch.tanh(n.l(y)), x, use_reentrant=False), l=linear()
    ),
)
of_torch("batch norm cumulative", lambda: Net(lambda n, x: n.b(n.l(x)), l=linear(), b=nn.BatchNorm1d(8, momentum=None)))
of_torch(
    "instance norm",
    lambda: Net(
        lambda n, x: n.b(n.l(x).view(2, 8, 3)),
        l=linear(),
        b=nn.InstanceNorm1d(8, affine=True, track_running_stats=True),
    ),
)
of_torch(
    "conv3d group norm",
    lambda: Net(lambda n, x: n.n(n.c(x.view(1, 1, 2, 4, 6))), c=nn.Conv3d(1, 4, 2, padding=1), n=nn.GroupNorm(2, 4)),
)
of_torch(
    "transposed convolution",
    lambda: Net(
        lambda n, x: n.c(x.view(1, 2, 4, 6)), c=nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2, output_padding=1)
    ),
)
of_torch(
    "pixel shuffle",
    lambda: Net(lambda n, x: F.pixel_shuffle(n.c(x.view(1, 2, 4, 6)), 2), c=nn.Conv2d(2, 8, 3, padding=2, dilation=2)),
)
of_torch(
    "lstm projected",
    lambda: Net(
        lambda n, x: n.r(x.view(2, 3, 8))[0], r=nn.LSTM(8, 8, 2, proj_size=4, bidirectional=True, batch_first=True)
    ),
)
of_torch("packed sequence", lambda: Net(packed, rnn=nn.GRU(8, 8, batch_first=True)))
of_torch(
    "attention padded",
    lambda: Net(
        attended, attention=nn.MultiheadAttention(8, 2, add_zero_attn=True, add_bias_kv=True, batch_first=True)
    ),
)
of_torch("gru cell", lambda: Net(unrolled, cell=nn.GRUCell(8, 8)))
of_torch("bilinear", lambda: Net(lambda n, x: n.b(x, x.sin()), b=nn.Bilinear(8, 8, 4)))
of_torch(
    "adaptive softmax",
    lambda: Net(lambda n, x: n.a(x, torch.arange(6) * 3).loss, a=nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10])),
)
experts = lambda: nn.ModuleList([linear(), linear()])  # noqa: E731
of_torch("experts by rows", lambda: Net(routed, gate=nn.Linear(8, 2), experts=experts()))
of_torch("experts dense", lambda: Net(routed_densely, gate=nn.Linear(8, 2), experts=experts()))
of_torch("hooks", hooked)
of_torch(
    "sort cumsum einsum",
    lambda: Net(lambda n, x: torch.einsum("bi,bj->ij", torch.sort(n.l(x), -1)[0], torch.cumsum(x, 0)), l=linear()),
)
of_torch("solve", lambda: Net(lambda n, x: torch.linalg.solve(definite(n), x.mT), weight=square()))
of_torch("cholesky", lambda: Net(lambda n, x: torch.linalg.cholesky(definite(n)).logsumexp(0), weight=square()))
of_torch("singular values", lambda: Net(lambda n, x: torch.linalg.svdvals(n.l(x)), l=linear()))
of_torch("embedding bag", lambda: Net(lambda n, x: n.e(x.long().abs() % 5), e=nn.EmbeddingBag(5, 8, mode="max")))
of_torch("a counter in a buffer", lambda: Net(counted, calls=torch.zeros(()), linear=linear()))
of_torch("fixed point", lambda: Net(settled, linear=linear()))
of_torch(
    "jacobians inside",
    lambda: Net(lambda n, x: torch.func.vmap(torch.func.jacrev(n.l))(x), l=nn.Sequential(nn.Linear(8, 4), nn.Tanh())),
)
of_torch("torch.jit", lambda: torch.jit.script(nn.Sequential(linear(), nn.ReLU())))
of_torch("views", lambda: Net(lambda n, x: n.l(x).view(-1)[::3].unfold(0, 4, 2), l=linear()))
of_torch(
    "ctc",
    lambda: Net(
        lambda n, x: F.ctc_loss(
            F.log_softmax(n.l(x.view(3, 2, 8)), -1),
            torch.tensor([[1, 2], [3, 4]]),
            torch.tensor([3, 3]),
            torch.tensor([2, 2]),
        ),
        l=nn.Linear(8, 6),
    ),
)


def torchs(case: Case, module: nn.Module, params: Any, buffers: Any) -> Outcome:
    """Return the loss, gradients and new buffers of the module itself, with these params."""
    module = ft.to_module(module, params, buffers)
    loss = case.loss(module(**case.inputs))
    loss.backward()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
    return Outcome(loss.detach(), grads, {n: b for n, b in module.named_buffers() if b.is_floating_point()})


def dotted(values: Any) -> dict[str, Tensor]:
    return {path.replace("/", "."): leaf for path, leaf in ft.tree.items(values)}


def compared(case: Case) -> list[str]:
    """Return what comes of a case: in eager, compiled whole, in pieces."""
    torch.manual_seed(0)
    module = case.build()
    if case.called_before:
        module(**case.inputs)
    functional = ft.from_module(module)
    given = (functional.params, functional.buffers)
    expected = torchs(case, module, *given)
    nudged = torchs(case, module, ft.tree.map(nudge, functional.params), functional.buffers)

    def loss(params: Any, buffers: Any) -> Any:
        result, new = functional.apply(params, buffers, None, **case.inputs)
        return case.loss(result), new

    def outcome(fn: Callable[..., Any]) -> str:
        (value, new), grads = fn(*given)
        moved = {name: leaf for name, leaf in dotted(new).items() if name in expected.buffers}
        return verdict(Outcome(value, dotted(grads), moved), expected, nudged)

    both, cells = ft.value_and_grad(loss, has_aux=True), []
    for cut_from in (None, 2**62, 0):
        compilation._PIECEWISE_BYTES = cut_from or 0
        cells.append(str(attempt(outcome, both if cut_from is None else ft.compile(both))))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="names of cases, with commas")
    parser.add_argument("--out", type=Path, help="a Markdown file to which the table is appended")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    lines, wrong = ["| module | eager | whole | in pieces |", "|---|---|---|---|"], 0
    names = [name for name in CASES if name in options.only.split(",") or options.only == ",".join(CASES)]
    for name in names:
        cells = attempt(compared, CASES[name])
        cells = cells if isinstance(cells, list) else [str(cells)] * 3
        lines.append(f"| {name} | {' | '.join('same' if i and c == cells[0] else c for i, c in enumerate(cells))} |")
        wrong += any(cell.startswith("WRONG") for cell in cells)
        print(lines[-1], flush=True)
    print(f"{len(names)} modules, {wrong} wrong")
    if options.out:
        with options.out.open("a") as file:
            file.write("\n".join(lines) + "\n")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
