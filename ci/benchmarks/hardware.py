# SPDX-License-Identifier: Apache-2.0
"""Run the gpu tests of every folder, and say in docs/hardware.md what has been run on which hardware.

python ci/benchmarks/hardware.py         # on a machine with a GPU; writes docs/results/gpu_tests.json and the table
python ci/benchmarks/hardware.py -k packed test_gpu                   # some of them, of some files
python ci/benchmarks/hardware.py --output some.json                   # there, and no table
python ci/benchmarks/hardware.py recipes/esm2_native_te               # those of one folder
python ci/benchmarks/hardware.py --table docs/hardware.md             # run nothing, the table from what is there
python ci/benchmarks/hardware.py --check docs/hardware.md

There is a table for each recipe. A cell names tests. It says "run on CPU" where CI runs them (the slow ones weekly),
and for each GPU that they have passed on its name, the date and versions, by docs/results/gpu_tests.json. That is a
list of runs; a new one replaces the outcomes that its tests had on the same GPU, and leaves the rest.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "esm2_native_te"))
import torch  # noqa: E402
from command_line import positive  # noqa: E402

from common.contract.running import with_table, write_table  # noqa: E402
from common.run_facts import versions  # noqa: E402
from tokens.backends import te_available  # noqa: E402
from tokens.formats import RECIPES  # noqa: E402


OUTPUT, NAME = ROOT / "docs" / "results" / "gpu_tests.json", "hardware"
PAGE = ROOT / "docs" / "hardware.md"
NO, NO_TEST = "not yet run on hardware", "no test on hardware"
LEFT_OUT = ("skipped", "not run")
BAD = {"failed": "fail", "crashed": "lost in a crash", "timed out": "lost in a timeout"}
GRACE_S = 30  # for pytest to write what it has when its time is over
TE = "pip install --no-build-isolation -r recipes/esm2_native_te/requirements-te.txt"


class Row(NamedTuple):
    """Patterns for the names of tests, or `=` and what to say instead; a column that no row has is left out."""

    what: str
    cpu: str
    plain: str
    te: str = ""


TRAINERS = (("DDP", "train_ddp"), ("FSDP2", "train_fsdp2"), ("Megatron-FSDP", "train_mfsdp"))


def recipes() -> list[Path]:
    """Their folders."""
    return sorted(path.parent for path in ROOT.glob("recipes/*/README.md"))


def folders(recipe: Path) -> tuple[str, ...]:
    """Where the tests lie that a recipe's table is about: in it, and with the models that it has a copy of."""
    models = [path.parent for path in ROOT.glob("models/*/modeling_*.py") if (recipe / path.name).is_file()]
    return tuple(f"{path.relative_to(ROOT)}/" for path in (recipe, *models))


