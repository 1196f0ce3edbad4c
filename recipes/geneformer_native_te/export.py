# SPDX-License-Identifier: Apache-2.0
"""Turn a checkpoint into a folder that plain `transformers` opens, without GPUs, ranks or the training data.

    python export.py CKPT_DIR/step_1000 [final_model]

writes `config.json` of a `BertForMaskedLM` (with `norm: pre` of a `MegatronBertForMaskedLM`), `model.safetensors`,
`vocabulary.json` where the vocabulary is a file, and a model card. Classes of cells and genes become a
`BertForSequenceClassification` and a `BertForTokenClassification`; the head of `task=length`, for which `transformers`
has no class, lies beside the model in `regression_head.safetensors`. After a run with LoRA the model has what was
trained in its weights, and `adapter/` holds it alone, as files of peft.
"""

import argparse
import json
import shutil
from pathlib import Path

from omegaconf import OmegaConf


from common import quiet  # noqa: F401  # isort: skip
from common.command import command, writing
from common.files import whole_folder
from common.own_data import data_names, published, validated_on, weights_of
from convert_geneformer import ARCHITECTURES, hf_config, save, save_adapter
from modeling_geneformer import GeneformerConfig
from pretrained import open_step
from tokens.starting_weights import without_adapters
from vocabulary import FILE, PUBLISHED


CARD = """---
library_name: transformers
tags: [geneformer, single-cell, masked-lm]
---
# {model_tag}, {step:,} steps

A Geneformer ([Theodoris et al. 2023](https://doi.org/10.1038/s41586-023-06139-9)), trained from {start} for {step:,}
steps ({num_tokens:,} tokens) on `{data}`. `transformers` opens it as `{architecture}`.

| | |
|---|---|
| weights | {weights} |
| vocabulary | {vocabulary} |
| longest cell | {length:,} tokens |
| validation data | {validation_data} |
{measured}
A cell is its genes by falling rank of expression over their medians, as numbers of the vocabulary:

```python
import torch
from transformers import {opens}

model = {opens}.from_pretrained(".")
logits = model(torch.tensor([[{example}]])).logits  # {logits}
```

{adapter}The configuration:

```yaml
{config}```
"""
ADAPTER = """Weights were adapted by LoRA, of rank {r}, and `adapter` alone has what was trained, for the package
[peft](https://github.com/huggingface/peft):

```py
from peft import PeftModel
from transformers import {opens}

base = {opens}.from_pretrained("{base}"{classes})
model = PeftModel.from_pretrained(base, "adapter")
```

"""
MEASURED = ("loss", "perplexity", "accuracy", "macro_f1", "length_mae", "length_rmse")
LOGITS = {"cells": "of each class", "genes": "of each class, for every gene"}


def export(step_folder: Path, target: Path) -> None:
    """Write the final model of one checkpoint; `target` appears only when it is complete.

    Raises ValueError for a folder that is no complete checkpoint, and for a target that exists.
    """
    step_folder, target = Path(step_folder), Path(target)
    if target.exists():
        raise ValueError(f"{target} exists; move it away or give another name.")
    config, weights = open_step(step_folder, merge=False)
    run = json.loads((step_folder / "run.json").read_text())
    with whole_folder(target) as folder:
        if config.lora:
            save_adapter(weights, config, run["config"]["init_from"], folder / "adapter")
            config, weights = without_adapters(config, weights)
        save(weights, config, "hf", folder)
        if Path(config.vocabulary).is_file():
            shutil.copy(config.vocabulary, folder / FILE)
        (folder / "README.md").write_text(model_card(run, config))


def model_card(run: dict, config: GeneformerConfig) -> str:
    """What the model is and how it came about, in Markdown; `run` is what is in a checkpoint's `run.json`."""
    shown, counts = published(run["config"]), run["logger"]
    validation = counts["validation"] or {}
    named, opens = config.vocabulary in PUBLISHED, f"AutoModel{ARCHITECTURES[config.task]}"
    classes = f", num_labels={len(config.classes)}" if config.classes else ""
    adapter = ADAPTER.format(r=run["config"]["lora"]["r"], base=shown["init_from"], opens=opens, classes=classes)
    return CARD.format(
        model_tag=shown["model_tag"], step=run["step"], num_tokens=counts["num_tokens"],
        start=f"`{shown['init_from']}`" if shown["init_from"] else "random weights",
        data=data_names(run["config"]["dataset"]["load_dataset_kwargs"]),
        architecture=hf_config(config).architectures[0], weights=weights_of(run),
        vocabulary=f"{config.vocabulary}, as published" if named else f"`{Path(config.vocabulary).name}`",
        length=run["config"]["dataset"]["max_seq_length"], validation_data=validated_on(run),
        example=", ".join(str(number) for number in range(config.vocab_size - 5, config.vocab_size)),
        config=OmegaConf.to_yaml(OmegaConf.create(shown)),
        measured="".join(f"| validation {k} | {validation[k]:.4f} |\n" for k in MEASURED if k in validation),
        adapter=adapter if run["model"]["lora"] else "", opens=opens,
        logits=LOGITS.get(config.task, "of every gene, at every rank"),
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step_folder", type=Path)
    parser.add_argument("target", type=Path, nargs="?", help="default: final_model beside the step folder")
    arguments = parser.parse_args()
    target = arguments.target or arguments.step_folder.parent / "final_model"
    with command(), writing(target):
        export(arguments.step_folder, target)
        print(f"{target} is written; its README.md says how to open it")
