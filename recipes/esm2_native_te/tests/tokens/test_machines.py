# SPDX-License-Identifier: Apache-2.0
"""Number formats and layers on GPUs and with packages that this machine need not have."""

import json
import subprocess
import sys
import types

import pytest
import torch
from sentences import assert_in

from common.contract.running import RECIPE, TINY, environment, run_here, torchrun
from tokens import layers_cpp
from tokens.backends import resolve_layer_backend, slower_backend_note
from tokens.formats import FP4 as FP4Section
from tokens.formats import FP8 as FP8Section
from tokens.formats import RECIPES
from tokens.low_precision import LowPrecision


@pytest.fixture
def machine(monkeypatch):
    """Let `LowPrecision` see a GPU of some capability, and TransformerEngine."""

    def be(capability: tuple[int, int], too_old: bool = False) -> None:
        scaling = types.SimpleNamespace(
            Format={"HYBRID": "hybrid", "E4M3": "e4m3"},
            **{name: lambda fp8_format=None, margin=0: (fp8_format, margin) for name in RECIPES},
        )
        for name, module in (
            ("transformer_engine", types.SimpleNamespace()),
            ("common", scaling),
            ("recipe", scaling),
        ):
            full = {"common": "transformer_engine.common", "recipe": "transformer_engine.common.recipe"}.get(
                name, name
            )
            monkeypatch.setitem(sys.modules, full, module)

        def check_recipe_support(scaling):
            if too_old:
                raise RuntimeError("CUDA >= 12.9.")

        support = types.SimpleNamespace(check_recipe_support=check_recipe_support)
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", types.SimpleNamespace(quantization=support))
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.quantization", support)
        scaling.recipe = sys.modules["transformer_engine"].common = scaling
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {capability}")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)

    return be


A100, L4, H100, B200, RTX_5090 = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)


def on_gpu(recipe: str, dtype: str = "auto", backend: str = "te", **options) -> LowPrecision:
    device, widths = torch.device("cuda", 0), {"hidden_size": 640, "intermediate_size": 2560}
    if RECIPES[recipe].bits == 4:
        section = {"fp4": FP4Section(enabled=True, fp4_recipe=recipe)}
    else:
        section = {"fp8": FP8Section(enabled=True, fp8_recipe=recipe, **options)}
    return LowPrecision(device, dtype, backend, 6, widths, True, **section)


@pytest.mark.parametrize(
    ("recipe", "capability", "needs"),
    [
        ("DelayedScaling", A100, "an Ada, Hopper or Blackwell GPU"),
        ("Float8CurrentScaling", A100, "an Ada, Hopper or Blackwell GPU"),
        ("Float8BlockScaling", L4, "a Hopper or Blackwell GPU"),
        ("MXFP8BlockScaling", A100, "a Blackwell GPU of a data centre"),
        ("MXFP8BlockScaling", H100, "a Blackwell GPU of a data centre"),
        ("MXFP8BlockScaling", RTX_5090, "a Blackwell GPU of a data centre"),
        ("DelayedScaling", L4, None),
        ("Float8CurrentScaling", H100, None),
        ("Float8BlockScaling", H100, None),
        ("MXFP8BlockScaling", B200, None),
    ],
)
def test_recipes_need_their_gpu(machine, recipe, capability, needs):
    machine(capability)
    if needs is None:
        assert on_gpu(recipe, fp8_format="E4M3", fp8_recipe_kwargs={"margin": 2}).scalings == {recipe: ("e4m3", 2)}
        return
    with pytest.raises(ValueError) as error:
        on_gpu(recipe)
    assert_in(str(error.value), f"fp8_config.fp8_recipe={recipe} needs {needs}", f"this is GPU {capability}")


def test_what_a_gpu_has_instead(machine):
    machine(H100)
    with pytest.raises(ValueError, match="which has DelayedScaling, Float8CurrentScaling, Float8BlockScaling"):
        on_gpu("MXFP8BlockScaling")
    machine(A100)
    with pytest.raises(ValueError, match="which has none of them"):
        on_gpu("DelayedScaling")


def test_an_argument_that_the_recipe_does_not_have(machine):
    machine(H100)
    with pytest.raises(ValueError) as error:
        on_gpu("DelayedScaling", fp8_recipe_kwargs={"margins": 2})
    assert_in(str(error.value), "fp8_config.fp8_recipe_kwargs={'margins': 2}", "DelayedScaling", "'margins'")


def test_packages_that_are_too_old_for_a_recipe(machine):
    machine(H100, too_old=True)
    with pytest.raises(ValueError, match=r"fp8_recipe=Float8BlockScaling does not run here: CUDA >= 12\.9"):
        on_gpu("Float8BlockScaling")


