# SPDX-License-Identifier: Apache-2.0
"""These tests are a recipe's; beside a model, which has the same files, there is nothing for them to run."""

from common import RECIPE


if any(RECIPE.glob("train_*.py")):
    from common.contract.fixtures import *  # noqa: F403
else:
    collect_ignore_glob = ["test_*.py"]
