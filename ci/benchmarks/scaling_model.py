# SPDX-License-Identifier: Apache-2.0
"""Cost model of training ESM-2 on many GPUs: time of a step, traffic and memory with DDP, FSDP2 and Megatron-FSDP.

python ci/benchmarks/scaling_model.py                                    # all tables, from the formulas
python ci/benchmarks/scaling_model.py --gpu B200 --link ethernet         # predictions for another machine
python ci/benchmarks/scaling_model.py --write                            # docs: JSON, tables of scaling.md, picture
python ci/benchmarks/scaling_model.py --from docs/results/scaling_model.json --check docs/scaling.md

Nothing is measured here. docs/scaling.md has the formulas; the constants with their sources are below. Times are in
seconds, bandwidths in bytes/s in one direction. A node has eight GPUs.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "esm2_native_te"))
from common import quiet  # noqa: E402, F401  # isort: skip
from common.run_facts import PEAK_TFLOPS  # noqa: E402
from modeling_esm2 import SIZES, Esm2Config, training_flops  # noqa: E402


MODELS = {tag.split("_")[2]: shape for tag, shape in SIZES.items() if "UR50D" in tag}  # 8M ... 15B
STRATEGIES = {"ddp": "DDP", "fsdp2": "FSDP2", "mfsdp": "Megatron-FSDP"}
NODE, GIB = 8, 2**30


class Gpu(NamedTuple):
    """From the data sheets: dense BF16 FLOP/s, memory in bytes as PyTorch sees it, its bandwidth, and NVLink's."""

    flops: float
    memory: float
    bandwidth: float
    nvlink: float


GPUS = {
    "A100": Gpu(PEAK_TFLOPS["A100"] * 1e12, 79 * GIB, 2.039e12, 300e9),
    "H100": Gpu(PEAK_TFLOPS["H100"] * 1e12, 79 * GIB, 3.35e12, 450e9),
    "H200": Gpu(PEAK_TFLOPS["H200"] * 1e12, 139 * GIB, 4.8e12, 450e9),
    "B200": Gpu(PEAK_TFLOPS["B200"] * 1e12, 178 * GIB, 8e12, 900e9),
    "B300": Gpu(PEAK_TFLOPS["B300"] * 1e12, 268 * GIB, 8e12, 900e9),
}


class Link(NamedTuple):
    """Between nodes: what it is called, and a node's bandwidth over all of its adapters."""

    name: str
    node: float


LINKS = {
    "ib400": Link("InfiniBand, 400 Gb/s a GPU", NODE * 400e9 / 8),
    "ib200": Link("InfiniBand, 200 Gb/s a GPU", NODE * 200e9 / 8),
    "ethernet": Link("Ethernet, 100 Gb/s a node", 100e9 / 8),
}

# Seconds to begin and to pass on, inside a node and between nodes: what NCCL's own tuner counts with for its LL128
# protocol (src/graph/tuning.cc).
START = 14e-6
RING, TREE = (1.9e-6, 4.0e-6), (1.25e-6, 8.5e-6)

# Assumptions, not from a source.
LINK_SHARE = 0.8  # of a link's bandwidth that a collective reaches
MEMORY_SHARE = 0.9  # of a GPU's memory that is there for us: CUDA, NCCL and the gaps between tensors take the rest
KERNEL = 5e-6  # to launch one
KERNELS = (20, 40)  # of a layer, forward and backward

# Elements of the width, of two bytes, that are read and written for a token and a layer, forward and backward: by
# norms, rotation, GELU, residuals and sums of bias gradients; by matrix products.
ELEMENTWISE = (22, 37)
PRODUCTS = (16, 32)
# Elements of the width that are held for a token and a layer until the backward pass: input, norm, q k v, turned q and
# k, context, residual, norm, two of four widths. With recomputation only the input.
HELD, HELD_RECOMPUTED = 18, 1
# Bytes a parameter that are copied on the GPU in a pass, forward and backward. DDP: autocast's BF16 weights, gradients
# added up in FP32. FSDP2: out of the gathered buffer, gradients into the one to scatter. Megatron-FSDP: the latter.
COPIES = {"ddp": (6, 10), "fsdp2": (4, 10), "mfsdp": (0, 6)}
# AdamW reads four values a parameter and writes three; clipping reads the gradient twice and writes it.
OPTIMIZER_BYTES = 4 * (4 + 3 + 3)
DDP_BUCKET = 25 * 2**20
# Parameters that Megatron-FSDP 0.6.1 gathers ahead, and whose gradients may wait (suggested_communication_unit_size).
AHEAD, WAITING = 500_000_000, 1_000_000_000

