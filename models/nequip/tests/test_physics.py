# SPDX-License-Identifier: Apache-2.0
"""What holds for any potential, whatever its weights."""

import numpy as np
import pytest
import torch
from golden import COMMON, batch, set_waves, two_structures
from small_models import SMALL


CUTOFF = COMMON["cutoff"]


@pytest.fixture(params=SMALL)
def model(request):
    made = SMALL[request.param](COMMON)
    set_waves(made)
    return made.eval()


def say(model, *structures, cutoff=CUTOFF):
    return model(**batch(list(structures), cutoff))


def rotation(determinant: float) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.array([1.0, 1.0, determinant * np.sign(np.linalg.det(q))])


@pytest.mark.parametrize("determinant", [1.0, -1.0])
def test_turned_and_mirrored(model, determinant):
    (x, cell, types), q = two_structures()[0], rotation(determinant)
    here, there = say(model, (x, cell, types)), say(model, (x @ q.T, cell @ q.T, types))
    assert np.linalg.det(q) == pytest.approx(determinant) and here.forces.abs().max() > 0.05
    torch.testing.assert_close(there.energies, here.energies, rtol=0, atol=1e-11)
    torch.testing.assert_close(there.forces, here.forces @ torch.tensor(q.T), rtol=0, atol=1e-11)
    q = torch.tensor(q)
    torch.testing.assert_close(there.stress, q @ here.stress @ q.T, rtol=0, atol=1e-12)


def test_moved_and_in_other_order(model):
    x, cell, types = two_structures()[0]
    order = np.random.default_rng(1).permutation(len(x))
    here, there = say(model, (x, cell, types)), say(model, ((x + [0.3, -7.0, 2.0])[order], cell, types[order]))
    torch.testing.assert_close(there.energies, here.energies, rtol=0, atol=1e-11)
    torch.testing.assert_close(there.forces, here.forces[order], rtol=0, atol=1e-11)
    torch.testing.assert_close(here.forces.sum(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-11)


def test_a_supercell_has_twice_the_energy_and_the_same_stress(model):
    x, cell, types = two_structures()[0]
    twice = np.concatenate([x, x + cell[1]]), cell * np.array([[1.0], [2.0], [1.0]]), np.tile(types, 2)
    here, there = say(model, (x, cell, types)), say(model, twice)
    torch.testing.assert_close(there.energies, 2 * here.energies, rtol=0, atol=1e-11)
    torch.testing.assert_close(there.forces, here.forces.repeat(2, 1), rtol=0, atol=1e-11)
    torch.testing.assert_close(there.stress, here.stress, rtol=0, atol=1e-12)


def test_far_molecules_add_up_and_a_lone_atom_is_its_shift(model):
    x, _, types = two_structures()[1]
    away = np.concatenate([x, x + [50.0, 0, 0], [[0, 90.0, 0]]]), np.zeros((3, 3)), np.array([*types, *types, 2])
    one, all_ = say(model, (x, np.zeros((3, 3)), types)), say(model, away)
    torch.testing.assert_close(all_.energies, 2 * one.energies + COMMON["energy_shifts"][2], rtol=0, atol=1e-11)
    assert all_.forces[-1].abs().max() == 0 and all_.stress.abs().max() == 0


def test_a_batch_is_its_structures(model):
    both = two_structures()
    together, apart = say(model, *both), [say(model, one) for one in both]
    torch.testing.assert_close(together.energies, torch.cat([o.energies for o in apart]), rtol=0, atol=1e-12)
    torch.testing.assert_close(together.forces, torch.cat([o.forces for o in apart]), rtol=0, atol=1e-12)
    torch.testing.assert_close(together.stress, torch.cat([o.stress for o in apart]), rtol=0, atol=1e-13)


def test_forces_and_stress_are_derivatives(model):
    (x, cell, types), h = two_structures()[0], 1e-4
    found, volume = say(model, (x, cell, types)), abs(np.linalg.det(cell))

    def slope(change):
        up, down = (float(say(model, (*change(step), types)).energies) for step in (h, -h))
        return (up - down) / (2 * h)

    for atom, axis in ((0, 0), (3, 1), (7, 2)):
        step = np.zeros_like(x)
        step[atom, axis] = 1.0
        force = -slope(lambda size, step=step: (x + size * step, cell))
        assert float(found.forces[atom, axis]) == pytest.approx(force, rel=1e-5, abs=1e-7)
    for a, b in ((0, 0), (1, 2), (0, 2)):
        strain = np.zeros((3, 3))
        strain[a, b] += 0.5
        strain[b, a] += 0.5
        stress = slope(lambda size, s=strain: (x @ (np.eye(3) + size * s), cell @ (np.eye(3) + size * s))) / volume
        assert float(found.stress[0, a, b]) == pytest.approx(stress, rel=1e-5, abs=1e-8)


def test_smooth_at_the_cutoff(model):
    """Force and energy of a pair go to nothing before its neighbour list forgets it."""
    types, none = np.array([0, 1]), np.zeros((3, 3))

    def pair(distance):
        return say(model, (np.array([[0.0, 0, 0], [distance, 0, 0]]), none, types))

    apart = COMMON["energy_shifts"][0] + COMMON["energy_shifts"][1]
    forces = [float(pair(CUTOFF - gap).forces.abs().max()) for gap in (0.4, 0.04, 0.004, -0.01)]
    assert forces[3] == 0 and forces[2] < 3e-2 * forces[1] < 1e-3 * forces[0]
    assert abs(float(pair(CUTOFF - 1e-3).energies) - apart) < 1e-8


def test_energy_is_kept_in_a_short_run(model):
    """By velocity Verlet the total energy swings with the square of the time step, and does not drift."""
    x, cell, types = two_structures()[0]

    def swing(step, number):
        position, velocity = x.copy(), 0.3 * np.random.default_rng(5).normal(size=x.shape)
        out, totals = say(model, (position, cell, types)), []
        for _ in range(number):
            velocity = velocity + 0.5 * step * out.forces.numpy()
            position = position + step * velocity
            out = say(model, (position, cell, types))
            velocity = velocity + 0.5 * step * out.forces.numpy()
            totals.append(float(out.energies) + 0.5 * (velocity**2).sum())
        return max(totals) - min(totals)

    step = 0.05 / float(say(model, (x, cell, types)).forces.abs().max()) ** 0.5
    coarse, fine = swing(step, 15), swing(step / 2, 30)
    assert 0 < fine < 0.35 * coarse


def test_fp32_is_fp32_of_the_same(model):
    structures = two_structures()
    small = type(model)(type(model.config)(**{**model.config.__dict__, "dtype": "float32"}))
    set_waves(small)
    found, exact = say(small.eval(), *structures), say(model, *structures)
    assert found.energies.dtype == torch.float64
    torch.testing.assert_close(found.forces, exact.forces, rtol=0, atol=1e-5 * float(exact.forces.abs().max()) + 1e-6)
    torch.testing.assert_close(found.energies, exact.energies, rtol=1e-6, atol=0)
