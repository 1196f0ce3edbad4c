# SPDX-License-Identifier: Apache-2.0
"""The inside of a contestant's process: it builds a model, an optimizer and data, then trains when it is told to.

A process has one pipe to train_speed.py. It reports that it is ready, blocks until so many steps are wanted, takes
them, reports what they took, and blocks again.
"""

import ctypes
import os
import pickle
import sys
import time
from collections import deque
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
from subject import RECIPE


from common import quiet  # noqa: F401  # isort: skip
import torch
import torch.nn.functional as F
from contestants import MAX_SEQ_LENGTH
from omegaconf import DictConfig, OmegaConf
from speed_profile import Profile

from build_model import build_precision, model_config, reference_config, training_flops
from common import cpu_memory
from common.scheduler import adamw
from keys import lr_schedule
from tokens.backends import resolve_layer_backend


CONFIGS = RECIPE / "hydra_config"
MLM_PROBABILITY, MAX_GRAD_NORM = 0.15, 1.0
WINDOW_ROWS = 10_000
POOL_STEPS = 200  # four times what Trainer sorts together
SIMD = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


class Finished(BaseException):
    """No more steps are wanted; it leaves a training loop that knows nothing of this."""


class Gate:
    """Counts the steps of a training loop, and holds it up after as many as were wanted."""

    def __init__(self, connection: Connection, device: str, shape):
        self.connection, self.device, self.shape = connection, device, shape
        self.profile = None
        self.facts = {"memory_before_gib": None}

    def about_to_build(self) -> None:
        """Everything is imported: what memory grows by from here on is the training's."""
        self.facts["memory_before_gib"] = status_gib("VmRSS")

    def ready(self, **facts) -> None:
        """Say so, and block until steps are wanted."""
        self.facts |= facts
        self.wait(self.facts)

    def wait(self, report: dict) -> dict:
        """Send a report and block until more is wanted; returns what. Raises Finished when nothing is."""
        release_memory(self.device)
        try:
            self.connection.send(report)
            wanted = self.connection.recv()
        except (EOFError, BrokenPipeError):
            wanted = None
        if wanted is None:
            raise Finished
        self.wanted, self.settling, self.profiled = (wanted[key] for key in ("steps", "settling", "profile"))
        self.begin()
        return wanted

    def begin(self) -> None:
        """From here on steps count, unless some have to settle things first."""
        self.counts = {"steps": 0, "tokens": 0, "labels": 0, "slots": 0, "flops": 0, "data_wait_s": 0.0}
        if self.profiled and not self.settling:
            self.profile = Profile(self.device)
        self.started = time.perf_counter()

    def count(self, batches: list, data_wait_s: float) -> None:
        """What a step trains on, and how long it waited for that."""
        counts, backend = self.counts, self.facts.get("layer_backend")  # ours alone have one
        counts["data_wait_s"] += data_wait_s
        for batch in batches:
            counts["tokens"] += batch.counts["tokens"]
            counts["labels"] += batch.counts["labels"]
            counts["slots"] += batch.num_slots
            counts["flops"] += training_flops(self.shape, batch, backend)

    def step(self, loss: float | None) -> None:
        """A step is over; `loss` is in nats a masked token, None where the loop does not read it."""
        if self.settling:  # no report, and no memory given back
            self.settling -= 1
            synchronize(self.device)
            self.begin()
            return
        self.counts["steps"] += 1
        if self.counts["steps"] < self.wanted:
            return
        synchronize(self.device)  # the last update must not run on in another contestant's time
        report = self.counts | {"seconds": time.perf_counter() - self.started, "loss": loss}
        if self.profile:
            report["seconds_by_kind"] = self.profile.stop(report["seconds"], report["data_wait_s"])
            self.profile = None
        report["peak_memory_gib"] = peak_memory_gib(self.device)
        if self.facts.get("compiled"):
            report["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        self.wait(report)


def run(connection: Connection, log: str, job: dict) -> NoReturn:
    """The target of the process; what is printed goes to the file `log`."""
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if job["device"] == "cpu":
        torch.set_num_threads(job["threads"])
    job = SimpleNamespace(**job)
    gate = Gate(connection, job.device, model_config(job.model_tag, "auto"))
    kinds = {"facts": prepare, "ours": train_ours, "loop": train_loop,
             "trainer": train_trainer, "products": multiply}  # fmt: skip
    try:
        kinds[job.kind](job, gate)
    except Finished:
        sys.exit(0)


def prepare(job: SimpleNamespace, gate: Gate) -> None:
    """Say what there is, and write the rows that our recipe is going to read, for the peers to read as well.

    They are tokenised, and in our recipe's order; beside them lies the recipe's collator, for padded batches.
    """
    import datasets

    from common.distributed import process_group
    from dataset import TrainLoader

    datasets.disable_progress_bars()
    config = recipe_config(job, {"precision": "fp32", "dataset.num_workers": 0})
    try:
        with process_group(job.seed) as distributed:
            build_precision(config, gate.shape, distributed)
            loader = TrainLoader(distributed, job.seed, packed=False, pad_to_multiple_of=1, **config.dataset)
    except ValueError as error:
        sys.exit(f"error: --data: {' '.join(str(error).split())}")
    Path(job.collator_file).write_bytes(pickle.dumps(loader.loader.collate_fn))
    plan, source = loader.plan, loader.plan.source
    lengths = np.concatenate([source.sizes(batch.rows, 0) for batch in plan.window(0, 0)])
    # As many rows as make up the tokens of a step; enough steps for a sampler to find rows of like lengths.
    step_rows = job.tokens_per_step / lengths.mean()
    passes = max(1, round(step_rows / job.peer_batch))
    micro_rows = min(job.peer_batch, max(1, round(step_rows)))
    num_rows = max(job.warmup + job.rounds * (job.settling + job.mixed_steps), POOL_STEPS) * passes * micro_rows
    tokens = []
    for batch in plan.starting_at(0, 0, 0):
        tokens += source.read(batch.rows, batch.epoch)
        if len(tokens) >= num_rows:
            break
    tokens = tokens[:num_rows]
    np.savez(job.rows_file, tokens=np.concatenate(tokens), lengths=[len(row) for row in tokens])
    data = {"num_rows": len(source), "mean_tokens": lengths.mean(), "passes": passes, "micro_rows": micro_rows}
    gate.ready(data=data, **machine_facts(job))


def machine_facts(job: SimpleNamespace) -> dict:
    """What the list of contestants depends on, and what the numbers do."""
    from common.run_facts import cpu_name, git_commit, versions
    from tokens.backends import te_available

    cuda = job.device == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.exit("error: --device cuda: torch finds no GPU here.")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features"))).split()
    except (OSError, StopIteration):  # no Linux
        flags = []
    found = versions() | {name: version(name) for name in ("accelerate", "flash_attn") if find_spec(name)}
    return {
        "device": job.device,
        "machine": {
            "name": torch.cuda.get_device_name() if cuda else cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "simd": [] if cuda else [flag for flag in SIMD if flag in flags],
        },
        "memory_gib": torch.cuda.mem_get_info()[0] / 2**30 if cuda else available_gib(),
        "bf16_speed": None if cuda else bf16_speed(),
        "capability": torch.cuda.get_device_capability() if cuda else None,
        "te": te_available()[0],
        "layer_backend": resolve_layer_backend("auto", model_config(job.model_tag, "auto").head_dim),
        "flash_attn": "flash_attn" in found,
        "accelerate": "accelerate" in found,
        "versions": found,
        "git": git_commit(),
    }


def bf16_speed() -> float:
    """How fast this processor's products are in BF16, as a share of FP32's."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        product = square_product(512, dtype, torch.device("cpu"))
        rates[dtype] = tera_per_second(*product(128), "cpu", least_s=0.05)
    return rates[torch.bfloat16] / rates[torch.float32]


def spread(places: np.ndarray, number: int, offset: float) -> np.ndarray:
    """So many indices into `places`, evenly apart; `offset` is that of the first, a share of the distance."""
    return ((np.arange(number) + offset) * len(places) / number).astype(int)


class Rows:
    """Rows tokenised ahead, and the order in which a peer reads them."""

    def __init__(self, job: SimpleNamespace):
        saved = np.load(job.rows_file)
        self.tokens = np.split(saved["tokens"].astype(np.int64), np.cumsum(saved["lengths"])[:-1])
        self.lengths = saved["lengths"]
        self.job = job
        self.random = np.random.default_rng(job.seed)
        self.collate = pickle.loads(Path(job.collator_file).read_bytes())
        self.number = 0

    def batch(self, places: np.ndarray):
        """The padded batch of these rows, freshly masked, with the inputs that Hugging Face's model takes."""
        self.number += 1
        batch = self.collate({"name": (self.number,), "items": [self.tokens[place] for place in places]})
        del batch.inputs["selected"]
        return batch

    def micro_batches(self, order: str) -> list[np.ndarray]:
        """The rows of each micro-batch, in order; each step (`random`) or round (`length`) has all lengths."""
        job, size = self.job, self.job.micro_rows
        if order == "length":  # a batch has like lengths; ties are broken at random
            places = np.lexsort((self.random.random(len(self.lengths)), self.lengths)).reshape(-1, size)
            return list(places[self.dealt(self.lengths[places].sum(1), job.passes)])
        # Of as many strata of like lengths as a step has rows, each step has one row, and batches have any of them.
        # Not our recipe's order: its packs have like lengths, as no random order has.
        per_step = job.passes * size
        num_steps = job.warmup + job.rounds * (job.settling + job.steps)
        places = np.argsort(self.lengths, kind="stable")
        places = places[spread(places, num_steps * per_step, 0)]
        steps = self.random.permuted(places.reshape(per_step, num_steps), axis=1).T
        return list(self.random.permuted(steps, axis=1).reshape(-1, size))

    def dealt(self, weights: np.ndarray, per_step: int) -> np.ndarray:
        """Places, `per_step` a step: what counts in every round, and what does not, have light and heavy ones alike.

        Otherwise a round's rate would be that of the lengths it happened to have.
        """
        job, places = self.job, np.argsort(weights, kind="stable")

        uncounted = (job.warmup + job.rounds * job.settling) * per_step
        first = np.append(spread(places[:-1], uncounted - 1, 0), len(places) - 1)  # and the heaviest
        rest = np.delete(places, first)
        rest = rest[spread(rest, job.rounds * job.steps * per_step, self.random.random())]
        rounds = self.random.permuted(self.random.permuted(rest.reshape(-1, job.rounds), axis=1).T, axis=1)
        warmup, settling = np.split(self.random.permutation(places[first[:-1]]), [job.warmup * per_step - 1])
        warmup = self.random.permutation(np.append(warmup, places[-1]))
        return np.concatenate([warmup, np.concatenate([settling.reshape(job.rounds, -1), rounds], axis=1).ravel()])


def recipe_config(job: SimpleNamespace, options: dict) -> DictConfig:
    """The recipe's configuration: what all contestants have in common, and these."""
    from hydra import compose, initialize_config_dir

    options = {
        "model_tag": job.model_tag, "num_train_steps": 10**6, "seed": job.seed,
        "micro_batches_per_step": job.pack_passes, "dataset.token_micro_batch_size": job.pack_tokens,
        "dataset.max_seq_length": MAX_SEQ_LENGTH, "dataset.mlm_probability": MLM_PROBABILITY,
        "dataset.window_rows": WINDOW_ROWS, "dataset.load_dataset_kwargs.path": job.data["path"],
        "max_grad_norm": MAX_GRAD_NORM, "logger.frequency": 10**6, "logger.log_dir": "null", **options,
    }  # fmt: skip
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("defaults", [f"{k}={v}" for k, v in options.items()])
    config.dataset.load_dataset_kwargs.data_files = job.data["data_files"]
    return config


def train_ours(job: SimpleNamespace, gate: Gate) -> None:
    """The recipe's own train_ddp.py, held up where it logs a step."""
    import train_ddp
    from common.config import launch
    from common.distributed import process_group
    from keys import check_config

    class GatedLogger(train_ddp.PerfLogger):
        """The trainer's logger, which sees every step."""

        def start(self, step, notes):
            super().start(step, notes)
            auto = build_precision(OmegaConf.merge(config, {"precision": "auto"}), gate.shape, self.distributed)
            gate.ready(
                num_parameters=self.run["num_parameters"],
                precision_auto="bf16" if auto.dtype else "fp32",
                layer_backend=self.run["layer_backend"],
                compiled=config.use_torch_compile,
            )

        def count(self, batches, counts, epoch, data_wait_s):
            super().count(batches, counts, epoch, data_wait_s)
            gate.count(batches, data_wait_s)

        def log_step(self, step, losses, grad_norm, learning_rate):
            super().log_step(step, losses, grad_norm, learning_rate)
            gate.step(losses["loss"])

    options = {"precision": job.precision, **job.options}
    if not options["use_sequence_packing"]:  # whole rows: packs of mixed lengths would be mostly padding
        options |= {
            "dataset.token_micro_batch_size": "null", "dataset.micro_batch_size": job.micro_rows,
            "micro_batches_per_step": job.passes,
        }  # fmt: skip
    config = None

    def main():
        nonlocal config
        config = recipe_config(job, options | dict(override.split("=", 1) for override in job.overrides))
        check_config(config)
        gate.about_to_build()
        with process_group(config.seed, config.deterministic) as distributed:
            train_ddp.train(config, distributed)

    train_ddp.PerfLogger = GatedLogger
    sys.argv[1:] = []  # those of the benchmark are no keys
    launch(main)


def build_peer(job: SimpleNamespace, shape) -> tuple:
    """Hugging Face's model with random weights, and the optimizer and schedule that our recipe has."""
    from transformers import AutoModelForMaskedLM

    torch.manual_seed(job.seed)
    model = AutoModelForMaskedLM.from_config(reference_config(shape), attn_implementation=job.options["attention"])
    for name, module in model.named_modules():
        if name.endswith("contact_head"):
            module.requires_grad_(False)  # no part of the loss
    model.to(job.device).train()
    published = OmegaConf.load(CONFIGS / "defaults.yaml")
    optimizer = adamw(model, **published.adamw_kwargs)
    return model, optimizer, lr_schedule(optimizer, **published.lr_scheduler_kwargs)


def train_loop(job: SimpleNamespace, gate: Gate) -> None:
    """A plain loop around Hugging Face's model."""
    gate.about_to_build()
    rows = Rows(job)
    model, optimizer, scheduler = build_peer(job, gate.shape)
    autocast = partial(torch.autocast, job.device, torch.bfloat16, enabled=job.precision == "bf16")
    order = rows.micro_batches(job.options["order"])

    def loss_of(batch) -> torch.Tensor:
        with autocast():
            return model(**batch.to(torch.device(job.device)).inputs).loss / job.passes

    facts = {"num_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    if job.options["compile"]:
        # Each layer by itself: the graph of one serves all.
        layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
        for layer in layers:
            layer.compile(dynamic=True)
        started = time.perf_counter()
        widths = [rows.lengths[places].max() for places in order]
        for place in np.argsort(widths)[[0, len(widths) // 2, -1]]:
            loss_of(rows.batch(order[place])).backward()
            same = np.full_like(order[place], order[place][0])  # no padding: a graph of its own
            loss_of(rows.batch(same)).backward()
        optimizer.zero_grad()
        synchronize(job.device)
        facts |= {"compiled": True, "compile_s": time.perf_counter() - started}
    gate.ready(**facts)

    micro_batches = iter(order)
    while some := list(islice(micro_batches, job.passes)):
        total = torch.zeros((), device=job.device)
        data_wait_s, batches = 0.0, []
        for places in some:
            started = time.perf_counter()
            batches.append(rows.batch(places))
            data_wait_s += time.perf_counter() - started
            loss = loss_of(batches[-1])
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        loss = total.item()
        gate.count(batches, data_wait_s)
        gate.step(loss)


def train_trainer(job: SimpleNamespace, gate: Gate) -> None:
    """Hugging Face's Trainer with its own grouping by length."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    gate.about_to_build()
    rows = Rows(job)
    model, *optimizers = build_peer(job, gate.shape)
    collated: deque = deque()  # it reads a batch ahead
    step_rows = job.passes * job.micro_rows

    class Grouped(Trainer):
        """The steps are those of its own sampler, dealt out so that every round has all lengths."""

        def _get_train_sampler(self, train_dataset=None):
            places = np.array(list(super()._get_train_sampler(train_dataset))).reshape(-1, step_rows)
            return places[rows.dealt(rows.lengths[places].sum(1), 1)].ravel().tolist()

    class Gated(TrainerCallback):
        """Sees the end of every step."""

        def on_step_end(self, args, state, control, **kwargs):
            batches, waits = zip(*(collated.popleft() for _ in range(job.passes)), strict=True)
            gate.count(batches, sum(waits))
            gate.step(None)

    def collate(samples: list[dict]) -> dict:
        started = time.perf_counter()
        batch = rows.batch(np.array([sample["place"] for sample in samples]))
        collated.append((batch, time.perf_counter() - started))
        return batch.inputs

    arguments = TrainingArguments(
        output_dir=job.scratch, use_cpu=job.device == "cpu", bf16=job.precision == "bf16", seed=job.seed,
        per_device_train_batch_size=job.micro_rows, gradient_accumulation_steps=job.passes, num_train_epochs=1,
        max_grad_norm=MAX_GRAD_NORM, train_sampling_strategy="group_by_length", dataloader_num_workers=0,
        remove_unused_columns=False, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    dataset = [{"input_ids": tokens, "place": place} for place, tokens in enumerate(rows.tokens)]
    trainer = Grouped(
        model, arguments, data_collator=collate, train_dataset=dataset, optimizers=optimizers, callbacks=[Gated()]
    )
    gate.ready(num_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))
    trainer.train()


def multiply(job: SimpleNamespace, gate: Gate) -> None:
    """The rate of matrix products alone: those of a layer, forward and backward, and large square ones."""
    least_s = 0.2 if job.quick else 1.0
    width, wide = gate.shape.hidden_size, gate.shape.intermediate_size
    shapes = ((width, 3 * width), (width, width), (width, wide), (wide, width))
    device, dtypes = torch.device(job.device), {"fp32": torch.float32, "bf16": torch.bfloat16}
    rates = {
        fmt: {
            "layer": products(layer_products(shapes, dtype, device), job.pack_tokens, job.device),
            "square_2048": products(square_product(2048, dtype, device), 2048, job.device),
        }
        for fmt, dtype in dtypes.items()
    }
    report = {}
    while True:
        gate.wait(report)
        report = {
            fmt: {name: tera_per_second(*product, job.device, least_s) for name, product in of.items()}
            for fmt, of in rates.items()
        }


def layer_products(shapes: tuple, dtype: torch.dtype, device: torch.device):
    """Forward and backward products of a layer; a function from a number of tokens to what computes them."""

    def of(num_tokens: int) -> tuple:
        made = [
            [torch.randn(*size, dtype=dtype, device=device) for size in ((num_tokens, i), (o, i), (num_tokens, o))]
            for i, o in shapes
        ]

        def run_once():
            for x, weight, gradient in made:
                F.linear(x, weight)
                gradient.mm(weight)
                gradient.t().mm(x)

        return run_once, sum(3 * 2 * num_tokens * i * o for i, o in shapes)

    return of


def square_product(size: int, dtype: torch.dtype, device: torch.device):
    """So many rows of a square product, likewise."""

    def of(rows: int) -> tuple:
        a, b = (torch.randn(n, size, dtype=dtype, device=device) for n in (rows, size))
        return lambda: a.mm(b), 2 * rows * size**2

    return of


def products(of, most: int, device: str, limit_s: float = 1.0) -> tuple:
    """Of `most` rows, or as many as take about a second: in BF16, a processor that lacks it can take minutes."""
    rows = most if device == "cuda" else min(32, most)
    while True:
        product = of(rows)
        started = time.perf_counter()
        product[0]()
        if rows == most or time.perf_counter() - started > limit_s / 2:
            return product
        rows = min(2 * rows, most)


def tera_per_second(function, flops: int, device: str, least_s: float) -> float:
    """The mean rate over at least so many seconds, in TFLOP/s."""
    function()
    synchronize(device)
    started, times = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < least_s:
        function()
        synchronize(device)
        times += 1
    return times * flops / seconds / 1e12


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def release_memory(device: str) -> None:
    """Give back what a waiting process does not need: the others run in the same memory."""
    if device == "cuda":
        torch.cuda.empty_cache()
    cpu_memory.trim()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def peak_memory_gib(device: str) -> float | None:
    """Most memory this process has held: on a GPU what torch allocated there, else resident."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else status_gib("VmHWM")


def status_gib(key: str) -> float | None:
    """A line of this process's status in GiB; None where there is no Linux."""
    return _kib_in("/proc/self/status", key)


def available_gib() -> float | None:
    """What the machine's memory still takes."""
    return _kib_in("/proc/meminfo", "MemAvailable")


def _kib_in(file: str, key: str) -> float | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{key}:")), None)
