# SPDX-License-Identifier: Apache-2.0
"""A model sharded by FSDP2 before it has storage gets the weights of the whole one, bit by bit."""

import os

import torch
import torch.distributed as dist
from conftest import ODD
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing import spawn

from common.weights import copy_parameters
from modeling_esm2 import Esm2Config, Esm2ForMaskedLM
from tokens.masked_lm import init_parameters


def train_step(model, batch):
    loss = model(**batch).loss
    loss.backward()
    gradient = model.esm.encoder.layer[0].self_attention.layernorm_qkv.weight.grad
    return loss.detach(), gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def rank_main(rank, folder, expected, batch):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # A prime width of the MLP and 33 tokens: no even split.
    with torch.device("meta"):
        model = Esm2ForMaskedLM(Esm2Config(**ODD))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.esm.encoder.layer:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device="cpu")

    def assert_gathered(weights):
        for name, x in model.state_dict().items():
            full = x.full_tensor() if hasattr(x, "full_tensor") else x
            assert torch.equal(full, weights[name]), name

    init_parameters(model, seed=7)
    assert_gathered(expected["initial"])
    copy_parameters(model, expected["other"])
    assert_gathered(expected["other"])

    model.activation_checkpointing_enable()
    angle_dtypes = []
    model.esm.encoder.layer[0].register_forward_pre_hook(lambda _, args: angle_dtypes.append(args[1].angles_SD.dtype))
    loss, gradient = train_step(model, batch)
    assert angle_dtypes == [torch.float32]
    torch.testing.assert_close(loss, expected["loss"], rtol=0.02, atol=0)
    cosine = torch.cosine_similarity(gradient.flatten(), expected["gradient"].flatten(), dim=0)
    assert cosine > 0.99, cosine
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may abort a process that goes on to its end


def test_two_ranks(make_model, make_batches, tmp_path):
    whole, other = make_model(), make_model()
    init_parameters(whole, seed=7)
    _, packed = make_batches()
    loss, gradient = train_step(other, packed)
    expected = {
        "initial": dict(whole.state_dict()),
        "other": dict(other.state_dict()),
        "loss": loss,
        "gradient": gradient,
    }
    spawn(rank_main, (tmp_path, expected, packed), nprocs=2)
