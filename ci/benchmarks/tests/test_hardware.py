# SPDX-License-Identifier: Apache-2.0
"""The tables of what has been run say what the tests' outcomes say, and every cell's tests are there."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import hardware  # noqa: E402


RUN = {"date": "2030-01-02", "device": "NVIDIA H300", "versions": {"torch": "9.1"}}
H300 = "NVIDIA H300 (2030-01-02, torch 9.1)"
RECIPE = hardware.ROOT / "recipes" / "esm2_native_te"


LIST = """
import sys, pytest
class Listing:
    def pytest_collection_finish(self, session):
        for item in session.items:
            print("gpu" if item.get_closest_marker("gpu") else "not gpu", item.nodeid, sep="\t")
options = ["--collect-only", "-q", "-m", "gpu or not gpu", "-p", "no:cacheprovider"]
sys.exit(pytest.main(options, plugins=[Listing()]))
"""


@pytest.fixture(scope="module")
def known_tests():
    """Names of all tests, slow ones too; those marked gpu apart."""
    found = {"gpu": [], "not gpu": []}
    for folder in sorted({hardware.folder_of(file) for file in hardware.files()}):
        done = subprocess.run([sys.executable, "-c", LIST], cwd=folder, capture_output=True, text=True)
        assert done.returncode in (0, 5), done.stdout[-2000:]
        for line in done.stdout.splitlines():
            marker, _, name = line.partition("\t")
            if marker in found:
                found[marker].append(f"{folder.relative_to(hardware.ROOT)}/{name}")
    assert all(found.values())
    return found


@pytest.mark.parametrize("recipe", list(filter(hardware.rows, hardware.recipes())), ids=lambda recipe: recipe.name)
def test_every_cell_names_tests_that_exist(recipe, known_tests):
    """Somewhere: those of common/ and of a family's folder run once, and where a recipe has none its cells say so."""
    for row in hardware.rows(recipe):
        for pattern, marker in ((row.cpu, "not gpu"), (row.plain, "gpu"), (row.te, "gpu")):
            known = known_tests[marker]
            assert pattern[:1] in ("", "=") or any(re.search(pattern, name) for name in known), (row.what, pattern)


NAME = "recipes/esm2_native_te/tests/test_gpu.py::test_in_bf16_all_are_near[train_ddp-{}-te]"


def bf16(*outcomes, **facts):
    """A run of the two tests of a cell."""
    tests = {NAME.format(layout): outcome for layout, outcome in zip(("packed", "padded"), outcomes, strict=False)}
    return RUN | facts | {"tests": tests}


def row_text(*runs):
    return hardware.cell(hardware.rows(RECIPE)[2].te, list(runs), hardware.folders(RECIPE))


def test_what_ran_where():
    assert row_text(bf16("passed", "passed")) == f"run on {H300}"
    assert row_text(bf16("passed", "failed")) == f"1 of 2 tests fail on {H300}"
    assert row_text(bf16("passed", "skipped")) == row_text(bf16("not run", "passed")) == f"1 of 2 tests run on {H300}"
    assert row_text(bf16("crashed", "crashed")) == f"2 of 2 tests lost in a crash on {H300}"
    assert row_text(bf16("failed", "timed out")) == f"1 of 2 tests fail and 1 of 2 tests lost in a timeout on {H300}"
    assert row_text(bf16("skipped", "not run")) == row_text(bf16()) == row_text() == hardware.NO
    assert hardware.cell("=no", [RUN | {"tests": {}}], hardware.folders(RECIPE)) == "no"


def test_runs_stand_beside_each_other():
    first, other = bf16("passed", "failed"), bf16("passed", "passed", device="NVIDIA B400")
    both = hardware.merged([first], other)
    assert row_text(*both) == "1 of 2 tests fail on NVIDIA H300 (2030-01-02, torch 9.1); run on " + (
        "NVIDIA B400 (2030-01-02, torch 9.1)"
    )
    # A later run of a part, on a device that is there.
    both = hardware.merged(both, bf16("not run", "passed", date="2030-03-04"))
    assert row_text(*both).startswith(
        "run on NVIDIA H300 (2030-01-02, torch 9.1; 2030-03-04, torch 9.1); run on NVIDIA B"
    )
    assert [len(run["tests"]) for run in both] == [1, 2, 1]
    # What is skipped now says nothing of what has passed; the same day's runs are one.
    assert hardware.merged([bf16("passed", "passed")], bf16("skipped", "passed")) == [bf16("passed", "passed")]
    # A file that cannot even be listed takes nothing away.
    lost = RUN | {"tests": {NAME.partition("::")[0]: "crashed"}}
    assert row_text(*hardware.merged([bf16("passed", "passed")], lost)) == f"run on {H300}"
    # A test that is gone, and a crash that is over.
    old = RUN | {"tests": {NAME.partition("::")[0]: "crashed", NAME.format("gone"): "passed", "other.py::x": "passed"}}
    assert hardware.merged([old], bf16("passed")) == [
        RUN | {"tests": {"other.py::x": "passed"} | bf16("passed")["tests"]}
    ]