STEP_TOKENS = 2**21  # published: 2M tokens a step
MICRO_TOKENS = {"15B": 4096}  # of hydra_config/L1_15B.yaml; the others:
DEFAULT_MICRO_TOKENS = 16384
RECOMPUTED = ("3B", "15B")  # use_activation_checkpointing in hydra_config/L1_*.yaml
NUM_GPUS = (8, 64, 256, 1024)
# Sum of squared lengths over sum of lengths, 8,000 UniRef proteins cropped to 1,024 tokens: what attention sees.
PACKED_LENGTH, FULL_LENGTH = 456, 1024
LABELLED = 0.15


class Published(NamedTuple):
    """A figure of others, and what it is taken to have been run with."""

    name: str
    size: str
    gpu: str
    figure: float
    unit: str = "tokens/s"
    num_gpus: int = 8
    micro_tokens: int = 16384
    length: int = PACKED_LENGTH
    precision: str = "bf16"
    note: str = ""


PADDED = "one GPU, sequences of 1,024"
FULL = "sequences of 1,024, 8 GPUs assumed"
UNPADDED = "unpadded, passes of 8,192 tokens assumed"
UNFUSED = "layers without TransformerEngine, which the model does not describe"
PUBLISHED = (
    Published("A100", "650M", "A100", 42933, "tokens/s", 1, 46 * 1024, FULL_LENGTH, note=PADDED),
    Published("H100", "650M", "H100", 95871, "tokens/s", 1, 46 * 1024, FULL_LENGTH, note=PADDED),
    Published("B300", "650M", "B300", 815, "TFLOP/s", length=FULL_LENGTH, note=FULL),
    Published("B300", "3B", "B300", 1045, "TFLOP/s", length=FULL_LENGTH, note=FULL),
    Published("B300", "15B", "B300", 1106, "TFLOP/s", length=FULL_LENGTH, note=FULL),
    Published("H200, TransformerEngine", "15B", "H200", 5950, micro_tokens=8192, note=UNPADDED),
    Published("H200, FP8 block scaling", "15B", "H200", 7119, micro_tokens=8192, precision="fp8", note=UNPADDED),
    Published("B200, MXFP8", "15B", "B200", 15450, micro_tokens=8192, precision="fp8", note=UNPADDED),
    Published("B200, NVFP4", "15B", "B200", 21476, micro_tokens=8192, precision="fp4", note=UNPADDED),
    Published("H200, FlashAttention-2", "15B", "H200", 1630, micro_tokens=8192, note=UNFUSED),
    Published("B200, FlashAttention-2", "15B", "B200", 2958, micro_tokens=8192, note=UNFUSED),
)
CALIBRATED_ON = {"A100": 0, "H100": 1, "H200": 1, "B200": 2, "B300": 2}  # places in PUBLISHED
# How much faster than in BF16 the layers' products may be; bytes a token, layer and width for rounding what goes in.
PRECISIONS = {"bf16": (1, 0), "fp8": (2, 64), "fp4": (4, 64)}


class Shape(NamedTuple):
    """What the model needs to know of a size."""

    config: Esm2Config
    num_layers: int
    width: int
    layer: int  # parameters of one
    rest: int  # parameters of embedding, last norm and head

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.num_layers * self.layer + self.rest


def shape_of(size: str) -> Shape:
    """The published size of that name."""
    config = Esm2Config(**MODELS[size])
    width, ffn = config.hidden_size, config.intermediate_size
    layer = 4 * width**2 + 2 * width * ffn + 9 * width + ffn
    rest = config.padded_vocab_size * width + width**2 + 5 * width + config.vocab_size
    return Shape(config, config.num_hidden_layers, width, layer, rest)