def token_rows() -> list[Row]:
    """What is said of a recipe on sequences of tokens."""
    found = [
        Row("layers alone, loss and gradients, padded and packed", "test_modeling.*test_padded_and_packed_agree",
            "test_layers_te.*test_loss_and_gradients", "test_layers_te.*test_loss_and_gradients"),
        Row("FP32", "test_train.*test_one_rank_gives_the_same_curve", "gpu.*in_fp32_the_curve",
            "test_gpu.*test_in_fp32_te_follows_the_curve"),
    ]  # fmt: skip
    for name, trainer in TRAINERS:
        gpu = rf"test_gpu.*test_in_bf16_all_are_near\[{trainer}-(packed|padded)-%s\]"
        what = f"{name}, BF16 over FP32 weights, padded and packed (THD)"
        found.append(Row(what, rf"test_train.*test_bf16_stays.*{trainer}", gpu % "torch", gpu % "te"))
    for name, needs in RECIPES.items():
        gpu = rf"test_gpu.*test_few_bits_train_save_and_go_on\[train_(ddp|fsdp2|mfsdp)-%s-{name}\]"
        cpu, plain = "=no", "=no: TransformerEngine only"
        if needs.torchao:
            short = "MXFP8" if "MX" in name else "FP8"
            cpu = rf"test_train.*test_few_bits_packed_to_the_final_model.*-{short}\]"
            plain = gpu % "torchao"
        found.append(
            Row(f"`{name}`, packed: train, save, resume, export; needs {needs.hardware}", cpu, plain, gpu % "te")
        )
    parallel = r"test_gpu.*(test_two_gpus\[2-.*-|test_context_parallels_hooks_on_one_gpu\[)%s\]"
    return found + [
        Row("FP8 in some layers only", "test_train.*test_few_bits_packed_to_the_final_model.*one layer",
            "test_gpu.*test_few_bits_in_some_layers.*torchao", "test_gpu.*test_few_bits_in_some_layers.*te-"),
        Row("statistics of rounding", "test_quant_stats.*test_every_product_of_every_layer",
            r"test_gpu.*test_statistics_of_rounding\[torchao", r"test_gpu.*test_statistics_of_rounding\[te-"),
        Row("context parallelism (`cp_size`)", "test_context_parallel.*test_two_ranks_that_share",
            parallel % "torch", parallel % "te"),
        Row("layers with kernels compiled for CPUs (`layer_backend=cpp`)", "test_layers_cpp.*test_whole_models_agree",
            "=no", "=no"),
        Row("activation checkpointing", "test_train.*test_activation_checkpointing",
            r"test_layers_te.*test_loss_and_gradients\[.*recomputed",
            r"test_layers_te.*test_loss_and_gradients\[.*recomputed"),
        Row("`torch.compile`", "test_train.*test_compiled_layers", "test_gpu.*use_torch_compile=true-torch",
            "test_gpu.*use_torch_compile=true-te"),
        Row("saves in the background", "test_checkpoint.*test_saves_in_the_background",
            "test_gpu.*async_save=true-torch", "test_gpu.*async_save=true-te"),
        Row("resume on another number of ranks", "test_checkpoint.*test_two_ranks_then_one_then_four", f"={NO_TEST}",
            f"={NO_TEST}"),
        Row("killed at any moment, restarted by `torchrun`", "test_kill_anywhere", f"={NO_TEST}", f"={NO_TEST}"),
        Row("a GPU's checkpoint resumes on a CPU", "=–", r"test_gpu.*goes_on_on_a_cpu\[torch\]",
            r"test_gpu.*goes_on_on_a_cpu\[te\]"),
        Row("final model opens with plain `transformers`", "test_final_model.*test_it_gives_what",
            r"test_gpu.*test_the_final_model_opens\[torch\]", r"test_gpu.*test_the_final_model_opens\[te\]"),
        Row("tensor parallelism", "=out of scope: FSDP2 splits the weights, `cp_size` the tokens", "=no", "=no"),
    ]  # fmt: skip


def atom_rows() -> list[Row]:
    """What is said of a recipe on atoms."""
    same = r"test_on_a_gpu.*test_in_fp32_the_curve_is_the_cpus\[%s\]"
    return [
        *(Row(f"{name}, FP32 with energies in float64", "test_curves.*test_one_rank_gives", same % trainer)
          for name, trainer in TRAINERS),
        Row("two ranks", "test_curves.*test_two_ranks", "test_on_a_gpu.*test_two_gpus"),
        Row("resume on another number of ranks, with another trainer", "test_resuming", f"={NO_TEST}"),
        Row("a GPU's checkpoint resumes on a CPU", "=–", "test_on_a_gpu.*test_a_checkpoint_of_a_gpu_resumes_on_a_cpu"),
        Row("final model opens in ASE", "test_final_model.*test_it_gives_what", "test_on_a_gpu.*test_its_final_model"),
        Row("final model as `.pt2`", "test_export.*test_a_program", f"={NO_TEST}"),
        Row("compiled for LAMMPS' `pair_nequip` and `pair_allegro` (`.nequip.pt2`)",
            "test_packages.*test_lammps_gets_the_calculators_numbers", f"={NO_TEST}"),
        Row("final model in torch-sim", "=run by hand, not in CI", f"={NO_TEST}"),
        Row("`layer_backend=cue`", "=its slow form, by hand, not in CI", "test_cue_products.*test_its_kernels"),
    ]  # fmt: skip


FAMILIES = {"tokens": token_rows, "atoms": atom_rows}  # by the folder that the recipes of a family share


def rows(recipe: Path) -> list[Row]:
    """What is said of a recipe."""
    return [row for folder, of_family in FAMILIES.items() if (recipe / folder).is_dir() for row in of_family()]


def files() -> list[Path]:
    """Those with gpu tests."""
    patterns = ("models/*/tests/**/test_*.py", "recipes/*/tests/**/test_*.py", "recipes/*/common/contract/test_*.py")
    tests = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(path for path in tests if "pytest.mark.gpu" in path.read_text())


def folder_of(file: Path) -> Path:
    """The recipe or model that a test belongs to."""
    return ROOT.joinpath(*file.relative_to(ROOT).parts[:2])


