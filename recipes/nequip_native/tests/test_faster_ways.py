# SPDX-License-Identifier: Apache-2.0
"""Kernels, lengths that edges share and a compiled program give the numbers of the plain way, and all gradients."""

import pytest
import torch
from ase import Atoms
from this_recipe import structures

from atoms.ase_calculator import graph
from atoms.compiled import CompiledDerivatives
from atoms.first_weights import init_parameters
from atoms.kernels import CPP, products
from atoms.losses import loss_terms
from atoms.neighbours import lengths_once
from atoms.tensor_product import TORCH
from modeling_allegro import Allegro, AllegroConfig
from modeling_nequip import NequIP, NequIPConfig


pytestmark = pytest.mark.skipif(
    products("auto", torch.device("cpu"))[1] != "cpp", reason="there is no C++ compiler for kernels"
)
ELEMENTS, CUTOFF = ["Al", "Ni", "Cu"], 4.2
COMMON = {"elements": ELEMENTS, "cutoff": CUTOFF, "num_neighbors": 20.0, "energy_scales": 3 * [1.0],
          "energy_shifts": 3 * [0.5], "dtype": "float64"}  # fmt: skip
# Channels that are whole vectors, and some that are not; pseudovectors; l up to 3.
MODELS = {
    "smallest": lambda: NequIP(NequIPConfig(**COMMON, num_layers=1, num_features=[3, 2], radial_width=4)),
    "small": lambda: NequIP(NequIPConfig(**COMMON, num_layers=2, num_features=[4, 3], radial_width=4)),
    "nequip": lambda: NequIP(NequIPConfig(**COMMON, num_layers=2, num_features=[19, 8, 5, 3], radial_width=8)),
    "with parity": lambda: NequIP(NequIPConfig(**COMMON, num_layers=3, num_features=[17, 9], parity=True)),
    "allegro": lambda: Allegro(AllegroConfig(**COMMON, num_scalars=8, num_tensors=11)),
    "with splines": lambda: Allegro(AllegroConfig(**COMMON, num_scalars=4, num_tensors=3, radial="spline")),
}  # fmt: skip


def batch(*some: int | Atoms) -> dict[str, torch.Tensor]:
    """Some structures laid end to end, of these or by their numbers, with labels that are waves."""
    known = structures()
    found = [graph(known[one] if isinstance(one, int) else one, ELEMENTS, CUTOFF, None) for one in some]
    sizes = torch.tensor([len(one["types"]) for one in found])
    starts = sizes.cumsum(0) - sizes
    inputs = {name: torch.cat([one[name] for one in found]) for name in ("positions", "types", "cell", "shifts")}
    inputs["edges"] = torch.cat([one["edges"] + start for one, start in zip(found, starts, strict=True)], 1)
    inputs["structure"] = torch.repeat_interleave(sizes)
    inputs["energy"] = torch.sin(torch.arange(1.0, 1 + len(found))).double()
    inputs["forces"] = torch.cos(torch.arange(3.0 * int(sizes.sum()))).double().view(-1, 3)
    return inputs


def answers(model: torch.nn.Module, inputs: dict) -> list[torch.Tensor]:
    """Energies, forces, stress, the loss and its gradients."""
    model.zero_grad()
    counts = {"energies": len(inputs["cell"]), "force_components": inputs["forces"].numel(), "stress_components": 0}
    out = model(**inputs, counts=counts)
    out.loss.backward()
    return [out.energies, out.forces, out.stress, out.loss, *(p.grad for p in model.parameters())]


def built(name: str) -> torch.nn.Module:
    model = MODELS[name]()
    init_parameters(model, 3)
    model.losses = loss_terms(ELEMENTS)
    return model.train()


def once_and_row(inputs: dict) -> dict[str, torch.Tensor]:
    once, row = lengths_once(inputs["edges"].numpy(), inputs["shifts"].long().numpy())
    return {"once": torch.from_numpy(once), "row": torch.from_numpy(row)}


@pytest.mark.parametrize("name", MODELS)
def test_all_ways_give_one_answer(name):
    model, inputs = built(name), batch(0, 3, 5)
    plain, shared = answers(model, inputs), inputs | once_and_row(inputs)
    assert len(shared["once"]) == inputs["edges"].shape[1] / 2
    ways = {"shared lengths": (TORCH, shared), "kernels": (CPP, inputs), "both": (CPP, shared)}
    for way, (model.kernels, given) in ways.items():
        for expected, found in zip(plain, answers(model, given), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=lambda m, way=way: f"{way}: {m}")


def test_in_threads():
    model, inputs = built("nequip"), batch(0, 3)
    model.kernels, threads = CPP, torch.get_num_threads()
    torch.set_num_threads(1)
    alone = answers(model, inputs)
    torch.set_num_threads(3)
    together = answers(model, inputs)
    torch.set_num_threads(threads)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "kernels", "backend"),
    [
        ("small", CPP, "aot_eager"),  # without the compiler: what can go wrong is traced before it
        pytest.param("small", CPP, "inductor", marks=pytest.mark.slow),
        pytest.param("small", TORCH, "aot_eager", marks=pytest.mark.slow),  # by inductor it would take minutes
        pytest.param("allegro", CPP, "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_one_compiled_program_for_all_sizes(name, kernels, backend):
    model = built(name)
    model.kernels, model.compiled = kernels, CompiledDerivatives(model, backend)
    for numbers in ((0, 3), (5, 0, 1, 2)):
        inputs = batch(*numbers)
        inputs |= once_and_row(inputs)
        torch.compiler.set_stance("default" if len(numbers) == 2 else "fail_on_recompile")
        try:
            found = answers(model, inputs)
        finally:
            torch.compiler.set_stance("default")
        compiled, model.compiled = model.compiled, None
        torch.testing.assert_close(found, answers(model, inputs), rtol=1e-9, atol=1e-12)
        model.compiled = compiled


def test_a_compiled_program_of_one_pair_and_of_no_edge():
    model = built("smallest")
    model.kernels, compiled = CPP, CompiledDerivatives(model, "aot_eager")
    pair = Atoms("AlNi", [[0, 0, 0], [0, 0, 2.0]])
    for structure, num_edges in ((pair, 2), (Atoms("Cu"), 0)):
        inputs = batch(structure)
        assert inputs["edges"].shape[1] == num_edges
        inputs |= once_and_row(inputs)
        model.compiled = compiled
        found, model.compiled = answers(model, inputs), None
        torch.testing.assert_close(found, answers(model, inputs), rtol=1e-9, atol=1e-12)


def test_an_edge_whose_reverse_is_not_there():
    """`max_neighbors` can leave out one direction of a pair; it stands for itself then."""
    inputs = batch(3)
    kept = torch.arange(inputs["edges"].shape[1]) % 7 != 3
    inputs["edges"], inputs["shifts"] = inputs["edges"][:, kept], inputs["shifts"][kept]
    once, row = once_and_row(inputs).values()
    assert len(once) > len(row) / 2
    i, j = inputs["edges"]
    vectors = inputs["positions"][j] - inputs["positions"][i] + inputs["shifts"] @ inputs["cell"][0]
    torch.testing.assert_close(vectors.norm(dim=1)[once][row], vectors.norm(dim=1))
