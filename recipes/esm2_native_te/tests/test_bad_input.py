# SPDX-License-Identifier: Apache-2.0
"""A user's mistake ends as one sentence and exit code 2, before a model is built and with nothing written."""

from copy import deepcopy

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from sentences import assert_in, refusals

from common.config import register_resolvers
from common.contract.running import RECIPE, TINY
from keys import check_config


REFERENCE = "model_tag=facebook/esm2_t6_8M_UR50D"
FP8 = "fp8_config.enabled=true"
FP4 = "fp4_config.enabled=true"
PACKED = "use_sequence_packing=true"
WIDE = ["model_kwargs.hidden_size=64", "model_kwargs.intermediate_size=96"]


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
    return refusals(tmp_path, capfd, monkeypatch)


@pytest.fixture(scope="module")
def settings():
    """A configuration that is right."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(RECIPE / "hydra_config"), version_base=None):
        config = compose("L0_sanity", TINY)
    check_config(config)
    return config


# ---- the command line and the configuration


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("banana=1", ["Unknown key banana: known are adamw_kwargs, anomalies, checkpoint,", " seed,"]),
        ("+new=1", ["Unknown key new:", "num_train_steps"]),
        ("+new.part=1", ["Unknown key new:"]),
        ("dataset.max_length=3", ["Unknown key dataset.max_length: did you mean dataset.max_seq_length?"]),
        ("adamw_kwargs.x=1", ["Unknown key adamw_kwargs.x: known are adamw_kwargs.betas,"]),
        ("+checkpoint.keep=1", ["Unknown key checkpoint.keep"]),
        ("+dataset.max_length=3", ["did you mean dataset.max_seq_length?"]),
        ("checkpoints.ckpt_dir=x", ["Unknown key checkpoints: did you mean checkpoint?"]),
        ("ckpt_dir=x", ["Unknown key ckpt_dir: did you mean checkpoint.ckpt_dir?"]),
        ("wandb_init_args.entity=me", ["Unknown key wandb_init_args.entity", "wandb_init_args.project"]),
        ("dataset.load_dataset_kwargs.data_file=x", ["did you mean dataset.load_dataset_kwargs.data_files?"]),
        ("+seed=1", ["seed", "already"]),
        ("~dataset", ["dataset", "taken out"]),
        ("dataset.sequence_column=[a", ["dataset.sequence_column=[a cannot be read"]),
        ("dataset=1", ["dataset=1 must be a section"]),
        ("model_tag=???", ["model_tag is not set; give it on the command line"]),
    ],
)
def test_keys(refused, override, parts):
    assert_in(refused(override), *parts)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("num_train_steps=1.5", "a whole number above 0"),
        ("num_train_steps=null", "a whole number above 0"),
        ("num_train_steps=0", "a whole number above 0"),
        ("num_train_steps=-3", "a whole number above 0"),
        ("seed=-1", "a whole number of at least 0"),
        ("max_grad_norm=0", "a number above 0"),
        ("max_grad_norm=-1.0", "a number above 0"),
        ("max_grad_norm=null", "a number above 0"),
        ("max_grad_norm=nan", "a number above 0"),
        ("ema_decay=0", "a number above 0 and below 1 or null"),
        ("ema_decay=1.0", "a number above 0 and below 1 or null"),
        ("model_kwargs.hidden_dropout_prob=-0.1", "a number of at least 0 or null"),
        ("use_sequence_packing=1", "true or false"),
        ("use_sequence_packing='yes'", "true or false"),
        ("use_torch_compile=null", "true or false"),
        ("model_tag=[a]", "text"),
        ("dataset.sequence_column=[a]", "text"),
        ("dataset.sequence_column=null", "text"),
        ("dataset.micro_batch_size=true", "a whole number or null"),
        ("dataset.num_workers=-1", "a whole number of at least 0"),
        ("dataset.load_dataset_kwargs=file.parquet", "a section of keys"),
        ("validation.load_dataset_kwargs=file.parquet", "a section of keys or null"),
        ("model_kwargs.num_attention_heads=0", "a whole number above 0 or null"),
        ("model_kwargs.num_hidden_layers=100000000", "a whole number above 0 and of at most 1000 or null"),
        ("precision=fp16", "one of auto, bf16, fp32"),
        ("layer_backend=jax", "one of auto, te, cpp, torch"),
        ("fp8_config.fp8_format=E5M2", "one of HYBRID, E4M3 or null"),
        ("adamw_kwargs.lr=0", "a number above 0"),
        ("adamw_kwargs.lr=null", "a number above 0"),
        ("adamw_kwargs.betas=0.9", "a list of numbers"),
        ("adamw_kwargs.betas=[0.9]", "two numbers of at least 0 and below 1"),
        ("adamw_kwargs.betas=[0.9, 1.0]", "two numbers of at least 0 and below 1"),
        ("wandb_init_args.mode=on", "one of online, offline, disabled, shared"),
        ("wandb_init_args.mode=dryrun", "one of online, offline, disabled, shared"),
    ],
)
def test_types_and_ranges(settings, capsys, override, wanted):
    key, value = override.split("=")
    config = deepcopy(settings)
    OmegaConf.update(config, key, OverridesParser.create().parse_override(override).value())
    with pytest.raises(SystemExit):
        check_config(config)
    shown = {"[a]": "['a']", "'yes'": "yes"}.get(value, value)
    assert f"error: {key}={shown} must be {wanted}.\n" == capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["micro_batches_per_step=0"], ["micro_batches_per_step=0", "a whole number above 0"]),
        (["dataset.micro_batch_size=null"], ["dataset.micro_batch_size", "dataset.token_micro_batch_size", "one of"]),
        (["dataset.token_micro_batch_size=96"], ["micro_batch_size=2", "token_micro_batch_size=96", "null"]),
        (["dataset.micro_batch_size=0"], ["dataset.micro_batch_size=0 must be at least 1"]),
        (
            ["dataset.micro_batch_size=null", "dataset.token_micro_batch_size=95"],
            ["dataset.token_micro_batch_size=95 is smaller", "dataset.max_seq_length=96", "raise the one"],
        ),
        (
            ["validation.token_micro_batch_size=50", "validation.micro_batch_size=null"],
            ["validation.token_micro_batch"],
        ),
        (["dataset.num_workers=1000000"], ["dataset.num_workers=1000000 must be at most 512"]),
        (["dataset.max_seq_length=99999999999"], ["dataset.max_seq_length=99999999999 must be less than 2^31"]),
        (
            ["model_kwargs.hidden_size=2000000000", "model_kwargs.num_attention_heads=200000000"],
            ["the model's sizes make a tensor that no memory holds"],
        ),
        (["dataset.max_seq_length=2"], ["dataset.max_seq_length=2 must be at least 3"]),
        (["validation.max_seq_length=2"], ["validation.max_seq_length=2 must be at least 3"]),
        (["dataset.mlm_probability=1"], ["dataset.mlm_probability=1 must lie between 0 and 1"]),
        (["validation.mlm_probability=0"], ["validation.mlm_probability=0 must lie between 0 and 1"]),
        (["dataset.window_rows=0"], ["dataset.window_rows=0 must be at least 1"]),
        (["validation.every_n_steps=0"], ["validation.every_n_steps=0 must be at least 1"]),
        (["logger.frequency=0"], ["logger.frequency=0 must be at least 1"]),
        (["model_kwargs.hidden_dropout_prob=1"], ["hidden_dropout_prob 1", "at least 0 and below 1"]),
        (["model_tag=esm3"], ["model_tag=esm3", "no local folder", "esm2_t6_8M_UR50D"]),
        (["model_tag=facebook/esm2_t7"], ["model_tag=facebook/esm2_t7", "esm2_t6_8M_UR50D"]),
        (["layer_backend=te"], ["layer_backend", "te", "no CUDA device", "torch or auto"]),
        ([FP8, "fp8_config.fp8_recipe=FP4"], ["fp8_config.fp8_recipe=FP4 must be one of DelayedScaling,"]),
        (
            [FP8, "fp8_config.fp8_recipe=MXFP8BlockScaling"],
            ["fp8_recipe=MXFP8BlockScaling", "divide by 32", "hidden_size=48"],
        ),
        (
            [FP8, "fp8_config.fp8_recipe=DelayedScaling"],
            ["DelayedScaling", "without them there are Float8CurrentScaling (HYBRID), MXFP8BlockScaling (E4M3)"],
        ),
        ([FP4, *WIDE], ["fp4_config.fp4_recipe=NVFP4BlockScaling", "needs TransformerEngine"]),
        ([FP4, FP8, *WIDE], ["both enabled", "fp8_layers or fp4_layers"]),
        ([FP8, "fp8_layers=[0]", "fp4_layers=[0-1]"], ["fp4_layers=0-1 needs fp4_config.enabled=true"]),
        ([FP8, FP4, "fp8_layers=[0]", "fp4_layers=[0-1]", *WIDE], ["both name layer 0"]),
        (["fp8_layers=[0]"], ["fp8_layers=0 needs fp8_config.enabled=true"]),
        ([FP8, "fp8_layers=[]"], ["fp8_layers=[] names no layer", "null takes all"]),
        ([FP8, "fp8_layers=[2]"], ["fp8_layers=[2]: there is no layer 2; they go from 0 to 1"]),
        ([FP8, "fp8_layers=0-x"], ["fp8_layers=0-x", "0-x is neither a layer nor a range"]),
        ([FP8, "fp8_layers=[1-0]"], ["1-0 is neither a layer nor a range"]),
        ([FP8, "fp8_layers=1.5"], ["fp8_layers=1.5 must be a list of layers or text or a whole number or null"]),
        (
            [FP8, "+fp8_config.quantized_model_init_kwargs.enabled=true"],
            ["fp8_config.quantized_model_init_kwargs", "weights are FP32 here always"],
        ),
        (
            ["+fp8_config.quantized_model_init_kwargs.preserve_high_precision_init_val=true"],
            ["fp8_config.quantized_model_init_kwargs", "weights are FP32 here always"],
        ),
        (["fp8_config.fp8_recipe=Nonsense"], ["fp8_config.fp8_recipe=Nonsense must be one of DelayedScaling,"]),
        (["fp4_config.fp4_recipe=DelayedScaling"], ["fp4_recipe=DelayedScaling must be one of NVFP4BlockScaling"]),
        (
            ["fp8_config.fp8_recipe_kwargs.margin=1"],
            ["Unknown key fp8_config.fp8_recipe_kwargs.margin", "+fp8_config.fp8_recipe_kwargs.margin=... adds one"],
        ),
        (
            [FP8, PACKED, "cp_size=2", "+fp8_config.fp8_recipe_kwargs.fp8_mha=true"],
            ["'fp8_mha': True", "cp_size=2", "leave fp8_mha out"],
        ),
        (
            [FP8, "fp8_config.fp8_recipe=DelayedScaling", "use_torch_compile=true"],
            ["fp8_recipe=DelayedScaling", "use_torch_compile=true", "Float8CurrentScaling can be"],
        ),
        (
            [FP8, "quant_stats_config.enabled=true", "use_torch_compile=true"],
            ["quant_stats_config.enabled=true", "use_torch_compile=true"],
        ),
        (["quant_stats_config.enabled=true"], ["quant_stats_config.enabled=true needs fp8_config.enabled=true"]),
        (["quant_stats_config.every_n_steps=0"], ["quant_stats_config.every_n_steps=0"]),
        ([FP8, "fp8_config.fp8_format=E4M3"], ["fp8_format=E4M3", "needs TransformerEngine", "HYBRID"]),
        ([FP8, "+fp8_config.fp8_recipe_kwargs.margin=1"], ["'margin': 1", "needs TransformerEngine"]),
        ([FP8, "model_kwargs.hidden_size=40"], ["fp8_recipe=Float8CurrentScaling", "divide by 16", "hidden_size=40"]),
        ([FP8, REFERENCE], ["fp8_config.enabled=true", "facebook/esm2_t6_8M_UR50D", "; esm2_t6_8M_UR50D has"]),
        (["layer_backend=te", REFERENCE], ["layer_backend=te", "; esm2_t6_8M_UR50D has"]),
        (["cp_size=2", PACKED, REFERENCE], ["cp_size=2", "; esm2_t6_8M_UR50D has"]),
        (["cp_size=3", PACKED], ["cp_size=3 does not divide the 1 ranks; 1 would"]),
    ],
)
def test_combinations(refused, overrides, parts):
    if torch.cuda.is_available() and any(x.startswith(("layer_backend=te", "fp8_config")) for x in overrides):
        pytest.skip("possible on a GPU")
    assert_in(refused(*overrides), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dataset: {max_length: 3}", ["Unknown key dataset.max_length: did you mean dataset.max_seq_length?"]),
        ("extra: {a: 1}", ["Unknown key extra"]),
        ("dataset: [", ["mine.yaml", "line"]),
        ("seed: ${sed}", ["sed", "not found"]),
    ],
)
def test_the_users_own_yaml(refused, tmp_path, text, parts):
    (tmp_path / "mine.yaml").write_text(f"defaults: [L0_sanity, _self_]\n{text}\n")
    assert_in(refused("--config-dir", str(tmp_path), "--config-name", "mine"), *parts)


def test_unknown_config(refused):
    assert_in(refused("--config-name", "L9"), "--config-name L9", "L0_sanity", "my_proteins")
