# SPDX-License-Identifier: Apache-2.0
"""The cost model against numbers worked out by hand, against the model it is about, and against itself."""

import json
import sys
from pathlib import Path

import pytest
import torch


HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import scaling_model as cost  # noqa: E402
import scaling_report  # noqa: E402

from build_model import build_model, model_config  # noqa: E402
from common.distributed import Distributed  # noqa: E402
from tokens.layers import AttentionInputs, TransformerLayer  # noqa: E402


H100, IB, ETHERNET = cost.GPUS["H100"], cost.LINKS["ib400"], cost.LINKS["ethernet"]
SHARE = 0.6


@pytest.fixture(scope="module")
def numbers():
    return cost.calculate()


@pytest.mark.parametrize("size", cost.MODELS)
def test_parameters_are_those_of_the_model(size):
    tag = next(tag for tag in cost.SIZES if f"_{size}_" in tag)
    alone = Distributed(0, 0, 1, torch.device("cpu"))
    model = build_model(model_config(tag, "torch"), alone)  # on the meta device
    shape = cost.shape_of(size)
    assert shape.parameters == model.num_parameters()
    assert shape.layer == sum(p.numel() for p in model.esm.encoder.layer[0].parameters())


def test_bytes_of_a_ring():
    # Four GPUs, eight bytes: three times two bytes leave each. An all-reduce does it twice.
    assert cost.ring_bytes(8, 4) == 6
    assert cost.ring_bytes(1e9, 1) == 0
    seconds = cost.ring_seconds(9e9, H100, IB, 8)
    assert seconds == pytest.approx(14e-6 + 7 * 1.9e-6 + 9e9 * 7 / 8 / (0.8 * 450e9))
    # 64 GPUs: seven of the 63 hops are between nodes, over 8 x 50 GB/s.
    seconds = cost.ring_seconds(9e9, H100, IB, 64)
    assert seconds == pytest.approx(14e-6 + 56 * 1.9e-6 + 7 * 4e-6 + 9e9 * 63 / 64 / (0.8 * 400e9))


def test_a_small_all_reduce_goes_by_the_tree_and_a_large_one_by_the_ring():
    hops = 2 * (7 * 1.25e-6 + 7 * 8.5e-6)  # 1,024 GPUs, 128 nodes
    assert cost.all_reduce_seconds(8, H100, IB, 1024) == pytest.approx(14e-6 + hops, rel=1e-3)
    ring = 2 * cost.ring_seconds(1e9, H100, IB, 8) - 14e-6
    assert cost.all_reduce_seconds(1e9, H100, IB, 8) == pytest.approx(ring)
    assert cost.all_reduce_seconds(1e9, H100, IB, 1) == 0


def test_both_kinds_of_strategy_send_eight_bytes_a_parameter():
    # DDP: 2 x 4 for FP32 gradients. FSDP2: 2 + 2 for BF16 weights, 4 for FP32 gradients, but in every pass.
    shape, link = cost.shape_of("3B"), cost.LINKS["ethernet"]
    parts = [cost.ring_bytes(2 * shape.parameters, 64)] * 2 + [cost.ring_bytes(4 * shape.parameters, 64)]
    assert sum(parts) == pytest.approx(2 * cost.ring_bytes(4 * shape.parameters, 64))
    passes = 4
    waits = {
        strategy: cost.step("3B", "H100", "ethernet", strategy, 64, passes * 64, SHARE, micro_tokens=64).exposed
        for strategy in cost.STRATEGIES
    }
    once = sum(parts) / cost.link_bandwidth(H100, link, 64)
    assert waits["ddp"] == pytest.approx(once, rel=0.1)  # next to nothing to hide behind
    assert waits["fsdp2"] == pytest.approx(passes * once, rel=0.1)


def test_flops_are_those_of_the_recipe():
    for size in ("8M", "15B"):
        found = cost.step(size, "H100", "ib400", "ddp", 1, 16384, SHARE, micro_tokens=16384, length=512)
        flops = cost.step_flops(cost.shape_of(size).config, [512] * 32, 32 * round(0.15 * 512))
        assert found.tflops == pytest.approx(flops / found.seconds / 1e12, rel=1e-3)


def test_time_of_a_layer_by_hand(monkeypatch):
    monkeypatch.setattr(cost, "KERNEL", 0.0)
    shape = cost.shape_of("650M")
    forward, backward = cost.layer_seconds(shape, H100, 0.5, 1000, 100)
    flops = 1000 * (24 * 1280**2 + 4 * 1280 * 100)
    traffic = 1000 * 1280 * 2 * (22 + 16) + 2 * shape.layer
    assert forward == pytest.approx(flops / (0.5 * 989e12) + traffic / 3.35e12)
    traffic = 1000 * 1280 * 2 * (37 + 32) + 4 * shape.layer
    assert backward == pytest.approx(2 * flops / (0.5 * 989e12) + traffic / 3.35e12)


def test_memory_of_the_states():
    p = cost.shape_of("650M").parameters
    found = cost.memory("650M", "ddp", 8, 4096, recompute=False)
    assert (found["weights"], found["gradients"], found["moments"]) == (4 * p, 4 * p, 8 * p)
    assert found["most"] == sum(found[key] for key in ("weights", "gradients", "moments", "buffers", "activations"))
    found = cost.memory("650M", "fsdp2", 8, 4096, recompute=False)
    assert (found["weights"], found["gradients"], found["moments"]) == (p / 2, p / 2, p)
    found = cost.memory("650M", "mfsdp", 8, 4096, recompute=False)
    assert (found["weights"], found["moments"]) == (6 * p / 8, p)
    p = cost.shape_of("15B").parameters
    assert cost.memory("15B", "mfsdp", 1024, 64, recompute=True)["most"] == 6 * p  # before it is split


