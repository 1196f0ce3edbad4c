# SPDX-License-Identifier: Apache-2.0
"""Train NequIP or Allegro with DDP: every rank holds the whole model, and gradients are averaged.

python train_ddp.py                                           # one process, on a GPU or the CPU
torchrun --nproc_per_node=8 train_ddp.py --config-name L0_sanity
TRAINER=train_ddp.py sbatch slurm.sh                          # several nodes
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import time
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig
from torch.nn.parallel import DistributedDataParallel

import metrics
from build_model import build_model, build_precision, materialize, model_config, prepare, training_flops
from checkpoint import Checkpointer
from common.anomalies import Anomalies
from common.config import joined, launch
from common.distributed import Distributed, StopSignal, passes_per_step
from common.ema import EMA
from common.gradients import Strategy, add_gradients, clip_grad_norm_
from common.loss_schedules import LossSchedules
from common.perf_logger import PerfLogger
from common.run_end import end_run
from common.scheduler import adamw, freeze
from dataset import TrainLoader, open_validation
from keys import check_config, check_labels, lr_schedule
from pretrained import read_pretrained


@hydra.main(version_base=None, config_path=f"{Path(__file__).parent}/hydra_config", config_name="L0_sanity")
def main(config: DictConfig) -> None:
    """Check the configuration, join the other ranks, train."""
    check_config(config, __file__)
    with joined(config) as distributed:
        train(config, distributed)


def train(config: DictConfig, distributed: Distributed) -> None:
    """The whole run."""
    with distributed.fail_together():  # a user's mistake shows here, on all ranks, before anything is built
        passes = passes_per_step(config.micro_batches_per_step, distributed)
        config.micro_batches_per_step = passes * distributed.num_data_ranks  # where it was null: a resume must know
        wanted = model_config(config.model_tag, config.precision, config.init_from, **config.model_kwargs)
        precision = build_precision(config, distributed.device)
        loader = TrainLoader(distributed, config.seed, wanted.cutoffs, wanted.elements, **config.dataset)
        validator = open_validation(distributed, wanted.cutoffs, loader.elements, **config.validation)
        check_labels(config, validator.metrics.labels)
        shape = wanted.on(loader.elements, loader.statistics)
        model = build_model(shape, config.loss_kwargs, distributed)  # on the meta device: no storage yet
        prepare(model, config, precision)
        freeze(model, **config.adamw_kwargs)
        checkpointer = Checkpointer(distributed, config, shape, model, **config.checkpoint)
        pretrained = checkpointer.first_weights(partial(read_pretrained, config, shape, loader.notes))
        anomalies = Anomalies(distributed, config.logger.log_dir, **config.anomalies)
        flops = partial(training_flops, shape)
        logger = PerfLogger(distributed, config, model, flops, precision, metrics, __file__, **config.logger)

    # ---- DDP: gradients are averaged in buckets while the backward pass goes on.
    materialize(model, config.seed, pretrained, distributed.device)
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = adamw(model, **config.adamw_kwargs)
    # It averages over ranks, and the loss is already divided by all labels.
    strategy = Strategy(precision.forward, distributed.num_ranks, model.no_sync)
    # ----

    ema = EMA(model, config.ema_decay)
    scheduler = lr_schedule(optimizer, **config.lr_scheduler_kwargs)
    schedules = LossSchedules(config.loss_schedules)
    parts = {
        "scheduler": scheduler,
        "loader": loader,
        "logger": logger,
        "anomalies": anomalies,
        "loss_schedules": schedules,
    }
    step, last = checkpointer.load(model, optimizer, ema, parts), config.num_train_steps
    data = [*loader.facts(config), *validator.facts]
    logger.start(step, [*data, *loader.notes, *checkpointer.notes, scheduler.note(last)])
    stop, batches = StopSignal(), iter(loader)
    validate = partial(validator.report, model, strategy.forward, ema, logger)
    validate(step, checkpointer.validates_anew)
    model.train()

    while step < last:
        step += 1
        started = time.perf_counter()
        micro_batches = [next(batches) for _ in range(passes)]
        data_wait_s = time.perf_counter() - started
        counts, epoch, stopping = distributed.sum_counts(micro_batches, stop.requested)
        weights = schedules.coefficients(step, epoch)
        gradients = partial(add_gradients, model, micro_batches, counts, strategy, distributed, config.seed, **weights)

        losses = gradients()
        grad_norm = clip_grad_norm_(model, config.max_grad_norm)
        result = anomalies.judge(step, micro_batches, losses, grad_norm)
        if result.is_sound:
            optimizer.step()
            ema.update(model)
        else:  # computed once more, to see where it began
            optimizer.zero_grad()
            with anomalies.explain(model):
                gradients()
        optimizer.zero_grad()
        if anomalies.fatal:
            break

        logger.count(micro_batches, counts, epoch, data_wait_s)
        logger.log_step(step, result.losses, result.grad_norm, scheduler.get_last_lr()[0])
        scheduler.step()
        validate(step, validator.is_due(step, last))
        scheduler.see(logger.validation)
        if checkpointer.is_due(step, step == last or stopping, logger.validation):
            checkpointer.save(step, model, optimizer, ema, parts, wait=stopping)
        if stopping:
            break
    end_run(step, last, checkpointer, logger, anomalies)


if __name__ == "__main__":
    launch(main)
