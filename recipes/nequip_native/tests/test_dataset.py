# SPDX-License-Identifier: Apache-2.0
"""Micro-batches are full, hold each structure once, and know what they hold; metrics are those of the whole set."""

from collections import Counter
from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read
from ase.neighborlist import neighbor_list
from ranks_in_threads import on_ranks
from structure_files import labelled, write

from dataset import TrainLoader, open_validation


@pytest.fixture(scope="module")
def frames():
    found = labelled(31)
    del found[3].calc.results["stress"], found[5].calc.results["energy"], found[6].calc.results["forces"]
    return found


@pytest.fixture
def loader(frames, tmp_path, distributed):
    path = write(frames, tmp_path / "a.extxyz")

    def build(elements=None, **keys):
        given = {"load_dataset_kwargs": {"path": "structures", "data_files": path}, "num_workers": 0}
        given |= {} if any("micro" in key for key in keys) else {"micro_batch_size": 3}
        return TrainLoader(distributed, 7, 4.0, elements, **given | keys)

    return build


def test_a_batch(frames, loader):
    built = loader(["Cu", "Al", "Ni"], micro_batch_size=4)
    batch = next(iter(built))
    rows = built.plan.window(0, 0)[0].rows
    some = [frames[row] for row in rows]
    inputs = batch.inputs
    assert np.array_equal(inputs["positions"], np.concatenate([a.positions for a in some]).round(8))
    assert [["Cu", "Al", "Ni"][t] for t in inputs["types"]] == [s for a in some for s in a.get_chemical_symbols()]
    assert inputs["structure"].tolist() == [i for i, a in enumerate(some) for _ in a]
    vectors = inputs["positions"][inputs["edges"][1]] - inputs["positions"][inputs["edges"][0]]
    vectors += torch.einsum("ei,eij->ej", inputs["shifts"], inputs["cell"][inputs["structure"][inputs["edges"][0]]])
    start = 0
    for a in some:
        mine = (inputs["edges"][0] >= start) & (inputs["edges"][0] < start + len(a))
        i, d = neighbor_list("id", a, 4.0)
        assert torch.equal(torch.bincount(inputs["edges"][0][mine] - start), torch.from_numpy(np.bincount(i)))
        assert np.allclose(np.sort(vectors[mine].norm(dim=-1)), np.sort(d), atol=1e-6)
        start += len(a)
    keys = ("energy", "forces", "stress")
    assert all(inputs[key].dtype == torch.float64 for key in (*keys, "positions", "cell", "shifts"))
    assert batch.counts == {
        "structures": 4, "atoms": start, "edges": inputs["edges"].shape[1],
        "energies": sum("energy" in a.calc.results for a in some),
        "force_components": sum(3 * len(a) for a in some if "forces" in a.calc.results),
        "stress_components": sum(9 for a in some if "stress" in a.calc.results),
    }  # fmt: skip
    edges = inputs["edges"].T.tolist()
    assert edges == sorted(edges)


@pytest.mark.parametrize("key", ["micro_batch_size", "atom_micro_batch_size", "edge_micro_batch_size"])
def test_each_structure_once_an_epoch(key, loader):
    plan = loader(
        **{key: {"micro_batch_size": 4, "atom_micro_batch_size": 90, "edge_micro_batch_size": 3500}[key]}
    ).plan
    for epoch in (0, 1):
        rows = Counter(int(row) for batch in plan.epoch(epoch) for row in batch.rows)
        assert rows == Counter(range(31))


@pytest.mark.parametrize("by", ["atom", "edge"])
def test_batches_are_full(by, tmp_path, distributed):
    from ase import Atoms

    random = np.random.default_rng(0)
    frames = []
    for _ in range(400):
        number = int(random.integers(5, 40))
        a = Atoms(
            "Cu" * number,
            scaled_positions=random.permutation(64)[:number, None] // [[16, 4, 1]] % 4 / 4,
            cell=[10] * 3,
        )
        a.info["REF_energy"], a.pbc = float(number), True
        frames.append(a)
    path = write(frames, tmp_path / "a.extxyz")
    budget = {"atom": 300, "edge": 4000}[by]
    built = TrainLoader(distributed, 0, 4.0, None, load_dataset_kwargs={"path": "structures", "data_files": path},
                        num_workers=0, bad_frames="keep", **{f"{by}_micro_batch_size": budget})  # fmt: skip
    batches = list(built.plan.epoch(0))
    sizes = [int(built.plan.source.sizes(batch.rows, 0).sum()) for batch in batches]
    assert max(sizes) <= budget and np.mean(sorted(sizes)[1:]) >= 0.99 * budget  # an epoch's last may be short
    counted = [batch.counts[f"{by}s"] for batch in islice(built, 5)]
    assert counted == sizes[:5]


