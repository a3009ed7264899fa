"""Layers as pure functions of tensors, and the one way to run layers after another."""

from functrain.nn import init
from functrain.nn.attention import attention
from functrain.nn.attention_masks import attention_mask, causal_mask
from functrain.nn.batch_norm import BatchStats, batch_norm, batch_norm_inference, batch_stats
from functrain.nn.convolution import conv, conv_transpose
from functrain.nn.dropout import dropout
from functrain.nn.experts import experts
from functrain.nn.functional import Functional, from_module, to_module
from functrain.nn.layers import embedding, gelu, group_norm, instance_norm, layer_norm, linear, rms_norm, swiglu
from functrain.nn.pooling import adaptive_avg_pool, adaptive_max_pool, avg_pool, global_avg_pool, max_pool
from functrain.nn.rotary import Rotary, rotary_angles, rotate
from functrain.nn.stack import stack
from functrain.tree import elsewhere

__all__ = [
    "BatchStats", "Functional", "Rotary", "adaptive_avg_pool", "adaptive_max_pool", "attention", "attention_mask",
    "avg_pool", "batch_norm", "batch_norm_inference", "batch_stats", "causal_mask", "conv", "conv_transpose",
    "dropout", "embedding", "experts", "from_module", "gelu", "global_avg_pool", "group_norm", "init",
    "instance_norm", "layer_norm", "linear", "max_pool", "rms_norm", "rotary_angles", "rotate", "stack", "swiglu",
    "to_module",
]  # fmt: skip

elsewhere.furnish(__name__)
