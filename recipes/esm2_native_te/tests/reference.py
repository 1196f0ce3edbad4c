# SPDX-License-Identifier: Apache-2.0
"""ESM-2 and its training once more, in float64 and the plainest way: one sequence, one head, one rank at a time.

Written from Lin et al. 2023 (doi:10.1126/science.ade2574), RoFormer (arXiv:2104.09864), AdamW (arXiv:1711.05101) and
the semantics of `transformers.EsmForMaskedLM`. What is a definition and no number to be checked comes from the recipe:
the order of rows and where a crop starts (common/epoch_plan.py), the names and layout of weights, and which draws of
numpy's generator decide about a mask.

Shapes: S tokens of one sequence, E the width, H heads of D channels.
"""

import math
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from common.epoch_plan import EpochPlan, Grouping, uniform_below


VOCABULARY = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
CLS, EOS, X, MASK = (VOCABULARY.index(token) for token in ("<cls>", "<eos>", "X", "<mask>"))
AMINO_ACIDS = [VOCABULARY.index(letter) for letter in "LAGVSERTIDPKQNFYMHWC"]
RESIDUES = AMINO_ACIDS + [VOCABULARY.index(letter) for letter in "XBUZO"]
CROP = 2  # of the recipe: the last part of the key that a crop is drawn by
EMBEDDING = "esm.embeddings.word_embeddings.weight"


# ---- the model


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def rotate(x: Tensor) -> Tensor:
    """Turn channels i and i + D/2 of [S, D], taken as a point in the plane, by position * 10000^(-2i/D)."""
    half = x.shape[1] // 2
    first, second = [], []
    for i in range(half):
        angle = torch.arange(len(x), dtype=torch.float64) * 10000.0 ** (-i / half)
        first.append(x[:, i] * torch.cos(angle) - x[:, half + i] * torch.sin(angle))
        second.append(x[:, half + i] * torch.cos(angle) + x[:, i] * torch.sin(angle))
    return torch.stack(first + second, dim=1)


def attention(x: Tensor, weights: dict[str, Tensor], prefix: str, num_heads: int) -> Tensor:
    """The attention block of the layer, [S, E] to [S, E], the residual not added."""
    qkv = f"{prefix}self_attention.layernorm_qkv."
    x = layer_norm(x, weights[f"{qkv}layer_norm_weight"], weights[f"{qkv}layer_norm_bias"])
    width = x.shape[1] // num_heads
    contexts = []
    for head in range(num_heads):
        parts = []
        for part in range(3):  # rows of the matrix: q, k, v of the first head, q, k, v of the second, ...
            start = (3 * head + part) * width
            rows = slice(start, start + width)
            parts.append(linear(x, weights[f"{qkv}weight"][rows], weights[f"{qkv}bias"][rows]))
        query, key, value = rotate(parts[0]), rotate(parts[1]), parts[2]
        likes = torch.exp(query @ key.T / math.sqrt(width))
        contexts.append(likes / likes.sum(1, keepdim=True) @ value)
    proj = f"{prefix}self_attention.proj."
    return linear(torch.cat(contexts, dim=1), weights[f"{proj}weight"], weights[f"{proj}bias"])


def feed_forward(x: Tensor, weights: dict[str, Tensor], prefix: str) -> Tensor:
    """The feed-forward block of the layer, [S, E] to [S, E], the residual not added."""
    mlp = f"{prefix}layernorm_mlp."
    x = layer_norm(x, weights[f"{mlp}layer_norm_weight"], weights[f"{mlp}layer_norm_bias"])
    x = gelu(linear(x, weights[f"{mlp}fc1_weight"], weights[f"{mlp}fc1_bias"]))
    return linear(x, weights[f"{mlp}fc2_weight"], weights[f"{mlp}fc2_bias"])


def embed(tokens: list[int], embedding: Tensor) -> Tensor:
    """Token dropout: a <mask> is 0, and the others are scaled by the usual over the observed share of those left."""
    num_masks = 0
    for token in tokens:
        num_masks += token == MASK
    scale = (1 - 0.15 * 0.8) / (1 - num_masks / len(tokens))
    return torch.stack([embedding[token] * (0 if token == MASK else scale) for token in tokens])


def logits(tokens: list[int], weights: dict[str, Tensor], num_heads: int) -> Tensor:
    """[S, 33]."""
    x = embed(tokens, weights[EMBEDDING])
    layer = 0
    while f"esm.encoder.layer.{layer}.self_attention.proj.weight" in weights:
        prefix = f"esm.encoder.layer.{layer}."
        x = x + attention(x, weights, prefix, num_heads)
        x = x + feed_forward(x, weights, prefix)
        layer += 1
    after = "esm.encoder.emb_layer_norm_after."
    x = layer_norm(x, weights[f"{after}weight"], weights[f"{after}bias"])
    x = gelu(linear(x, weights["lm_head.dense.weight"], weights["lm_head.dense.bias"]))
    x = layer_norm(x, weights["lm_head.layer_norm.weight"], weights["lm_head.layer_norm.bias"])
    return linear(x, weights[EMBEDDING][:33], weights["lm_head.bias"])


