# SPDX-License-Identifier: Apache-2.0
"""Fill masked residues of green fluorescent protein with a trained model, through `transformers` alone."""

import logging
import os
import sys


# transformers imports torchao, and torchao looks for GPU kernels that are of no use here.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

import torch  # noqa: E402
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer  # noqa: E402
from transformers import logging as transformers_logging  # noqa: E402


transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

GFP_P42212 = (
    "MSKGEELFTGVVPILVELDGDVNGHKFSVSGEGEGDATYGKLTLKFICTTGKLPVPWPTLVTTFSYGVQCFSRYPDHMKQHDFFKSAMPEGYVQERTIFFKDDGNY"
    "KTRAEVKFEGDTLVNRIELKGIDFKEDGNILGHKLEYNYNSHNVYIMADKQKNGIKVNFKIRHNIEDGSVQLADHYQQNTPIGDGPVLLPDNHYLSTQSALSKDPN"
    "EKRDHMVLLEFVTAAGITHGMDELYK"
)
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForMaskedLM.from_pretrained(folder).eval()
inputs = tokenizer(GFP_P42212, return_tensors="pt")
places = torch.arange(10, 230, 22)
truth = inputs["input_ids"][0, places].clone()
inputs["input_ids"][0, places] = tokenizer.mask_token_id
with torch.no_grad():
    probabilities = model(**inputs).logits[0, places].softmax(-1)
    embedding = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()(**inputs).last_hidden_state
print("residue  was  filled in with (probability)")
for place, was, row in zip(places.tolist(), truth, probabilities, strict=True):
    best = row.topk(3)
    guesses = "  ".join(f"{tokenizer.convert_ids_to_tokens(int(i))} {p:.2f}" for p, i in zip(*best, strict=True))
    print(f"{place:7d}  {tokenizer.convert_ids_to_tokens(int(was)):>3s}  {guesses}")
print(f"Embedding of GFP from AutoModel: {tuple(embedding.shape)}")
