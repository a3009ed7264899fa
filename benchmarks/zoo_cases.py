"""Modules that no one here wrote, or that are written as people write them, each with a batch and a loss.

B rows, C channels, T tokens, V vocabulary. `CASES[name](drop)` makes a case in training mode; `drop` is a factor on its
usual dropout rates, 1 or 0. All have more than 1 MiB of parameters, from a fixed seed, and random inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

ROWS, TOKENS, VOCABULARY, CLASSES, SIDE = 8, 32, 1024, 10, 32


class Case(NamedTuple):
    module: nn.Module
    inputs: dict[str, Tensor]  # keyword arguments of the call, each (B, ...)
    options: dict[str, Any]  # the others
    targets: dict[str, Tensor]  # keyword arguments of mean_loss, each (B, ...)
    mean_loss: Callable[..., Tensor]  # (what the module returned, **targets) -> ()


Build = Callable[[float], Case]
CASES: dict[str, Build] = {}


def case(build: Build) -> Build:
    """Register a case under the function's name; its tensors come from a fixed seed."""
    CASES[build.__name__] = lambda drop: _seeded(build, drop)
    return build


def _seeded(build: Build, drop: float) -> Case:
    torch.manual_seed(0)
    made = build(drop)
    return made._replace(module=made.module.train())


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


