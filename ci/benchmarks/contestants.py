# SPDX-License-Identifier: Apache-2.0
"""Who takes part in train_speed.py: a list that depends on the machine. Imports nothing heavy."""

from typing import Any, NamedTuple

from subject import SUBJECT


SIZES = SUBJECT.sizes
MAX_SEQ_LENGTH = SUBJECT.max_seq_length
PRODUCTS = "matrix products"
SAME = "all contestants have the same"
PEER_GIB = 12.0  # on CPUs, with which a peer's micro-batch has to do, if it has more than a row
LEAST_BF16_SPEED = 0.2  # of FP32's products: below, a step in BF16 would take minutes and could not win
# What the benchmark sets for our recipe itself, and the option that says so.
TAKEN = {
    "model_tag": "--sizes",
    "model_kwargs": SAME,
    "init_from": SAME,
    "adamw_kwargs": SAME,
    "lr_scheduler_kwargs": SAME,
    "max_grad_norm": SAME,
    "dataset.mlm_probability": SAME,
    "dataset.max_seq_length": SAME,
    "dataset.window_rows": SAME,
    "seed": "--seed",
    "num_train_steps": "--steps and --rounds",
    "micro_batches_per_step": "--tokens-per-step and --pack-tokens",
    "dataset.token_micro_batch_size": "--pack-tokens",
    "dataset.micro_batch_size": "--peer-batch",
    "dataset.load_dataset_kwargs": "--data",
    "use_activation_checkpointing": "a contestant of its own",
    "checkpoint": "nothing is saved",
    "logger": "nothing is logged",
    "validation": "nothing is validated",
}


class Contestant(NamedTuple):
    """One way of training; `kind` names the function that runs it, `options` are for that function.

    The fastest of `precisions` takes part in the rounds; with `precision_of`, that of another contestant.
    """

    name: str
    kind: str
    precisions: tuple[str, ...]
    options: dict[str, Any]
    precision_of: str | None = None


class Defaults(NamedTuple):
    """What a step is, unless the command line says otherwise."""

    tokens_per_step: int
    pack_tokens: int
    peer_batch: int
    steps: int


def defaults(device: str, size: str) -> Defaults:
    """Enough tokens for every part of a step to count, few enough for a round to take a minute or two."""
    millions = SIZES[size].num_parameters / 1e6
    if device == "cuda":
        if millions > 1500:
            return Defaults(32_768, 8_192, 8, 10)
        return Defaults(65_536, 16_384, 16 if millions > 400 else 32, 20)
    if size == SUBJECT.quick:
        return Defaults(4_096, 2_048, 4, 1)
    tokens = 8_192
    fitting = [rows for rows in range(1, tokens // MAX_SEQ_LENGTH + 1) if used_gib(device, size, rows) < PEER_GIB]
    return Defaults(tokens, tokens, max(fitting, default=1), 4 if millions < 20 else 2 if millions < 100 else 1)


def held_gib(size: str) -> float:
    """Memory of a process that waits: weights and AdamW's moments in FP32, Python and libraries."""
    return 0.7 + 12 * SIZES[size].num_parameters / 2**30


def used_gib(device: str, size: str, rows: int) -> float:
    """About what a peer needs beyond that in a step, with so many of the longest rows in a batch."""
    shape, tokens = SIZES[size], rows * MAX_SEQ_LENGTH
    # A layer keeps about 30 numbers a token and channel; on CPUs in FP32, in a heap that gets holes.
    kept = 30 * 2 if device == "cuda" else 50 * 4
    of_token = shape.num_layers * shape.width * kept + 3 * 4 * SUBJECT.vocab_size
    if SUBJECT.head_dim_of_dropout:  # weights of attention, before and after dropout, and what was dropped
        of_token += shape.num_layers * shape.width / SUBJECT.head_dim_of_dropout * MAX_SEQ_LENGTH * 3 * 4
    return (tokens * of_token + 4 * shape.num_parameters) / 2**30


def held_at_once(memory_gib: float, device: str, size: str, rows: int) -> int:
    """How many models may wait or train side by side; below 2 there is not enough memory."""
    # One more while a contestant qualifies in two precisions.
    return int((0.9 * memory_gib - used_gib(device, size, rows)) / held_gib(size)) - 1


def contestants(facts: dict, overrides: dict[str, str], quick: bool) -> tuple[list[Contestant], dict[str, str]]:
    """Those that can run on a machine with these `facts`, ours first; the others with the reason why they cannot."""
    left_out = {}
    if facts["device"] == "cuda":
        ours = ours_on_gpu(facts, overrides, left_out)
        both = ("bf16",)
    else:
        asked = overrides.get("precision")
        both = ("fp32", "bf16")
        if facts["bf16_speed"] < LEAST_BF16_SPEED:
            both = ("fp32",)
            left_out["BF16"] = f"this processor's products run at {facts['bf16_speed']:.1%} of FP32's speed in it"
        options = {"use_sequence_packing": True, "dataset.num_workers": 0}
        ours = [Contestant("ours", "ours", (asked,) if asked else both, options)]
    first = ours[0]
    ours.append(
        Contestant(
            f"{first.name}, activation checkpointing", "ours", first.precisions,
            {**first.options, "use_activation_checkpointing": True}, precision_of=first.name,
        )
    )  # fmt: skip
    if facts["layer_backend"] == "cpp" and "layer_backend" not in overrides and not quick:
        without = {**first.options, "layer_backend": "torch"}
        ours.append(Contestant("ours, layer_backend=torch", "ours", first.precisions, without))
    if quick:  # one contestant shows how precisions are chosen
        both = both[:1]

    loop = {"order": "random", "compile": False, "attention": "sdpa"}
    peers = [
        Contestant("transformers", "loop", both, loop),
        Contestant("transformers, length buckets", "loop", both, {**loop, "order": "length"}),
    ]
    if not quick:
        compiled = {**loop, "order": "length", "compile": True}
        peers.append(Contestant("transformers, length buckets, torch.compile", "loop", both, compiled))
    if facts["device"] == "cuda":
        name = "transformers, length buckets, FlashAttention"
        if facts["flash_attn"]:
            peers.append(Contestant(name, "loop", both, {**loop, "order": "length", "attention": "flash_attention_2"}))
        else:
            left_out[name] = "the package flash_attn is not installed"
    name = "transformers.Trainer, grouped by length"
    if facts["accelerate"]:
        peers.append(Contestant(name, "trainer", both, {"attention": "sdpa"}))
    else:
        left_out[name] = "the package accelerate is not installed"
    return ours + peers, left_out


def ours_on_gpu(facts: dict, overrides: dict[str, str], left_out: dict[str, str]) -> list[Contestant]:
    """Layers x batches x number format, as far as this GPU and its packages have them."""
    found, without, asked = [], {}, overrides.get("precision", "bf16")
    if not facts["te"]:
        without["te"] = "TransformerEngine is not installed"
    if tuple(facts["capability"]) < (8, 9):
        without["fp8"] = "the GPU has no FP8 products"
    for backend in ("te", "torch"):
        for layout in ("packed", "padded"):
            for fmt in (asked, "fp8"):
                name = f"ours, {backend}, {layout}, {fmt}"
                if reason := without.get(backend) or without.get(fmt):
                    left_out[name] = reason
                    continue
                options = {"layer_backend": backend, "use_sequence_packing": layout == "packed"}
                if fmt == "fp8":
                    options["fp8_config.enabled"] = True
                found.append(Contestant(name, "ours", ("bf16" if fmt == "fp8" else fmt,), options))
    return found