def test_activations_are_those_that_autograd_holds():
    width, tokens = 64, 96
    layer = TransformerLayer(width, 4 * width, 4, 1e-5).bfloat16()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.02)
    angles = torch.arange(tokens)[:, None] * torch.rand(width // 8).repeat(2)
    inputs = AttentionInputs(angles)
    held = {}
    ours = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    ours |= {x.untyped_storage().data_ptr() for x in vars(inputs).values() if isinstance(x, torch.Tensor)}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in ours:
            held[storage.data_ptr()] = storage.nbytes()
        return x  # so that no storage is freed and its address used again

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = layer(torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True), inputs)
    assert y.requires_grad
    statistics = tokens * (2 * 2 + 4) * 4  # of two norms, and of four heads' softmax: few beside real widths
    assert sum(held.values()) - statistics == pytest.approx(2 * cost.HELD * width * tokens, rel=0.03)


def test_more_of_a_thing_is_never_better_where_it_should_not_be():
    for strategy in cost.STRATEGIES:
        rates = [cost.step("650M", "H100", "ib400", strategy, n, 4096, SHARE).tokens_per_second for n in cost.NUM_GPUS]
        if strategy == "ddp":  # its update is not split
            assert rates == sorted(rates, reverse=True)
        assert rates[-1] < rates[0]
        by_link = [cost.step("650M", "H100", k, strategy, 64, 4096, SHARE).tokens_per_second for k in cost.LINKS]
        assert by_link == sorted(by_link, reverse=True)
        by_share = [
            cost.step("650M", "H100", "ib400", strategy, 64, 4096, s).tokens_per_second for s in (0.3, 0.6, 0.9)
        ]
        assert by_share == sorted(by_share)
        sizes = [cost.memory(size, strategy, 64, 4096, False)["most"] for size in cost.MODELS]
        assert sizes == sorted(sizes)
    sharded = [cost.memory("3B", "fsdp2", n, 4096, False)["most"] for n in (1, *cost.NUM_GPUS)]
    assert sharded == sorted(sharded, reverse=True)
    assert cost.step("650M", "H100", "ib400", "fsdp2", 1, 4096, SHARE).exposed == 0


def test_recomputation_costs_a_third_and_saves_memory():
    without, with_it = (
        cost.step("3B", "H100", "ib400", "fsdp2", 8, 16384, SHARE, recompute=r).seconds for r in (False, True)
    )
    assert 1.25 < with_it / without < 1.34
    without, with_it = (cost.memory("3B", "fsdp2", 8, 16384, r)["activations"] for r in (False, True))
    assert without / with_it == pytest.approx(36 * 18 / (36 + 18))


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match=r"15B with DDP on 8 x H100 needs \d+ GiB a GPU, and 71 of 79 GiB"):
        cost.check_fits("15B", "H100", "ddp", 8, 4096, True)
    with pytest.raises(ValueError, match="15B with Megatron-FSDP on 1024 x H100"):
        cost.check_fits("15B", "H100", "mfsdp", 1024, 4096, True)
    cost.check_fits("15B", "H100", "fsdp2", 8, 4096, True)
    assert "refused" in cost.prediction("15B", "H100", "ib400", "ddp", 8, SHARE)


def test_published_runs_fit_and_calibration_gives_its_figures(numbers):
    for line in numbers["checks"]:
        if line["num_gpus"] > 1:
            cost.check_fits(line["size"], line["gpu"], "fsdp2", line["num_gpus"], line["micro_tokens"], False)
        if line["calibrates"]:
            assert line["ratio"] == pytest.approx(1, abs=2e-3)
    assert sorted(sum((line["calibrates"] for line in numbers["checks"]), [])) == sorted(cost.GPUS)
    # What is neither calibrated on nor FP8 nor without fused layers: the model is right to 20%.
    bf16 = [
        x for x in numbers["checks"] if not x["calibrates"] and x["precision"] == "bf16" and x["note"] != cost.UNFUSED
    ]
    assert len(bf16) == 3 and all(0.8 < line["ratio"] < 1.2 for line in bf16)


def test_the_page_is_checked_against_the_numbers(numbers, tmp_path, monkeypatch, capsys):
    page, source = tmp_path / "page.md", tmp_path / "numbers.json"
    source.write_text(scaling_report.dump(numbers))
    assert json.loads(source.read_text()) == json.loads(json.dumps(numbers))
    names = scaling_report.tables(numbers)
    page.write_text("\n".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->" for name in names) + "\n")
    scaling_report.write_tables(page, numbers)

    monkeypatch.setattr(sys, "argv", ["scaling_model.py", "--from", str(source), "--check", str(page)])
    assert cost.main() == 0
    page.write_text(page.read_text().replace("does not fit", "fits", 1))
    assert cost.main() == 1
    said = capsys.readouterr().err
    assert "scaling_fixed" in said and "--write" not in said
    source.write_text(source.read_text().replace('"ratio": 1.0', '"ratio": 1.1', 1))
    assert cost.main() == 1 and "not what the formulas give" in capsys.readouterr().err
    scaling_report.plot(numbers, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000