def test_a_table_for_each_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    for name in ("one", "two", "three"):
        folder = tmp_path / "recipes" / name
        (folder / ("atoms" if name == "three" else "tokens")).mkdir(parents=True)
        (folder / "README.md").write_text(f"# The {name}\n")
    (tmp_path / "models" / "m").mkdir(parents=True)
    for folder in ("models/m", "recipes/two"):
        (tmp_path / folder / "modeling_m.py").write_text("")
    assert hardware.folders(tmp_path / "recipes/two") == ("recipes/two/", "models/m/")
    assert hardware.folders(tmp_path / "recipes/one") == ("recipes/one/",)
    passed = {NAME.format(layout).replace("esm2_native_te", "two"): "passed" for layout in ("packed", "padded")}
    text = hardware.table([RUN | {"tests": passed}])
    one, two = text.partition("## two\n")[::2]  # in the order of their names, "three" is in the first
    assert one.startswith("## one\n[The one](../recipes/one/README.md)\n\n| | CPU | GPU, plain layers | GPU, Trans")
    assert "(../recipes/three/README.md)\n\n| | CPU | GPU |\n|---|---|---|\n| DDP" in one
    assert H300 in two and H300 not in one


@pytest.fixture
def gpu_file(tmp_path, monkeypatch):
    """Writes a file of gpu tests, in a repository of its own."""
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    (tmp_path / "recipes" / "one" / "tests" / "common").mkdir(parents=True)

    def write(text):
        file = tmp_path / "recipes" / "one" / "tests" / "common" / "test_it.py"
        file.write_text(f"import os, signal, time, pytest\npytestmark = pytest.mark.gpu\n{text}")
        return file

    return write


@pytest.mark.parametrize(
    "text, timeout, expected",
    [
        ("def test_a(): pass\ndef test_b(): assert 0", 99, {"a": "passed", "b": "failed"}),
        ("def test_a(): pass\ndef test_b(): os.kill(os.getpid(), 11)", 99,
         {"a": "crashed", "b": "crashed", "file": "crashed"}),
        ("import atexit\ndef test_a(): atexit.register(os.kill, os.getpid(), 11)", 99,
         {"a": "passed", "file": "crashed"}),
        ("def test_a(): pass\ndef test_b(): time.sleep(999)", 10,
         {"a": "passed", "b": "timed out", "file": "timed out"}),
        ("def test_a(): pass\nif os.environ.get('CUDA_VISIBLE_DEVICES') is None: raise ValueError", 99,
         {"a": "crashed", "file": "crashed"}),
        ("def test_a(): pass\nimport no_such_module", 99, {"file": "crashed"}),
    ],
    ids=["passed and failed", "crash", "crash at exit", "timeout", "import that needs no GPU", "import"],
)  # fmt: skip
def test_what_is_lost_is_told(text, timeout, expected, gpu_file, monkeypatch, capfd):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script's background
    try:
        found = hardware.measure(gpu_file(text), None, timeout)
    finally:
        signal.signal(signal.SIGINT, before)
    name = "recipes/one/tests/common/test_it.py"
    assert found == {name if key == "file" else f"{name}::test_{key}": value for key, value in expected.items()}
    assert (f"error: {name}: " in capfd.readouterr().err) == ("file" in expected)


def test_a_part_of_a_file(gpu_file):
    file = gpu_file("def test_a(): pass\ndef test_b(): assert 0")
    assert list(hardware.measure(file, "a and not b", 99).values()) == ["passed", "not run"]
    assert list(hardware.measure(file, "neither", 99).values()) == ["not run", "not run"]


