# SPDX-License-Identifier: Apache-2.0
"""The trainers differ only where the strategies differ, and every file stays in its room."""

import ast
import re
from difflib import ndiff

import pytest

from common import RECIPE
from common.contract.imports import import_problems


TRIO = [name for name in ("train_ddp", "train_fsdp2", "train_mfsdp") if (RECIPE / f"{name}.py").exists()]
STRATEGY = r"\b(?:DistributedDataParallel|fully_shard\w*|megatron_fsdp|DDP|FSDP2?)\b"
# What is a strategy's own, and what has to know where a split model keeps its weights.
NAME_ONE = ("megatron_fsdp_cpu.py", "megatron_fsdp_exact.py", "ema.py", "quiet.py", "validation.py")


def lines(trainer: str) -> list[str]:
    return (RECIPE / f"{trainer}.py").read_text().splitlines()


def shared_lines(trainer: str) -> list[str]:
    """All but the docstring, the imports and the block between the markers."""
    text = lines(trainer)
    body = ast.parse("\n".join(text)).body
    own = set()
    for node in body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_docstring or isinstance(node, ast.Import | ast.ImportFrom):
            own |= set(range(node.lineno - 1, node.end_lineno))
    start, end = (i for i, line in enumerate(text) if line.strip().startswith("# ----"))
    own |= set(range(start, end + 1))
    return [line for i, line in enumerate(text) if i not in own and line]


@pytest.mark.parametrize("trainer", TRIO[1:])
def test_everything_else_is_the_same(trainer):
    assert shared_lines(trainer) == shared_lines(TRIO[0])


@pytest.mark.parametrize("trainer", TRIO)
def test_most_of_a_trainer_is_shared_and_short(trainer):
    assert len(shared_lines(trainer)) > 60
    assert len(lines(trainer)) <= 140


@pytest.mark.parametrize(
    ("one", "other", "limit"), [("train_ddp", "train_fsdp2", 22), ("train_fsdp2", "train_mfsdp", 36)]
)
def test_so_many_lines_change(one, other, limit):
    if {one, other} - {*TRIO}:
        pytest.skip("this recipe has other trainers")
    changed = [line for line in ndiff(lines(one), lines(other)) if line[0] in "+-"]
    assert 0 < len(changed) <= limit


def test_no_strategy_is_named_outside_the_trainers():
    own = [path for path in RECIPE.glob("*.py") if not path.name.startswith(("train_", "modeling_"))]
    for path in own + [path for path in (RECIPE / "common").glob("*.py") if path.name not in NAME_ONE]:
        found = re.findall(STRATEGY, path.read_text())
        assert not found, f"{path.relative_to(RECIPE)} names {found}"


def test_imports():
    problems = import_problems(RECIPE)
    assert not problems, "\n".join(problems)


def test_no_path_leads_outside_the_folder():
    for pattern in ("*.py", "*.sh", "Dockerfile", "hydra_config/*.yaml", "*/*.py"):
        for file in RECIPE.glob(pattern):
            assert "../" not in file.read_text() or file.parent.name == "tests", file.name


def test_no_file_is_long():
    """But for compiled kernels and tests, which are read in parts."""
    files = [path for path in RECIPE.rglob("*") if path.suffix in (".py", ".cpp", ".sh") and path.stem != "layers_cpp"]
    lengths = {str(path.relative_to(RECIPE)): len(path.read_text().splitlines()) for path in files}
    not_read = ("tests/", "outputs/", ".venv/")
    assert not {name: n for name, n in lengths.items() if n > 400 and not name.startswith(not_read)}
