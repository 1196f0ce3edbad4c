# SPDX-License-Identifier: Apache-2.0
"""Train ESM-2 with Megatron-FSDP: as FSDP2, but shards are cut from flat buffers, sent in larger pieces.

python train_mfsdp.py                                         # one process, on a GPU or the CPU
torchrun --nproc_per_node=8 train_mfsdp.py --config-name L0_sanity
TRAINER=train_mfsdp.py sbatch slurm.sh                        # several nodes
"""

import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import time
from contextlib import nullcontext
from pathlib import Path

import hydra
import torch
from megatron_fsdp import MixedPrecisionPolicy, fully_shard_model
from omegaconf import DictConfig
from torch.distributed.device_mesh import init_device_mesh

from anomalies import Anomalies
from build_model import build_model, fill_model, model_config, read_pretrained
from checkpoint import Checkpointer
from config import check_config, launch
from dataset import TrainLoader
from distributed import Distributed, StopSignal, clip_grad_norm_, passes_per_step, process_group
from megatron_fsdp_cpu import stand_in_for_cuda
from megatron_fsdp_exact import compute_in, make_exact
from perf_logger import PerfLogger
from precision import FP4, FP8, Precision
from quant_stats import QuantStats
from scheduler import adamw, linear_schedule
from validation import Validator


@hydra.main(version_base=None, config_path=f"{Path(__file__).parent}/hydra_config", config_name="L0_sanity")
def main(config: DictConfig) -> None:
    """Check the configuration, join the other ranks, train."""
    check_config(config)
    with process_group(config.seed, config.deterministic) as distributed:
        train(config, distributed)


def train(config: DictConfig, distributed: Distributed) -> None:
    """The whole run."""
    with distributed.one_voice():  # a user's mistake shows here, on all ranks, before anything is built
        distributed = distributed.with_context_parallel(config.cp_size)
        passes = passes_per_step(config.micro_batches_per_step, distributed.num_data_ranks, distributed.cp_size)
        config.micro_batches_per_step = passes * distributed.num_data_ranks  # where it was null: a resume must know
        shape = model_config(config.model_tag, config.layer_backend, **config.model_kwargs)
        precision = Precision(
            distributed.device, config.precision, shape, FP8(**config.fp8_config), FP4(**config.fp4_config),
            config.fp8_layers, config.fp4_layers, QuantStats(**config.quant_stats_config),
        )  # fmt: skip
        layout = {"packed": config.use_sequence_packing, "pad_to_multiple_of": precision.multiple * config.cp_size}
        loader = TrainLoader(distributed, config.seed, **layout, **config.dataset)
        validator = Validator(distributed, **layout, **config.validation)
        model = build_model(config.model_tag, shape, distributed.context_parallel)  # on the meta device
        num_parameters = model.num_parameters()
        checkpointer = Checkpointer(distributed, config, num_parameters, shape, **config.checkpoint)
        fresh = checkpointer.resume_step is None
        pretrained = read_pretrained(config.init_from, shape) if config.init_from and fresh else None
        anomalies = Anomalies(distributed, config.logger.log_dir, **config.anomalies)
        logger = PerfLogger(distributed, config, shape, num_parameters, precision, __file__, **config.logger)

    precision.prepare(model)
    if config.use_activation_checkpointing:
        model.activation_checkpointing_enable()
    if config.use_torch_compile:
        for layer in model.esm.encoder.layer:
            layer.compile(dynamic=True)

    # ---- Megatron-FSDP: filled before it is split, so each rank holds the whole model for a moment.
    logger.notes.append(stand_in_for_cuda())
    model.to_empty(device=distributed.device)
    fill_model(model, shape, config.seed, pretrained)
    model = fully_shard_model(
        compute_in(precision.dtype, model),
        # It asks for a tensor-parallel dimension even where there is none.
        device_mesh=init_device_mesh(distributed.device.type, (distributed.num_ranks, 1), mesh_dim_names=("dp", "tp")),
        dp_shard_dim="dp",
        tp_dim="tp",
        fsdp_unit_modules=[type(model.esm.encoder.layer[0])],
        device=distributed.device,
        calculate_per_token_loss=True,  # sum over ranks: the loss is already divided by all labels
        mixed_precision_policy=MixedPrecisionPolicy(main_params_dtype=torch.float32, main_grads_dtype=torch.float32),
        preproc_state_dict_for_dcp_ckpt=False,  # checkpoint.py reads the shards' places itself
    )
    optimizer = adamw(model.parameters(), **config.adamw_kwargs)
    make_exact(model, optimizer)
    forward = precision.forward
    gradient_scale = 1
    accumulate = nullcontext
    # ----

    scheduler = linear_schedule(optimizer, **config.lr_scheduler_kwargs)
    progress = checkpointer.load(model, optimizer, scheduler, loader)
    logger.start(progress, [loader.note, *checkpointer.notes])
    anomalies.start(progress)
    stop, last, batches = StopSignal(), config.num_train_steps, iter(loader)
    model.train()

    def add_gradients(micro_batches, num_labels):
        """Those of one step; returns each micro-batch's part of its loss."""
        losses = []
        for batch in micro_batches:
            inputs = batch.to(distributed.device).inputs
            with nullcontext() if batch is micro_batches[-1] else accumulate():
                with forward():
                    loss = model(**inputs, num_items_in_batch=max(num_labels, 1)).loss
                (loss * gradient_scale).backward()
            losses.append(loss.detach())
        return losses

    for step in range(progress["step"] + 1, last + 1):
        started = time.perf_counter()
        micro_batches = [next(batches) for _ in range(passes)]
        data_wait_s = time.perf_counter() - started
        num_labels, num_tokens, stopping = distributed.sum(
            sum(b.num_labels for b in micro_batches), sum(b.num_tokens for b in micro_batches), stop.requested
        )

        losses = add_gradients(micro_batches, num_labels)
        grad_norm = clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        loss, is_sound = anomalies.judge(step, micro_batches, losses, grad_norm)
        if is_sound:
            optimizer.step()
        else:
            optimizer.zero_grad()
            with anomalies.explain(model):
                add_gradients(micro_batches, num_labels)
        optimizer.zero_grad()
        if anomalies.fatal:
            break
        logger.count(micro_batches, data_wait_s, num_tokens)
        logger.log_step(step, loss, grad_norm, scheduler.get_last_lr()[0])
        scheduler.step()
        if validator.is_due(step, last):
            with logger.paused():
                logger.log_validation(step, validator.run(model, forward))
        if checkpointer.is_due(step, step == last or stopping):
            progress = logger.progress() | anomalies.progress()
            checkpointer.save(step, model, optimizer, scheduler, loader, progress, wait=stopping)
        if stopping and step < last:
            distributed.say(f"Stopped after step {step} as asked; {checkpointer.stopped()}")
            break
    else:
        checkpointer.save_final(last)
    checkpointer.finish()
    logger.close()
    anomalies.close()
    checkpointer.close()


if __name__ == "__main__":
    launch(main)