def link_bandwidth(gpu: Gpu, link: Link, num_gpus: int) -> float:
    """Of a ring over all GPUs. It enters a node once and leaves it once, over all adapters together."""
    return LINK_SHARE * (gpu.nvlink if num_gpus <= NODE else min(gpu.nvlink, link.node))


def ring_bytes(size: float, num_gpus: int) -> float:
    """What each GPU sends so that all have gathered, or reduced and scattered, `size` bytes."""
    return size * (num_gpus - 1) / num_gpus


def ring_seconds(size: float, gpu: Gpu, link: Link, num_gpus: int) -> float:
    """An all-gather or a reduce-scatter of `size` bytes in all."""
    if num_gpus == 1:
        return 0.0
    between = num_nodes(num_gpus) - 1
    hops = (num_gpus - 1 - between) * RING[0] + between * RING[1]
    return START + hops + ring_bytes(size, num_gpus) / link_bandwidth(gpu, link, num_gpus)


def all_reduce_seconds(size: float, gpu: Gpu, link: Link, num_gpus: int) -> float:
    """By a ring (reduce-scatter, then all-gather) or a tree (up, then down), whichever is faster."""
    if num_gpus == 1:
        return 0.0
    ring = 2 * ring_seconds(size, gpu, link, num_gpus) - START
    hops = (min(num_gpus, NODE) - 1) * TREE[0] + math.floor(math.log2(num_nodes(num_gpus))) * TREE[1]
    tree = START + 2 * hops + 2 * size / link_bandwidth(gpu, link, num_gpus)
    return min(ring, tree)


