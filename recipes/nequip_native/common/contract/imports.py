# SPDX-License-Identifier: Apache-2.0
"""Which files of a recipe may import what, read from their text; nothing of the recipe is imported or run.

A file in `common/` imports the standard library, pinned packages and `common/`; one in a family's folder (`tokens/`,
`atoms/`) also its own folder; the others also what stands at the top. Nothing imports tests, nothing imports
relatively, and no files import each other in a circle while they are loaded.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple


# Packages that are imported by another name than they are installed by, for where they are not installed.
DISTRIBUTIONS = {"hydra": ["hydra-core"], "torch_sim": ["torch-sim-atomistic"], "yaml": ["PyYAML"]}
LEFT_BY_RUNS = ("__pycache__", "outputs", ".venv")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class Import(NamedTuple):
    """A module that a file names, or could name: `from a import b` may mean the module a.b."""

    line: int
    module: str
    names: tuple[str, ...]  # of `from module import names`
    level: int  # dots of a relative import
    when_loaded: bool  # not inside a function


def imports(tree: ast.AST, when_loaded: bool = True) -> Iterator[Import]:
    """Those below `tree`, also in functions, and `import_module("a.b")`."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import():
                yield from (Import(node.lineno, alias.name, (), 0, when_loaded) for alias in node.names)
            case ast.ImportFrom():
                names = tuple(alias.name for alias in node.names)
                yield Import(node.lineno, node.module or "", names, node.level, when_loaded)
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                          args=[ast.Constant(value=str(name)), *_]):  # fmt: skip
                yield Import(node.lineno, name, (), 0, when_loaded)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for part in node.body:
                yield from imports(ast.Module([part], []), when_loaded=False)
            for part in node.orelse:
                yield from imports(ast.Module([part], []), when_loaded)
        else:
            yield from imports(node, when_loaded and not isinstance(node, FUNCTIONS))


class Folder:
    """A recipe's or model's files."""

    def __init__(self, root: Path):
        self.root = root
        self.files = sorted(p for p in root.rglob("*.py") if not {*p.relative_to(root).parts} & {*LEFT_BY_RUNS})
        self.is_recipe = any(root.glob("train_*.py"))
        self.modules = {name: path for path in self.files if (name := self.module(path))}
        self.shared = [path.parent.name for path in self.files if path.parts[-1] == "__init__.py"
                       and path.parents[1] == root]  # fmt: skip
        self.imports = {path: list(imports(ast.parse(path.read_text(), str(path)))) for path in self.files}

    def module(self, path: Path) -> str | None:
        """Its name for an import from the folder itself; None in a folder that is no package."""
        *folders, name = path.relative_to(self.root).with_suffix("").parts
        for i in range(len(folders)):
            if not self.root.joinpath(*folders[: i + 1], "__init__.py").is_file():
                return None
        return ".".join([*folders, *([] if name == "__init__" else [name])])

    def beside(self, path: Path) -> set[str]:
        """Modules that are found because a script or test beside them is run; tests look into all such folders."""
        if self.module(path):
            return set()
        is_test = path.relative_to(self.root).parts[0] == "tests"
        others = (other for other in self.files if not self.module(other))
        return {other.stem for other in others if is_test or other.parent == path.parent}

    def modules_of(self, found: Import) -> set[str]:
        """Those of this folder that an import loads, but for the packages around the last one."""
        if found.level:
            return set()
        inner = {f"{found.module}.{name}" for name in found.names} & self.modules.keys()
        own_names = {*found.names} - {name.rpartition(".")[2] for name in inner}
        return inner | ({found.module} & self.modules.keys() if own_names or not found.names else set())


