# SPDX-License-Identifier: Apache-2.0
"""AMPLIFY once more, in the plainest way: published weights, one sequence, one head, one pair of channels at a time.

Written from the paper, RoFormer (arXiv:2104.09864), RMSNorm (arXiv:1910.07467) and GLU variants (arXiv:2002.05202), in
the precision of the weights; rotary angles in FP32, as published. S tokens, D channels of a head.
"""

import torch
from torch import Tensor


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * weight


def rotate(x_SD: Tensor) -> Tensor:
    length, dim = x_SD.shape
    turned = []
    for j in range(dim // 2):
        exponent = torch.tensor(2 * j, dtype=torch.float32) / dim
        angles = torch.arange(length) * (1.0 / 10000.0**exponent)
        real, imaginary = x_SD[:, 2 * j], x_SD[:, 2 * j + 1]
        turned.append(real * angles.cos() - imaginary * angles.sin())
        turned.append(real * angles.sin() + imaginary * angles.cos())
    return torch.stack(turned, dim=1)


def logits(weights: dict[str, Tensor], num_heads: int, tokens: Tensor) -> Tensor:
    """[S] to [S, 27]."""
    x = weights["encoder.weight"][tokens]
    for i in range(sum(name.endswith(".wo.weight") for name in weights)):
        w = {name.removeprefix(f"transformer_encoder.{i}."): value for name, value in weights.items()}
        y = norm(x, w["attention_norm.weight"])
        q, k, v = (y @ w[f"{name}.weight"].T for name in "qkv")
        dim, heads = x.shape[1] // num_heads, []
        for h in range(num_heads):
            part = slice(h * dim, (h + 1) * dim)
            scores = rotate(q[:, part]) @ rotate(k[:, part]).T / dim**0.5
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + torch.cat(heads, dim=1) @ w["wo.weight"].T
        gate, up = (norm(x, w["ffn_norm.weight"]) @ w["ffn.w12.weight"].T).chunk(2, dim=1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w["ffn.w3.weight"].T
    return norm(x, weights["layer_norm_2.weight"]) @ weights["decoder.weight"].T + weights["decoder.bias"]


def loss_and_gradients(weights: dict[str, Tensor], num_heads: int, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a padded batch: the mean over all labels, and its gradients."""
    weights = {name: x.detach().requires_grad_() for name, x in weights.items()}
    total, count = 0.0, 0
    for tokens, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        found = logits(weights, num_heads, tokens[mask.bool()]).log_softmax(-1)
        for place, label in enumerate(labels[mask.bool()].tolist()):
            if label != -100:
                total, count = total - found[place, label], count + 1
    loss = total / count
    return loss.detach(), dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
