"""A small model with what real ones have, and a picture of it that two moments are compared by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loratune as lt

CONFIG = lt.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.v = Conv1D(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.v(torch.tanh(self.q(self.norm(x)))))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Two blocks between an embedding and a head that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


IDS = torch.tensor([[1, 2, 3], [4, 5, 10]])


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    for block in model.blocks:
        nn.init.normal_(block.v.weight, std=0.5)
        nn.init.normal_(block.v.bias)
    model.embed.weight.requires_grad_(False)  # somebody froze a part already
    return model.to(dtype).eval()


def attached(*others: str, dtype: torch.dtype = torch.float32) -> tuple[Net, lt.Adapters]:
    """`default` active, `others` beside it; all with random A and B."""
    model = net(dtype)
    handle = lt.attach(model, CONFIG)
    for name in others:
        handle.add(CONFIG, name)
    return model, handle


def picture(model: nn.Module, handle: lt.Adapters | None = None) -> dict[str, Any]:
    """Everything that a refused verb must not change, tensors as their bytes."""
    found: dict[str, Any] = {
        "tensors": {name: bits(tensor) for name, tensor in model.state_dict().items()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)},
        "modules": {path: (id(module), type(module), module.training) for path, module in model.named_modules()},
        "output": bits(output_of(model)),
    }
    if handle is not None:
        found["handle"] = (handle.names, handle.active, handle.merged)
        found["configs"] = {name: handle.config(name) for name in handle.names}
        found["trains"] = [id(p) for p in handle.parameters()]
    return found


def output_of(model: nn.Module) -> Tensor:
    """What a model makes of `IDS`, the net as well as one of transformers."""
    found = model(IDS)
    return found if isinstance(found, Tensor) else found.logits


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
