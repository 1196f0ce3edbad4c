# SPDX-License-Identifier: Apache-2.0
"""Small models with everything, by name, of the arguments that all potentials have."""

from modeling_allegro import Allegro, AllegroConfig


ODD = {"num_layers": 2, "l_max": 2, "num_scalars": 8, "num_tensors": 4, "radial_features": 10, "mlp_width": 12}
SMALL = {
    "plain": lambda common: Allegro(AllegroConfig(**common, **ODD)),
    "spline_zbl": lambda common: Allegro(
        AllegroConfig(**common, **ODD | {"num_layers": 3, "l_max": 1, "radial": "spline"}, zbl="metal")
    ),
}
