# SPDX-License-Identifier: Apache-2.0
"""Import this first: it turns off what third parties say that no user can act on."""

import logging
import os
import sys
import warnings


# transformers imports torchao, and torchao looks for GPU kernels that training does not use.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
# datasets logs each error that it raises as well.
os.environ.setdefault("DATASETS_VERBOSITY", "critical")
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")  # megatron-fsdp
warnings.filterwarnings(
    "ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning
)  # megatron-fsdp
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as an offline export wants it
# megatron-fsdp: the reference model's frozen contact head stays gathered; test_train.py holds the curves equal.
warnings.filterwarnings("ignore", message="There are still pending all-gather tasks")
logging.getLogger("megatron_fsdp").setLevel(logging.WARNING)  # it lists every parameter
if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