def pixelwise(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def squares(found: Tensor, values: Tensor) -> Tensor:
    return F.mse_loss(found.float(), values)


def _tokens(rows: int = ROWS, tokens: int = TOKENS, least: int = 3) -> Tensor:
    return torch.randint(least, VOCABULARY, (rows, tokens))


def _images(rows: int = ROWS, side: int = SIDE) -> Tensor:
    return torch.randn(rows, 3, side, side)


def _classes(rows: int = ROWS) -> Tensor:
    return torch.randint(CLASSES, (rows,))


def _image_case(module: nn.Module, rows: int = ROWS, side: int = SIDE) -> Case:
    return Case(module, {"x": _images(rows, side)}, {}, {"labels": _classes(rows)}, cross_entropy)


def _token_case(module: nn.Module) -> Case:
    return Case(module, {"tokens": _tokens()}, {}, {"labels": _tokens()}, cross_entropy)


class Named(nn.Sequential):
    """A sequence whose input is called `x`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OnTokens(nn.Module):
    """Embedding, body, head; the head is the embedding where `tied`."""

    def __init__(self, body: nn.Module, width: int, out: int, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(VOCABULARY, width), body
        self.head = nn.Linear(out, VOCABULARY)
        if tied:
            nn.init.normal_(self.embedding.weight, std=0.05)
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.body(self.embedding(tokens))
        return self.head(found[0] if isinstance(found, tuple) else found)


# -- torch.nn


@case
def mlp(drop: float) -> Case:
    body = [nn.Linear(256, 768), nn.ReLU(), nn.Dropout(0.1 * drop), nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 10)]
    return Case(Named(*body), {"x": torch.randn(64, 256)}, {}, {"labels": _classes(64)}, cross_entropy)


class Basic(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.relu, self.downsample = nn.ReLU(inplace=True), nn.Identity()
        if stride > 1 or inputs != width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


@case
def resnet(drop: float) -> Case:
    stem = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks = [Basic(32, 32, 1), Basic(32, 64, 2), Basic(64, 64, 1), Basic(64, 128, 2), Basic(128, 128, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2 * drop), nn.Linear(128, CLASSES)]
    return _image_case(Named(*stem, *blocks, *head), 16)


class UNet(nn.Module):
    """Two levels down by convolutions and group norm, up by transposed convolutions and batch norm."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        w = width
        self.enter, self.down1, self.down2 = self.block(3, w), self.block(w, 2 * w), self.block(2 * w, 4 * w)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * w, 2 * w, 2, 2), nn.ConvTranspose2d(2 * w, w, 4, 2, 1)
        self.join2, self.join1 = self.block(4 * w, 2 * w, nn.BatchNorm2d), self.block(2 * w, w, nn.BatchNorm2d)
        self.dropout, self.out = nn.Dropout2d(rate), nn.Conv2d(w, CLASSES, 1)

    @staticmethod
    def block(inputs: int, width: int, norm: Any = lambda width: nn.GroupNorm(8, width)) -> nn.Module:
        first = [nn.Conv2d(inputs, width, 3, padding=1), norm(width), nn.SiLU()]
        return nn.Sequential(*first, nn.Conv2d(width, width, 3, padding=1), norm(width), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        one = self.enter(x)
        two = self.down1(F.max_pool2d(one, 2))
        deep = self.dropout(self.down2(F.max_pool2d(two, 2)))
        two = self.join2(torch.cat([self.up2(deep), two], 1))
        return self.out(self.join1(torch.cat([self.up1(two), one], 1)))


@case
def unet(drop: float) -> Case:
    labels = torch.randint(CLASSES, (4, SIDE, SIDE))
    return Case(UNet(40, 0.1 * drop), {"x": _images(4)}, {}, {"labels": labels}, pixelwise)


@case
def lstm(drop: float) -> Case:
    return _token_case(OnTokens(nn.LSTM(128, 192, 2, batch_first=True, dropout=0.2 * drop), 128, 192))


@case
def gru(drop: float) -> Case:
    return _token_case(OnTokens(nn.GRU(128, 192, 2, batch_first=True, dropout=0.2 * drop), 128, 192))


@case
def encoder(drop: float) -> Case:
    layer = nn.TransformerEncoderLayer(128, 4, 512, 0.1 * drop, batch_first=True, norm_first=True)
    return _token_case(OnTokens(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 128, 128))


class Translator(nn.Module):
    """An encoder and a decoder, with learned positions."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(TOKENS, width)
        self.transformer = nn.Transformer(width, 4, 2, 2, 4 * width, rate, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        places = self.positions(torch.arange(source.shape[1], device=source.device))
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        source, target = self.embedding(source) + places, self.embedding(target) + places
        return self.head(self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True))


@case
def transformer(drop: float) -> Case:
    inputs = {"source": _tokens(4), "target": _tokens(4)}
    return Case(Translator(128, 0.1 * drop), inputs, {}, {"labels": _tokens(4)}, cross_entropy)


# -- hard for a compiler, or for a function of tensors


@case
def weight_norm(drop: float) -> Case:
    convs = [nn.Conv2d(3, 64, 3, 2, 1), nn.Conv2d(64, 128, 3, 2, 1), nn.Conv2d(128, 256, 3, 2, 1)]
    body = [part for conv in convs for part in (parametrizations.weight_norm(conv), nn.ELU(), nn.Dropout2d(0.1 * drop))]
    return _image_case(Named(*body, nn.Flatten(), nn.Linear(256 * 16, CLASSES)), 16)


@case
def spectral_norm(drop: float) -> Case:
    convs = [nn.Conv2d(3, 64, 4, 2, 1), nn.Conv2d(64, 128, 4, 2, 1), nn.Conv2d(128, 192, 4, 2, 1)]
    body = [part for conv in convs for part in (parametrizations.spectral_norm(conv), nn.LeakyReLU(0.2))]
    head = parametrizations.spectral_norm(nn.Linear(192 * 16, CLASSES))
    return _image_case(Named(*body, nn.Flatten(), nn.Dropout(0.3 * drop), head), 16)


@case
def tied(drop: float) -> Case:
    layer = nn.TransformerEncoderLayer(192, 4, 384, 0.1 * drop, "gelu", batch_first=True)
    return _token_case(OnTokens(nn.TransformerEncoder(layer, 1), 192, 192, tied=True))


@case
def shared(drop: float) -> Case:
    block = nn.Sequential(
        nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.GELU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU()
    )
    body = [nn.Conv2d(3, 128, 4, 4), block, nn.Dropout2d(0.1 * drop), block, nn.BatchNorm2d(128), block]
    return _image_case(Named(*body, nn.Flatten(), nn.Linear(128 * 64, 20), nn.Tanh(), nn.Linear(20, CLASSES)))


class Spectral(nn.Module):
    """Mixes tokens by a product of their Fourier coefficients with a parameter, complex or its two parts."""

    def __init__(self, tokens: int, width: int, *, parts: bool) -> None:
        super().__init__()
        filters = torch.randn(tokens // 2 + 1, width, 2) * 0.5
        self.filters = nn.Parameter(filters if parts else torch.view_as_complex(filters))
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        filters = self.filters if self.filters.is_complex() else torch.view_as_complex(self.filters)
        found = torch.fft.rfft(self.norm(x), dim=1, norm="ortho") * filters
        found = torch.fft.irfft(found, n=x.shape[1], dim=1, norm="ortho")
        return x + F.gelu(self.mix(found))


@case
def fourier(drop: float) -> Case:
    body = [part for _ in range(3) for part in (Spectral(TOKENS, 192, parts=True), nn.Dropout(0.1 * drop))]
    return _token_case(OnTokens(nn.Sequential(*body), 192, 192))


@case
def complex_parameters(drop: float) -> Case:
    body = [part for _ in range(3) for part in (Spectral(TOKENS, 192, parts=False), nn.Dropout(0.1 * drop))]
    return _token_case(OnTokens(nn.Sequential(*body), 192, 192))


class Routed(nn.Module):
    """Each token goes to the k experts of its largest scores, whose weights are gathered."""

    def __init__(self, width: int, hidden: int, experts: int, k: int) -> None:
        super().__init__()
        self.router, self.k = nn.Linear(width, experts, bias=False), k
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = torch.topk(self.router(x), self.k, dim=-1)  # (B, T, k)
        hidden = F.silu(torch.einsum("btd,edh->bteh", x, self.up))
        found = torch.einsum("bteh,ehd->bted", hidden, self.down)
        found = torch.gather(found, 2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))  # (B, T, k, D)
        return x + torch.sum(found * torch.softmax(scores, -1)[..., None], 2)


@case
def top_k(drop: float) -> Case:
    body = nn.Sequential(Routed(96, 192, 8, 2), nn.Dropout(0.1 * drop), nn.LayerNorm(96), Routed(96, 192, 8, 2))
    return _token_case(OnTokens(body, 96, 96))


@case
def inplace(drop: float) -> Case:
    def block(inputs: int, width: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, width, 3, 2, 1)
        return [conv, nn.Dropout2d(0.1 * drop, inplace=True), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]

    body = [*block(3, 48), *block(48, 96), *block(96, 256), nn.Flatten(), nn.Linear(256 * 16, 64), nn.Hardtanh(-1, 1)]
    return _image_case(Named(*body, nn.BatchNorm1d(64), nn.ELU(inplace=True), nn.Linear(64, CLASSES)), 16)


class Inverted(nn.Module):
    """MobileNet's inverted bottleneck; with squeeze and excitation, EfficientNet's."""

    def __init__(self, inputs: int, width: int, stride: int, *, squeeze: bool, rate: float) -> None:
        super().__init__()
        hidden, act = 4 * inputs, nn.SiLU if squeeze else nn.ReLU6
        self.enter = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), act())
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(hidden), act())
        self.squeeze = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(hidden, inputs, 1), act(), nn.Conv2d(inputs, hidden, 1), nn.Sigmoid()
            )
            if squeeze
            else None
        )
        self.leave = nn.Sequential(nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width))
        self.dropout, self.around = nn.Dropout(rate), stride == 1 and inputs == width

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.depthwise(self.enter(x))
        if self.squeeze is not None:
            hidden = hidden * self.squeeze(hidden)
        found = self.leave(hidden)
        return x + self.dropout(found) if self.around else found


def _inverted(*, squeeze: bool, rate: float) -> Case:
    shapes = [(16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 160, 2), (160, 160, 1)]
    blocks = [Inverted(*shape, squeeze=squeeze, rate=rate) for shape in shapes]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(2 * rate), nn.Linear(160, CLASSES)]
    return _image_case(Named(nn.Conv2d(3, 16, 3, 2, 1), *blocks, *head))


@case
def mobilenet(drop: float) -> Case:
    return _inverted(squeeze=False, rate=0.1 * drop)


@case
def efficientnet(drop: float) -> Case:
    return _inverted(squeeze=True, rate=0.1 * drop)


class WaveNet(nn.Module):
    """Causal, gated, dilated convolutions, whose parts are added."""

    def __init__(self, width: int, layers: int, rate: float) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(layers))
        self.residuals = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.dropout = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        h = x.mT  # (B, C, T)
        total = torch.zeros_like(h)
        for i, (gate, residual) in enumerate(zip(self.gates, self.residuals, strict=True)):
            a, b = gate(F.pad(h, (2**i, 0))).chunk(2, 1)
            found = self.dropout(residual(torch.tanh(a) * torch.sigmoid(b)))
            h, total = h + found, total + found
        return F.relu(total).mT


@case
def wavenet(drop: float) -> Case:
    return _token_case(OnTokens(WaveNet(112, 5, 0.1 * drop), 112, 112))


class GraphNet(nn.Module):
    """Messages along the edges of each row's graph, added up where they arrive."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(2 * width, width), nn.GRUCell(width, width)
        self.norm, self.dropout, self.head = nn.BatchNorm1d(width), nn.Dropout(rate), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        b, n, d = x.shape
        start, end = (edges[:, i, :, None].expand(-1, -1, d) for i in range(2))  # (B, E, D)
        for _ in range(2):
            ends = torch.cat([torch.gather(x, 1, start), torch.gather(x, 1, end)], -1)
            sums = torch.zeros_like(x).scatter_add(1, end, F.relu(self.message(ends)))
            largest = torch.zeros_like(x).scatter_reduce(1, end, torch.gather(x, 1, start), "amax")
            x = self.update(self.dropout(sums + largest).flatten(0, 1), x.flatten(0, 1))
            x = self.norm(x).view(b, n, d)
        return self.head(x.mean(1))


@case
def graph(drop: float) -> Case:
    inputs = {"x": torch.randn(8, 20, 256), "edges": torch.randint(20, (8, 2, 60))}
    return Case(GraphNet(256, 0.1 * drop), inputs, {}, {"labels": _classes(8)}, cross_entropy)


class Unpooled(nn.Module):
    """SegNet's way up, by the places of the largest; and one by interpolation."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True), nn.PReLU())
        self.deep = nn.Sequential(nn.Conv2d(width, width, 5, padding=2), nn.BatchNorm2d(width), nn.Softplus())
        self.dropout, self.out = nn.Dropout2d(rate), nn.Conv2d(2 * width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled, places = F.max_pool2d(self.down(x), 2, return_indices=True)
        deep = self.dropout(self.deep(pooled))
        wide = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(torch.cat([F.max_unpool2d(deep, places, 2), wide], 1))


@case
def unpool(drop: float) -> Case:
    labels = torch.randint(CLASSES, (4, 24, 24))
    return Case(Unpooled(128, 0.1 * drop), {"x": _images(4, 24)}, {}, {"labels": labels}, pixelwise)


@case
def conv3d(drop: float) -> Case:
    body = [nn.Conv3d(2, 32, 3, 2, 1), nn.BatchNorm3d(32), nn.ReLU(True), nn.Conv3d(32, 128, 3, 2, 1), nn.SELU()]
    head = [nn.AdaptiveMaxPool3d(2), nn.Flatten(), nn.Dropout(0.5 * drop), nn.Linear(128 * 8, 384), nn.ReLU()]
    inputs = {"x": torch.randn(4, 2, 16, 16, 16)}
    return Case(Named(*body, *head, nn.Linear(384, 10)), inputs, {}, {"labels": _classes(4)}, cross_entropy)


class Flow(nn.Module):
    """A neural ordinary differential equation, by Euler's steps of one network."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(width + 1, width), nn.Tanh(), nn.Dropout(rate), nn.Linear(width, width))
        self.out = nn.Bilinear(width, 4, width)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            time = torch.full_like(x[:, :1], i / 4)
            x = x + 0.25 * self.field(torch.cat([x, time], 1))
        return self.out(x, torch.sin(x[:, :4]))


@case
def ode(drop: float) -> Case:
    inputs = {"x": torch.randn(32, 256)}
    return Case(Flow(256, 0.1 * drop), inputs, {}, {"values": torch.randn(32, 256)}, squares)


# -- transformers


def _causal(rows: int = ROWS, tokens: int = TOKENS) -> dict[str, Tensor]:
    ids = _tokens(rows, tokens)
    return {"input_ids": ids, "labels": ids}


def _masked() -> dict[str, Tensor]:
    """Padded rows, of which every fifth token is to be guessed; 1 is padding, as for OPT and RoBERTa."""
    ids = _tokens(TOKENS // 4)
    places, lengths = torch.arange(TOKENS), torch.randint(TOKENS // 2, TOKENS + 1, (len(ids), 1))
    seen = places < lengths
    labels = torch.where((places % 5 == 0) & seen, ids, -100)
    return {"input_ids": torch.where(seen, ids, 1), "attention_mask": seen.long(), "labels": labels}


def _translated() -> dict[str, Tensor]:
    return {"input_ids": _tokens(4), "labels": _tokens(4)}


def _pictures(rows: int = ROWS, side: int = SIDE) -> dict[str, Tensor]:
    return {"pixel_values": _images(rows, side), "labels": _classes(rows)}


def _waves() -> dict[str, Tensor]:
    return {"input_values": torch.randn(4, 2000), "labels": _classes(4)}


def _leave_input_alone(module: nn.Module) -> None:
    """Keep the convolutions of wav2vec2 from making their input a leaf that requires grad, for checkpointing."""
    for part in module.modules():
        if hasattr(part, "_requires_grad"):
            part._requires_grad = False


def _own_loss(output: Any) -> Tensor:
    return output.loss.float()


def _register(
    name: str,
    kind: str,
    inputs: Callable[[], dict[str, Tensor]],
    options: dict[str, Any] | None = None,
    prepare: Callable[[nn.Module], Any] = lambda module: None,
    **settings: Any,
) -> None:
    """Register a model of transformers by the name of its class; it computes its loss from `labels`."""

    def build(drop: float) -> Case:
        import transformers

        model = getattr(transformers, kind)
        config = model.config_class(**settings)
        config.use_cache = False
        _scale_rates(config, drop)
        module = model(config)
        prepare(module)
        return Case(module, inputs(), options or {}, {}, _own_loss)

    CASES[name] = lambda drop: _seeded(build, drop)


def _scale_rates(config: Any, factor: float) -> None:
    """Multiply all dropout rates of a configuration; no layer is dropped as a whole, which is Python's decision."""
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0 if "layerdrop" in name else value * factor)
        elif hasattr(value, "to_dict"):
            _scale_rates(value, factor)


WIDE = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = WIDE | {"vocab_size": VOCABULARY}
BERT = TEXT | {"intermediate_size": 512, "max_position_embeddings": 64}
LLAMA = BERT | {"num_key_value_heads": 2}
SMALL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
VISION = WIDE | {"intermediate_size": 512, "image_size": SIDE, "patch_size": 4, "num_labels": CLASSES}
T5 = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY,
      "decoder_start_token_id": 0}  # fmt: skip
BART = {"d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "vocab_size": VOCABULARY,
        "decoder_start_token_id": 2, **SMALL}  # fmt: skip
WAVES = WIDE | {"intermediate_size": 256, "conv_dim": (64, 64, 64), "conv_kernel": (10, 3, 3), "conv_stride": (5, 4, 2),
                "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False,
                "num_feat_extract_layers": 3, "num_labels": CLASSES, "vocab_size": 64}  # fmt: skip
MOE = LLAMA | {"intermediate_size": 192, "num_local_experts": 4, "num_experts_per_tok": 2}

_register("bert", "BertForMaskedLM", _masked, **BERT)
_register("gpt2", "GPT2LMHeadModel", _causal, **TEXT, **SMALL)
_register("llama", "LlamaForCausalLM", _causal, **LLAMA)
_register("mixtral", "MixtralForCausalLM", _causal, **MOE)
_register("mixtral_eager", "MixtralForCausalLM", _causal, experts_implementation="eager", **MOE)
_register("t5", "T5ForConditionalGeneration", _translated, **T5)
_register("mt5", "MT5ForConditionalGeneration", _translated, initializer_factor=0.1, **T5)
_register("vit", "ViTForImageClassification", _pictures, hidden_dropout_prob=0.1, **VISION)
_register("convnext", "ConvNextForImageClassification", _pictures, hidden_sizes=[32, 64, 96, 192], depths=[1, 1, 2, 1],
          drop_path_rate=0.1, layer_scale_init_value=0.1, patch_size=2, num_labels=CLASSES)  # fmt: skip
_register("wav2vec2", "Wav2Vec2ForSequenceClassification", _waves, **WAVES)
_register("wav2vec2_plain", "Wav2Vec2ForSequenceClassification", _waves, prepare=_leave_input_alone, **WAVES)
_register("hubert", "HubertForSequenceClassification", _waves, prepare=_leave_input_alone, **WAVES)
_register("wav2vec2_ctc", "Wav2Vec2ForCTC",
          lambda: {"input_values": torch.randn(4, 2000), "labels": torch.randint(3, 64, (4, 8))},
          ctc_loss_reduction="mean", prepare=_leave_input_alone, **WAVES)  # fmt: skip
_register("mamba", "MambaForCausalLM", lambda: _causal(4, 24), hidden_size=160, num_hidden_layers=2,
          vocab_size=VOCABULARY, state_size=16)  # fmt: skip
_register("clip", "CLIPModel", lambda: {"input_ids": _tokens(), "pixel_values": _images()}, {"return_loss": True},
          text_config=BERT, vision_config=VISION, projection_dim=64)  # fmt: skip
_register("whisper", "WhisperForConditionalGeneration",
          lambda: {"input_features": torch.randn(4, 80, 64), "labels": _tokens(4, 16)}, apply_spec_augment=False,
          dropout=0.1, max_source_positions=32, max_target_positions=32, **BART)  # fmt: skip
_register("deberta", "DebertaV2ForMaskedLM", _masked, relative_attention=True, pos_att_type=["c2p", "p2c"],
          position_buckets=16, **BERT)  # fmt: skip
_register("deberta_v1", "DebertaForMaskedLM", _masked, relative_attention=True, pos_att_type=["c2p", "p2c"],
          max_relative_positions=16, **BERT)  # fmt: skip
_register("albert", "AlbertForMaskedLM", _masked, hidden_dropout_prob=0.1, embedding_size=96, **(BERT | WIDE))
_register("electra", "ElectraForMaskedLM", _masked, embedding_size=96, **BERT)
_register("distilbert", "DistilBertForMaskedLM", _masked, dim=192, n_layers=2, n_heads=4, hidden_dim=512,
          vocab_size=VOCABULARY)  # fmt: skip
_register("modernbert", "ModernBertForMaskedLM", _masked, attention_dropout=0.1, mlp_dropout=0.1, local_attention=16,
          pad_token_id=1, **BERT)  # fmt: skip
_register("fnet", "FNetForMaskedLM", lambda: {k: v for k, v in _masked().items() if k != "attention_mask"}, **BERT)
_register("qwen3", "Qwen3ForCausalLM", _causal, head_dim=32, **LLAMA)
_register("gemma2", "Gemma2ForCausalLM", _causal, head_dim=32, sliding_window=16, **LLAMA)
_register("gemma3", "Gemma3ForCausalLM", _causal, head_dim=32, sliding_window=16, **LLAMA)
_register("falcon", "FalconForCausalLM", _causal, hidden_dropout=0.1, **TEXT)
_register("bloom", "BloomForCausalLM", _causal, hidden_dropout=0.1, attention_dropout=0.1, n_layer=2, n_head=4,
          hidden_size=192, vocab_size=VOCABULARY)  # fmt: skip
_register("opt", "OPTForCausalLM", _masked, ffn_dim=512, word_embed_proj_dim=192, **TEXT, **SMALL)
_register("gpt_neox", "GPTNeoXForCausalLM", _causal, hidden_dropout=0.1, **BERT)
_register("phi3", "Phi3ForCausalLM", _causal, resid_pdrop=0.1, **LLAMA, **SMALL)
_register("qwen3_moe", "Qwen3MoeForCausalLM", _causal, head_dim=32, num_experts=4, moe_intermediate_size=128,
          num_experts_per_tok=2, **LLAMA)  # fmt: skip
_register("gpt_oss", "GptOssForCausalLM", _causal, head_dim=32, sliding_window=16, **MOE)
_register("deepseek_v3", "DeepseekV3ForCausalLM", _causal, q_lora_rank=64, kv_lora_rank=32, qk_rope_head_dim=16,
          qk_nope_head_dim=16, v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
          moe_intermediate_size=128, first_k_dense_replace=1, **(LLAMA | {"num_key_value_heads": 4}))  # fmt: skip
_register("bart", "BartForConditionalGeneration", _translated, **BART)
_register("rwkv", "RwkvForCausalLM", lambda: _causal(4, 24), hidden_size=160, attention_hidden_size=160,
          num_hidden_layers=2, vocab_size=VOCABULARY, context_length=32)  # fmt: skip
_register("mamba2", "Mamba2ForCausalLM", _causal, hidden_size=160, num_heads=10, head_dim=32, state_size=16, n_groups=1,
          chunk_size=16, num_hidden_layers=2, vocab_size=VOCABULARY)  # fmt: skip
_register("xlnet", "XLNetLMHeadModel", _causal, d_model=128, n_layer=2, n_head=4, d_inner=512, vocab_size=VOCABULARY)
_register("perceiver", "PerceiverForMaskedLM", _masked, num_latents=16, d_latents=192, d_model=96, num_blocks=1,
          num_self_attends_per_block=2, num_self_attention_heads=4, num_cross_attention_heads=4,
          vocab_size=VOCABULARY, max_position_embeddings=TOKENS, qk_channels=96, v_channels=192)  # fmt: skip
_register("swin", "SwinForImageClassification", _pictures, image_size=SIDE, patch_size=2, embed_dim=64, depths=[2, 2],
          num_heads=[2, 4], window_size=4, hidden_dropout_prob=0.1, num_labels=CLASSES, encoder_stride=2)  # fmt: skip
_register("segformer", "SegformerForSemanticSegmentation",
          lambda: {"pixel_values": _images(), "labels": torch.randint(CLASSES, (ROWS, SIDE, SIDE))},
          hidden_sizes=[32, 48, 64, 128], depths=[1, 1, 1, 1], decoder_hidden_size=64, num_labels=CLASSES)  # fmt: skip
_register("mobilenet_v2", "MobileNetV2ForImageClassification", _pictures, depth_multiplier=0.35, image_size=SIDE,
          num_labels=CLASSES)  # fmt: skip
_register("regnet", "RegNetForImageClassification", _pictures, embedding_size=16, hidden_sizes=[32, 64, 128, 320],
          depths=[1, 1, 2, 1], groups_width=16, num_labels=CLASSES)  # fmt: skip
_register("dinov2", "Dinov2ForImageClassification", _pictures, drop_path_rate=0.1, **VISION)
_register("vit_mae", "ViTMAEForPreTraining",
          lambda: {"pixel_values": _images(), "noise": torch.rand(ROWS, (SIDE // 4) ** 2)},
          decoder_hidden_size=64, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
          decoder_intermediate_size=128, **VISION)  # fmt: skip
_register("patchtst", "PatchTSTForPrediction",
          lambda: {"past_values": torch.randn(ROWS, 64, 3), "future_values": torch.randn(ROWS, 16, 3)},
          num_input_channels=3, context_length=64, prediction_length=16, patch_length=8, patch_stride=8, d_model=128,
          num_hidden_layers=2, num_attention_heads=4, ffn_dim=512, attention_dropout=0.1, loss="mse")  # fmt: skip
