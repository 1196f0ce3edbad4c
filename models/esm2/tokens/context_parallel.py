# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: packed sequences too long for one rank, shared out over several (Ulysses, arXiv:2309.14509).

Each rank of a group holds an equal stretch of a micro-batch's tokens, wherever sequences begin and end. Only attention
looks across tokens: before it the ranks exchange tokens for heads, so that each has all tokens of some heads, and
afterwards they change back.

Shapes: T tokens of the micro-batch, P = T / ranks of them here; H heads, K of them here; C numbers of each head.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange(torch.autograd.Function):
    """Pieces of `x` [sum(send)] to the ranks, theirs to [sum(receive)]; gradients go the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = receive, send, group
        y = x.new_empty(sum(receive))
        dist.all_to_all_single(y, x, receive, send, group=group)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        return Exchange.apply(grad.contiguous(), *ctx.back), None, None, None


class ContextParallel:
    """This rank's place in the group that shares a micro-batch."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def part(self, x_T: Tensor) -> Tensor:
        """This rank's [P] of [T]. Raises ValueError if the ranks do not divide T."""
        if len(x_T) % self.size:
            raise ValueError(f"{len(x_T)} tokens are not the same number on each of {self.size} ranks: pad them.")
        return x_T.chunk(self.size)[self.rank]

    def num_heads(self, num_heads: int) -> list[int]:
        """How many of all heads each rank takes; the first ones take one more if they do not divide."""
        return [num_heads // self.size + (rank < num_heads % self.size) for rank in range(self.size)]

    def first_head(self, num_heads: int) -> int:
        """The number of the first of those that this rank takes."""
        return sum(self.num_heads(num_heads)[: self.rank])

    @torch.compiler.disable
    def tokens_to_heads(self, x_PHC: Tensor) -> Tensor:
        """[P, H, C] to [T, K, C]."""
        num_tokens, all_heads, width = x_PHC.shape
        heads = self.num_heads(all_heads)
        sent = torch.cat([x.flatten() for x in x_PHC.split(heads, dim=1)])
        mine = num_tokens * heads[self.rank] * width
        y = Exchange.apply(sent, [num_tokens * n * width for n in heads], [mine] * self.size, self.group)
        return y.view(-1, heads[self.rank], width)

    @torch.compiler.disable
    def heads_to_tokens(self, x_TKC: Tensor, num_heads: int) -> Tensor:
        """[T, K, C] to [P, H, C]."""
        num_tokens, mine, width = x_TKC.shape
        num_tokens //= self.size
        heads = self.num_heads(num_heads)
        sizes = [num_tokens * n * width for n in heads]
        y = Exchange.apply(x_TKC.flatten(), [num_tokens * mine * width] * self.size, sizes, self.group)
        return torch.cat([x.view(num_tokens, -1, width) for x in y.split(sizes)], dim=1)
