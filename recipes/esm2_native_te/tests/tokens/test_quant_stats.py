# SPDX-License-Identifier: Apache-2.0
"""What rounding does is measured where it happens, at the steps asked for, and changes nothing."""

import json
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

from common.contract.running import RECIPE, TRAINERS, curve, run_here
from plot_metrics import plot_quantization
from tokens.quant_stats import QuantStats


WIDE = ("model_kwargs.hidden_size=64", "model_kwargs.intermediate_size=96", "fp8_config.enabled=true")
STATS = ("quant_stats_config.enabled=true", "quant_stats_config.every_n_steps=2")
PRODUCTS = ("self_attention.layernorm_qkv", "self_attention.proj", "layernorm_mlp.fc1", "layernorm_mlp.fc2")


def lines(path):
    found = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == "quantization"]


@pytest.mark.rotated
@pytest.mark.parametrize("recipe", ["Float8CurrentScaling", "MXFP8BlockScaling"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_product_of_every_layer(trainer, recipe, tmp_path):
    options = (*WIDE, f"fp8_config.fp8_recipe={recipe}")
    path = run_here(trainer, tmp_path / "with", *options, *STATS)
    assert curve(path) == curve(run_here(trainer, tmp_path / "without", *options))
    found = lines(path)
    assert [line["step"] for line in found] == [2, 4, 6]
    names = {
        f"{i}.{name}.{tensor}" for i in range(2) for name in PRODUCTS for tensor in ("input", "weight", "gradient")
    }
    for line in found:
        assert set(line["tensors"]) == names
        for one in line["tensors"].values():
            assert 0 <= one["underflow"] < 0.5 and 0 <= one["saturation"] < 0.5
            assert 1e-5 < one["mse"] < 1e-2 and one["scale"] > 0


def test_weights_of_one_shape_are_told_apart(tmp_path):
    square = ("model_kwargs.hidden_size=64", "model_kwargs.intermediate_size=64", "fp8_config.enabled=true")
    assert len(lines(run_here("train_fsdp2", tmp_path, *square, *STATS))[0]["tensors"]) == 2 * 4 * 3


def test_lines_are_json_whatever_becomes_of_the_numbers(tmp_path):
    exploding = ("adamw_kwargs.lr=1e30", "anomalies.on_nonfinite=skip", "anomalies.max_skipped=100")
    path = run_here("train_ddp", tmp_path, *WIDE, *STATS, *exploding)

    def no_json(name):
        raise AssertionError(f"{name} is no JSON")

    found = [json.loads(line, parse_constant=no_json) for line in (path / "metrics.jsonl").read_text().splitlines()]
    tensors = [one for line in found if line["kind"] == "quantization" for one in line["tensors"].values()]
    assert any(one["mse"] is None for one in tensors)


def test_only_layers_in_few_bits(tmp_path):
    path = run_here("train_ddp", tmp_path, *WIDE, *STATS, "fp8_layers=[1]", "use_activation_checkpointing=true")
    assert {name.partition(".")[0] for name in lines(path)[0]["tensors"]} == {"1"}


def test_numbers_that_are_known():
    """Halves that become 0, and one that is the largest."""
    stats = QuantStats(enabled=True, every_n_steps=3)

    def round_trip(x, is_gradient):
        rounded = torch.where(x > 2, x, 0.0)
        return rounded, torch.tensor(8.0 if is_gradient else 4.0), rounded == 4

    part = torch.nn.Linear(2, 2, bias=False)
    part.weight.data = torch.tensor([[1.0, 3.0], [0.0, 4.0]])
    linear = stats.watched("0.part", part, torch.nn.functional.linear, round_trip)
    for step in (2, 3):
        stats.begin(step)
        linear(torch.tensor([[1.0, 4.0]]), part.weight).sum().backward()
        if step == 2:
            assert stats.take() is None
    found = stats.take()
    assert found["0.part.input"] == {"underflow": 0.5, "saturation": 0.5, "scale": 4, "mse": pytest.approx(1 / 17)}
    assert found["0.part.weight"] == {"underflow": 0.25, "saturation": 0.25, "scale": 4, "mse": pytest.approx(1 / 26)}
    assert found["0.part.gradient"] == {"underflow": 1, "saturation": 0, "scale": 8, "mse": 1}
    assert stats.take() is None


def test_rows_of_the_picture_have_their_products_names(tmp_path, monkeypatch):
    one = {"underflow": 0.01, "saturation": 0.0, "mse": 1e-3, "scale": 2.0}
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: drawn.append(figure))
    for layers, names in ((2, ["0 qkv", "0 proj", "0 fc1", "0 fc2", "1 qkv", "1 proj", "1 fc1", "1 fc2"]), (7, 7)):
        tensors = {f"{i}.{name}.{x}": one for i in range(layers) for name in PRODUCTS for x in ("input", "weight")}
        plot_quantization([{"step": 1, "tensors": tensors}], "", tmp_path / "x.png")
        first = drawn[-1].axes[0]
        assert first.get_ylabel() == "underflow, %" and drawn[-1].axes[3].get_ylabel() == "saturated, %"
        found = [label.get_text() for label in first.get_yticklabels()]
        assert found == (names if layers == 2 else [f"{i} qkv" for i in range(names)])


def test_the_picture(tmp_path):
    path = run_here("train_ddp", tmp_path, *WIDE, *STATS)
    done = subprocess.run([sys.executable, RECIPE / "plot_metrics.py", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    picture = path / "quantization.png"
    assert str(picture) in done.stdout and picture.read_bytes()[:4] == b"\x89PNG"
