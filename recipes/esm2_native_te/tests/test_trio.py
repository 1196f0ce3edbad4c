# SPDX-License-Identifier: Apache-2.0
"""The trainers differ only where the strategies differ, and the folder needs nothing outside it."""

import ast
import re
import sys
from difflib import ndiff
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from running import RECIPE, TRAINERS


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


@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_everything_else_is_the_same(trainer):
    assert shared_lines(trainer) == shared_lines(TRAINERS[0])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_most_of_a_trainer_is_shared_and_short(trainer):
    assert len(shared_lines(trainer)) > 60
    assert len(lines(trainer)) <= 160


@pytest.mark.parametrize(
    ("one", "other", "limit"), [("train_ddp", "train_fsdp2", 30), ("train_fsdp2", "train_mfsdp", 45)]
)
def test_so_many_lines_change(one, other, limit):
    changed = [line for line in ndiff(lines(one), lines(other)) if line[0] in "+-"]
    assert 0 < len(changed) <= limit


def test_no_strategy_is_named_outside_the_trainers():
    for name in ("checkpoint.py", "export.py", "dataset.py", "validation.py", "perf_logger.py"):
        found = re.findall(r"\b(?:DistributedDataParallel|fully_shard\w*|megatron_fsdp|DDP|FSDP2?)\b",
                           (RECIPE / name).read_text())  # fmt: skip
        assert not found, f"{name} names {found}"


# ---- the recipe runs alone


def imported_modules(file: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: a relative import"
            modules.add(node.module)
    return {module.partition(".")[0] for module in modules}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_import_reaches_outside_the_folder():
    required = set()
    for file in RECIPE.glob("requirements*.txt"):
        pinned = re.findall(r"^([\w.-]+)(?:\[\w+\])?(==\S+)?", file.read_text(), re.MULTILINE)
        assert all(version for _, version in pinned), f"{file.name}: every package has its version"
        required |= {normal(name) for name, _ in pinned}
    packages = packages_distributions()
    files = [path for folder in (RECIPE, RECIPE / "data", RECIPE / "tests") for path in folder.glob("*.py")]
    inside = {path.stem for path in files} | sys.stdlib_module_names
    for file in files:
        for module in imported_modules(file) - inside:
            providers = {normal(name) for name in (module, *packages.get(module, ()))}
            assert providers & required, f"{file.relative_to(RECIPE)} imports {module}, which no requirement gives"


def test_no_path_leads_outside_the_folder():
    for pattern in ("*.py", "*.sh", "Dockerfile", "hydra_config/*.yaml", "data/*.py"):
        for file in RECIPE.glob(pattern):
            assert "../" not in file.read_text(), file.name
