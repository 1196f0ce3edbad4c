# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs with every contestant it has here, tells what fails, and its tables are those of its numbers."""

import json
import math
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest


HERE = Path(__file__).resolve().parents[1]
RECIPE = HERE.parents[1] / "recipes" / "esm2_native_te"
sys.path.insert(0, str(HERE))

import subject  # noqa: E402
import train_speed  # noqa: E402
from contestants import SIZES, Contestant, contestants, defaults, held_at_once  # noqa: E402


DATA = RECIPE / "data" / "train.parquet"
QUICK = ["--quick", f"--data={DATA}", "--threads=1"]
GPU = {
    "device": "cuda", "te": True, "capability": (9, 0), "flash_attn": True, "accelerate": True, "layer_backend": "te",
}  # fmt: skip


def quick(folder, *arguments):
    """Run the command, in a process as a user would: others are forked from a server that it starts."""
    command = [sys.executable, "train_speed.py", *QUICK, f"--output={folder}/numbers.json", *map(str, arguments)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    out = ["--table", folder / "page.md", "--plot", folder / "bars.png"]
    done = quick(folder, "--profile=1", "--at-once=3", *out)
    assert done.returncode == 0, done.stderr[-4000:]
    return SimpleNamespace(
        folder=folder, said=done, entry=json.loads((folder / "numbers.json").read_text())["entries"][0]
    )


def test_every_contestant_trains(run):
    names = [contestant["name"] for contestant in run.entry["contestants"]]
    assert names[:2] == ["ours", "ours, activation checkpointing"]
    assert {"transformers", "transformers, length buckets"} < set(names)
    trainer = "transformers.Trainer, grouped by length"
    assert (trainer in names) == bool(find_spec("accelerate")) == (trainer not in run.entry["left_out"])
    for contestant in run.entry["contestants"]:
        assert "failed" not in contestant
        for turn in contestant["rounds"]:
            assert turn["steps"] == (1 if contestant["kind"] == "loop" else 4)
            assert turn["seconds"] > 0 and turn["data_wait_s"] < turn["seconds"]
            assert 0.1 < turn["labels"] / turn["tokens"] < 0.2
            assert turn["tokens"] <= turn["slots"] and turn["flops"] > 1e9
            # Random weights, and no one has taken more than a few small steps.
            assert turn["loss"] is None or abs(turn["loss"] - math.log(33)) < 0.2
            assert turn["peak_memory_gib"] is None or 0.1 < turn["peak_memory_gib"] < 4
    assert {0, 1} <= {turn["round"] for turn in run.entry["contestants"][0]["rounds"]}


def test_precisions_qualify(run):
    ours = run.entry["contestants"][0]
    rates = ours["qualifying_tokens_per_second"]
    assert set(rates) == {"fp32"} | ({"bf16"} - set(map(str.lower, run.entry["left_out"])))
    assert ours["precision"] == max(rates, key=rates.get)
    assert run.entry["contestants"][1]["precision"] == ours["precision"]


def test_groups_have_rounds_of_ours_and_of_the_products(run):
    by_name = {contestant["name"]: contestant for contestant in run.entry["contestants"]}
    first, *others = (
        {turn["round"] for turn in by_name[name]["rounds"]}
        for name in ("ours", "ours, activation checkpointing", "transformers", "transformers, length buckets")
    )
    assert first == {turn["round"] for turn in run.entry["products"]} >= set().union(*others)
    assert others == [{0, 1}, {0, 1}, {2, 3}]  # three at once: ours and two others
    assert all(turn[fmt][kind] > 0 for turn in run.entry["products"] for fmt in ("fp32", "bf16")
               for kind in ("layer", "square_2048"))  # fmt: skip


def test_who_waits_does_not_work(run):
    assert run.entry["waiting_cpu_share"] < 0.3


def test_the_profile_adds_up(run):
    profile = run.entry["contestants"][0]["profile"]
    spent = profile["seconds_by_kind"]
    assert sum(spent.values()) == pytest.approx(profile["seconds"], rel=1e-3)
    assert {"matrix products", "attention", "layer norm", "GELU", "optimizer", "data"} <= set(spent)
    assert spent["attention"] > 0 and spent["matrix products"] > 0 and spent["optimizer"] > 0


def test_the_numbers_say_what_ran_and_nothing_of_where(run):
    text = (run.folder / "numbers.json").read_text()
    assert str(HERE.parents[1]) not in text and str(run.folder) not in text
    assert run.entry["data"]["file"] == "train.parquet" and run.entry["machine"]["threads"] == 1
    assert run.entry["versions"]["torch"] and run.entry["settings"]["seed"] == 42
    assert (run.folder / "bars.png").stat().st_size > 10_000
    assert "| **ours** |" in run.said.stdout and "of matrix products" in run.said.stdout
    assert "rounds of 1 step (ours and Trainer 4); a step of ours" in run.said.stdout


def test_tables_are_checked_against_the_numbers(run, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n{(run.folder / 'page.md').read_text()}After.\n")
    check = ["--from", str(run.folder / "numbers.json"), "--check", str(page)]
    assert train_speed.main(check) == 0
    page.write_text(page.read_text().replace("| FP32 |", "| FP64 |"))
    assert train_speed.main(check) == 1
    assert "--table" in capsys.readouterr().err
    assert train_speed.main([*check[:2], "--table", str(page)]) == train_speed.main(check) == 0
    assert page.read_text().startswith("Before.\n") and page.read_text().endswith("After.\n")


def test_an_entry_replaces_that_of_its_size_and_machine(run, tmp_path):
    result, output = {"entries": []}, tmp_path / "deep" / "numbers.json"
    for size, device, name, simd, seed in (
        ("35M", "cpu", "A", ["avx2"], 1), ("8M", "cpu", "A", ["avx2"], 1), ("8M", "cuda", "G", [], 1),
        ("35M", "cpu", "A", ["avx2"], 2), ("35M", "cpu", "A", ["avx2", "avx512f"], 4),
        ("35M", "cpu", "B", ["avx2"], 3),
    ):  # fmt: skip
        machine = {"name": name, "threads": 2, "simd": simd}
        train_speed.keep({"size": size, "device": device, "machine": machine, "seed": seed}, result, output)
    kept = [(e["size"], e["machine"]["name"], e["seed"]) for e in json.loads(output.read_text())["entries"]]
    assert kept == [("8M", "A", 1), ("35M", "A", 2), ("35M", "A", 4), ("35M", "B", 3), ("8M", "G", 1)]
    assert [path.name for path in output.parent.iterdir()] == ["numbers.json"]


@pytest.mark.slow
def test_a_contestant_that_fails_is_told_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    broken = Contestant("broken", "loop", ("fp32",), {"order": "random", "compile": False, "attention": "nonsense"})

    def two(*arguments):
        found, left_out = contestants(*arguments)
        return [found[0]._replace(precisions=("fp32",)), broken], left_out

    monkeypatch.setattr(train_speed, "contestants", two)
    assert train_speed.main([*QUICK, f"--output={tmp_path}/numbers.json"]) == 0
    printed = capsys.readouterr()
    assert "broken: fp32: ValueError" in printed.err and "| broken |" in printed.out
    ours, other = json.loads((tmp_path / "numbers.json").read_text())["entries"][0]["contestants"]
    assert len(ours["rounds"]) == 2 and "nonsense" in other["failed"] and not other["rounds"]


@pytest.mark.slow
def test_an_override_that_the_recipe_refuses(tmp_path):
    done = quick(tmp_path, "use_torch_compile=maybe")
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.splitlines()[-1] == "error: use_torch_compile=maybe must be true or false."


def test_contestants_on_a_gpu():
    found, left_out = contestants(GPU, {}, quick=False)
    names = [contestant.name for contestant in found]
    assert not left_out and len(set(names)) == len(names) == 14
    assert names[0] == "ours, te, packed, bf16" and "ours, torch, padded, fp8" in names
    assert {"transformers, length buckets, FlashAttention", "ours, te, packed, bf16, activation checkpointing"} < set(
        names
    )
    assert all(contestant.precisions == ("bf16",) for contestant in found)


def test_contestants_on_a_cpu():
    facts = {"device": "cpu", "accelerate": True, "layer_backend": "cpp", "bf16_speed": 0.9}
    found, left_out = contestants(facts, {}, quick=False)
    names = [contestant.name for contestant in found]
    assert not left_out and len(set(names)) == len(names) == 7
    assert "ours, layer_backend=torch" in names and "transformers, length buckets, torch.compile" in names
    assert all(contestant.precisions == ("fp32", "bf16") for contestant in found)
    asked = contestants(facts, {"precision": "bf16"}, quick=False)[0]
    assert [c.precisions for c in asked if c.kind == "ours"] == [("bf16",)] * 3
    assert len(contestants(facts | {"layer_backend": "torch"}, {}, quick=False)[0]) == 6
    found, left_out = contestants(facts | {"bf16_speed": 0.01}, {}, quick=False)
    assert {contestant.precisions for contestant in found} == {("fp32",)} and "1.0% of FP32" in left_out["BF16"]


def test_contestants_that_a_gpu_does_not_have():
    facts = GPU | {"te": False, "capability": (8, 0), "flash_attn": False}
    found, left_out = contestants(facts, {}, quick=False)
    first = "ours, torch, packed, bf16"
    ours = [contestant.name for contestant in found if contestant.kind == "ours"]
    assert ours == [first, "ours, torch, padded, bf16", f"{first}, activation checkpointing"]
    assert len(left_out) == 7 and "TransformerEngine" in left_out["ours, te, packed, fp8"]


def test_what_is_in_memory_at_once():
    def fitting(memory_gib, device, size):
        return held_at_once(memory_gib, device, size, defaults(device, size).peer_batch)

    assert fitting(21, "cpu", "8M") > 7
    assert fitting(21, "cpu", "35M") > fitting(21, "cpu", "150M") >= 2
    assert fitting(21, "cpu", "650M") < 2 <= fitting(138, "cuda", "650M")


@pytest.mark.parametrize("words", [["--recipe", "recipes/none"], ["--recipe=recipes/none"]])
def test_a_recipe_without_sizes(words):
    done = subprocess.run([sys.executable, "train_speed.py", *words], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --recipe recipes/none: speed is measured of recipes/esm2_native_te")


def test_each_recipe_has_files_and_tables_of_its_own(monkeypatch, tmp_path):
    import speed_report

    other = subject.SUBJECTS["esm2_native_te"]._replace(title="Other")
    monkeypatch.setitem(subject.SUBJECTS, "other_native", other)
    assert [subject.suffix(name) for name in subject.SUBJECTS][:1] == [""] and subject.suffix(
        "other_native"
    ) == "_other_native"
    monkeypatch.setattr(speed_report, "tables", lambda result: "none")
    page = tmp_path / "page.md"
    speed_report.write(page, {"entries": [{"recipe": "other_native"}]})
    assert page.read_text().splitlines()[0] == "<!-- train_speed_other_native: begin -->"
    assert speed_report.summary({"entries": []}).startswith("| ESM-2 |")


def test_cells(tmp_path):
    """Geneformer's rows are tokens already, its peer is BERT with the same dropout."""
    recipe = HERE.parents[1] / "recipes" / "geneformer_native_te"
    words = [f"--recipe={recipe}", f"--data={recipe}/data/train.parquet", "--only", "buckets"]
    done = quick(tmp_path, *words)
    assert done.returncode == 0, done.stderr[-4000:]
    entry = json.loads((tmp_path / "numbers.json").read_text())["entries"][0]
    assert entry["recipe"] == recipe.name and entry["data"]["num_rows"] == 600
    assert [c["name"] for c in entry["contestants"]] == ["ours", "transformers, length buckets"]
    ours, theirs = entry["contestants"]
    assert theirs["num_parameters"] <= ours["num_parameters"] < 1.01 * theirs["num_parameters"]  # rows of 64 tokens
    for turn in ours["rounds"] + theirs["rounds"]:
        assert abs(turn["loss"] - math.log(25_426)) < 0.3 and 0.1 < turn["labels"] / turn["tokens"] < 0.2
    assert "600 cells" in done.stdout and "| **ours** |" in done.stdout


def test_sizes_are_those_of_the_recipe():
    import modeling_esm2

    for shape in SIZES.values():
        ours = modeling_esm2.SIZES[shape.model_tag]
        assert shape[2:] == (ours["num_hidden_layers"], ours["hidden_size"])


def test_settling_does_not_count_and_gives_no_memory_back(monkeypatch):
    import contestant_process

    from build_model import model_config

    events, wants = [], [{"steps": 2, "settling": 1, "profile": False}, None]
    connection = SimpleNamespace(send=events.append, recv=lambda: wants.pop(0))
    monkeypatch.setattr(contestant_process, "release_memory", lambda device: events.append("memory"))
    gate = contestant_process.Gate(connection, "cpu", model_config("esm2_t4_1M", "auto"))
    batch = SimpleNamespace(counts={"tokens": 10, "labels": 1, "token_pairs": 100}, num_slots=12)
    with pytest.raises(contestant_process.Finished):
        gate.ready()
        for loss in (1.0, 2.0, 3.0):
            events.append(loss)
            gate.count([batch], 0.5)
            gate.step(loss)
    assert events[:6] == ["memory", {"memory_before_gib": None}, 1.0, 2.0, 3.0, "memory"]
    assert events[6]["steps"] == 2 and events[6]["tokens"] == 20 and events[6]["data_wait_s"] == 1.0


@pytest.mark.parametrize(("facts", "counted"), [({}, None), ({"layer_backend": "te"}, None),
                                                ({"layer_backend": "cpp"}, "cpp")])  # fmt: skip
def test_operations_are_those_that_a_contestant_has_to_do(facts, counted):
    """The last layer of ours leaves something out; peers' and TransformerEngine's do not."""
    from contestant_process import Gate

    from modeling_esm2 import SIZES, Esm2Config, training_flops

    gate = Gate(None, "cpu", Esm2Config(**SIZES["esm2_t4_1M"]))
    gate.facts |= facts
    gate.wanted = gate.settling = gate.profiled = 0
    gate.begin()
    counts = {"tokens": 30, "labels": 5, "token_pairs": 500}
    gate.count([SimpleNamespace(counts=counts, num_slots=40)], 0.5)
    assert gate.counts["flops"] == training_flops(gate.shape, counts, counted)
    assert (gate.counts["flops"] < training_flops(gate.shape, counts)) == (counted == "cpp")


def test_every_round_has_short_and_long_rows(tmp_path):
    import numpy as np
    from contestant_process import Rows

    lengths = np.random.default_rng(0).integers(10, 1000, 1200)
    np.savez(tmp_path / "rows.npz", tokens=np.zeros(lengths.sum(), np.uint8), lengths=lengths)
    (tmp_path / "collator.pickle").write_bytes(pickle.dumps(None))
    job = {
        "rows_file": tmp_path / "rows.npz",
        "collator_file": tmp_path / "collator.pickle",
        "seed": 1,
        "warmup": 2,
        "rounds": 3,
        "settling": 1,
        "steps": 4,
        "passes": 3,
        "micro_rows": 8,
    }
    for order in ("length", "random"):
        rows = Rows(SimpleNamespace(**job))
        batches = rows.micro_batches(order)
        assert len(batches) == (2 + 3 * (1 + 4)) * 3 and {len(batch) for batch in batches} == {8}
        places = np.concatenate(batches)
        assert len(set(places.tolist())) == len(places)
        by_round = lengths[places][2 * 3 * 8 :].reshape(3, 1 + 4, -1)[:, 1:].reshape(3, -1)  # what counts
        if order == "length":
            assert all(np.ptp(lengths[batch]) < 50 for batch in batches)
            assert np.ptp(by_round.mean(1)) < 0.15 * lengths.mean()
            assert max(lengths[batch].max() for batch in batches[: 2 * 3]) == lengths.max()  # its memory shows early
        else:
            by_step = lengths[places].reshape(-1, 3 * 8)
            assert all(abs(step.mean() - lengths.mean()) < 0.05 * lengths.mean() for step in by_step)
            fill = [lengths[batch].mean() / lengths[batch].max() for batch in batches]
            shuffled = np.random.default_rng(2).permutation(lengths).reshape(-1, 8)
            assert np.mean(fill) == pytest.approx((shuffled.mean(1) / shuffled.max(1)).mean(), rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--sizes", "8M,9M"], "9M: known are"),
        (["--data", "nowhere.fasta"], "no such file"),
        (["--data", __file__], "its name ends on none of"),
        (["--tokens-per-step", "5000"], "must divide by"),
        (["--rounds", "0"], "at least 1"),
        (["seed=3"], "--seed"),
        (["dataset.load_dataset_kwargs.path=csv"], "--data"),
        (["precision=auto"], "fp32 or bf16"),
        (["--check", "page.md"], "--from"),
        (["--from", "numbers.json", "--quick"], "leave it"),
    ],
)
def test_what_it_does_not_take(arguments, reason, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_speed.main(arguments)
    assert reason in capsys.readouterr().err.splitlines()[-1]
