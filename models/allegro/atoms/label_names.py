# SPDX-License-Identifier: Apache-2.0
"""What files call energies, forces and the rest, and how these become labels in our units."""

from dataclasses import dataclass, field

import numpy as np

from atoms.structures import unit_factors


# Names that labels usually have, the first that is there counts.
USUAL = {
    "energy": ("energy", "Energy", "REF_energy", "ref_energy", "dft_energy", "DFT_energy", "total_energy", "TotEnergy",
               "dft_total_energy", "formation_energy", "energies", "E", "y"),
    "forces": ("forces", "force", "Forces", "REF_forces", "ref_forces", "dft_forces", "DFT_forces", "F"),
    "gradient": ("dft_total_gradient", "gradient", "gradients", "dft_gradient"),
    "stress": ("stress", "Stress", "REF_stress", "ref_stress", "dft_stress", "DFT_stress", "stress_tensor"),
    "virial": ("virial", "virials", "REF_virial", "REF_virials", "dft_virial"),
    "numbers": ("numbers", "atomic_numbers", "nuclear_charges", "species", "z", "Z", "charges", "species_at_sites"),
    "positions": ("positions", "coordinates", "coords", "pos", "conformations", "R", "cartesian_site_positions"),
    "cell": ("cell", "lattice", "lattice_vectors", "cells", "box"),
    "pbc": ("pbc", "periodic"),
    "charge": ("charge", "total_charge"),
    "spin": ("spin", "spin_multiplicity", "multiplicity"),
}  # fmt: skip
ANOTHER = ("formation_energy", "E", "y", "F")  # can be something else beside an energy or forces
LABEL_KEYS = ("energy", "forces", "stress", "virial", "charge", "spin", "data_set")


@dataclass(frozen=True)
class Options:
    """How a file is read: the section for sentences, names of labels and units, as the configuration has them."""

    section: str
    label_keys: dict = field(default_factory=dict)
    units: dict = field(default_factory=dict)

    def __post_init__(self):
        if unknown := set(self.label_keys) - set(LABEL_KEYS):
            raise ValueError(
                f"{self.section}.label_keys.{min(unknown)}: there is no such key; there is {', '.join(LABEL_KEYS)}."
            )
        unit_factors(self.section, self.units)

    def find(self, label: str, values) -> str | None:
        """The name that a label has among `values`: the configured one, or a usual one."""
        if given := self.label_keys.get(label):
            return given if given in values else None
        return next((name for name in USUAL.get(label, ()) if name in values), None)

    def labels(self, values, factors: dict[str, float], volume: float) -> dict:
        """Energy, forces, stress, charge, spin and data set among named values, in our units; `volume` is in A^3."""
        found = {}
        for label, factor in (
            ("energy", factors["energy"]),
            ("forces", factors["forces"]),
            ("stress", factors["stress"]),
        ):
            if name := self.find(label, values):
                found[label] = np.asarray(values[name], dtype=np.float64) * factor
        if "forces" not in found and (name := self.find("gradient", values)):
            found["forces"] = -np.asarray(values[name], dtype=np.float64) * factors["forces"]
        name = self.find("virial", values) if "stress" not in found or "virial" in self.label_keys else None
        if name and volume > 0:
            found["stress"] = -np.asarray(values[name], dtype=np.float64) * factors["energy"] / volume
        for label in ("charge", "spin"):
            if name := self.find(label, values):
                found[label] = values[name]
        if (name := self.label_keys.get("data_set")) and name in values:
            found["data_set"] = str(values[name])
        if "energy" not in found and "forces" not in found:
            found["others"] = ", ".join(sorted(set(values) - {"numbers", "positions"})) or None
        elif also := [name for label in ("energy", "forces") for name in self.also(label, values)]:
            found["others"] = ", ".join(also)
        return found

    def also(self, label: str, values) -> list[str]:
        """Other usual names that a label has as well, with other values, unless it is configured which one counts."""
        taken, found = self.find(label, values), []
        for name in USUAL[label] if taken and not self.label_keys.get(label) else ():
            if name in values and name != taken and name not in ANOTHER:
                one, two = (np.asarray(values[k], dtype=np.float64) for k in (taken, name))
                same = one.size == two.size and np.allclose(one.ravel(), two.ravel(), equal_nan=True)
                found += [] if same else [name]
        return found