@cache
def normal(package: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", package).lower()


@cache
def installed() -> dict[str, list[str]]:
    """Which packages give a module, of those that are installed."""
    return {**DISTRIBUTIONS, **packages_distributions()}


def requirements(folder: Folder) -> tuple[set[str], list[str]]:
    """Packages that the folder's requirements name, and what is wrong with those lines."""
    required, wrong = set(), []
    for file in sorted(folder.root.glob("requirements*.txt")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if found := re.match(r"([\w.-]+)(?:\[[\w,]+\])?(==\S+)?", line):
                required.add(normal(found[1]))
                if folder.is_recipe and not found[2]:
                    wrong.append(f"{file.name}:{number}: {found[1]} has no version; pin it, {found[1]}==<version>.")
    return required, wrong


def where(folder: Folder, path: Path, line: int) -> str:
    """The place of an import, for a person."""
    return f"{path.relative_to(folder.root)}:{line}"


def import_problem(folder: Folder, path: Path, found: Import, required: set[str], needs_packages: bool) -> str | None:
    """What is wrong with one import, if something is."""
    parts = path.relative_to(folder.root).parts
    top = found.module.partition(".")[0]
    shown = found.module if not found.names else f"{', '.join(found.names)} of {found.module}"
    says = f"{where(folder, path, found.line)}: imports {shown}"
    if found.level:
        return f"{where(folder, path, found.line)}: a relative import; name the module from the recipe's folder on."
    if top == "tests":
        return f"{says}; nothing imports tests."
    in_tests = parts[0] == "tests" or parts[:2] == ("common", "contract")
    if not in_tests and any(name.startswith("common.contract") for name in (found.module, *folder.modules_of(found))):
        return f"{says}; common/contract/ is for tests only."
    if top in folder.beside(path) or top in sys.stdlib_module_names:
        return None
    room = parts[0] if parts[0] in folder.shared else None
    if top in {name.partition(".")[0] for name in folder.modules} | {path.stem for path in folder.files}:
        if room and top not in (room, "common"):
            own = "" if room == "common" else f", {room}/"
            return f"{says}; a file in {room}/ imports the standard library, pinned packages{own} and common/ only."
        if not folder.modules_of(found):
            return f"{says}; there is no such file here that it could import."
        return None
    packages = {normal(name) for name in (top, *installed().get(top, ()))}
    if needs_packages and not packages & required:
        return f"{says}, which no line of requirements*.txt gives."
    return None


def loaded(folder: Folder, path: Path) -> dict[str, int]:
    """The folder's modules that are loaded with a file, with the lines that ask for them."""
    own = folder.module(path) or ""
    found: dict[str, int] = {}
    for one in folder.imports[path]:
        if one.when_loaded:
            for name in folder.modules_of(one):
                # A package is loaded before what is in it, so that its own files find it there.
                around = {name.rpartition(".")[0]} & folder.modules.keys()
                for module in {name, *(p for p in around if not own.startswith(f"{p}."))} - {own}:
                    found.setdefault(module, one.line)
    return found


def cycles(folder: Folder) -> list[str]:
    """Circles of files that load each other, each file in one of them at most."""
    graph = {name: loaded(folder, path) for name, path in folder.modules.items()}
    found, seen = [], set()
    for start in sorted(graph):
        came_from: dict[str, str] = {}
        going = [start]
        for module in going:  # grows
            for following in sorted(graph[module]):
                if following not in came_from:
                    came_from[following] = module
                    going.append(following)
        if start in came_from:
            circle = [start]
            while (module := came_from[circle[-1]]) != start:
                circle.append(module)
            circle = [start, *reversed(circle)]
            if not seen & {*circle}:
                steps = (f"{where(folder, folder.modules[one], graph[one][other])} imports {other}"
                         for one, other in pairwise(circle))  # fmt: skip
                found.append(f"{', '.join(steps)}: a circle; put what both need into a third file.")
            seen |= {*circle}
    return found


def needed(folder: Folder) -> set[Path]:
    """The files whose packages have to be required: a recipe's all, a model's those that its own files load."""
    if folder.is_recipe:
        return {*folder.files}
    going = [path for path in folder.files if path.relative_to(folder.root).parts[0] not in folder.shared]
    for path in going:  # grows
        going += [p for name in loaded(folder, path) if (p := folder.modules[name]) not in going]
    return {*going}


def import_problems(root: Path) -> list[str]:
    """What is wrong in a recipe's or model's folder, a sentence each."""
    folder = Folder(root)
    required, found = requirements(folder)
    with_packages = needed(folder)
    for path in folder.files:
        problems = (import_problem(folder, path, one, required, path in with_packages) for one in folder.imports[path])
        found += filter(None, problems)
    return found + cycles(folder)