def summed_loss(tokens: list[int], labels: list[int | None], weights: dict[str, Tensor], num_heads: int) -> Tensor:
    """Cross-entropy in nats over the labels of one sequence, not yet divided by their number."""
    found = logits(tokens, weights, num_heads)
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(found, labels, strict=True):
        if label is not None:
            total = total + torch.log(torch.exp(row).sum()) - row[label]
    return total


# ---- the data


def tokenize(text: str | None) -> list[int]:
    """The residues of one row, without <cls> and <eos>, by the rule in the README."""
    signs = list(text or "")
    while signs and signs[-1] in "*-. \t\r\n":
        signs.pop()
    residues = [VOCABULARY[token] for token in RESIDUES]
    known = {sign: VOCABULARY.index(sign.upper()) for residue in residues for sign in (residue, residue.lower())}
    return [known.get(sign, X) for sign in signs if sign not in "-. \t\r\n"]


def cropped(residues: list[int], start: int, max_seq_length: int) -> list[int]:
    return [CLS, *residues[start : start + max_seq_length - 2], EOS]


def mask(
    tokens: list[int], random: np.random.Generator, rate: float, shares=(0.8, 0.1), others=AMINO_ACIDS
) -> tuple[list[int], list[int | None]]:
    """The masked tokens and their labels: `shares` of the chosen are masked, and kept; the rest is replaced."""
    masked, labels = [], []
    # Which draws decide is a definition.
    draws = random.random(len(tokens)), random.random(len(tokens)), random.integers(0, len(others), len(tokens))
    for token, choice, kind, other in zip(tokens, *(draw.tolist() for draw in draws), strict=True):
        if token not in RESIDUES or choice >= rate:
            masked.append(token)
            labels.append(None)
        else:
            masked.append(MASK if kind < shares[0] else token if kind < sum(shares) else others[other])
            labels.append(token)
    return masked, labels


