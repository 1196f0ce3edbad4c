# SPDX-License-Identifier: Apache-2.0
"""What is this recipe's own: its mixture, its masking, its crops, its sample, and its way out."""

import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, pipeline

import embed
from collator import FIRST_RESIDUE, MASK, NUM_RESIDUES, VOCABULARY, mask_tokens
from common import RECIPE
from common.config import register_resolvers
from common.contract.ranks import excess_chi_square
from common.contract.running import TINY, curve, metrics, run_here, run_ranks
from convert_amplify import save
from dataset import ALPHABET, TrainLoader
from export import export
from keys import check_config
from pretrained import FAMILY, open_pretrained, open_step, shapes
from tokens.starting_weights import empty_model


sys.path.insert(0, str(RECIPE / "data"))
from make_mixture import NUM_ROWS, make_mixture
from make_sample import SEED


BOS, EOS, CHAIN = (VOCABULARY.index(token) for token in ("<bos>", "<eos>", "|"))


def composed(*overrides):
    register_resolvers()
    with initialize_config_dir(str(RECIPE / "hydra_config"), version_base=None):
        config = compose("L0_sanity", [*TINY, *overrides])
    check_config(config)
    return config


def test_the_sample_is_what_its_script_makes():
    files = {
        name: pq.read_table(RECIPE / "data" / f"{name}.parquet").to_pylist() for name in (*NUM_ROWS, "validation")
    }
    assert make_mixture(SEED) == files
    assert all(row["sequence"].count("|") == 1 for row in files["oas"])


def test_shares_of_a_run_are_the_weights(distributed):
    config = composed("dataset.mix.oas.weight=3", "dataset.mix.scop.weight=1")
    plan = TrainLoader(distributed, 1, packed=True, pad_to_multiple_of=1, **config.dataset).plan
    for epoch in (0, 1, 5):
        rows = np.concatenate([batch.rows for batch in plan.epoch(epoch)])
        assert len(rows) == len(plan.source) == sum(NUM_ROWS.values())
        names = [line.partition(":")[0] for line in plan.source.describe(rows, epoch)]
        for name, weight in (("uniprot", 8), ("oas", 3), ("scop", 1)):
            assert abs(names.count(name) - len(rows) * weight / 12) <= 3
    first = [line.partition(":")[0] for line in plan.source.describe(next(plan.epoch(0)).rows, 0)]
    assert set(first) <= {"uniprot", "oas", "scop"}


def test_a_mixture_resumes_on_other_ranks(tmp_path):
    """Three sources, packed to a budget: 2 ranks with workers, then one process, give one curve."""
    options = ["use_sequence_packing=true", "dataset.micro_batch_size=null", "dataset.token_micro_batch_size=192"]
    straight = curve(run_here("train_ddp", tmp_path / "whole", *options))
    save = [*options, f"checkpoint.ckpt_dir={tmp_path}", "checkpoint.save_every_n_steps=3"]
    run_ranks("train_fsdp2", 2, tmp_path, *save, "num_train_steps=3", "dataset.num_workers=1")
    assert curve(run_here("train_ddp", tmp_path, *save)) == pytest.approx(straight, rel=1e-5)


@pytest.mark.parametrize("masking", ["amino_acids", "published"])
def test_masking(masking):
    random = np.random.default_rng(0)
    tokens = np.tile(np.arange(27), 40_000)
    masked, labels = mask_tokens(tokens, 0.15, masking, random)
    is_residue = (tokens >= FIRST_RESIDUE) & (tokens < FIRST_RESIDUE + NUM_RESIDUES)
    can_be = is_residue if masking == "amino_acids" else ~np.isin(tokens, [0, BOS, EOS])
    chosen = labels != -100
    assert not chosen[~can_be].any() and (labels[chosen] == tokens[chosen]).all()
    assert (masked[~chosen] == tokens[~chosen]).all()
    assert chosen[can_be].mean() == pytest.approx(0.15, abs=0.002)
    # What is put in is <mask> in 80%, any of the tokens that may be in 10%, the token itself in 10%.
    into = np.arange(27) if masking == "published" else np.arange(FIRST_RESIDUE, FIRST_RESIDUE + NUM_RESIDUES)
    found = np.bincount(masked[chosen & (tokens == 6)], minlength=27)
    expected = np.zeros(27)
    expected[MASK], expected[6] = 0.8, 0.1
    expected[into] += 0.1 / len(into)
    assert not found[expected == 0].any()
    seen = expected > 0
    assert excess_chi_square(found[seen], found.sum() * expected[seen], seen.sum() - 1) < 5


def test_crops_show_both_ends():
    long = ALPHABET.tokenize(b"MA" + b"G" * 20 + b"|WC")
    assert long[-3] == CHAIN and ALPHABET.tokenize(b"mXk*-") == bytes([22, 1, 17])
    crops = np.stack(ALPHABET.crop([long] * 4000, np.arange(4000), 12, 1, 0))
    assert (crops[:, 0] == BOS).all() and (crops[:, -1] == EOS).all()
    starts = len(long) - 10 + 1
    assert (crops[:, 1] == long[0]).mean() == pytest.approx(1 / starts, rel=0.25)
    assert (crops[:, -2] == long[-1]).mean() == pytest.approx(1 / starts, rel=0.25)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    more = ["checkpoint.save_final_model=true", "use_sequence_packing=true", "num_train_steps=2"]
    return run_here("train_ddp", path, f"checkpoint.ckpt_dir={path}", *more)


