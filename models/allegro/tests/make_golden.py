# SPDX-License-Identifier: Apache-2.0
"""Write golden.json: what the package `nequip-allegro` says with our weights. In an environment with it:

pip install torch==2.13.0 && pip install -r models/allegro/requirements.txt -r models/allegro/requirements-peer.txt
python models/allegro/tests/make_golden.py
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from golden import COMMON, set_waves
from peer import peer_digest

from convert_allegro import allegro_arguments, allegro_to_native, config_from_allegro, native_to_allegro
from modeling_allegro import SIZES, Allegro, AllegroConfig


ODD = {"num_layers": 2, "l_max": 2, "num_scalars": 8, "num_tensors": 4, "radial_features": 10, "mlp_width": 12}
CASES = {
    "plain": ODD,
    "no_parity": ODD | {"parity": False, "num_layers": 3},
    "three_layers": ODD | {"num_layers": 3, "mlp_depth": 2},
    "one_layer": ODD | {"num_layers": 1, "l_max": 3},
    "spline": ODD | {"radial": "spline", "num_splines": 8, "spline_span": 6},
    "paths_without_channels": ODD | {"coupled_paths": False},
    "zbl": ODD | {"zbl": "metal"},
    "by_element": ODD | {
        "num_neighbors": [11.0, 17.0, 23.0], "train_scales": True, "train_shifts": True, "train_bessels": True,
        "pair_cutoffs": [[4.5, 3.5, 4.0], [4.4, 4.5, 3.0], [4.0, 4.2, 3.9]],
    },
    "float32": ODD | {"dtype": "float32"},
    "float32_spline": ODD | {"dtype": "float32", "radial": "spline"},
    **{name: size for name, size in SIZES.items() if name != "allegro_XL"},
}  # fmt: skip


def main() -> None:
    """All cases."""
    found = {}
    for name, options in CASES.items():
        config = AllegroConfig(**COMMON | options)
        model = Allegro(config)
        set_waves(model)
        weights = dict(model.state_dict())
        theirs, arguments = native_to_allegro(weights, config), allegro_arguments(config)
        again = allegro_to_native(theirs, config)
        assert all(torch.allclose(again[k], weights[k]) or k.startswith("added_") for k in weights), name
        assert config_from_allegro(arguments, theirs).radial == config.radial
        found[name] = peer_digest("allegro", arguments, theirs, lambda state, c=config: allegro_to_native(state, c))
        print(name, found[name]["energies"])
    path = Path(__file__).with_name("golden.json")
    path.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