@dataclass
class Rows:
    """A column of text, read as the recipe defines it: `plan` needs `len` and `sizes` of it."""

    texts: list[str | None]
    seed: int
    max_seq_length: int

    def __len__(self) -> int:
        return len(self.texts)

    def sizes(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        return np.array([len(self.tokens(int(row), epoch)) if tokenize(self.texts[row]) else 0 for row in rows])

    def tokens(self, row: int, epoch: int) -> list[int]:
        residues = tokenize(self.texts[row])
        num_starts = max(1, len(residues) - (self.max_seq_length - 2) + 1)
        start = uniform_below(np.array([num_starts]), np.array([row]), self.seed, epoch, CROP)
        return cropped(residues, int(start[0]), self.max_seq_length)

    def masked(self, micro_batch, rate: float) -> list[tuple[list[int], list[int | None]]]:
        """Tokens and labels of each sequence of a micro-batch: masks are drawn over all of them, end to end."""
        sequences = [self.tokens(int(row), micro_batch.epoch) for row in micro_batch.rows]
        random = np.random.default_rng((self.seed, micro_batch.epoch, micro_batch.window, micro_batch.index))
        tokens, labels = mask([token for sequence in sequences for token in sequence], random, rate)
        parts, start = [], 0
        for sequence in sequences:
            end = start + len(sequence)
            parts.append((tokens[start:end], labels[start:end]))
            start = end
        return parts


# ---- one step


def clip_factor(gradients: dict[str, Tensor], max_norm: float) -> tuple[float, float]:
    """The L2 norm of all gradients taken as one vector, and what to multiply them by."""
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
    return norm, min(1.0, max_norm / norm)


def adamw(weight, gradient, moments, step: int, lr: float, betas, eps: float, weight_decay: float):
    """One element, or many alike: the new weight and the new moments (Loshchilov & Hutter 2019, algorithm 2)."""
    first = betas[0] * moments[0] + (1 - betas[0]) * gradient
    second = betas[1] * moments[1] + (1 - betas[1]) * gradient**2
    direction = first / (1 - betas[0] ** step) / ((second / (1 - betas[1] ** step)) ** 0.5 + eps)
    return weight - lr * weight_decay * weight - lr * direction, (first, second)


def learning_rate(step: int, lr: float, num_warmup_steps: int, end: int, min_lr_fraction: float) -> float:
    """Of step 1, 2, ...: up to `lr` at the last warm-up step, from the next one down to the floor after `end`."""
    if step <= num_warmup_steps:
        return lr * step / num_warmup_steps
    if step > end:
        return lr * min_lr_fraction
    left = (end + 1 - step) / (end - num_warmup_steps)
    return lr * (min_lr_fraction + (1 - min_lr_fraction) * left)


def flops(
    seq_lens: list[int], num_labels: int, layers: int, width: int, feed_forward: int, labels_only: bool = False
) -> float:
    """Of forward and backward pass: every matrix product [m, k] x [k, n] is 2 m k n, and there and back 3 of them.

    With `labels_only`, the tokens that go on from the last layer's keys and values are those with a label, each
    protein's share of them being alike.
    """
    products = []
    for length in seq_lens:
        for layer in range(layers):
            on = length * num_labels / sum(seq_lens) if labels_only and layer == layers - 1 else length
            products.append((length, width, 3 * width))  # q, k, v
            products.append((on, width, length))  # scores of all heads, whose channels add up to the width
            products.append((on, length, width))  # contexts of all heads
            products.append((on, width, width))
            products.append((on, width, feed_forward))
            products.append((on, feed_forward, width))
    for _ in range(num_labels):
        products.append((1, width, width))
        products.append((1, width, 64))  # the vocabulary, padded
    return sum(3 * 2 * m * k * n for m, k, n in products)


# ---- a run


@dataclass(frozen=True)
class Settings:
    """What decides a run, under the names of the recipe's keys."""

    seed: int
    micro_batches_per_step: int
    num_train_steps: int
    max_grad_norm: float
    micro_batch_size: int | None
    token_micro_batch_size: int | None
    max_seq_length: int
    mlm_probability: float
    window_rows: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    num_warmup_steps: int
    num_training_steps: int
    decay_fraction: float
    min_lr_fraction: float
    max_rows: int  # of validation

    def plan(self, rows: Rows, seed: int | None) -> EpochPlan:
        return EpochPlan(rows, Grouping(self.micro_batch_size, self.token_micro_batch_size), seed, self.window_rows)


def train(settings: Settings, texts: list[str | None], first: dict[str, Tensor], num_heads: int) -> list[dict]:
    """Every step's numbers, with the weights after it; `texts` are validated on as well."""
    weights = {name: weight.double() for name, weight in first.items()}
    moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in weights.items()}
    rows = Rows(texts, settings.seed, settings.max_seq_length)
    micro_batches = settings.plan(rows, settings.seed).starting_at(0, 0, 0)
    steps, num_tokens = [], 0
    for step in range(1, settings.num_train_steps + 1):
        sequences, padded_slots, sizes = [], 0, []
        for micro_batch in islice(micro_batches, settings.micro_batches_per_step):
            some = rows.masked(micro_batch, settings.mlm_probability)
            padded_slots += len(some) * max(len(tokens) for tokens, _ in some)
            sizes.append(
                ([len(tokens) for tokens, _ in some], sum(label is not None for _, labels in some for label in labels))
            )
            sequences += some
        seq_lens = [length for lengths, _ in sizes for length in lengths]
        num_tokens += sum(seq_lens)

        loss, gradients = loss_and_gradients(sequences, weights, num_heads)
        norm, factor = clip_factor(gradients, settings.max_grad_norm)
        rate = learning_rate(
            step, settings.lr, settings.num_warmup_steps,
            round(settings.decay_fraction * settings.num_training_steps), settings.min_lr_fraction,
        )  # fmt: skip
        for name, weight in weights.items():
            weights[name], moments[name] = adamw(
                weight, gradients[name] * factor, moments[name], step, rate, settings.betas, settings.eps,
                settings.weight_decay,
            )  # fmt: skip
        steps.append({
            "loss": loss, "grad_norm": norm, "learning_rate": rate, "num_tokens": num_tokens, "factor": factor,
            "padded_fill": sum(seq_lens) / padded_slots, "micro_batches": sizes,
            "weights": dict(weights), "validation": validate(settings, texts, weights, num_heads),
        })  # fmt: skip
    return steps


def loss_and_gradients(sequences, weights: dict[str, Tensor], num_heads: int) -> tuple[float, dict[str, Tensor]]:
    """The mean over all labels of all sequences, and its gradient."""
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    num_labels = sum(label is not None for _, labels in sequences for label in labels)
    loss = 0.0
    for tokens, labels in sequences:
        if any(label is not None for label in labels):
            part = summed_loss(tokens, labels, leaves, num_heads) / num_labels
            part.backward()
            loss += part.item()
    return loss, {name: leaf.grad for name, leaf in leaves.items()}


@torch.no_grad()
def validate(settings: Settings, texts: list[str | None], weights: dict[str, Tensor], num_heads: int) -> dict:
    """Loss, perplexity and accuracy over the first rows, each once, in order; masks and crops are those of seed 0.

    `margin` is the least by which a first guess is ahead of the second: if it is wide, rounding moves no accuracy.
    """
    rows = Rows(texts[: settings.max_rows], 0, settings.max_seq_length)
    losses, hits, margins = [], [], []
    for micro_batch in settings.plan(rows, None).epoch(0):
        for tokens, labels in rows.masked(micro_batch, settings.mlm_probability):
            found = torch.log_softmax(logits(tokens, weights, num_heads), dim=1).tolist()
            for row, label in zip(found, labels, strict=True):
                if label is not None:
                    losses.append(-row[label])
                    hits.append(row.index(max(row)) == label)
                    margins.append(sorted(row)[-1] - sorted(row)[-2])
    loss = math.fsum(losses) / len(losses)
    return {
        "loss": loss, "perplexity": math.exp(loss), "accuracy": sum(hits) / len(hits), "num_labels": len(losses),
        "margin": min(margins),
    }  # fmt: skip
