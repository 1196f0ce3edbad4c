# SPDX-License-Identifier: Apache-2.0
"""Statistics are exact over the training set, the same to the bit on any number of ranks, and kept with the data."""

import numpy as np
import pytest
from ase.neighborlist import neighbor_list
from ranks_in_threads import on_ranks
from structure_files import labelled, write

from atoms import survey as module
from atoms.arrow_cache import open_structures
from atoms.neighbours import Cutoffs
from atoms.survey import statistics, survey


@pytest.fixture
def rows(tmp_path):
    frames = labelled(23)
    del frames[2].calc.results["forces"], frames[4].calc.results["energy"]
    return frames, open_structures(
        "dataset", {"path": "structures", "data_files": write(frames, tmp_path / "a.extxyz")}
    )


def by_hand(frames, cutoff):
    """The same by ASE's neighbour list and numpy's least squares."""
    numbers = np.concatenate([a.numbers for a in frames])
    neighbours = np.concatenate([np.bincount(neighbor_list("i", a, cutoff), minlength=len(a)) for a in frames])
    of_forces = [a for a in frames if "forces" in a.calc.results]
    forces = np.concatenate([a.calc.results["forces"] for a in of_forces])
    which = np.concatenate([a.numbers for a in of_forces])
    of_energy = [a for a in frames if "energy" in a.calc.results]
    counts = np.array([[np.sum(a.numbers == z) for z in (13, 28, 29)] for a in of_energy], dtype=float)
    energies = np.linalg.lstsq(counts, [a.calc.results["energy"] for a in of_energy], rcond=None)[0]
    return {
        "num_neighbors_mean": neighbours.mean(), "per_element_energy": energies,
        "forces_rms": np.sqrt((forces**2).mean()),
        "num_neighbors_per_type": [neighbours[numbers == z].mean() for z in (13, 28, 29)],
        "forces_rms_per_type": [np.sqrt((forces[which == z] ** 2).mean()) for z in (13, 28, 29)],
        "energy_per_atom_mean": np.mean([a.calc.results["energy"] / len(a) for a in of_energy]),
        "stress_rms": np.sqrt(np.mean([a.get_stress(voigt=False) ** 2 for a in frames])),
        "num_structures": len(frames), "num_atoms": len(numbers),
    }  # fmt: skip


def test_statistics_are_exact(rows, distributed):
    frames, found = rows
    numbers, notes = statistics(survey(distributed, "dataset", found, Cutoffs(4.0)), ["Al", "Ni", "Cu"])
    for name, value in by_hand(frames, 4.0).items():
        assert np.allclose(numbers[name], value, rtol=1e-9, atol=1e-12), name
    assert numbers["per_element_energy_rank"] == 3 and not notes
    turned, _ = statistics(survey(distributed, "dataset", found, Cutoffs(4.0)), ["Cu", "Au", "Al"])
    assert (
        turned["per_element_energy"][::2] == numbers["per_element_energy"][::-2]
        and turned["forces_rms_per_type"][1] == 0
    )


def test_another_run_was_faster(rows, distributed, monkeypatch):
    survey_to_file = module.chunk_to_file

    def late(*arguments):
        monkeypatch.setattr(module, "chunk_to_file", survey_to_file)
        survey(distributed, "dataset", rows[1], Cutoffs(4.0))  # it keeps what it has found, and removes the parts
        return survey_to_file(*arguments)

    monkeypatch.setattr(module, "chunk_to_file", late)
    assert statistics(survey(distributed, "dataset", rows[1], Cutoffs(4.0)), ["Al", "Ni", "Cu"])[0]


@pytest.mark.parametrize("one_node", [True, False])
def test_any_number_of_ranks(one_node, rows, monkeypatch, tmp_path, distributed):
    monkeypatch.setattr(module, "CHUNK", 4)
    alone = statistics(survey(distributed, "dataset", rows[1], Cutoffs(4.0)), ["Al", "Ni", "Cu"])
    for number in (2, 3):
        monkeypatch.setattr(module.datasets.config, "HF_DATASETS_CACHE", tmp_path / str(number))
        found = on_ranks(number, lambda rank: survey(rank, "dataset", rows[1], Cutoffs(4.0)), one_node)
        for one in found:
            assert statistics(one, ["Al", "Ni", "Cu"]) == alone
            assert one.edges.tolist() == found[0].edges.tolist()


def test_it_is_made_once_and_goes_on(rows, monkeypatch, distributed):
    monkeypatch.setattr(module, "CHUNK", 5)
    monkeypatch.setattr(module, "VERSION", "test_it_is_made_once")
    done, survey_chunk = [], module.survey_chunk

    def killed(rows, first, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(first)
        return survey_chunk(rows, first, *rest)

    monkeypatch.setattr(module, "survey_chunk", killed)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        survey(distributed, "dataset", rows[1], Cutoffs(4.0))
    done.append("third")
    survey(distributed, "dataset", rows[1], Cutoffs(4.0))
    assert done == [0, 5, "third", 10, 15, 20]
    survey(distributed, "dataset", rows[1], Cutoffs(4.0))
    assert len(done) == 6
    survey(distributed, "dataset", rows[1], Cutoffs(4.5))  # other neighbours
    assert len(done) == 11


def test_what_is_left_out_counts_for_nothing(rows, monkeypatch, distributed, tmp_path):
    frames, found = rows
    monkeypatch.setattr(module, "CHUNK", 6)
    kept = np.ones(23, bool)
    kept[[1, 9, 22]] = False
    expected = by_hand([a for a, stays in zip(frames, kept, strict=True) if stays], 4.0)
    for number in (1, 2):

        def work(rank):
            one = survey(rank, "dataset", found, Cutoffs(4.0))
            one.only(kept, rank)
            return statistics(one, ["Al", "Ni", "Cu"])[0]

        for numbers in on_ranks(number, work):
            for name, value in expected.items():
                assert np.allclose(numbers[name], value, rtol=1e-9, atol=1e-12), name


def test_compositions_that_tell_nothing_apart(real_structures, distributed):
    found = open_structures("dataset", {"path": "structures", "data_files": real_structures("lips_150.extxyz")})
    numbers, notes = statistics(survey(distributed, "dataset", found, Cutoffs(5.0)), ["Li", "P", "S"])
    assert numbers["per_element_energy_rank"] == 1 and "only 1 of 3 can be told apart" in notes[0]
    mean = np.mean([row["energy"] for row in found])
    assert np.dot(numbers["per_element_energy"], [27, 12, 44]) == pytest.approx(mean, abs=1e-9)
    assert numbers["forces_rms"] == pytest.approx(0.614, abs=1e-3)


@pytest.mark.parametrize("name", ["0.npz", "evidence.npz"])
def test_a_damaged_file_is_made_anew(name, rows, distributed):
    found = survey(distributed, "dataset", rows[1], Cutoffs(4.0))
    path = found.folder / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{name} was damaged and is removed; start again"):
        survey(distributed, "dataset", rows[1], Cutoffs(4.0))
    assert survey(distributed, "dataset", rows[1], Cutoffs(4.0)).edges.tolist() == found.edges.tolist()
