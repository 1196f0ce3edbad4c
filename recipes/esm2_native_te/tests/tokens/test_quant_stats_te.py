# SPDX-License-Identifier: Apache-2.0
"""TransformerEngine's debugging interface: the real package, with stand-ins for the features that need a GPU."""

from importlib.machinery import ModuleSpec

import pytest
import torch


debug_api = pytest.importorskip("nvdlfw_inspect.api")
from nvdlfw_inspect.config_manager import ConfigManager  # noqa: E402
from nvdlfw_inspect.logging import MetricLogger  # noqa: E402

from tokens import quant_stats_te  # noqa: E402
from tokens.quant_stats import QuantStats  # noqa: E402


STAND_IN = """
from nvdlfw_inspect.base import BaseConfigAPIMapper, BaseNamespaceAPI
from nvdlfw_inspect.registry import Registry


@Registry.register_namespace_api(namespace="transformer_engine")
class Features(BaseNamespaceAPI):
    def is_multiple_feature_invocation_allowed(self, *args): ...

    def input_assertions_hook(self, *args, **kwargs): ...

    def output_assertions_hook(self, *args, **kwargs): ...

    def routing_condition(self, *args, **kwargs): ...


class Feature(BaseConfigAPIMapper):
    def parse_config_and_api(self, config, **kwargs): ...


for name in ("LogFp8TensorStats", "LogNvfp4TensorStats", "LogTensorStats"):
    Registry.register_feature(namespace="transformer_engine")(type(name, (Feature,), {}))
"""
RECIPES = ["DelayedScaling", None, "NVFP4BlockScaling", "DelayedScaling"]


@pytest.fixture
def stats(tmp_path, monkeypatch):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "api.py").write_text(STAND_IN)
    spec = ModuleSpec("features", None, origin=str(tmp_path / "features" / "__init__.py"))
    monkeypatch.setattr(quant_stats_te, "find_spec", lambda name: spec)
    made = QuantStats(enabled=True, every_n_steps=2)
    made.inspect_te(RECIPES)
    yield made
    debug_api.end_debug()


def test_each_layer_is_asked_for_what_its_recipe_has(stats):
    first, second, third, fourth = (
        ConfigManager.get_config_for_layer(f"{i}.layernorm_mlp.fc1").get("transformer_engine", {}) for i in range(4)
    )
    assert second == {} and fourth == first
    assert set(first) == {"LogFp8TensorStats", "LogTensorStats"}
    assert "fp8_delayed_scaling_overflows%" in first["LogFp8TensorStats"]["stats"]
    assert set(third) == {"LogNvfp4TensorStats", "LogTensorStats"}
    assert third["LogNvfp4TensorStats"]["stats"] == ["underflows%", "mse"]
    assert first["LogFp8TensorStats"]["freq"] == 2


def test_scales_that_are_none(stats):
    features = quant_stats_te.features(["Float8BlockScaling"], 1)["Float8BlockScaling"]["transformer_engine"]
    assert features["LogFp8TensorStats"]["stats"] == ["underflows%", "mse"]
    known = {"underflows%": 0.0, "mse": 0.0, "mean": 0.0, "std": 0.0}
    for smallest, largest in ((-1.0, 2.0), (float("nan"), 1.0), (0.0, 1.0)):
        found = quant_stats_te.translated(known | {"scale_inv_min": smallest, "scale_inv_max": largest})
        assert found["scale"] is None and found["mse"] == 0


def test_numbers_are_given_as_those_of_the_plain_layers(stats):
    stats.begin(4)
    delayed, fp4 = "0.self_attention.layernorm_qkv_activation", "2.layernorm_mlp.fc2_gradient"
    logged = {
        f"{delayed}_underflows%": 25, f"{delayed}_mse": 0.5, f"{delayed}_scale_inv_min": 0.25,
        f"{delayed}_scale_inv_max": 1.0, f"{delayed}_fp8_delayed_scaling_overflows%": 10, f"{delayed}_mean": 3.0,
        f"{delayed}_std": 4.0, f"{fp4}_nvfp4_underflows%": 50, f"{fp4}_nvfp4_mse": 1.0, f"{fp4}_mean": 0.0,
        f"{fp4}_std": 2.0, "1.self_attention.proj_weight_mean": 1.0, "1.self_attention.proj_weight_std": 1.0,
    }  # fmt: skip
    for name, value in logged.items():
        MetricLogger.log_scalar(name, torch.tensor(value), 4)
    assert stats.take() == {
        "0.self_attention.layernorm_qkv.input": {"underflow": 0.25, "saturation": 0.1, "scale": 2.0, "mse": 0.02},
        "2.layernorm_mlp.fc2.gradient": {"underflow": 0.5, "saturation": None, "scale": None, "mse": 0.25},
    }
    assert stats.take() is None


def test_it_knows_the_step_and_sees_nothing_while_paused(stats):
    def now():
        return debug_api.DEBUG_MANAGER._trainer_iteration_count

    stats.begin(7)
    assert now() == 7
    with stats.paused():
        assert now() < 0
    assert now() == 7


def test_modules_have_the_names_they_are_logged_by(stats):
    layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(1, 1)) for _ in range(2)])
    stats.inspector.name_modules(layers)
    assert layers[1][0].name == "1.0"


def test_after_a_run_nothing_is_looked_at(stats):
    stats.close()
    assert debug_api.DEBUG_MANAGER is None and not stats.enabled


def test_a_second_run_in_the_process_starts_afresh(stats):
    stats.inspect_te([None, "MXFP8BlockScaling"])
    assert ConfigManager.get_config_for_layer("0.layernorm_mlp.fc1") == {}
    assert "LogFp8TensorStats" in ConfigManager.get_config_for_layer("1.layernorm_mlp.fc1")["transformer_engine"]
