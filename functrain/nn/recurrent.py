"""torch's recurrent layers in a trace: a step in time is a layer of `nn.stack`, compiled once for all times.

T times, B batch, I inputs, H hidden, G gates (3 of a GRU, 1 of an RNN). torch's own GRU would be a graph as long as the
sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.compiler import engine

Weights = tuple[Tensor, Tensor | None]  # of the hidden state, (G * H, H), and their bias, (G * H,)


def cuts(name: str) -> bool:
    """Tell whether a recurrent layer of torch that runs now is better cut at its times."""
    cutter = engine.here.cutter
    return name in _CELLS and cutter is not None and bool(cutter.cuts_layers())


def recurrent(name: str) -> Callable[..., Any]:
    """Return the function of torch of this name, "gru", "rnn_tanh" or "rnn_relu", for sequences of one length."""
    cell = _CELLS[name]

    def run(
        input: Tensor, state: Tensor, weights: list[Tensor], has_biases: bool, layers: int, dropout: float,
        training: bool, bidirectional: bool, batch_first: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x = input.transpose(0, 1) if batch_first else input  # (T, B, I)
        size = 4 if has_biases else 2
        each = [weights[i : i + size] for i in range(0, len(weights), size)]
        last = []
        for layer in range(layers):
            outputs = []
            for direction in range(1 + bidirectional):
                i = layer * (1 + bidirectional) + direction
                outputs.append(_over_time(cell, x, state[i], each[i], backwards=direction == 1))
                last.append(outputs[-1][0 if direction == 1 else -1])
            x = torch.cat(outputs, -1)  # (T, B, H), or 2 H
        return (x.transpose(0, 1) if batch_first else x), torch.stack(last)

    return run


def _over_time(cell: Callable[..., Tensor], x: Tensor, h: Tensor, weights: list[Tensor], *, backwards: bool) -> Tensor:
    """Return the hidden state after each time, (T, B, H)."""
    of_input, of_state = weights[0], (weights[1], weights[3] if len(weights) == 4 else None)
    gates = F.linear(x, of_input, weights[2] if len(weights) == 4 else None)  # (T, B, G * H)
    times = list(gates.unbind())
    made: list[Tensor] = []
    kind = object()
    for gate in reversed(times) if backwards else times:
        h = engine.here.cutter.layer(kind, cell, of_state, h, (gate,))
        made.append(h)
    return torch.stack(made[::-1] if backwards else made)


def _gru(weights: Weights, h: Tensor, gate: Tensor) -> Tensor:
    gate_r, gate_z, gate_n = gate.chunk(3, -1)
    state_r, state_z, state_n = F.linear(h, *weights).chunk(3, -1)
    n = torch.tanh(gate_n + torch.sigmoid(gate_r + state_r) * state_n)
    return n + torch.sigmoid(gate_z + state_z) * (h - n)


def _rnn_tanh(weights: Weights, h: Tensor, gate: Tensor) -> Tensor:
    return torch.tanh(gate + F.linear(h, *weights))


def _rnn_relu(weights: Weights, h: Tensor, gate: Tensor) -> Tensor:
    return torch.relu(gate + F.linear(h, *weights))


_CELLS: dict[str, Callable[..., Tensor]] = {"gru": _gru, "rnn_tanh": _rnn_tanh, "rnn_relu": _rnn_relu}
