# SPDX-License-Identifier: Apache-2.0
"""Small models with everything, by name, of the arguments that all potentials have."""

from modeling_nequip import NequIP, NequIPConfig


ODD = {"num_layers": 3, "num_features": [6, 4, 3], "num_element_features": 5, "radial_width": 10}
SMALL = {
    "plain": lambda common: NequIP(NequIPConfig(**common, **ODD)),
    "parity_zbl": lambda common: NequIP(
        NequIPConfig(**common, **ODD | {"parity": True, "num_layers": 4, "num_features": [5, 4]}, zbl="metal")
    ),
}
