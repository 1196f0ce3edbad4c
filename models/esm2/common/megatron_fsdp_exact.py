# SPDX-License-Identifier: Apache-2.0
"""What Megatron-FSDP 0.6.1 needs so that its numbers are those of DDP; held to that by tests/test_train.py."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from megatron_fsdp import MegatronFSDP, param_and_grad_buffer
from megatron_fsdp.uneven_dtensor import update_uneven_dtensor_chunk_metadata

from common.distributed import stop_with


def compute_in(dtype: torch.dtype | None, model: torch.nn.Module, checkpoint: Mapping = {}) -> torch.nn.Module:
    """Cast the parameters that compute (None: leave them); the FP32 values become the masters' first ones.

    Ends all ranks with a sentence where checkpoints would hold frozen parameters: they have no FP32 masters.
    """
    param_and_grad_buffer.build_data_parallel_buffer_index = layout_of_buffer
    is_frozen = not all(p.requires_grad for p in model.parameters())
    if dtype is not None and is_frozen and checkpoint.get("ckpt_dir") and not checkpoint.get("trained_only"):
        stop_with(
            "Megatron-FSDP rounds parameters that are frozen to BF16, and would save them so; set "
            "checkpoint.trained_only=true or precision=fp32, or use train_fsdp2.py."
        )
    if dtype is not None:  # else the masters would start from rounded values
        for p in model.parameters():
            p.get_high_precision_init_val = lambda master=p.data: master
            p.clear_high_precision_init_val = lambda p=p: delattr(p, "get_high_precision_init_val")
            p.data = p.data.to(dtype)
    return model


_layout_of_buffer = param_and_grad_buffer.build_data_parallel_buffer_index


def layout_of_buffer(
    elements: list[torch.Size], data_parallel_rank: int, data_parallel_world_size: int, is_data_distributed: bool,
    ddp_config, bucket_id: int = 0, chunk_size_factor: int = 1,
) -> tuple:  # fmt: skip
    """Where each parameter lies in its flat buffer: as the package says, unless that cuts one within a row.

    It lays those of fewer elements than `chunk_size_factor`, the least common multiple of all rows, end to end, and a
    rank's part may end within a row of one: then it fails. Here they lie between two multiples of it. Takes and
    returns what `param_and_grad_buffer.build_data_parallel_buffer_index` does.
    """
    world = (data_parallel_rank, data_parallel_world_size, is_data_distributed, ddp_config)
    items, bucket, shard = _layout_of_buffer(elements, *world, bucket_id, chunk_size_factor)
    part = bucket.size // data_parallel_world_size
    cuts = [(index, -index.global_data_index % part) for index in items.values()] if part else []
    if all(cut >= index.size or cut % elements[index.item_id][1:].numel() == 0 for index, cut in cuts):
        return items, bucket, shard
    chunk, end, room = chunk_size_factor, 0, []  # room: [where it begins, how much], behind each parameter
    for item, shape in sorted(enumerate(elements), key=lambda one: -one[1].numel()):
        place = next((one for one in room if one[1] >= shape.numel()), None)
        if place is None:
            place = [end, -(-shape.numel() // chunk) * chunk]
            room.append(place)
            end += place[1]
        items[item] = items[item]._replace(global_data_index=place[0])
        place[0], place[1] = place[0] + shape.numel(), place[1] - shape.numel()
    per_rank = data_parallel_world_size * chunk
    bucket = bucket._replace(size=-(-end // per_rank) * per_rank, items=list(items.values()))
    of_this_rank = (is_data_distributed, data_parallel_world_size, data_parallel_rank)
    return items, bucket, param_and_grad_buffer._get_dp_buffer_shard_bucket_index(bucket, *of_this_rank)


def make_exact(model: MegatronFSDP, optimizer: torch.optim.Optimizer) -> None:
    """Hook into the wrapped model and its optimizer; the training loop then stays what it is."""

    # Its root hook looks for the loss in tensors, tuples and lists, and overlooks one in a ModelOutput: gradients
    # outside the layers would be reduced more than once.
    def start_backward(grad):
        model.pre_backward()
        torch.autograd.Variable._execution_engine.queue_callback(model.post_backward)

    def after_forward(module, args, output):
        if torch.is_grad_enabled() and output.loss.requires_grad:
            output.loss.register_hook(start_backward)
        else:  # no backward pass follows that would bring the sharded parameters back
            model.synchronize_param_gather()

    model.register_forward_hook(after_forward)

    # Where a rank holds no row of a parameter its gradient is None, and clipping, a reduction a gradient, would hang.
    finish_grad_sync = model.finish_grad_sync

    def finish_grad_sync_everywhere():
        finish_grad_sync()
        for p in model.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)

    model.finish_grad_sync = finish_grad_sync_everywhere

    # Instead of its fully_shard_optimizer, which takes a step with zero gradients: weight decay, and bias correction.
    optimizer.register_step_post_hook(lambda *_: model.install_optimized_model_weights())
    zero_grad = optimizer.zero_grad

    def zero_grad_and_buffer(set_to_none=True):
        zero_grad(set_to_none)
        model.zero_grad_buffer()

    optimizer.zero_grad = zero_grad_and_buffer

    # A shard is some rows of a flat buffer, no even split; this notes on each parameter which, for checkpoints.
    for p in model.parameters():
        update_uneven_dtensor_chunk_metadata(p)


@contextmanager
def summed_at_the_end(model: MegatronFSDP) -> Iterator[None]:
    """For all but the last micro-batch of a step, where gradients are whole on each rank (`zero_dp_strategy` 0 and 1).

    Their buffer is reduced in place: after each micro-batch, the earlier ones' gradients would be reduced again.
    """
    model.model_auto_sync = False
    try:
        with model.no_sync():
            yield
    finally:
        model.model_auto_sync = True
