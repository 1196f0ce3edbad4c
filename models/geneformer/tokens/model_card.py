# SPDX-License-Identifier: Apache-2.0
"""What a final model's README.md says: of a protein language model that plain `transformers` opens."""

from omegaconf import OmegaConf

from common.own_data import published, validated_on, weights_of


CARD = """---
library_name: transformers
tags: [{tags}, protein-language-model, masked-lm]
---
# {model_tag}, {step:,} steps

A protein language model of the {architecture} architecture ({paper}), trained from {start} for {step:,} steps
({num_tokens:,} tokens) on `{data}`.{more}

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


def model_card(run: dict, architecture: str, paper: str, tags: str, data: str, more: str = "") -> str:
    """What the model is and how it came about, in Markdown; `run` is what is in a checkpoint's `run.json`."""
    shown, counts = published(run["config"]), run.get("logger", run)  # older files have it at the top
    validation = counts["validation"] or {}
    return CARD.format(
        architecture=architecture, paper=paper, tags=tags, data=data, more=more and f" {more}",
        model_tag=shown["model_tag"], step=run["step"], num_tokens=counts["num_tokens"],
        start=f"`{shown['init_from']}`" if shown["init_from"] else "random weights",
        weights=weights_of(run), validation_data=validated_on(run), config=OmegaConf.to_yaml(OmegaConf.create(shown)),
        **{key: f"{validation[key]:.4f}" if key in validation else "-" for key in ("loss", "perplexity", "accuracy")},
    )  # fmt: skip