@pytest.mark.parametrize(("backend", "recipe"), [("torch", "MXFP8BlockScaling"), ("te", "NVFP4BlockScaling")])
def test_formats_that_round_bf16_only(machine, backend, recipe):
    machine(B200)
    with pytest.raises(ValueError, match=rf"{recipe} takes BF16 numbers on GPUs; precision=bf16"):
        on_gpu(recipe, "fp32", backend)


@pytest.mark.parametrize(("capability", "emulated"), [(A100, True), (H100, False)])
def test_without_transformer_engine_a_gpu_takes_torchao(machine, capability, emulated):
    machine(capability)
    chosen = on_gpu("Float8CurrentScaling", backend="torch")
    assert chosen.emulated is emulated and ("emulated" in chosen.notes[-1]) is emulated
    assert on_gpu("MXFP8BlockScaling", backend="torch").emulated
    with pytest.raises(ValueError, match=r"DelayedScaling.* needs TransformerEngine"):
        on_gpu("DelayedScaling", backend="torch")


def test_why_auto_came_to_slower_layers_is_said_once_and_first():
    gpu = torch.device("cuda", 0)
    note = slower_backend_note("auto", "torch", gpu, 32)
    assert "faster form cannot be had" in note and "PyTorch's are slower" in note
    assert slower_backend_note("torch", "torch", gpu, 32) is slower_backend_note("auto", "te", gpu, 32) is None
    widths = {"hidden_size": 64, "intermediate_size": 96}
    chosen = LowPrecision(
        torch.device("cpu"), "fp32", "torch", 2, widths, True, FP8Section(enabled=True), notes=[note]
    )
    assert chosen.notes[0] == note and len(chosen.notes) == 2


def test_transformer_engine_that_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "tokens.layers_te", None)
    with pytest.raises(
        ValueError, match="layer_backend: te is impossible because TransformerEngine cannot be imported"
    ):
        resolve_layer_backend("te", 32)
    assert resolve_layer_backend("auto", 32) == "torch"


def test_a_compiler_that_is_missing(monkeypatch, tmp_path, capsys):
    layers_cpp.library.cache_clear()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no_such_compiler")
    try:
        with pytest.raises(
            ValueError, match=r"layer_backend: cpp is impossible .* no C\+\+ compiler .*no_such_compiler"
        ):
            resolve_layer_backend("cpp", 16)
        run_here("train_ddp", tmp_path, "num_train_steps=1", "use_sequence_packing=true")
    finally:
        layers_cpp.library.cache_clear()
    message = capsys.readouterr().err
    assert "cannot be compiled (there is no C++ compiler (no_such_compiler)); PyTorch's are slower" in message


ON_OTHER_MACHINES = """
import os, runpy, sys, torch
first = os.environ["RANK"] == "0"
torch.cpu._is_avx512_bf16_supported = lambda: first
if not first:  # and no library that another machine has compiled
    os.environ |= {"CXX": "/nonexistent", "TORCH_EXTENSIONS_DIR": sys.argv.pop(1)}
else:
    sys.argv.pop(1)
sys.argv[0] = "train_ddp.py"
runpy.run_path("train_ddp.py", run_name="__main__")
"""


def test_ranks_on_two_kinds_of_machines_train_as_the_lesser_can(tmp_path):
    """Rank 1 has a processor without BF16, and no compiler; it is said once, before the first step."""
    (tmp_path / "start.py").write_text(ON_OTHER_MACHINES)
    wide = ["model_kwargs.hidden_size=256", "use_sequence_packing=true", "precision=auto", "num_train_steps=2"]
    command = [*torchrun(2), str(tmp_path / "start.py"), str(tmp_path / "cache"), *TINY, *wide]
    command += [f"logger.log_dir={tmp_path}", "validation.load_dataset_kwargs=null", "layer_backend=auto"]
    paths = {"PYTHONPATH": str(RECIPE)}
    done = subprocess.run(command, cwd=RECIPE, env=environment() | paths, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for sentence in (
        "layer_backend: auto is PyTorch's on all ranks, because of rank 1. The layers' kernels for CPUs cannot be "
        "compiled (there is no C++ compiler (/nonexistent))",
        "precision: auto is FP32 on all ranks, because BF16 is not faster on rank 1.",
    ):
        assert done.stderr.count(sentence) == 1, done.stderr
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["layer_backend"], run["precision"], run["num_ranks"]) == ("torch", "fp32", 2)
