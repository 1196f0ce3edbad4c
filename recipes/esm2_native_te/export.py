# SPDX-License-Identifier: Apache-2.0
"""Turn a checkpoint into a folder that plain `transformers` opens, without GPUs, ranks or the training data.

    python export.py CKPT_DIR/step_1000 [final_model]

writes `config.json` of an `EsmForMaskedLM`, `model.safetensors`, the tokenizer and a model card.
"""

import argparse
import json
import re
import shutil
from pathlib import Path


from common import quiet  # noqa: F401  # isort: skip
from omegaconf import OmegaConf

from common import RECIPE
from common.command import command, writing
from common.files import open_to_readers
from common.own_data import data_names, validated_on, weights_of
from convert import save_hf
from dataset import ALPHABET, VOCABULARY
from pretrained import FAMILY, open_step, trained_length
from tokens.residue_tokenizer import save_tokenizer


CARD = """---
library_name: transformers
tags: [esm, protein-language-model, masked-lm]
---
# {model_tag}, {step:,} steps

A protein language model of the ESM-2 architecture (Lin et al. 2023), trained from {start} for {step:,} steps
({num_tokens:,} tokens) on `{data}`.

| | |
|---|---|
| weights | {weights} |
| validation data | {validation_data} |
| validation loss | {loss} |
| validation perplexity | {perplexity} |
| masked residues predicted rightly | {accuracy} |

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model, tokenizer = AutoModelForMaskedLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
logits = model(**tokenizer("MSKGEELFTGVVPILVELDGDVNGHK<mask>SVSGEGEGDATYGK", return_tensors="pt")).logits
```

The configuration:

```yaml
{config}```
"""


def export(step_folder: Path, target: Path) -> None:
    """Write the final model of one checkpoint; `target` appears only when it is complete.

    Raises ValueError for a folder that is no complete checkpoint, and for a target that exists.
    """
    step_folder, target = Path(step_folder), Path(target)
    if target.exists():
        raise ValueError(f"{target} exists; move it away or give another name.")
    config, weights = open_step(step_folder)
    run = json.loads((step_folder / "run.json").read_text())
    length = trained_length(config, run)
    config.max_position_embeddings = length + FAMILY.more_positions
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_hf(weights, config, partial)
    save_tokenizer(partial, VOCABULARY, ALPHABET, length)
    shutil.copy(RECIPE / "tokenizer" / "vocab.txt", partial)
    (partial / "README.md").write_text(model_card(run))
    open_to_readers(partial)
    partial.rename(target)


def model_card(run: dict) -> str:
    """What the model is and how it came about, in Markdown."""
    config, counts = run["config"], run.get("logger", run)  # older files have it at the top
    validation = counts["validation"] or {}
    shown = {k: v for k, v in config.items() if k not in ("checkpoint", "logger", "validation", "wandb_init_args")}
    # A card gets published; where files lay on the machine it was written on is nobody's business.
    shown = json.loads(re.sub(r'"/[^"]*/([^"/]*)"', r'"\1"', json.dumps(shown)))
    return CARD.format(
        model_tag=shown["model_tag"],
        step=run["step"],
        start=f"`{shown['init_from']}`" if shown["init_from"] else "random weights",
        num_tokens=counts["num_tokens"],
        data=data_names(config["dataset"]["load_dataset_kwargs"]),
        weights=weights_of(run),
        validation_data=validated_on(run),
        config=OmegaConf.to_yaml(OmegaConf.create(shown)),
        **{key: f"{validation[key]:.4f}" if key in validation else "-" for key in ("loss", "perplexity", "accuracy")},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step_folder", type=Path)
    parser.add_argument("target", type=Path, nargs="?", help="default: final_model beside the step folder")
    arguments = parser.parse_args()
    target = arguments.target or arguments.step_folder.parent / "final_model"
    with command(), writing(target):
        export(arguments.step_folder, target)
        print(f"{target} is written; its README.md says how to open it")