def num_nodes(num_gpus: int) -> int:
    """Nodes that so many GPUs fill."""
    return -(-num_gpus // NODE)


def step_flops(config: Esm2Config, lengths: list[float], num_labels: int) -> float:
    """Operations of a training step on sequences of these lengths."""
    counts = {"tokens": sum(lengths), "labels": num_labels, "token_pairs": sum(length**2 for length in lengths)}
    return training_flops(config, counts)


def layer_seconds(shape: Shape, gpu: Gpu, share: float, tokens: int, length: float, precision: str = "bf16") -> tuple:
    """Forward and backward pass of one layer, without communication."""
    speedup, rounding = PRECISIONS[precision]
    flops = step_flops(shape.config, [length], 0) / (3 * shape.num_layers * length)  # forward, a token
    products = 2 * (4 * shape.width**2 + 2 * shape.width * shape.config.intermediate_size)
    seconds = []
    for times, elementwise, moved, kernels in zip((1, 2), ELEMENTWISE, PRODUCTS, KERNELS, strict=True):
        compute = times * tokens * (products / speedup + flops - products) / (share * gpu.flops)
        traffic = tokens * shape.width * (2 * (elementwise + moved) + rounding * times / 3) + times * 2 * shape.layer
        seconds.append(max(compute + traffic / gpu.bandwidth, kernels * KERNEL))
    return tuple(seconds)


class Step(NamedTuple):
    """What the model says of one step."""

    seconds: float
    exposed: float  # of these, waiting for other GPUs
    tokens_per_second: float  # a GPU
    tflops: float  # a GPU; recomputation does not count


def step(
    size: str,
    gpu_name: str,
    link: str,
    strategy: str,
    num_gpus: int,
    tokens: int,
    share: float,
    *,
    micro_tokens: int | None = None,
    length: float = PACKED_LENGTH,
    recompute: bool = False,
    precision: str = "bf16",
) -> Step:
    """One step of `tokens` tokens a GPU, in passes of `micro_tokens` (or fewer, where there are not so many)."""
    shape, gpu, link = shape_of(size), GPUS[gpu_name], LINKS[link]
    micro_tokens = min(tokens, micro_tokens or MICRO_TOKENS.get(size, DEFAULT_MICRO_TOKENS))
    passes = tokens / micro_tokens
    forward, backward = layer_seconds(shape, gpu, share, micro_tokens, length, precision)
    backward += recompute * forward
    copied = [shape.layer * count / gpu.bandwidth for count in COPIES[strategy]]
    forward, backward = forward + copied[0], backward + copied[1]
    head = step_flops(shape.config, [], round(LABELLED * micro_tokens)) / (share * gpu.flops)
    compute = shape.num_layers * (forward + backward) + head

    def gathered(parameters: int) -> float:
        return ring_seconds(2 * parameters, gpu, link, num_gpus)

    def scattered(parameters: int) -> float:
        return ring_seconds(4 * parameters, gpu, link, num_gpus)

    if strategy == "ddp":
        buckets = math.ceil(4 * shape.parameters / DDP_BUCKET)
        one = all_reduce_seconds(4 * shape.parameters / buckets, gpu, link, num_gpus)
        exposed = one + max(0.0, (buckets - 1) * one - shape.num_layers * backward)
        updated = shape.parameters
    else:
        gather, scatter, others = gathered(shape.layer), scattered(shape.layer), shape.num_layers - 1
        edges = gathered(shape.rest) + gather + gather + scatter + scattered(shape.rest)
        within = max(0.0, gather - forward) + max(0.0, gather + scatter - backward)
        exposed = passes * (edges + others * within)
        updated = shape.parameters / num_gpus
    exposed += 2 * all_reduce_seconds(8, gpu, link, num_gpus)  # the number of labels, the gradient's norm
    seconds = passes * compute + exposed + updated * OPTIMIZER_BYTES / gpu.bandwidth
    flops = step_flops(shape.config, [length], round(LABELLED * length)) / length
    rate = tokens / seconds
    return Step(seconds, exposed, rate, rate * flops / 1e12)


def memory(size: str, strategy: str, num_gpus: int, micro_tokens: int, recompute: bool) -> dict[str, float]:
    """Bytes a GPU: weights, gradients and moments that stay, buffers, activations, and the most there is of it."""
    shape = shape_of(size)
    p, parts = shape.parameters, 1 if strategy == "ddp" else num_gpus
    masters = 6 if strategy == "mfsdp" else 4  # it keeps BF16 shards beside those in FP32
    if strategy == "ddp":
        buffers = 2 * p  # autocast's BF16 weights
    elif strategy == "fsdp2":  # two layers gathered, gradients of one in BF16 and FP32; embedding and head
        buffers = 10 * shape.layer + 6 * shape.rest
    else:
        buffers = 2 * min(p, AHEAD + shape.layer) + 4 * min(p, WAITING + shape.layer)
    held = HELD_RECOMPUTED * shape.num_layers + HELD if recompute else HELD * shape.num_layers
    found = {
        "weights": masters * p / parts,
        "gradients": 4 * p / parts,
        "moments": 8 * p / parts,
        "buffers": buffers,
        "activations": 2 * held * shape.width * micro_tokens,
    }
    # Megatron-FSDP is filled with FP32 weights and given BF16 ones before it is split.
    return found | {"most": max(sum(found.values()), 6 * p if strategy == "mfsdp" else 0)}


def check_fits(size: str, gpu: str, strategy: str, num_gpus: int, micro_tokens: int, recompute: bool) -> None:
    """Raises ValueError, with the names and numbers, where the memory is too small."""
    needed, there = memory(size, strategy, num_gpus, micro_tokens, recompute)["most"], GPUS[gpu].memory
    if needed > MEMORY_SHARE * there:
        raise ValueError(
            f"{size} with {STRATEGIES[strategy]} on {num_gpus} x {gpu} needs {needed / GIB:.0f} GiB a GPU, and "
            f"{MEMORY_SHARE * there / GIB:.0f} of {there / GIB:.0f} GiB are there for it."
        )


def predicted(figure: Published, share: float) -> float:
    """What the model says of a published figure, in its unit."""
    strategy = "ddp" if figure.num_gpus == 1 else "fsdp2"
    found = step(
        figure.size, figure.gpu, "ib400", strategy, figure.num_gpus, figure.micro_tokens, share,
        micro_tokens=figure.micro_tokens, length=figure.length, precision=figure.precision,
    )  # fmt: skip
    return found.tflops if figure.unit == "TFLOP/s" else found.tokens_per_second


def calibrate() -> dict[str, float]:
    """For each GPU the share of its peak that gives the one published figure of `CALIBRATED_ON`."""
    shares = {}
    for gpu, place in CALIBRATED_ON.items():
        low, high = 0.01, 1.5  # more than 1 would show that the rest of the model takes too long
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (
                (low, middle) if predicted(PUBLISHED[place], middle) > PUBLISHED[place].figure else (middle, high)
            )
        shares[gpu] = round(middle, 4)
    return shares


def arithmetic() -> list[dict]:
    """Where a rate was published together with TFLOP/s or a share of the peak: what our count makes of the rate."""
    config = Esm2Config(**MODELS["650M"])
    flops = step_flops(config, [FULL_LENGTH], round(LABELLED * FULL_LENGTH)) / FULL_LENGTH
    a100, h100 = (PUBLISHED[place].figure * flops for place in (0, 1))
    return [
        {"name": "A100", "published": "59% of peak", "counted": f"{a100 / GPUS['A100'].flops:.0%}"},
        {"name": "H100", "published": "424 TFLOP/s", "counted": f"{h100 / 1e12:.0f}"},
    ]


def hiding(shares: dict[str, float]) -> list[dict]:
    """Tokens a pass from which FSDP2's traffic hides behind the backward pass: 6 P bytes at 4 P operations a token."""
    found = []
    for name, gpu in GPUS.items():
        paces = {"nvlink": link_bandwidth(gpu, LINKS["ib400"], NODE)}
        paces |= {key: link_bandwidth(gpu, link, NODE + 1) for key, link in LINKS.items()}
        compute = shares[name] * gpu.flops
        found.append({"gpu": name} | {key: round(1.5 * compute / pace, -2) for key, pace in paces.items()})
    return [{key: int(x) if isinstance(x, float) else x for key, x in line.items()} for line in found]


def prediction(
    size: str, gpu: str, link: str, strategy: str, num_gpus: int, share: float, grows: bool = False
) -> dict:
    """The configuration of that size on so many GPUs: 2M tokens a step or, where it `grows`, one pass a GPU."""
    micro, recompute = MICRO_TOKENS.get(size, DEFAULT_MICRO_TOKENS), size in RECOMPUTED
    tokens = micro if grows else STEP_TOKENS // num_gpus
    line = {"size": size, "gpu": gpu, "link": link, "strategy": strategy, "num_gpus": num_gpus}
    try:
        check_fits(size, gpu, strategy, num_gpus, min(micro, tokens), recompute)
    except ValueError as error:
        return line | {"refused": str(error)}
    alone = step(size, gpu, link, strategy, 1, STEP_TOKENS, share, recompute=recompute)
    found = step(size, gpu, link, strategy, num_gpus, tokens, share, recompute=recompute)
    return line | {
        "tokens_per_second": round(found.tokens_per_second, 1),
        "efficiency": round(found.tokens_per_second / alone.tokens_per_second, 4),
        "exposed_share": round(found.exposed / found.seconds, 4),
        "tflops": round(found.tflops, 1),
    }


def calculate() -> dict:
    """All that the page shows."""
    shares = calibrate()

    def predictions(gpus, links, counts, grows=False) -> list[dict]:
        return [
            prediction(size, gpu, link, strategy, count, shares[gpu], grows)
            for gpu in gpus for link in links for size in MODELS for strategy in STRATEGIES for count in counts
        ]  # fmt: skip

    checks = []
    for place, figure in enumerate(PUBLISHED):
        found = predicted(figure, shares[figure.gpu])
        checks.append(
            figure._asdict()
            | {"predicted": round(found, 1), "ratio": round(found / figure.figure, 3)}
            | {"calibrates": [gpu for gpu, used in CALIBRATED_ON.items() if used == place]}
        )
    traffic, memories = [], []
    h100 = GPUS["H100"]
    for size in MODELS:
        shape, micro = shape_of(size), MICRO_TOKENS.get(size, DEFAULT_MICRO_TOKENS)
        sent = 2 * ring_bytes(4 * shape.parameters, 64)
        compute = sum(layer_seconds(shape, h100, shares["H100"], micro, PACKED_LENGTH)) * shape.num_layers
        traffic.append(
            {"size": size, "parameters": shape.parameters, "bytes": round(sent), "micro_tokens": micro}
            | {"compute_s": round(compute, 6)}
            | {"nvlink": round(sent / link_bandwidth(h100, LINKS["ib400"], 8), 6)}
            | {key: round(sent / link_bandwidth(h100, link, 64), 6) for key, link in LINKS.items()}
        )
        for strategy in STRATEGIES:
            for recompute in (False, True):
                parts = memory(size, strategy, 8, micro, recompute)
                memories.append(
                    {"size": size, "strategy": strategy, "num_gpus": 8, "micro_tokens": micro, "recompute": recompute}
                    | {key: round(value / GIB, 2) for key, value in parts.items()}
                )
    costs = []
    for size in MODELS:
        without, with_it = (step(size, "H100", "ib400", "fsdp2", 8, 16 * DEFAULT_MICRO_TOKENS, shares["H100"],
                                 recompute=recompute) for recompute in (False, True))  # fmt: skip
        costs.append({"size": size, "slower_by": round(with_it.seconds / without.seconds, 3)})
    return {
        "note": "calculated, nothing measured",
        "shares_of_peak": shares,
        "checks": checks,
        "arithmetic": arithmetic(),
        "traffic": traffic,
        "hiding": hiding(shares),
        "fixed_step": predictions(["H100"], LINKS, NUM_GPUS),
        "growing_step": predictions(["H100"], ["ib400"], NUM_GPUS, grows=True),
        "other_gpus": predictions(GPUS, ["ib400"], [64]),
        "memory": memories,
        "recomputation": costs,
    }


def read_arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, help="print predictions for this GPU instead of all tables")
    parser.add_argument("--link", choices=LINKS, default="ib400", help="between nodes, with --gpu; default: ib400")
    parser.add_argument("--write", action="store_true", help="write JSON, tables and picture into docs")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE.json", help="take these numbers")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the tables into this page")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the predictions")
    parser.add_argument(
        "--check", type=Path, metavar="FILE.md",
        help="exit with 1 if its tables are not those of --from, or if --from is not what the formulas give",
    )  # fmt: skip
    found = parser.parse_args()
    if found.check and not found.source:
        parser.error("--check needs the numbers: --from FILE.json.")
    if found.source and not found.source.is_file():
        parser.error(f"--from {found.source}: no such file.")
    if found.source and (found.write or found.gpu):
        parser.error("--from calculates nothing; leave it or --write and --gpu out.")
    return found


