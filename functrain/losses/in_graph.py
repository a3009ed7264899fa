"""The chunked loss as one node of a compiled graph.

Imported only where something compiles. Dynamo's own tracing of an autograd.Function silently loses its second
derivative (torch 2.13); a node that it does not look into keeps every derivative.
"""

from __future__ import annotations

import torch

from functrain.losses.chunked_total import total_of_chunks

total = torch.compiler.allow_in_graph(total_of_chunks)
