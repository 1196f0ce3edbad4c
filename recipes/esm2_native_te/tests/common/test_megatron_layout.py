# SPDX-License-Identifier: Apache-2.0
"""A rank's part of Megatron-FSDP's flat buffer holds whole rows of each parameter."""

import math
from types import SimpleNamespace

import pytest
import torch

from common import megatron_fsdp_exact as exact


# Each is shorter than 30, the least common multiple of their rows.
ODD = [(7, 2), (5, 3), (4, 5), (9, 3), (5, 5), (7, 3), (4,), (9, 2)]
EVEN = [(64, 32), (32,), (128, 64), (64, 128), (64,)]


def is_cut_within_a_row(shapes, layout, world):
    items, bucket, _ = layout
    part = bucket.size // world
    cuts = range(0, bucket.size, part)
    inside = [(cut - item.global_data_index, shapes[i]) for i, item in items.items() for cut in cuts]
    return any(0 < cut < shape.numel() and cut % shape[1:].numel() for cut, shape in inside)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("shapes", [ODD, EVEN], ids=["odd", "even"])
def test_no_rank_holds_part_of_a_row(shapes, world):
    shapes = [torch.Size(shape) for shape in shapes]
    strategy = SimpleNamespace(data_parallel_sharding_strategy="optim")
    chunk = math.lcm(*(shape[1:].numel() for shape in shapes))
    parts = [exact.layout_of_buffer(shapes, rank, world, True, strategy, 0, chunk) for rank in range(world)]
    assert not is_cut_within_a_row(shapes, parts[0], world)
    items, bucket, _ = parts[0]
    taken = torch.zeros(bucket.size, dtype=torch.int)
    for i, item in items.items():
        assert item.size == shapes[i].numel() and item.item_id == i
        taken[item.global_data_index : item.global_data_index + item.size] += 1
    assert taken.max() == 1 and taken.sum() == sum(shape.numel() for shape in shapes)
    assert [part[:2] for part in parts] == [parts[0][:2]] * world and bucket.size % (world * chunk) == 0
    starts = [part[2].global_data_index for part in parts]
    assert starts == list(range(0, bucket.size, bucket.size // world))


def test_what_the_package_cuts_well_stays():
    shapes = [torch.Size(shape) for shape in EVEN]
    arguments = (shapes, 1, 2, True, SimpleNamespace(data_parallel_sharding_strategy="optim"), 3, 128)
    assert exact.layout_of_buffer(*arguments) == exact._layout_of_buffer(*arguments)


def test_the_package_cuts_odd_ones_within_a_row():
    """Or `layout_of_buffer` can go."""
    shapes = [torch.Size(shape) for shape in ODD]
    strategy = SimpleNamespace(data_parallel_sharding_strategy="optim")
    assert is_cut_within_a_row(shapes, exact._layout_of_buffer(shapes, 0, 2, True, strategy, 0, 30), 2)