def main() -> int:
    """Calculate or read, then print, write or check."""
    from scaling_report import dump, plot, prediction_table, tables, write_tables, wrong_tables

    asked = read_arguments()
    if asked.gpu:
        share = calibrate()[asked.gpu]
        lines = [prediction(size, asked.gpu, asked.link, strategy, count, share)
                 for size in MODELS for strategy in STRATEGIES for count in NUM_GPUS]  # fmt: skip
        print(f"{asked.gpu}, {LINKS[asked.link].name}, 2M tokens a step:\n\n{prediction_table(lines)}")
        return 0
    numbers = json.loads(asked.source.read_text()) if asked.source else calculate()
    docs = ROOT / "docs"
    if asked.write:
        (docs / "results" / "scaling_model.json").write_text(dump(numbers))
        asked.table, asked.plot = asked.table or docs / "scaling.md", asked.plot or docs / "images" / "scaling.png"
    if asked.plot:
        plot(numbers, asked.plot)
    if asked.table:
        write_tables(asked.table, numbers)
    if asked.check:
        wrong = wrong_tables(asked.check, numbers)
        if wrong:
            print(
                f"error: {asked.check}: {', '.join(wrong)} not of {asked.source}; --table writes it.", file=sys.stderr
            )
        if stale := dump(numbers) != dump(json.loads(dump(calculate()))):
            print(f"error: {asked.source} is not what the formulas give; --write calculates anew.", file=sys.stderr)
        return int(bool(wrong) or stale)
    if not asked.table and not asked.plot:
        print("\n\n".join(f"## {name}\n\n{text}" for name, text in tables(numbers).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
