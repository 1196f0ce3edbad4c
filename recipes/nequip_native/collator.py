# SPDX-License-Identifier: Apache-2.0
"""Lay structures end to end as one graph, with edges between neighbours."""

import numpy as np
import torch

from atoms.neighbours import Cutoffs, all_neighbours, lengths_once
from atoms.structures import NUM_ELEMENTS, NUMBERS, Structures
from common.batch import Batch


class GraphCollator:
    """Finds neighbours and lays out a micro-batch; `elements` are the model's types, in their order.

    With `data_sets`, the batch also says which data set each structure is of, for metrics; models do not take it.
    """

    def __init__(self, section: str, cutoffs: Cutoffs, elements: list[str], max_neighbors: int | None = None,
                 with_data_sets: bool = False):  # fmt: skip
        self.section, self.cutoffs, self.elements = section, cutoffs, elements
        self.max_neighbors, self.with_data_sets = max_neighbors, with_data_sets
        self.type_of = np.full(NUM_ELEMENTS, -1)
        self.type_of[[NUMBERS[symbol] for symbol in elements]] = np.arange(len(elements))

    def __call__(self, sample: dict) -> Batch:
        """`inputs`: positions [A, 3], types [A], cell [S, 3, 3], edges [2, E], shifts [E, 3], structure [A];
        once [less], row [E] as the model takes them, unless a pair's cutoff differs by direction.

        Labels are energy [S], forces [A, 3], stress [S, 3, 3], NaN where there is none; floats are float64. `counts`:
        structures, atoms, edges, energies, force_components, stress_components.
        """
        structures: Structures = sample["items"]
        edges, shifts, reverse = all_neighbours(structures, self.cutoffs, self.max_neighbors)
        types = self.type_of[structures.numbers]
        if (types < 0).any():
            number = int(structures.numbers[types < 0][0])
            symbol = next(k for k, v in NUMBERS.items() if v == number)
            raise ValueError(
                f"{self.section}: there is {symbol} in the data, and the model knows {', '.join(self.elements)}."
            )
        inputs = {
            "positions": structures.positions, "types": types, "cell": structures.cell, "edges": edges,
            "shifts": shifts.astype(np.float64), "structure": structures.structure, "energy": structures.energy,
            "forces": structures.forces, "stress": structures.stress,
        }  # fmt: skip
        if self.cutoffs.symmetric:  # else x differs by direction
            inputs["once"], inputs["row"] = lengths_once(edges, shifts, reverse)
        if self.with_data_sets:
            inputs["data_set"] = structures.data_set
        counts = {
            "structures": len(structures), "atoms": len(types), "edges": edges.shape[1],
            "energies": int(np.isfinite(structures.energy).sum()),
            "force_components": 3 * int(np.isfinite(structures.forces).all(-1).sum()),
            "stress_components": 9 * int(np.isfinite(structures.stress).all((1, 2)).sum()),
        }  # fmt: skip
        tensors = {
            name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in inputs.items()
        }
        return Batch(tensors, sample["name"], counts, len(types))