def pytest_on(file: Path, *options: str) -> list[str]:
    """The command for its gpu tests, in its recipe's or model's folder."""
    command = [sys.executable, "-m", "pytest", "--rootdir=.", "-m", "gpu", "-p", "no:cacheprovider", *options]
    return [*command, str(file.relative_to(folder_of(file)))]


def names_in(file: Path, *options: str) -> list[str]:
    """Its gpu tests, listed with no GPU in sight: what they would load cannot break that. Raises ValueError."""
    command, hidden = pytest_on(file, "--collect-only", "-q", *options), os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    folder = folder_of(file)
    done = subprocess.run(command, cwd=folder, env=hidden, capture_output=True, text=True)
    if done.returncode not in (0, 5):  # 5: none was chosen
        raise ValueError(f"pytest cannot list its tests:\n{(done.stdout + done.stderr)[-2000:]}")
    return [f"{folder.relative_to(ROOT)}/{line}" for line in done.stdout.splitlines() if "::" in line]


def outcomes(junit: Path, folder: Path) -> dict[str, str]:
    """`recipes/name/tests/test_file.py::test[parameters]` to passed, failed or skipped, from pytest's XML."""
    found = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        path = case.get("classname", "").replace(".", "/")
        found[f"{folder.relative_to(ROOT)}/{path}.py::{case.get('name')}"] = outcome
    return found


def _takes_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which what a script runs in the background ignores


def run_pytest(file: Path, timeout_s: float, *options: str) -> int | None:
    """Its tests in a process of their own, their output shown as it comes; pytest's exit code, None for a timeout."""
    process = subprocess.Popen(
        pytest_on(file, "-v", *options), cwd=folder_of(file), start_new_session=True, preexec_fn=_takes_interrupts
    )
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        return None
    finally:  # whatever a test has started
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measure(file: Path, chosen: str | None, timeout_s: float) -> dict[str, str]:
    """The outcome of each of its gpu tests, and of the file where pytest did not come to its end."""
    path, some = str(file.relative_to(ROOT)), ["-k", chosen] if chosen else []
    try:
        every = names_in(file)
        asked = names_in(file, *some) if some else every
    except ValueError as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return {path: "crashed"}
    results, found = dict.fromkeys(every, "not run"), {}
    if not asked:
        return results
    with tempfile.TemporaryDirectory() as scratch:
        junit = Path(scratch) / "junit.xml"
        code = run_pytest(file, timeout_s, f"--junitxml={junit}", *some)
        if junit.exists():
            found = outcomes(junit, folder_of(file))
    lost = "timed out" if code is None else "crashed"
    results |= {name: found.get(name, lost) for name in asked}
    if code not in (0, 1) or lost in results.values():
        reason = f"timed out after {timeout_s} s" if code is None else f"pytest ended with exit code {code}"
        missing = sum(name not in found for name in asked)
        print(f"error: {path}: {reason}; {missing} of {len(asked)} tests have no outcome.", file=sys.stderr)
        results[path] = lost
    return results


def merged(runs: list[dict], new: dict) -> list[dict]:
    """`runs` and `new`: on its device, tests of its files that are gone or have a new outcome lose the earlier one."""
    tests, kept = dict(new["tests"]), []
    files = {name.partition("::")[0] for name in tests if "::" in name}  # not those whose tests could not be listed
    for run in runs:
        if run["device"] == new["device"]:
            stays = {
                name: outcome
                for name, outcome in run["tests"].items()
                if name.partition("::")[0] not in files or (tests.get(name) in LEFT_OUT and outcome not in LEFT_OUT)
            }
            run = run | {"tests": stays}
            tests = {name: outcome for name, outcome in tests.items() if name not in stays}
        kept.append(run)
    if kept and kept[-1] | {"tests": tests} == new | {"tests": tests}:
        tests = kept.pop()["tests"] | tests
    return [run for run in [*kept, new | {"tests": tests}] if run["tests"]]


def cell(pattern: str, runs: list[dict], places: tuple[str, ...]) -> str:
    """What a GPU's column says, by the tests that lie in `places`."""
    if pattern.startswith("="):
        return pattern[1:]
    devices = []
    for device in dict.fromkeys(run["device"] for run in runs):
        found = [(outcome, run) for run in runs if run["device"] == device for name, outcome in run["tests"].items()
                 if name.startswith(places) and re.search(pattern, name)]  # fmt: skip
        ran = [(outcome, when(run)) for outcome, run in found if outcome not in LEFT_OUT]
        counts = Counter(outcome for outcome, _ in ran)
        what = [
            f"{counts[outcome]} of {len(found)} tests {words}" for outcome, words in BAD.items() if counts[outcome]
        ]
        if ran:
            done = "run" if len(ran) == len(found) else f"{len(ran)} of {len(found)} tests run"
            whens = "; ".join(dict.fromkeys(when for _, when in ran))
            devices.append(f"{' and '.join(what) or done} on {device} ({whens})")
    return "; ".join(devices) or NO


