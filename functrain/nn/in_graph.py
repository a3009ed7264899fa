"""The product of groups as one node of a graph of Dynamo's.

Imported only where something compiles. Dynamo's own tracing of an autograd.Function silently loses its second
derivative (torch 2.13); a node that it does not look into keeps every derivative.
"""

from __future__ import annotations

import torch

from functrain.nn.grouped import grouped_product

product = torch.compiler.allow_in_graph(grouped_product)
