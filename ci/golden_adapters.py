#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write small adapters by peft that the tests of Geneformer's recipe read; or open one that a run has written.

    python3.11 -m venv env && env/bin/pip install torch==2.13.0 peft==0.21.2
    env/bin/python ci/golden_adapters.py
    env/bin/python ci/golden_adapters.py --check my_cells_model/final_model

The first writes recipes/geneformer_native_te/tests/golden_adapters: for three kinds of model a base of random weights,
an adapter of random weights, and what the two give together. The second puts `adapter/` of a final model upon its base
and compares that with the final model itself.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, MegatronBertConfig


OUT = Path(__file__).resolve().parents[1] / "recipes/geneformer_native_te/tests/golden_adapters"
CELL = [2, 17, 30, 4, 28, 8, 13, 7, 3]
DENSE = ["attention.output.dense", "intermediate.dense", "output.dense"]
KINDS = {
    "cells": (BertConfig, "SequenceClassification",
              {"task_type": "SEQ_CLS", "target_modules": ["query", "value"],
               "modules_to_save": ["classifier", "pooler"]}),
    "genes_pre_norm": (MegatronBertConfig, "TokenClassification",
                       {"task_type": "TOKEN_CLS", "target_modules": ["query", "key", "value", *DENSE],
                        "modules_to_save": ["classifier"]}),
    "masked_lm": (BertConfig, "MaskedLM", {"target_modules": DENSE, "use_rslora": True}),
}  # fmt: skip
SIZE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 12, "hidden_act": "relu"}  # fmt: skip


def write() -> None:
    """Base, adapter and logits of each kind."""
    shutil.rmtree(OUT, ignore_errors=True)
    for name, (config, opens, options) in KINDS.items():
        torch.manual_seed(0)
        kind = config.__name__.removesuffix("Config")
        base = getattr(transformers, f"{kind}ForMaskedLM")(config(**SIZE))
        base.save_pretrained(OUT / name / "base")
        base = getattr(transformers, f"{kind}For{opens}").from_pretrained(OUT / name / "base", num_labels=3)
        model = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, **options))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(OUT / name / "adapter")
        (OUT / name / "adapter" / "README.md").unlink()
        file = OUT / name / "adapter" / "adapter_config.json"
        given = json.loads(file.read_text()) | {"base_model_name_or_path": "base"}
        given["target_modules"].sort()
        file.write_text(json.dumps(given, indent=1) + "\n")
        with torch.no_grad():
            logits = model.eval()(torch.tensor([CELL])).logits
        (OUT / name / "logits.json").write_text(json.dumps(logits.tolist()) + "\n")


def check(folder: Path) -> None:
    """Exit with 1 unless base and adapter give the logits of the model, to 1e-5."""
    config = json.loads((folder / "config.json").read_text())
    opens = getattr(transformers, config["architectures"][0])
    model = opens.from_pretrained(folder).eval()
    base = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = opens.from_pretrained(base, num_labels=len(config.get("id2label", "01")))
    cell = torch.arange(config["vocab_size"] - 9, config["vocab_size"])[None]
    with torch.no_grad():
        plain, expected = base.eval()(cell).logits, model(cell).logits
        found = PeftModel.from_pretrained(base, folder / "adapter").eval()(cell).logits
    error, change = ((found - x).abs().max().item() for x in (expected, plain))
    print(f"{folder}: base and adapter differ from the model by {error:.2g}; without the adapter by {change:.2g}")
    sys.exit(error > 1e-5 or change < 1e-3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="FINAL_MODEL")
    folder = parser.parse_args().check
    check(folder) if folder else write()