def test_the_exported_tokenizer_reads_what_training_reads(run):
    tokenizer = AutoTokenizer.from_pretrained(run / "final_model")
    assert tokenizer.convert_ids_to_tokens(range(27)) == VOCABULARY and len(tokenizer) == 27
    assert tokenizer.model_max_length == 96
    assert json.loads((run / "final_model" / "config.json").read_text())["max_position_embeddings"] == 96
    signs, random = [*map(chr, range(1, 127)), "é", "語"], np.random.default_rng(0)
    texts = ["MKVLAWXB|EVQLC", "mkv|Lax-", "A-C.D E\n", "MK*L**", "*", "", "".join(signs).replace("<", "")]
    texts += ["".join(random.choice(signs, 60)).replace("<", "") for _ in range(100)]
    for text in texts:
        assert tokenizer(text)["input_ids"] == [BOS, *ALPHABET.tokenize(text.encode()), EOS], text
    assert tokenizer("mk<mask>|")["input_ids"] == [BOS, *ALPHABET.tokenize(b"MK"), MASK, CHAIN, EOS]


def test_embeddings_are_what_transformers_gives(run, tmp_path):
    proteins = ["MSKGEELFTGVVPILVELDGDVNG", "mkv-", "EVQLVESG|DIQMTQ", "", "W" * 120]
    (tmp_path / "my.fasta").write_text("".join(f">p{i}\n{s}\n" for i, s in enumerate(proteins)))
    tokenizer = AutoTokenizer.from_pretrained(run / "final_model")
    model = AutoModel.from_pretrained(run / "final_model").eval()
    for source in ("final_model", "step_2"):
        options = ["--per-residue", "--tokens=60", "--layer-backend=torch", "--precision=fp32"]
        embed.main([str(tmp_path / "my.fasta"), str(run / source), str(tmp_path / f"{source}.parquet"), *options])
        for protein, line in zip(proteins, pq.read_table(tmp_path / f"{source}.parquet").to_pylist(), strict=True):
            if not protein:
                assert line["embedding"] is None
                continue
            with torch.no_grad():
                expected = model(**tokenizer(protein, return_tensors="pt")).last_hidden_state[0, 1:-1].numpy()
            np.testing.assert_allclose(line["residue_embeddings"], expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(line["embedding"], expected.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["encoder", "published", "eurobert"])
def test_a_folder_that_lacks_some_tensors_starts_in_part(run, tmp_path, kind):
    shape, whole = open_step(run / "step_2")
    if kind == "encoder":
        AutoModel.from_pretrained(run / "final_model").save_pretrained(tmp_path / "source")
    else:
        save(whole, shape, {"published": "amplify"}.get(kind, kind), tmp_path / "source")
        weights = load_file(tmp_path / "source" / "model.safetensors")
        left_out = ("decoder", "lm_head", "transformer_encoder.1.q.", "model.layers.1.self_attn.q_proj")
        kept = {name: x for name, x in weights.items() if not name.startswith(left_out)}
        save_file(kept | {"x": torch.ones(1)}, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing .*init_from_partial=true takes what fits"):
        open_pretrained(str(tmp_path / "source"), shape)
    weights, note = open_pretrained(str(tmp_path / "source"), shape, partial=True, seed=3)
    new = {"decoder.weight", "decoder.bias"}
    new |= set() if kind == "encoder" else {"amplify.layer.1.self_attention.layernorm_qkv.weight"}
    assert all(name in note for name in new) and (kind == "encoder" or "left out: x" in note), note
    for name, size in shapes(shape).items():
        first = empty_model(FAMILY, shape).initial_value(name, size, 3)
        assert torch.equal(weights[name], first if name in new else whole[name]), name


def test_the_final_model_fills_masks_and_comes_back(run, tmp_path):
    folder = run / "final_model"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["EuroBertForMaskedLM"]
    assert "train.parquet, oas.parquet, scop.parquet" in (folder / "README.md").read_text()
    guesses = pipeline("fill-mask", str(folder))("MKV<mask>A|EVQ")
    assert len(guesses) == 5 and {guess["token_str"] for guess in guesses} <= set(VOCABULARY)
    more = [f"model_tag={folder}", f"init_from={folder}", "num_train_steps=1", "adamw_kwargs.lr=1e-12"]
    run_here("train_ddp", tmp_path / "more", f"checkpoint.ckpt_dir={tmp_path}/more", *more)
    export(tmp_path / "more" / "step_1", tmp_path / "again")
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("recipe", ["Float8CurrentScaling", "MXFP8BlockScaling"])
def test_fp8_emulated(recipe, tmp_path):
    widths = ["model_kwargs.hidden_size=64", "model_kwargs.intermediate_size=96", "num_train_steps=2"]
    fp8 = ["fp8_config.enabled=true", f"fp8_config.fp8_recipe={recipe}", "use_sequence_packing=true"]
    exact = metrics(run_here("train_ddp", tmp_path / "exact", *widths, "precision=bf16"), "train", "loss")
    low = metrics(run_here("train_ddp", tmp_path / "low", *widths, *fp8, "precision=bf16"), "train", "loss")
    assert low == pytest.approx(exact, rel=0.01) and low != exact


def test_context_parallelism(tmp_path):
    packed = ["use_sequence_packing=true", "num_train_steps=3"]
    alone = curve(run_here("train_ddp", tmp_path / "alone", *packed))
    shared = curve(run_ranks("train_fsdp2", 2, tmp_path / "shared", *packed, "cp_size=2"))
    assert shared == pytest.approx(alone, rel=1e-5)
