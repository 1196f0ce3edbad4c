# SPDX-License-Identifier: Apache-2.0
"""What carries a secret is passed on, and shows as *** in all that a run writes and prints."""

import pytest
from omegaconf import OmegaConf

import rows
from common import open_data
from common.contract.running import run_here
from common.redaction import redacted, redacted_command


PLANTED = (
    "+dataset.load_dataset_kwargs.token=PLANTED_1",
    "+dataset.load_dataset_kwargs.storage_options={key: PLANTED_2, client_kwargs: {endpoint: PLANTED_3}}",
    "+validation.load_dataset_kwargs.token=PLANTED_4",
    "+wandb_init_args.api_key=PLANTED_5",
)


def test_nothing_of_a_run_has_a_secret_in_it(tmp_path, capfd):
    saving = (f"checkpoint.ckpt_dir={tmp_path}", "checkpoint.save_final_model=true", "num_train_steps=2")
    run_here("train_ddp", tmp_path, *PLANTED, *saving)
    assert "PLANTED" in " ".join(PLANTED) and (tmp_path / "final_model" / "README.md").exists()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "run.json", "metrics.jsonl", "README.md"} <= {path.name for path in files}
    assert not [path for path in files if b"PLANTED" in path.read_bytes()]
    assert "PLANTED" not in "".join(capfd.readouterr())
    # The same secrets again, or none: a resume does not ask for those of before.
    run_here("train_ddp", tmp_path, *saving[:1], "num_train_steps=3", "checkpoint.allow_config_change=true")


def test_they_are_passed_on(monkeypatch, tmp_path, capsys):
    seen = []

    def load_dataset(**kwargs):
        seen.append(kwargs)
        raise OSError("no such bucket")

    monkeypatch.setattr(open_data.datasets, "load_dataset", load_dataset)
    with pytest.raises(SystemExit):
        run_here("train_ddp", tmp_path, *PLANTED, "dataset.load_dataset_kwargs.data_files=s3://bucket/x.parquet")
    assert seen[0]["token"] == "PLANTED_1" and seen[0]["storage_options"]["key"] == "PLANTED_2"
    told = capsys.readouterr().err
    assert "no such bucket" in told and "***" in told and "PLANTED" not in told


def test_what_is_a_secret_and_what_is_not():
    config = {
        "token": "a", "hf_token": "a", "api_key": "a", "Secret": "a", "aws_secret_access_key": "a", "password": "a",
        "storage_options": {"anything": ["a"]}, "auth": {"user": "a"},
    }  # fmt: skip
    assert "'a'" not in repr(redacted(config))
    plain = {"pad_token_id": 1, "token_dropout": True, "token": None, "sequence_column": "x", "monkey": "x",
             "tokenizer": "x", "token_micro_batch_size": 4096, "label_keys": {"energy": "REF_energy"}}  # fmt: skip
    assert redacted(plain) == plain


def test_rows_of_an_address_that_was_not_written_down_are_not_looked_for(tmp_path):
    given = {"path": "parquet", "data_files": ["https://user:PLANTED@host/x.parquet"], "token": "PLANTED"}
    config = {"seed": 1, "dataset": {"num_workers": 0, "load_dataset_kwargs": redacted(given)}}
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"load_dataset_kwargs\.data_files=\['https://\*\*\*@host.* stands for"):
        rows.run_in(tmp_path)


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("a.token=x", "a.token=***"),
        ("+b.storage_options.client=y", "+b.storage_options.client=***"),
        ("c={token: z, other: 1}", "c={'token': '***', 'other': 1}"),
        ("c={tokens: [z]}", "c={'tokens': ['***']}"),
        ("c={storage_options: {user: u}}", "c={'storage_options': {'user': '***'}}"),
        ("d=[https://user:pw@host/x]", "d=['https://***@host/x']"),
        ("d=https://host/x.csv?sig=a%2B&se=1", "d=https://host/x.csv?***"),
        ("d=s3://bucket/x?.csv", "d=s3://bucket/x?.csv"),  # a pattern
        *((word, word) for word in ("train.py", "seed=1", "--config-name", "a.token_micro_batch_size=4096",
                                    "a.token_dropout=true", "a=[unfinished", "x={k: v}")),
    ],
)  # fmt: skip
def test_command_lines(word, shown):
    assert redacted_command([word]) == [shown]
