# SPDX-License-Identifier: Apache-2.0
"""A user's mistake ends as one sentence and exit code 2, before a model is built and with nothing written."""

import gzip
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import train_fsdp2
from common.contract.running import RECIPE, TINY, environment, run_here, torchrun
from tokens import layers_cpp
from tokens.backends import resolve_layer_backend, slower_backend_note
from tokens.formats import FP4 as FP4Section
from tokens.formats import FP8 as FP8Section
from tokens.formats import RECIPES
from tokens.low_precision import LowPrecision


REFERENCE = "model_tag=facebook/esm2_t6_8M_UR50D"
FP8 = "fp8_config.enabled=true"
FP4 = "fp4_config.enabled=true"
PACKED = "use_sequence_packing=true"
WIDE = ["model_kwargs.hidden_size=64", "model_kwargs.intermediate_size=96"]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
    """Start a trainer in an otherwise empty folder, see it refuse, and return what it says."""

    def built(*_):
        raise AssertionError("a model was built")

    def start(*overrides: str) -> str:
        before = files(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_here("train_fsdp2", "log", *overrides)
        told = capfd.readouterr().err
        assert stopped.value.code == 2
        assert told.startswith("error: ") and told.count("\n") == 1, told
        assert files(tmp_path) == before
        return told

    monkeypatch.setattr(train_fsdp2, "materialize", built)
    monkeypatch.chdir(tmp_path)
    return start


def assert_told(told: str, *parts: str) -> None:
    missing = [part for part in parts if part not in told]
    assert not missing, f"{missing} not in: {told}"


# ---- the command line and the configuration


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sed=1", ["Unknown key sed: did you mean seed?"]),
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
        ("~seed", ["seed was taken out"]),
        ("~dataset", ["dataset", "taken out"]),
        ("seed", ["seed cannot be read", "key=value"]),
        ("dataset.sequence_column=[a", ["dataset.sequence_column=[a cannot be read"]),
        ("dataset=1", ["dataset=1 must be a section"]),
        ("checkpoint=null", ["checkpoint=null must be a section"]),
        ("model_tag=???", ["model_tag is not set; give it on the command line"]),
    ],
)
def test_keys(refused, override, parts):
    assert_told(refused(override), *parts)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("num_train_steps=many", "a whole number above 0"),
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
        ("model_tag=3", "text"),
        ("dataset.sequence_column=[a]", "text"),
        ("dataset.sequence_column=null", "text"),
        ("dataset.micro_batch_size=true", "a whole number or null"),
        ("dataset.num_workers=-1", "a whole number of at least 0"),
        ("dataset.load_dataset_kwargs=file.parquet", "a section of keys"),
        ("validation.load_dataset_kwargs=file.parquet", "a section of keys or null"),
        ("model_kwargs.num_attention_heads=0", "a whole number above 0 or null"),
        ("precision=fp16", "one of auto, bf16, fp32"),
        ("layer_backend=jax", "one of auto, te, cpp, torch"),
        ("fp8_config.fp8_format=E5M2", "one of HYBRID, E4M3 or null"),
        ("adamw_kwargs.lr=0", "a number above 0"),
        ("adamw_kwargs.lr=null", "a number above 0"),
        ("adamw_kwargs.betas=0.9", "a list of numbers"),
        ("adamw_kwargs.betas=[0.9]", "two numbers of at least 0 and below 1"),
        ("adamw_kwargs.betas=[0.9, 1.0]", "two numbers of at least 0 and below 1"),
        ("checkpoint.async_save=maybe", "true or false"),
        ("checkpoint.ckpt_dir=3", "text or null"),
        ("wandb_init_args.mode=on", "one of online, offline, disabled, shared"),
        ("wandb_init_args.mode=dryrun", "one of online, offline, disabled, shared"),
    ],
)
def test_types_and_ranges(refused, override, wanted):
    key, value = override.split("=")
    shown = {"[a]": "['a']", "'yes'": "yes"}.get(value, value)
    assert f"error: {key}={shown} must be {wanted}.\n" == refused(override)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["micro_batches_per_step=0"], ["micro_batches_per_step=0", "a whole number above 0"]),
        (
            ["lr_scheduler_kwargs.num_warmup_steps=90", "lr_scheduler_kwargs.num_training_steps=100"],
            ["lr_scheduler_kwargs.num_warmup_steps=90 must be less than 90", "num_training_steps=100"],
        ),
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
        (["dataset.max_seq_length=2"], ["dataset.max_seq_length=2 must be at least 3"]),
        (["validation.max_seq_length=2"], ["validation.max_seq_length=2 must be at least 3"]),
        (["dataset.mlm_probability=1"], ["dataset.mlm_probability=1 must lie between 0 and 1"]),
        (["validation.mlm_probability=0"], ["validation.mlm_probability=0 must lie between 0 and 1"]),
        (["dataset.window_rows=0"], ["dataset.window_rows=0 must be at least 1"]),
        (["validation.every_n_steps=0"], ["validation.every_n_steps=0 must be at least 1"]),
        (["logger.frequency=0"], ["logger.frequency=0 must be at least 1"]),
        (["model_kwargs.num_attention_heads=5"], ["hidden_size 48", "num_attention_heads 5", "a multiple of 10"]),
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
        (["cp_size=2"], ["cp_size=2 needs use_sequence_packing=true"]),
        (["cp_size=3", PACKED], ["cp_size=3 does not divide the 1 ranks; 1 would"]),
    ],
)
def test_combinations(refused, overrides, parts):
    if torch.cuda.is_available() and any(x.startswith(("layer_backend=te", "fp8_config")) for x in overrides):
        pytest.skip("possible on a GPU")
    assert_told(refused(*overrides), *parts)


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
    assert_told(refused("--config-dir", str(tmp_path), "--config-name", "mine"), *parts)