def test_a_mixture_has_its_shares_and_its_numbers(loader, tmp_path, distributed):
    """Replay: 31 new structures three parts, 9 old ones one part; statistics are of all 40 rows once."""
    other = labelled(9, seed=5)
    old = {"weight": 1, "load_dataset_kwargs": {"data_files": write(other, tmp_path / "old.extxyz")}}
    built = loader(mix={"new": {"weight": 3}, "old": old}, micro_batch_size=4)
    seen = Counter()
    for epoch in range(3):
        rows = np.concatenate([batch.rows for batch in built.plan.epoch(epoch)])
        seen += Counter(line.partition(":")[0] for line in built.plan.source.describe(rows, epoch))
    assert seen == {"new": 90, "old": 30}
    mixture, some = built.plan.source, np.array([39, 0, 17])
    together, alone = mixture.read(some, 1), [mixture.read(some[[i]], 1) for i in range(3)]
    assert np.array_equal(together.positions, np.concatenate([one.positions for one in alone]))
    assert np.array_equal(together.energy, np.concatenate([one.energy for one in alone]), equal_nan=True)
    assert together.num_atoms.tolist() == mixture.sizes(some, 1).tolist()
    assert built.statistics["num_structures"] == 40 and any("times its 9 rows" in note for note in built.notes)
    whole = write([*read(tmp_path / "a.extxyz", ":"), *other], tmp_path / "whole.extxyz")
    alike = loader(load_dataset_kwargs={"path": "structures", "data_files": whole}).statistics
    assert built.statistics["per_element_energy"] == pytest.approx(alike["per_element_energy"], rel=1e-9)
    with pytest.raises(ValueError, match=r"frame 1 of old\.extxyz|frame 1 of a\.extxyz alone has 32 atoms"):
        loader(mix={"new": {"weight": 3}, "old": old}, atom_micro_batch_size=20)


def test_workers_and_resuming_change_nothing(loader):
    straight = [batch.name for batch in islice(loader(atom_micro_batch_size=80), 12)]
    saved = loader(atom_micro_batch_size=80)
    first = [batch.name for batch in islice(saved, 5)]
    with_workers = loader(atom_micro_batch_size=80, num_workers=2)
    with_workers.load_state_dict(saved.state_dict())
    assert first + [batch.name for batch in islice(with_workers, 7)] == straight


def test_bad_frames(frames, tmp_path, distributed):
    broken = labelled(8)
    broken[2].positions[1] = broken[2].positions[0] + 0.1
    path = write(broken, tmp_path / "b.extxyz")
    keys = {"load_dataset_kwargs": {"path": "structures", "data_files": path}, "num_workers": 0, "micro_batch_size": 2}
    with pytest.raises(
        ValueError, match=r"b.extxyz, frame 2 has atoms 0.17 A apart \[positions\].*bad_frames=leave_out"
    ):
        TrainLoader(distributed, 0, 4.0, None, **keys)
    loader = TrainLoader(distributed, 0, 4.0, None, **keys, bad_frames="leave_out")
    assert sorted(int(row) for batch in loader.plan.epoch(0) for row in batch.rows) == [0, 1, 3, 4, 5, 6, 7]
    assert loader.statistics["num_structures"] == 7 and any(
        "1 of 8 structures are left out" in note for note in loader.notes
    )
    kept = TrainLoader(distributed, 0, 4.0, None, **keys, bad_frames="keep")
    assert kept.statistics["num_structures"] == 8 and loader.plan.source.identity != kept.plan.source.identity


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"atom_micro_batch_size": 20}, "frame 1 of a.extxyz alone has 32 atoms; give at least that"),
        ({"micro_batch_size": 2, "atom_micro_batch_size": 99}, "are both set: give one of"),
        ({"micro_batch_size": None}, "none is set: give one of dataset.micro_batch_size"),
        ({"elements": ["Cu", "Ni"]}, "there is Al in the data, and the model knows Cu, Ni"),
        ({"elements": ["Cu", "Kryptonite"]}, "Kryptonite is no symbol"),
    ],
)
def test_a_mistake_is_one_sentence(keys, words, loader):
    with pytest.raises(ValueError, match=words):
        loader(**keys)


