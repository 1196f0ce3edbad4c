# SPDX-License-Identifier: Apache-2.0
"""Weights of the package to ours and back, and what is refused."""

import pytest
import torch
from golden import COMMON, set_waves
from make_golden import CASES, ODD

from convert_allegro import allegro_arguments, allegro_to_native, config_from_allegro, native_to_allegro
from modeling_allegro import Allegro, AllegroConfig


def made(options: dict) -> tuple[AllegroConfig, dict, dict]:
    config = AllegroConfig(**COMMON | options)
    model = Allegro(config)
    set_waves(model)
    return config, dict(model.state_dict()), native_to_allegro(model.state_dict(), config)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name):
    config, weights, theirs = made(CASES[name])
    found = config_from_allegro(allegro_arguments(config), theirs)
    back = allegro_to_native(theirs, found)
    for key, value in weights.items():
        if key.startswith("added_"):  # now in the configuration
            assert not back[key].any()
            now = getattr(found, f"energy_{key[6:]}")
            assert now == pytest.approx((torch.tensor(getattr(config, f"energy_{key[6:]}")) + value).tolist())
        else:
            torch.testing.assert_close(back[key], value, rtol=1e-15, atol=1e-15)
    same = {"pair_cutoffs", "energy_scales", "energy_shifts", "readout_width"}  # up to rounding, or a default
    assert {k: v for k, v in found.to_dict().items() if k not in same} == {
        k: v for k, v in config.to_dict().items() if k not in same
    }


def test_what_does_not_fit_is_refused():
    config, _, theirs = made(ODD)
    arguments = allegro_arguments(config)
    for change, words in (
        ({"weight_individual_irreps": False}, "weight_individual_irreps=False, which we have nothing for"),
        ({"avg_num_neighbors": "${training_data_stats:num_neighbors_mean}"}, "is no number yet"),
        ({"type_names": ["H", "C", "O1"]}, "O1 is no symbol of an element"),
        ({"readout_mlp_nonlinearity": "gelu"}, "must be silu"),
        ({"pair_potential": {"_target_": "nequip.nn.pair_potential.LennardJones"}}, "is not ZBL"),
        (
            {"pair_potential": {"_target_": "nequip.nn.ZBL", "polynomial_cutoff_p": 8.0}},
            "polynomial_cutoff_p=8.0 must be 6",
        ),
    ):
        with pytest.raises(ValueError, match=words.replace("$", r"\$").replace("{", r"\{")):
            config_from_allegro(arguments | change, theirs)
    with pytest.raises(ValueError, match="are 0 models of nequip"):
        allegro_to_native({"weight": torch.zeros(1)}, config)
    wider = AllegroConfig(**COMMON | ODD | {"num_scalars": 7})
    with pytest.raises(ValueError, match="do not fit"):
        allegro_to_native(native_to_allegro(made(ODD)[1], config), wider)