def test_unknown_config(refused):
    assert_told(refused("--config-name", "L9"), "--config-name L9", "L0_sanity", "my_proteins")


# ---- data


def write_bad_data(folder: Path) -> None:
    (folder / "empty.parquet").touch()
    (folder / "text.parquet").write_text("not a parquet file, but longer than its magic bytes\n" * 3)
    pq.write_table(pa.table({"protein": ["MKV"]}), folder / "other_column.parquet")
    pq.write_table(pa.table({"sequence": [1, 2]}), folder / "numbers.parquet")
    pq.write_table(pa.table({"sequence": ["", None, " - "]}), folder / "blank.parquet")
    pq.write_table(pa.table({"sequence": pa.array([], pa.string())}), folder / "no_rows.parquet")
    (folder / "no_rows.csv").write_text("id,sequence\n")
    (folder / "no_rows.fasta").write_text("MKV\n")  # no record begins
    whole = gzip.compress("".join(f">p{i}\nMKVLAAGIT\n" for i in range(999)).encode(), mtime=0)
    (folder / "cut.fasta.gz").write_bytes(whole[: len(whole) // 2])


BAD_DATA = [
    ("parquet", "missing.parquet", ["data_files=missing.parquet: no such file", "full path"]),
    ("parquet", "empty.parquet", ["empty.parquet: the file is empty", "with rows"]),
    ("parquet", "no_rows.parquet", ["split=train of no_rows.parquet has no rows"]),
    ("parquet", "other_column.parquet", ["sequence_column=sequence: the data has no such column", "has protein"]),
    ("parquet", "numbers.parquet", ["sequence_column=sequence: the column holds int64, not text"]),
    ("parquet", "blank.parquet", ["all empty", "column"]),
    ("parquet", "text.parquet", ["text.parquet", "arquet"]),
    ("fasta", "cut.fasta.gz", ["cut.fasta.gz"]),
    ("csv", "no_rows.csv", ["split=train of no_rows.csv has no rows"]),
    ("fasta", "no_rows.fasta", ["split=train of no_rows.fasta has no rows"]),
    ("parquet", "null", ["data_files is not set"]),
]


@pytest.mark.parametrize(
    ("section", "kind", "name", "parts"),
    [("dataset", *case) for case in BAD_DATA] + [("validation", *case) for case in BAD_DATA[:5]],
)
def test_data(refused, tmp_path, section, kind, name, parts):
    write_bad_data(tmp_path)
    where = f"{section}.load_dataset_kwargs"
    told = refused(f"{where}.path={kind}", f"{where}.data_files={name}")
    assert_told(told, f"error: {section}", *parts)


def test_libraries_add_nothing(tmp_path):
    write_bad_data(tmp_path)
    command = [sys.executable, "train_ddp.py", f"dataset.load_dataset_kwargs.data_files={tmp_path}/text.parquet"]
    done = subprocess.run(command, cwd=RECIPE, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: dataset.load_dataset_kwargs") and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_file_too_small_for_its_parts(refused, tmp_path):
    (tmp_path / "few.fasta").write_text("".join(f">p{i}\nMKVLAAGIT\n" for i in range(5)))
    few = ("dataset.load_dataset_kwargs.data_files=few.fasta", "dataset.token_micro_batch_size=null")
    assert_told(refused(*few, "--config-name", "my_proteins"), "split=train[95%:] of few.fasta has no rows")


def test_split_and_database(refused, tmp_path):
    assert_told(refused("dataset.load_dataset_kwargs.split=test"), "dataset.load_dataset_kwargs", "test")
    assert_told(refused("dataset.load_dataset_kwargs.split=null"), "dataset.load_dataset_kwargs.split", "train")
    assert_told(refused("dataset.cluster_column=sequence", "dataset.protein_database=no.db"), "no.db: no such file")


# ---- what a run writes


def test_folders_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("kept")
    told = refused("checkpoint.ckpt_dir=file/below")
    assert_told(told, "checkpoint.ckpt_dir=file/below cannot be written", "give another folder")
    assert_told(refused("logger.log_dir=file"), "logger.log_dir=file cannot be written", "give another folder")


def test_a_full_disk(refused, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(path)._replace(free=1000) if str(path) == "full" else usage(path)
    )
    told = refused("checkpoint.ckpt_dir=full")
    assert_told(told, "checkpoint.ckpt_dir=full has 0.0 MiB free", "MiB; make room or take another folder")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("checkpoint.save_final_model=true", ["save_final_model=true needs checkpoint.ckpt_dir"]),
        ("checkpoint.save_every_n_steps=3", ["save_every_n_steps=3 needs checkpoint.ckpt_dir"]),
        ("checkpoint.save_every_n_steps=0", ["checkpoint.save_every_n_steps=0 must be at least 1, or null"]),
        ("checkpoint.max_to_keep=0", ["checkpoint.max_to_keep=0 must be at least 1, or null"]),
    ],
)
def test_saving(refused, override, parts):
    assert_told(refused(override), *parts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps with its final model."""
    path = tmp_path_factory.mktemp("finished")
    run_here("train_ddp", path, f"checkpoint.ckpt_dir={path}", "checkpoint.save_final_model=true", "num_train_steps=3")
    return path


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([], ["checkpoint.ckpt_dir=ckpt", "final_model already", "save_final_model=false"]),
        (
            ["checkpoint.save_final_model=false", "checkpoint.resume_from_checkpoint=false"],
            ["ckpt holds step_3 of an earlier run", "resume_from_checkpoint=true", "another folder"],
        ),
        (["model_kwargs.hidden_size=64"], ["model_kwargs.hidden_size was 48 and is 64", "another folder"]),
        (
            ["model_kwargs.num_hidden_layers=3", "checkpoint.allow_config_change=true"],
            ["model_kwargs.num_hidden_layers was 2 and is 3"],
        ),
        (["model_tag=esm2_t6_8M_UR50D"], ["model_tag was esm2_t4_1M and is esm2_t6_8M_UR50D"]),
        ([REFERENCE], ["model_tag was esm2_t4_1M and is facebook/esm2_t6_8M_UR50D"]),
        (["seed=7"], ["seed was 42 and is 7", "checkpoint.allow_config_change=true"]),
        (["num_train_steps=2"], ["num_train_steps=2", "at step 3", "more steps"]),
    ],
)
def test_an_earlier_run_stays_as_it_is(refused, finished, tmp_path, overrides, parts):
    shutil.copytree(finished, tmp_path / "ckpt")
    if overrides:
        shutil.rmtree(tmp_path / "ckpt" / "final_model")
    told = refused("checkpoint.ckpt_dir=ckpt", "checkpoint.save_final_model=true", *overrides)
    assert_told(told, *parts)


# ---- pretrained weights


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda path: shutil.rmtree(path), ["init_from=source", "no local folder"]),
        (lambda path: (path / "model.safetensors").unlink(), ["init_from=source", "neither *.safetensors nor"]),
        (lambda path: (path / "model.safetensors").write_bytes(b"half"), ["init_from=source", "cannot be used"]),
        (lambda path: (path / "config.json").unlink(), ["init_from=source", "config.json"]),
        (
            lambda path: (path / "config.json").write_text('{"model_type": "bert"}'),
            ["init_from=source", "bert", "esm"],
        ),
        (lambda path: (path / "config.json").write_text("{"), ["init_from=source", "cannot be used"]),
    ],
)
def test_weights_that_cannot_be_used(refused, finished, tmp_path, spoil, parts):
    shutil.copytree(finished / "final_model", tmp_path / "source")
    spoil(tmp_path / "source")
    assert_told(refused("init_from=source"), *parts)


@pytest.mark.parametrize(
    ("key", "value", "had"), [("hidden_size", 64, 48), ("num_hidden_layers", 3, 2), ("num_attention_heads", 2, 4)]
)
def test_weights_of_another_size(refused, finished, key, value, had):
    told = refused(f"init_from={finished / 'final_model'}", f"model_kwargs.{key}={value}")
    assert_told(told, f"init_from={finished}", f"{key}={had}", str(value), "model_kwargs of that size")


def test_a_name_that_the_hub_does_not_give(refused):
    assert_told(refused("init_from=nobody/nothing"), "init_from=nobody/nothing", "hub")


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "bert"}'])
def test_a_folder_that_is_no_model(refused, tmp_path, text):
    (tmp_path / "folder").mkdir()
    if text:
        (tmp_path / "folder" / "config.json").write_text(text)
    assert_told(refused("model_tag=folder"), "model_tag=folder is no folder of an ESM-2")


# ---- Weights & Biases


def test_wandb_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert_told(refused("wandb_init_args.mode=online"), "wandb_init_args.mode=online", "pip install wandb", "disabled")


def test_wandb_that_does_not_start(refused, monkeypatch):
    wandb = types.SimpleNamespace(Error=type("Error", (Exception,), {}))

    def init(mode, project, name, config, entity=None):
        raise wandb.Error("api_key not configured (no-tty).\nCall wandb login.")

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert_told(refused("wandb_init_args.mode=online", "+wandb_init_args.entity=me"), "mode=online", "wandb login")
    told = refused("wandb_init_args.mode=offline", "+wandb_init_args.colour=red")
    assert_told(told, "wandb_init_args", "mode=offline", "'colour'")


# ---- GPUs and TransformerEngine, which this machine need not have


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
    assert_told(str(error.value), f"fp8_config.fp8_recipe={recipe} needs {needs}", f"this is GPU {capability}")


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
    assert_told(str(error.value), "fp8_config.fp8_recipe_kwargs={'margins': 2}", "DelayedScaling", "'margins'")


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
    told = capsys.readouterr().err
    assert "cannot be compiled (there is no C++ compiler (no_such_compiler)); PyTorch's are slower" in told


# ---- two ranks


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["micro_batches_per_step=3"], ["micro_batches_per_step=3 does not divide by the 2 ranks; 2 or 4 would"]),
        (
            ["cp_size=2", PACKED, "model_kwargs.num_attention_heads=1"],
            ["cp_size=2 must be at most the number of heads, 1"],
        ),
        (["sed=1"], ["Unknown key sed"]),
        (
            ["dataset.load_dataset_kwargs.data_files='${oc.env:TEST_FOLDER}/${oc.env:RANK}.parquet'"],
            ["1.parquet: no such file"],
        ),
    ],
    ids=["all ranks", "too few heads", "before they meet", "one rank"],
)
def test_two_ranks_say_it_once_and_all_stop(tmp_path, overrides, parts):
    shutil.copy(RECIPE / "data" / "train.parquet", tmp_path / "0.parquet")
    before = files(tmp_path)
    command = [*torchrun(2), "train_fsdp2.py"]
    command += [*TINY, f"logger.log_dir={tmp_path}/log", f"checkpoint.ckpt_dir={tmp_path}/ckpt", *overrides]
    env = environment() | {"TEST_FOLDER": str(tmp_path)}
    done = subprocess.run(command, cwd=RECIPE, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert_told(told, *parts)
    assert "exitcode  : 2" in done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("  File") and str(RECIPE) in line]
    assert not ours  # no traceback of a rank
    assert files(tmp_path) == before
