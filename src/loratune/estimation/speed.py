"""How fast this machine multiplies, measured rather than looked up."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from loratune.model import context_of, evaluating

# A step in bare forward passes over the same tokens, one more to recompute. Arithmetic alone is two; the adapters'
# small products, the backward's element-wise work and the optimizer make it 5.4, measured on SmolLM2-135M at rank 16.
STEP_FORWARDS, RECOMPUTED_FORWARDS = 5, 6


def forward_rate(model: Any, *, tokens: int = 256) -> float:
    """Tokens a second of the model's own forward pass over one row, measured in two passes after one to warm up."""
    tokens = min(tokens, context_of(model) or tokens)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (1, tokens)).to(next(model.parameters()).device)
    with evaluating(model), torch.no_grad():
        return tokens / min([_forward_seconds(model, ids) for _ in range(3)][1:])


def _forward_seconds(model: Any, ids: Tensor) -> float:
    start = time.perf_counter()
    written = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    float(model(input_ids=ids, use_cache=False, **written)[0].flatten()[-1])  # waits for an asynchronous device
    return time.perf_counter() - start


def matmul_rate(device: torch.device, dtype: torch.dtype, *, width: int = 1024) -> float:
    """Floating-point operations a second of a (512, width) × (width, width) product."""
    a = torch.randn(512, width, device=device, dtype=dtype)
    b = torch.randn(width, width, device=device, dtype=dtype)
    return 2 * 512 * width * width / min(_seconds(a, b) for _ in range(6))


def _seconds(a: Tensor, b: Tensor, repeats: int = 4) -> float:
    c = a @ b
    start = time.perf_counter()
    for _ in range(repeats):
        c = a @ b
    float(c[0, 0])  # waits for an asynchronous device
    return (time.perf_counter() - start) / repeats
