# SPDX-License-Identifier: Apache-2.0
"""Turn a checkpoint into a folder that plain `transformers` opens, without GPUs, ranks or the training data.

    python export.py CKPT_DIR/step_1000 [final_model]

writes `config.json` of an `EsmForMaskedLM`, `model.safetensors`, the tokenizer and a model card.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path


import quiet  # noqa: F401  # isort: skip
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from omegaconf import OmegaConf

from build_model import is_reference
from convert import hf_config, save_hf
from modeling_esm2 import Esm2Config
from step_folder import damage


CARD = """---
library_name: transformers
tags: [esm, protein-language-model, masked-lm]
---
# {model_tag}, {step:,} steps

A protein language model of the ESM-2 architecture (Lin et al. 2023), trained from {start} for {step:,} steps
({num_tokens:,} tokens) on `{data}`.

| | |
|---|---|
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


def read_weights(step_folder: Path) -> dict[str, torch.Tensor]:
    """The model's full tensors on the CPU, from the shards of any strategy and number of ranks.

    TransformerEngine's FP8 state is left out: it is of use only to go on training.
    """
    metadata = dcp.FileSystemReader(step_folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith("model.") and not name.endswith("._extra_state")
    }
    dcp.load(state, checkpoint_id=step_folder, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def export(step_folder: Path, target: Path) -> None:
    """Write the final model of one checkpoint; `target` appears only when it is complete.

    Raises ValueError for a folder that is no complete checkpoint, and for a target that exists.
    """
    step_folder, target = Path(step_folder), Path(target)
    if reason := damage(step_folder):
        raise ValueError(f"{step_folder} is no whole checkpoint: {reason}; give a step_<n> folder that is.")
    if target.exists():
        raise ValueError(f"{target} exists; move it away or give another name.")
    run = json.loads((step_folder / "run.json").read_text())
    config, weights = Esm2Config(**run["model"]), read_weights(step_folder)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if is_reference(run["config"]["model_tag"]):
        save_torch_state_dict(weights, partial)
        hf_config(config).save_pretrained(partial)
    else:
        save_hf(weights, config, partial)
    shutil.copytree(Path(__file__).parent / "tokenizer", partial, dirs_exist_ok=True)
    (partial / "README.md").write_text(model_card(run))
    partial.rename(target)


def model_card(run: dict) -> str:
    """What the model is and how it came about, in Markdown."""
    config, validation = run["config"], run.get("validation") or {}
    data = config["dataset"]["load_dataset_kwargs"]
    files = data.get("data_files") or data["path"]
    told = {k: v for k, v in config.items() if k not in ("checkpoint", "logger", "validation", "wandb_init_args")}
    # A card gets published; where files lay on the machine it was written on is nobody's business.
    told = json.loads(re.sub(r'"/[^"]*/([^"/]*)"', r'"\1"', json.dumps(told)))
    return CARD.format(
        model_tag=told["model_tag"],
        step=run["step"],
        start=f"`{told['init_from']}`" if told["init_from"] else "random weights",
        num_tokens=run["num_tokens"],
        data=", ".join(Path(file).name for file in ([files] if isinstance(files, str) else files)),
        config=OmegaConf.to_yaml(OmegaConf.create(told)),
        **{key: f"{validation[key]:.4f}" if key in validation else "-" for key in ("loss", "perplexity", "accuracy")},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step_folder", type=Path)
    parser.add_argument("target", type=Path, nargs="?", help="default: final_model beside the step folder")
    arguments = parser.parse_args()
    try:
        export(arguments.step_folder, arguments.target or arguments.step_folder.parent / "final_model")
    except ValueError as error:
        sys.exit(f"error: {error}")
