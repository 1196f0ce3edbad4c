# SPDX-License-Identifier: Apache-2.0
"""Write golden.json: what the package `nequip` says with our weights. In an environment with that package:

pip install torch==2.13.0 && pip install -r models/nequip/requirements.txt -r models/nequip/requirements-peer.txt
python models/nequip/tests/make_golden.py
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from golden import COMMON, set_waves
from peer import peer_digest

from convert_nequip import config_from_nequip, native_to_nequip, nequip_arguments, nequip_to_native
from modeling_nequip import SIZES, NequIP, NequIPConfig


ODD = {"num_layers": 3, "num_features": [6, 4, 3], "num_element_features": 5, "radial_width": 10}
CASES = {
    "plain": ODD,
    "parity": ODD | {"parity": True, "num_layers": 4},
    "parity_l1": ODD | {"parity": True, "num_features": [6, 4]},
    "deep_radial": ODD | {"radial_depth": 2, "readout_depth": 1, "readout_width": 7, "cutoff_power": 5},
    "many_elements_few_features": ODD | {"num_element_features": 2},
    "zbl": ODD | {"zbl": "metal"},
    "zbl_real": ODD | {"zbl": "real"},
    "by_element": ODD | {
        "num_neighbors": [11.0, 17.0, 23.0], "train_scales": True, "train_shifts": True, "train_bessels": True,
        "pair_cutoffs": [[4.5, 3.5, 4.0], [4.4, 4.5, 3.0], [4.0, 4.2, 3.9]],
    },
    "float32": ODD | {"dtype": "float32"},
    "float32_parity": ODD | {"dtype": "float32", "parity": True, "num_layers": 4},
    **{name: size for name, size in SIZES.items() if name != "nequip_XS"},  # the published ones
}  # fmt: skip


def main() -> None:
    """All cases."""
    found = {}
    for name, options in CASES.items():
        config = NequIPConfig(**COMMON | options)
        model = NequIP(config)
        set_waves(model)
        weights = dict(model.state_dict())
        theirs, arguments = native_to_nequip(weights, config), nequip_arguments(config)
        again = nequip_to_native(theirs, config)
        assert all(torch.allclose(again[k], weights[k]) or k.startswith("added_") for k in weights), name
        assert config_from_nequip(arguments, theirs).num_features == config.num_features
        found[name] = peer_digest("nequip", arguments, theirs, lambda state, c=config: nequip_to_native(state, c))
        print(name, found[name]["energies"])
    path = Path(__file__).with_name("golden.json")
    path.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
