# SPDX-License-Identifier: Apache-2.0
"""Errors and parity plots of a potential on files; ranks that repeat a micro-batch add nothing to the plot."""

import json
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import torch
from ranks_in_threads import on_ranks
from structure_files import labelled, write

import evaluate


class Off(torch.nn.Module):
    """Labels that are wrong by known amounts."""

    config = SimpleNamespace(elements=["Al", "Ni", "Cu"], cutoff=4.0, pair_cutoffs=[[4.0, 3.0, 4.0]] * 3)

    def forward(self, positions, types, cell, edges, shifts, structure, energy, forces, stress, counts):
        energies = energy + 0.5 * torch.bincount(structure)
        return SimpleNamespace(energies=energies, forces=forces + 0.1 * types[:, None], stress=stress - 0.02)


def test_errors_and_parity(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "calculator", lambda folder: SimpleNamespace(model=Off()))
    drawn = []
    monkeypatch.setattr(evaluate, "parity_plot", lambda *given: drawn.append(given))
    frames = labelled(7)
    numbers = np.concatenate([atoms.numbers for atoms in frames])
    given = Namespace(model=tmp_path, files=[write(frames, tmp_path / "a.extxyz")], split=None, label=[], unit=[],
                      atoms=60, max_neighbors=None, bad_frames="refuse", out=tmp_path / "report")  # fmt: skip
    for found in on_ranks(2, lambda rank: evaluate.evaluate(rank, given)):
        assert abs(found["energy_per_atom_mae"] - 0.5) < 1e-7 and abs(found["stress_max"] - 0.02) < 1e-7
        assert abs(found["forces_mae"] - (0.1 * (numbers == 28) + 0.2 * (numbers == 29)).mean()) < 1e-7
        assert found["num_structures"] == 7
    assert json.loads((tmp_path / "report" / "errors.json").read_text()) == found
    _, both, _, groups, _ = drawn[0]
    assert (
        both["forces"][0].shape == groups["forces"].shape == (3 * len(numbers),)
        and len(both["energy_per_atom"][0]) == 7
    )
    assert np.allclose((both["forces"][1] - both["forces"][0])[groups["forces"] == "Cu"], 0.2)
    assert "written:" in capsys.readouterr().out