@pytest.mark.parametrize("change", ["energy", "forces", "stress", "cell", "pbc", "positions"])
def test_data_that_has_changed_is_not_resumed_on(change, frames, tmp_path, distributed):
    def build(some):
        data = {"path": "structures", "data_files": write(some, tmp_path / "a.extxyz")}
        return TrainLoader(distributed, 7, 4.0, None, load_dataset_kwargs=data, num_workers=0, micro_batch_size=3)

    saved, others = build(frames).state_dict(), [atoms.copy() for atoms in frames]
    for atoms, frame in zip(others, frames, strict=True):
        atoms.calc = SinglePointCalculator(atoms, **frame.calc.results)
    build(others).load_state_dict(saved)
    build(others).load_state_dict(saved | {"data": {k: v for k, v in saved["data"].items() if k != "cells"}})
    wrong = others[9]
    if change == "cell":
        wrong.cell[2, 2] += 0.01
    elif change == "pbc":
        wrong.pbc = [True, True, False]
    elif change == "positions":
        wrong.positions[0, 0] += 1e-3
    else:
        wrong.calc.results[change] = wrong.calc.results[change] + 1e-4
    with pytest.raises(ValueError, match="the data is not what the checkpoint was made with"):
        build(others).load_state_dict(saved)


class Off(torch.nn.Module):
    """Errors that differ from atom to atom."""

    def forward(self, positions, types, cell, edges, shifts, structure, once, row, energy, forces, stress, counts):
        atoms = torch.bincount(structure)
        errors = 0.01 * (types[:, None] + 1) * torch.sin(positions)
        wrong = torch.where(torch.isfinite(forces), forces + errors, 1.0)
        energies = torch.nan_to_num(energy) + 0.1 * atoms * torch.cos(cell[:, 0, 0] * 50)
        return SimpleNamespace(energies=energies, forces=wrong, stress=torch.nan_to_num(stress) + 1e-3 * cell / 10)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_metrics_are_those_of_the_whole_set(num_ranks, frames, tmp_path):
    paths = [write(frames[:20], tmp_path / "a.extxyz"), write(frames[20:], tmp_path / "b.extxyz")]
    elements = ["Cu", "Al", "Ni"]

    def work(rank):
        kwargs = {"path": "structures", "data_files": paths}
        validator = open_validation(rank, 4.0, elements, load_dataset_kwargs=kwargs, atom_micro_batch_size=100)
        return validator.run(Off(), nullcontext)

    for found in on_ranks(num_ranks, work):
        errors = {"a.extxyz": [], "b.extxyz": []}
        of_energy, of_element = [], {element: [] for element in elements}
        for i, a in enumerate(frames):
            types = np.array([elements.index(s) for s in a.get_chemical_symbols()])
            if "forces" in a.calc.results:
                wrong = 0.01 * (types[:, None] + 1) * np.sin(a.positions)
                errors["a.extxyz" if i < 20 else "b.extxyz"].append(wrong)
                for t, element in enumerate(elements):
                    of_element[element].append(wrong[types == t])
            if "energy" in a.calc.results:
                of_energy.append(0.1 * np.cos(a.cell[0, 0] * 50))
        both = np.concatenate(errors["a.extxyz"] + errors["b.extxyz"])
        assert found["forces_mae"] == pytest.approx(np.abs(both).mean(), rel=1e-5)
        assert found["forces_rmse"] == pytest.approx(np.sqrt((both**2).mean()), rel=1e-5)
        assert found["forces_max"] == pytest.approx(np.abs(both).max(), rel=1e-5)
        assert found["energy_per_atom_mae"] == pytest.approx(np.abs(of_energy).mean(), rel=1e-4)
        assert found["forces_mae/a.extxyz"] == pytest.approx(
            np.abs(np.concatenate(errors["a.extxyz"])).mean(), rel=1e-5
        )
        for element, wrong in of_element.items():
            assert found[f"forces_mae/{element}"] == pytest.approx(np.abs(np.concatenate(wrong)).mean(), rel=1e-5)
            assert found[f"forces_max/{element}"] == pytest.approx(np.abs(np.concatenate(wrong)).max(), rel=1e-5)
        assert 0.9 < found["forces_cosine"] < 1 and found["num_structures"] == 31
        assert found["stress_mae"] > 0 and "stress_mae/b.extxyz" in found


def test_no_validation(distributed):
    assert not open_validation(distributed, 4.0, ["Cu"]).is_due(1, 1)
