# SPDX-License-Identifier: Apache-2.0
"""Dropout by a hash instead of a stream of random numbers.

Whether a number is dropped follows from (seed of the micro-batch, sequence, position, layer, place in the layer,
column). A column is a channel, or in attention a key's position. So it does not depend on how a batch lies in memory
(padded, packed or shared by ranks), and nothing is stored for the backward pass: `layers_cpp.cpp` computes it again.

Words are int32 and wrap around. Each token has one for the micro-batch (`token_words`), from it one for each layer,
and from that one for each place; the last and a column's give a draw. Shapes as in `layers.py`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


ATTENDED, FED, HEADS = 0, 1, 2  # places in a layer: what its two parts add, and attention's first head


def _wrapped(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


# The odd numbers and shifts of `lowbias32` (C. Wellons, Hash Prospector), and the golden ratio.
FIRST, SECOND, GOLDEN = _wrapped(0x7FEB352D), _wrapped(0x846CA68B), _wrapped(0x9E3779B9)


def _shifted(words: Tensor, bits: int) -> Tensor:
    return (words >> bits) & (2 ** (32 - bits) - 1)  # int32 would be filled up with its sign


def fold(words: Tensor | int, numbers: Tensor | int) -> Tensor:
    """A new word for each word and number, of which at least one is a tensor."""
    words = words + numbers * GOLDEN if isinstance(numbers, Tensor) else words + _wrapped(numbers * GOLDEN)
    words = (words ^ _shifted(words, 16)) * FIRST
    words = (words ^ _shifted(words, 15)) * SECOND
    return words ^ _shifted(words, 16)


def draw_seed() -> Tensor:
    """A seed from the CPU's stream, which common/random_numbers.py sets for each micro-batch; it stays on the CPU."""
    return torch.randint(-(2**31), 2**31, (), dtype=torch.int32, device="cpu")


def token_words(seed: Tensor | int, sequences_N: Tensor, positions_N: Tensor) -> Tensor:
    """The words of a micro-batch's tokens, [N], by the number of the sequence and the position in it."""
    return fold(fold(seed, sequences_N.int()), positions_N.int())


def limit_of(rate: float) -> int:
    """Draws, int32, below it are dropped."""
    return round(rate * 2**32) - 2**31


def kept(words_N: Tensor, num_columns: int, rate: float) -> Tensor:
    """Of the rows that have these words, which numbers stay, [N, columns]."""
    columns = fold(0, torch.arange(num_columns, dtype=torch.int32, device=words_N.device))
    draws = (words_N.unsqueeze(-1) ^ columns) * FIRST
    return (draws ^ _shifted(draws, 15)) * SECOND >= limit_of(rate)


def drop(x_NE: Tensor, words_N: Tensor, place: int, rate: float) -> Tensor:
    """[N, E] with numbers dropped, and the others scaled up; `words_N` are those of the layer."""
    return x_NE * kept(fold(words_N, place), x_NE.shape[-1], rate) / (1 - rate)


class Dropped(NamedTuple):
    """Attention's weights that are: `words` [B, S] or [T] of the layer, and the number of the first head here."""

    words: Tensor
    rate: float
    first_head: int = 0

    def split(self, lengths: list[int]) -> list["Dropped"]:
        """Of each packed sequence, [1, S]."""
        return [self._replace(words=words) for words in self.words[None].split(lengths, dim=1)]


def attention_of_rows(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask_B11S: Tensor | None = None, dropped: Dropped | None = None
) -> Tensor:
    """Softmax attention, [B, H, S, D]. With dropout, the CPU holds all weights at once.

    GPUs draw from their own stream: PyTorch's kernels there hold no weights, and can be given no draws.
    """
    if dropped is None or q_BHSD.is_cuda:
        rate = dropped.rate if dropped else 0.0
        return F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, attn_mask=mask_B11S, dropout_p=rate)
    scores_BHSS = q_BHSD @ k_BHSD.transpose(-1, -2) * q_BHSD.shape[-1] ** -0.5
    if mask_B11S is not None:
        scores_BHSS = scores_BHSS.masked_fill(~mask_B11S, float("-inf"))
    words_BS, (num_heads, num_keys) = dropped.words, scores_BHSS.shape[1::2]
    heads_H1 = torch.arange(num_heads, dtype=torch.int32, device=words_BS.device)[:, None] + dropped.first_head + HEADS
    kept_BHSS = kept(fold(words_BS[:, None], heads_H1), num_keys, dropped.rate)
    at_least_fp32 = torch.promote_types(scores_BHSS.dtype, torch.float32)
    weights_BHSS = scores_BHSS.to(at_least_fp32).softmax(-1) * kept_BHSS / (1 - dropped.rate)
    return weights_BHSS.to(v_BHSD.dtype) @ v_BHSD
