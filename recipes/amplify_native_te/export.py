# SPDX-License-Identifier: Apache-2.0
"""Turn a checkpoint into a folder that plain `transformers` opens, without GPUs, ranks or the training data.

    python export.py CKPT_DIR/step_1000 [final_model]

writes `config.json` of an `EuroBertForMaskedLM`, `model.safetensors`, the tokenizer and a model card.
"""

import argparse
import json
from pathlib import Path


from common import quiet  # noqa: F401  # isort: skip
from collator import VOCABULARY
from common.command import command, writing
from common.files import whole_folder
from common.own_data import data_names
from convert_amplify import save
from dataset import ALPHABET
from pretrained import open_step, trained_length
from tokens.model_card import model_card as tokens_card
from tokens.residue_tokenizer import save_tokenizer


def export(step_folder: Path, target: Path) -> None:
    """Write the final model of one checkpoint; `target` appears only when it is complete.

    Raises ValueError for a folder that is no complete checkpoint, and for a target that exists.
    """
    step_folder, target = Path(step_folder), Path(target)
    if target.exists():
        raise ValueError(f"{target} exists; move it away or give another name.")
    config, weights = open_step(step_folder)
    run = json.loads((step_folder / "run.json").read_text())
    config.max_position_embeddings = trained_length(config, run)
    with whole_folder(target) as folder:
        save(weights, config, "eurobert", folder)
        save_tokenizer(folder, VOCABULARY, ALPHABET, config.max_position_embeddings)
        (folder / "README.md").write_text(model_card(run))


def model_card(run: dict) -> str:
    """What the model is and how it came about, in Markdown."""
    dataset = run["config"]["dataset"]
    sources = (dataset.get("mix") or {"": {}}).values()
    kwargs = [dataset["load_dataset_kwargs"] | (source.get("load_dataset_kwargs") or {}) for source in sources]
    opened = "`transformers` opens it as EuroBERT, which is the same mathematics."
    data = ", ".join(map(data_names, kwargs))
    return tokens_card(run, "AMPLIFY", "Fournier et al. 2024", "amplify, eurobert", data, opened)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step_folder", type=Path)
    parser.add_argument("target", type=Path, nargs="?", help="default: final_model beside the step folder")
    arguments = parser.parse_args()
    target = arguments.target or arguments.step_folder.parent / "final_model"
    with command(), writing(target):
        export(arguments.step_folder, target)
        print(f"{target} is written; its README.md says how to open it")
