# SPDX-License-Identifier: Apache-2.0
"""Predictions are the calculator's on any batches and ranks, and after a stop; a committee has a spread."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import read
from structure_files import labelled, model_in, write

import predict
from atoms.arrow_cache import open_structures
from atoms.final_model import calculator
from atoms.kernels import products
from common.contract import ranks


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def committee(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for seed in range(3):
        (path / str(seed)).mkdir()
    return [model_in(path / str(seed), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    frames = labelled(6)
    frames.append(frames[0][:7])  # without labels
    frames[-1].pbc = False
    return write(frames, tmp_path_factory.mktemp("data") / "mine.extxyz")


@pytest.fixture(scope="module")
def expected(committee, structures):
    """By each model: energies, and forces and stress of each structure."""
    found = []
    for folder in committee:
        calc, one = calculator(folder), []
        for atoms in read(structures, ":"):
            atoms.calc = calc
            stress = atoms.get_stress() if atoms.pbc.all() else None
            one.append((atoms.get_potential_energy(), atoms.get_forces(), stress))
        found.append(one)
    return found


def same(file, expected, structures):
    predictions, given = read(file, ":"), read(structures, ":")
    assert len(predictions) == len(given)
    for i, (atoms, original) in enumerate(zip(predictions, given, strict=True)):
        assert (atoms.numbers == original.numbers).all() and np.allclose(atoms.positions, original.positions)
        energies, forces = (np.array([one[i][k] for one in expected]) for k in (0, 1))
        assert atoms.get_potential_energy() == pytest.approx(energies.mean(), abs=1e-6)
        assert np.allclose(atoms.get_forces(), forces.mean(0), atol=1e-7)
        if atoms.pbc.all():
            assert np.allclose(atoms.get_stress(), np.mean([one[i][2] for one in expected], axis=0), atol=1e-7)
        else:
            assert "stress" not in atoms.calc.results
        if len(expected) > 1:
            assert atoms.info["energy_std"] == pytest.approx(energies.std(ddof=1), abs=1e-6)
            assert np.allclose(atoms.arrays["forces_std"], np.sqrt(forces.var(0, ddof=1).sum(-1)), atol=1e-7)


@pytest.mark.parametrize("atoms", [1, 50, 2000])
def test_it_is_what_the_calculator_gives(committee, structures, expected, atoms, tmp_path):
    number = 1 if atoms == 1 else 3
    assert predict.open_models(committee[:1], CPU)[0][0].kernels == products("auto", CPU)[0]
    predict.main([structures, str(tmp_path / "out.xyz"), *committee[:number], f"--atoms={atoms}"])
    same(tmp_path / "out.xyz", expected[:number], structures)
    assert [path.name for path in tmp_path.iterdir()] == ["out.xyz"]


def on_a_rank(distributed, words):
    predict.ROWS_PER_PART = 2
    predict.predict(distributed, predict.parse(words))


def test_ranks_share_the_work_and_what_is_written_is_data(committee, structures, expected, tmp_path):
    ranks.call_on_ranks(tmp_path / "ranks", on_a_rank, 2, [structures, str(tmp_path / "out.parquet"), *committee])
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["key"] for row in rows] == [str(i) for i in range(7)] and rows[-1]["stress"] is None
    data = {"path": "parquet", "data_files": str(tmp_path / "out.parquet"), "split": "train"}
    read_again = open_structures("dataset", data)
    for i, row in enumerate(read_again):
        assert row["energy"] == pytest.approx(np.mean([one[i][0] for one in expected]), abs=1e-9)


def test_the_same_command_goes_on_and_another_does_not(committee, structures, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "ROWS_PER_PART", 2)
    computed, real = [], predict.part_table

    def counted(*arguments):
        if len(computed) == 2:
            computed.append("stopped")
            raise KeyboardInterrupt
        computed.append(1)
        return real(*arguments)

    monkeypatch.setattr(predict, "part_table", counted)
    words = [structures, str(tmp_path / "out.extxyz"), committee[0]]
    with pytest.raises(KeyboardInterrupt):
        predict.main(words)
    with pytest.raises(SystemExit):
        predict.main([*words[:2], committee[1]])
    predict.main(words)
    assert computed == [1, 1, "stopped", 1, 1]
    same(tmp_path / "out.extxyz", expected[:1], structures)


@pytest.mark.parametrize(
    ("target", "model", "message"),
    [
        ("out.xyz", "two.xyz", "two.xyz, frame 0: its energy is not a number; look for atoms in the same place."),
        ("out.csv", "0", "out.csv must end with .extxyz, .xyz, .parquet, .arrow"),
        ("out.xyz", "nowhere", "nowhere is no run with checkpoints"),
        ("out.xyz", "0", "mine.extxyz, frame 1: there is H, and the potential knows Al, Cu, Ni."),
    ],
)
def test_mistakes_are_one_sentence(committee, target, model, message, tmp_path, capfd):
    write([Atoms("Cu2")], tmp_path / "two.xyz")
    file = write([*labelled(1), molecule("CH3CH2OH", vacuum=3)[-3:]], tmp_path / "mine.extxyz")
    with pytest.raises(SystemExit) as stopped, predict.command():
        file = str(tmp_path / model) if "." in model else file
        predict.main([file, str(tmp_path / target), model if model == "nowhere" else committee[0]])
    said = capfd.readouterr().err
    assert stopped.value.code == 2 and message in said and "Traceback" not in said