def test_outcomes_are_read_from_pytest(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('x')\n"
        "@pytest.fixture\ndef broken(): raise ValueError\ndef test_d(broken): pass\n"
    )
    junit = tmp_path / "junit.xml"
    subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", "test_it.py"], cwd=tmp_path)
    found = hardware.outcomes(junit, hardware.ROOT / "models" / "esm2")
    assert {name.rpartition("::")[2]: outcome for name, outcome in found.items()} == {
        "test_a": "passed", "test_b": "failed", "test_c": "skipped", "test_d": "failed",
    }  # fmt: skip
    assert all(name.startswith("models/esm2/test_it.py::") for name in found)


def test_the_page_is_written_and_checked(tmp_path, monkeypatch, capsys):
    results, page = tmp_path / "gpu_tests.json", tmp_path / "page.md"
    monkeypatch.setattr(hardware, "OUTPUT", results)
    assert hardware.main(["--table", str(page)]) == 0 and hardware.main(["--check", str(page)]) == 0
    assert hardware.NO in page.read_text()
    passed = {"recipes/esm2_native_te/tests/test_gpu.py::test_in_bf16_all_are_near[train_ddp-packed-te]": "passed"}
    results.write_text(json.dumps([RUN | {"tests": passed}]))
    assert hardware.main(["--check", str(page)]) == 1
    assert "write it: --table" in capsys.readouterr().err
    assert hardware.main(["--table", str(page)]) == 0 and "NVIDIA H300" in page.read_text()


def test_a_run_is_kept_and_its_outcome_is_the_exit_code(tmp_path, monkeypatch, capsys):
    output, name = tmp_path / "gpu_tests.json", "recipes/esm2_native_te/tests/test_gpu.py::test"
    monkeypatch.setattr(hardware, "missing", lambda without_te: None)
    monkeypatch.setattr(hardware.torch.cuda, "get_device_name", lambda: "NVIDIA H300")
    for outcome, code in (("passed", 0), ("failed", 1), ("crashed", 1), ("timed out", 1), ("skipped", 1)):
        monkeypatch.setattr(hardware, "measure", lambda *_, outcome=outcome: {name: outcome})
        assert hardware.main(["test_gpu", f"--output={output}"]) == code
    assert "no test has run" in capsys.readouterr().err
    (run,) = json.loads(output.read_text())
    assert run["device"] == "NVIDIA H300" and run["tests"] == {name: "timed out"}
    with pytest.raises(SystemExit):
        hardware.main(["no_such_file"])


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(hardware.torch.cuda, "is_available", lambda: False)
    assert hardware.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
    monkeypatch.setattr(hardware.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware, "te_available", lambda: (False, "TransformerEngine cannot be imported (why)"))
    assert hardware.main([]) == 2
    assert "(why): pip install --no-build-isolation -r recipes/" in capsys.readouterr().err
    assert hardware.missing(without_te=True) is None


def gpu_script(*arguments, **variables):
    command, environment = ["bash", HERE.parent / "gpu.sh", *arguments], {"HERE": "1"} | variables
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_the_script_without_a_gpu():
    done = gpu_script(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stderr.startswith("error: there is no GPU that torch can use"), done.stderr
    done = gpu_script("weight")
    assert done.returncode == 2 and "weight is no part" in done.stderr


def test_the_script_runs_all_and_tells_what_failed(tmp_path):
    python, log, out = tmp_path / "python", tmp_path / "log", tmp_path / "out"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *650M*) exit 3;; esac\n')
    python.chmod(0o755)
    done = gpu_script(PYTHON=str(python), OUT=str(out))
    assert done.returncode == 1 and done.stderr == "failed: speed of 650M (exit code 3)\n"
    calls = [line.split(" ")[:5] for line in log.read_text().splitlines()[1:]]
    assert calls[0] == ["ci/benchmarks/hardware.py", "--output", f"{out}/gpu_tests.json"]
    assert [line[4] for line in calls[1:4]] == ["150M", "650M", "3B"]
    assert calls[4:] == [
        ["ci/benchmarks/train_speed.py", "--from", f"{out}/train_speed.json", "--table", f"{out}/speed.md"]
    ]
    log.unlink()
    assert gpu_script("speed", "150M", "--rounds", "3", PYTHON=str(python), OUT=str(out)).returncode == 0
    assert log.read_text().splitlines()[1].endswith("--rounds 3") and len(log.read_text().splitlines()) == 3


def test_the_script_takes_another_recipe(tmp_path):
    done = gpu_script("speed", RECIPE="recipes/none")
    assert done.returncode == 2 and done.stderr.startswith("error: RECIPE=recipes/none: no such recipe; there are")
