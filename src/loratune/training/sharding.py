"""FSDP2: each process keeps a part of every weight, and of what is trained of it.

`fully_shard` itself, layer by layer and then the rest: accelerate's plugin replicates on a CPU without a word.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from loratune.lora import base_of
from loratune.loss import Objective
from loratune.model import has_separate_head


def units_of(model: Any) -> list[nn.Module]:
    """The decoder's layers, which are gathered one at a time; none where the family does not name them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if base_of(type(module)).__name__ in names]


def shard(model: Any, device: torch.device) -> Objective:
    """Divide an adapted model's parameters among all processes, on `device`; there is no way back.

    The loss is the root: it reads the head's weights, so that it must run inside the root's forward pass.
    """
    has_separate_head(model)  # tried once, while nothing is divided yet
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    objective = Objective(model)
    for module in [*units_of(model), objective]:
        fully_shard(module, mesh=mesh)
        part = cast(FSDPModule, module)
        # A step's loss is divided by the tokens of all processes, so that gradients add up; gloo knows no other sum.
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)
    return objective


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process has a part; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as `parameter` is kept: this process's part of it where that is sharded."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    on_device = tensor.to(parameter.device_mesh.device_type)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements)
