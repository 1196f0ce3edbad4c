# SPDX-License-Identifier: Apache-2.0
"""Energies, forces and stress of a potential as one compiled program, through which the loss's gradients go."""

from functools import reduce
from operator import mul

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as tracing
from torch.fx.experimental.proxy_tensor import make_fx

from atoms.neighbours import lengths_once
from atoms.potential import Potential


def apart():
    """A context in which numbers of atoms, edges and the like that are equal by chance are not taken for one."""
    return tracing.patch(use_duck_shape=False)


class _Derived(nn.Module):
    """Apart from the model, so that calling it runs none of the model's hooks."""

    def __init__(self, model: Potential):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor | None):
        return self.model.derive(*inputs)


class CompiledDerivatives:
    """As `derive` of a potential in training; compiled at the first batch, for batches of all sizes."""

    def __init__(self, model: Potential, backend: str = "inductor"):
        self.model, self.backend, self.programs = model, backend, {}

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        parameters = {f"model.{name}": value for name, value in self.model.named_parameters()}
        given = tuple(x is not None for x in inputs)
        if given not in self.programs:
            traced = self.trace(parameters, inputs)
            self.programs[given] = torch.compile(traced, backend=self.backend, dynamic=True, fullgraph=True)
        with apart():
            return self.programs[given](list(parameters.values()), *(x for x in inputs if x is not None))

    def trace(self, parameters: dict[str, Tensor], inputs: tuple) -> torch.fx.GraphModule:
        """The derivative by vectors becomes part of the program, so that one more can be taken by the parameters."""
        derived, given = _Derived(self.model), [x is not None for x in inputs]

        def program(values: list[Tensor], *some: Tensor) -> tuple[Tensor, ...]:
            left = iter(some)
            every = tuple(next(left) if there else None for there in given)
            return torch.func.functional_call(derived, dict(zip(parameters, values, strict=True)), every)

        example = example_inputs(inputs[0].device)
        some = [x for x, there in zip(example, given, strict=True) if there]
        values = list(parameters.values())
        program(values, *some)  # tables are made outside of the trace
        with apart():
            traced = make_fx(program, tracing_mode="symbolic", _allow_non_fake_inputs=True)(values, *some)
        for node in list(traced.graph.nodes):
            if node.target is torch.ops.aten.detach.default:
                # What autograd keeps for its first derivative is cut off from the second.
                node.replace_all_uses_with(node.args[0])
                traced.graph.erase_node(node)
            elif node.target is torch.ops.aten.sym_numel.default:
                # Dynamo does not take it where it is a plain number, as of a batch with one pair.
                with traced.graph.inserting_before(node):
                    sizes = [traced.graph.call_function(torch.ops.aten.sym_size.int, (node.args[0], d))
                             for d in range(node.args[0].meta["val"].dim())]  # fmt: skip
                    found = reduce(lambda a, b: traced.graph.call_function(mul, (a, b)), sizes)
                node.replace_all_uses_with(found)
                traced.graph.erase_node(node)
        traced.recompile()
        return traced


def example_inputs(device: torch.device) -> tuple[Tensor, ...]:
    """Two rows of atoms, each beside the next."""
    of_rows, num_atoms = (7, 6), 13
    positions = torch.zeros(num_atoms, 3, dtype=torch.float64)
    positions[:, 0] = 1.3 * torch.arange(num_atoms)
    positions[:, 1] = torch.arange(num_atoms) % 3 * 0.4
    structure = torch.repeat_interleave(torch.tensor(of_rows))
    pairs = [(i, i + 1) for i in range(num_atoms - 1) if structure[i] == structure[i + 1]]
    edges = torch.tensor(sorted([*pairs, *((j, i) for i, j in pairs)])).T.contiguous()
    shifts = torch.zeros(edges.shape[1], 3, dtype=torch.float64)
    once, row = (torch.from_numpy(x) for x in lengths_once(edges.numpy(), shifts.numpy()))
    cell = 30 * torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    types = torch.zeros(num_atoms, dtype=torch.int64)
    found = (positions, types, cell, edges, shifts, structure, once, row)
    return tuple(x.to(device) for x in found)
