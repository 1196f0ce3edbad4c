# SPDX-License-Identifier: Apache-2.0
"""Vectors of tokens by an encoder that is there: what commands on sequences and on cells share."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from common.kept_steps import fingerprint
from common.precision import Precision
from common.weights import LazyTensors, copy_parameters, listed, named_tensors, read
from tokens.masked_lm import TokenModel
from tokens.starting_weights import Family


def open_encoder(
    family: Family, open_model: Callable, source: str, layer_backend: str, device: torch.device
) -> tuple[TokenModel, str]:
    """The encoder with its weights, and a fingerprint of them. Raises ValueError for a source that lacks some."""
    shape, weights, _ = open_model(source, strict=False)
    shape.layer_backend = layer_backend
    with torch.device("meta"):
        model = family.model(shape).base_model
    sizes = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    theirs = {name: f"{model.base_model_prefix}.{name}" for name in sizes}
    missing = [n for n in sizes if theirs[n] not in weights and not n.startswith("contact_head.")]  # that is not used
    if missing:
        raise ValueError(f"{source} lacks {listed(missing)}, so it is no whole encoder.")
    found = {name: read(weights, theirs[name]) for name in sizes if theirs[name] in weights}
    values = LazyTensors({name: found.get(name, partial(torch.zeros, size)) for name, size in sizes.items()})
    model.to_empty(device=device)
    copy_parameters(model, values)
    return model.eval(), fingerprint(values, None, source)


def batches(sizes: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Rows that have tokens, from short to long, so many at once that their tokens are at most `max_tokens`."""
    order = np.argsort(sizes, kind="stable")
    groups: list[list[int]] = []
    total = max_tokens
    for row in order[sizes[order] > 0]:
        total += sizes[row]
        if total > max_tokens:
            groups.append([])
            total = sizes[row]
        groups[-1].append(row)
    return [np.array(group) for group in groups]


@torch.no_grad()
def token_vectors(model: TokenModel, precision: Precision, tokens: list[np.ndarray]) -> list[np.ndarray]:
    """Of each row a vector for each of its tokens after the last layer, [tokens, width], FP32."""
    lengths = [len(some) for some in tokens]
    packed = {
        "input_ids": torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
        "cu_seqlens": torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
    }
    packed = {name: tensor.to(precision.device) for name, tensor in packed.items()}
    with precision.forward(autocast=True):
        hidden = model(**packed, max_seqlen=max(lengths), seq_lens=lengths).last_hidden_state
    return np.split(hidden.float().cpu().numpy(), np.cumsum(lengths)[:-1])