def when(run: dict) -> str:
    """Its date and versions."""
    shown = {"torch": "torch", "transformer-engine": "TE"}
    return ", ".join([run["date"], *(f"{shown[x]} {run['versions'][x]}" for x in shown if x in run["versions"])])


def table(runs: list[dict]) -> str:
    """One for each recipe, under its folder's name, with a row for each of its `rows`."""
    return "\n\n".join(table_of(recipe, runs) for recipe in recipes() if rows(recipe))


def table_of(recipe: Path, runs: list[dict]) -> str:
    """That of one recipe."""
    readme, places = recipe / "README.md", folders(recipe)
    title = readme.read_text().partition("\n")[0].lstrip("# ")
    lines = [f"## {recipe.name}", f"[{title}](../{readme.relative_to(ROOT)})", ""]
    asked = rows(recipe)
    gpus = ["GPU, plain layers", "GPU, TransformerEngine"] if any(row.te for row in asked) else ["GPU"]
    lines += [f"| {' | '.join(['', 'CPU', *gpus])} |".replace("|  |", "| |"), "|---" * (2 + len(gpus)) + "|"]
    for row in asked:
        cpu = "run on CPU" + ", emulated" * any(x in row.what for x in ("Scaling", "FP8", "rounding"))
        cpu += ", with a stand-in for CUDA's streams" * row.what.startswith("Megatron")
        cpu = row.cpu[1:] if row.cpu.startswith("=") else cpu
        cells = [cpu, *(cell(pattern, runs, places) for pattern in (row.plain, row.te)[: len(gpus)])]
        lines.append(f"| {row.what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="run only files that have one of these in their path")
    parser.add_argument("-k", dest="chosen", metavar="TEXT", help="run only tests that pytest -k chooses by this")
    parser.add_argument("--timeout", type=positive, default=1800, metavar="S", help="of a file; default: 1800 seconds")
    parser.add_argument("--without-te", action="store_true", help="skip its tests if TransformerEngine is missing")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help=f"default: docs/results/{OUTPUT.name}")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="run nothing, write the table into this page")
    parser.add_argument("--check", type=Path, metavar="FILE.md", help="run nothing, exit with 1 if its table differs")
    found = parser.parse_args(arguments)
    paths = {path: str(path.relative_to(ROOT)) for path in files()}
    found.files = [x for x in paths if not found.files or any(part in paths[x] for part in found.files)]
    if not found.files:
        parser.error(f"no such file with gpu tests; there are {', '.join(paths.values())}.")
    return found


def missing(without_te: bool) -> str | None:
    """What this machine lacks for the tests."""
    if not torch.cuda.is_available():
        return "this machine has no GPU that torch can use; --table or --check run nothing."
    available, reason = te_available()
    return None if available or without_te else f"{reason}: {TE}, or leave its tests out: --without-te."


def main(arguments: list[str]) -> int:
    """Run, or write or check the table."""
    asked = read_arguments(arguments)
    output = asked.output or OUTPUT
    runs = json.loads(output.read_text()) if output.exists() else []
    if asked.table:
        write_table(asked.table, NAME, table(runs))
        return 0
    if asked.check:
        if (text := asked.check.read_text()) == with_table(text, NAME, table(runs)):
            return 0
        print(f"error: {asked.check}: its table is not that of the tests; write it: --table.", file=sys.stderr)
        return 1
    if reason := missing(asked.without_te):
        print(f"error: {reason}", file=sys.stderr)
        return 2
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
    }
    found = set()
    for file in asked.files:
        tests = measure(file, asked.chosen, asked.timeout)
        found |= set(tests.values())
        runs = merged(runs, facts | {"tests": tests})
        output.write_text(json.dumps(runs, indent=1) + "\n")
    if not asked.output:
        write_table(PAGE, NAME, table(runs))
    print(table(runs))
    if found.issubset(LEFT_OUT):
        print("error: no test has run: none was chosen, or all were skipped.", file=sys.stderr)
        return 1
    return int(not found.isdisjoint(BAD))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that running tests are ended, too
    sys.exit(main(sys.argv[1:]))
