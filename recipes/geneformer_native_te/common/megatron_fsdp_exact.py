# SPDX-License-Identifier: Apache-2.0
"""What Megatron-FSDP 0.6.1 needs so that its numbers are those of DDP; held to that by tests/test_train.py."""

from collections.abc import Mapping

import torch
from megatron_fsdp import MegatronFSDP
from megatron_fsdp.uneven_dtensor import update_uneven_dtensor_chunk_metadata

from common.distributed import stop_with


def compute_in(dtype: torch.dtype | None, model: torch.nn.Module, checkpoint: Mapping = {}) -> torch.nn.Module:
    """Cast the parameters that compute (None: leave them); the FP32 values become the masters' first ones.

    Ends all ranks with a sentence where checkpoints would hold frozen parameters: they have no FP32 masters.
    """
    is_frozen = not all(p.requires_grad for p in model.parameters())
    if dtype is not None and is_frozen and checkpoint.get("ckpt_dir") and not checkpoint.get("trained_only"):
        stop_with(
            "adamw_kwargs.groups: Megatron-FSDP rounds what is frozen to BF16, and would save it so; set "
            "checkpoint.trained_only=true or precision=fp32, or use train_fsdp2.py."
        )
    if dtype is not None:  # else the masters would start from rounded values
        for p in model.parameters():
            p.get_high_precision_init_val = lambda master=p.data: master
            p.clear_high_precision_init_val = lambda p=p: delattr(p, "get_high_precision_init_val")
            p.data = p.data.to(dtype)
    return model


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
