# SPDX-License-Identifier: Apache-2.0
"""Muon (Jordan et al. 2024): a matrix moves along its momentum made nearly orthogonal; AdamW moves the rest.

`torch.optim.Muon` does that in BF16, where a difference in the last digit, as between numbers of ranks, may become one
of a hundredth. Here it is done in the parameters' precision, and on whole matrices: each rank gathers those that are
split.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from common.distributed import own_part


MOMENTUM, NUM_ITERATIONS = 0.95, 5  # as published; with Nesterov's correction
A, B, C = 3.4445, -4.7750, 2.0315  # of the published polynomial, which is steepest at 0


@torch.no_grad()
def muon_first(optimizer: Optimizer, *_) -> None:
    """Before a step of AdamW: move the matrices of groups with `muon`, and drop their gradients, so that it passes by.

    The update has 0.2 as its root mean square, about what AdamW's has (Liu et al. 2025, eq. 4), so that learning rate
    and weight decay mean the same in all groups.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["muon"] else ():
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros((), device=parameter.device)  # AdamW asks for it when a state is loaded
            state["step"] += 1
            gradient, momentum = own_part(parameter.grad), own_part(state["momentum"])
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalized(gradient.lerp(momentum, MOMENTUM), parameter)
            weight = own_part(parameter)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])
            parameter.grad = None


def orthogonalized(part: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of the orthogonal matrix nearest to one of which it has `part`, split as the parameter is."""
    if not isinstance(parameter, DTensor):
        return newton_schulz(part)
    assert all(placement.is_replicate() or placement.is_shard(0) for placement in parameter.placements)
    (chunk,) = parameter.__create_chunk_list__()
    rows = slice(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])
    whole = part.new_zeros(parameter.shape)
    whole[rows] = part
    for i, placement in enumerate(parameter.placements):
        if placement.is_shard():
            dist.all_reduce(whole, group=parameter.device_mesh.get_group(i))  # the sum of zeros and one part
    return newton_schulz(whole)[rows]


def newton_schulz(matrix: Tensor) -> Tensor:
    """Its singular values become about 1 (0.7 to 1.2), its singular vectors stay."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-30)
    for _ in range(NUM_ITERATIONS):
        square = x @ x.T
        x = A * x + (B * square + C * square @ square) @ x
    return x if wide is matrix else x.T
