# SPDX-License-Identifier: Apache-2.0
"""Structures come out of every kind of file as they went in, then from the cache; a mistake is one sentence."""

from pathlib import Path

import ase.io
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ase import Atoms
from ase.constraints import FixAtoms
from structure_files import arrays, labelled, text, with_labels, write

from atoms import arrow_cache, readers
from atoms.arrow_cache import open_structures
from atoms.structures import SCHEMA, structures_of, unit_factor


def opened(path, section="dataset", split=None, **options):
    kwargs = {"path": "structures", "data_files": path if isinstance(path, list) else str(path), "split": split}
    return structures_of(open_structures(section, kwargs, **options).with_format("arrow")[:])


def same(found, frames, stress=True, rtol=0.0):
    assert np.array_equal(found.num_atoms, [len(atoms) for atoms in frames])
    assert np.array_equal(found.numbers, np.concatenate([atoms.numbers for atoms in frames]))
    expected = {
        "positions": np.concatenate([atoms.positions for atoms in frames]),
        "cell": np.stack([atoms.cell.array for atoms in frames]),
        "energy": [atoms.calc.results["energy"] for atoms in frames],
        "forces": np.concatenate([atoms.calc.results["forces"] for atoms in frames]),
    } | ({"stress": np.stack([atoms.get_stress(voigt=False) for atoms in frames])} if stress else {})  # fmt: skip
    for name, value in expected.items():
        assert np.allclose(getattr(found, name), value, atol=2e-8, rtol=rtol), name
    assert (found.pbc == np.stack([atoms.pbc for atoms in frames])).all()


@pytest.mark.parametrize("name", ["a.extxyz", "a.xyz", "a.traj", "a.db", "a.aselmdb", "a.json", "a.extxyz.gz"])
def test_what_ase_writes(name, tmp_path):
    if name.endswith("aselmdb"):
        pytest.importorskip("ase_db_backends")
    frames = labelled(5)
    same(opened(write(frames, tmp_path / name)), frames)


@pytest.mark.parametrize("name", ["a.extxyz", "a.traj", "a.db"])
def test_parts_go_on_where_a_kill_left_them(name, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PART", 4)
    frames = labelled(11)
    path = write(frames, tmp_path / name)
    done, write_part = [], arrow_cache.write_part

    def killed(target, part, options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(target.name)
        return write_part(target, part, options)

    monkeypatch.setattr(arrow_cache, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(path)
    done.append("third")  # and so it runs on
    same(opened(path), frames)
    assert [d for d in done if d.endswith(".arrow")] == ["000000.arrow", "000001.arrow", "000002.arrow"]
    same(opened(path), frames)  # from the cache
    assert len(done) == 4


def test_several_processes_and_files(tmp_path, monkeypatch):
    frames = labelled(6)
    paths = [write(frames[:4], tmp_path / "a.extxyz"), write(frames[4:], tmp_path / "b.traj")]
    same(opened(str(tmp_path / "*.*"), num_processes=2), frames)
    same(opened(paths[::-1]), frames[4:] + frames[:4])
    same(opened(tmp_path), frames)  # a folder is all of its files


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    frames = labelled(4)
    same(opened(write(frames[:2], tmp_path / "a.extxyz")), frames[:2])
    same(opened(write(frames, tmp_path / "a.extxyz")), frames)


def test_parts_of_a_file(tmp_path):
    frames = labelled(10)
    path = write(frames, tmp_path / "a.extxyz")
    same(opened(path, split="train[:70%]"), frames[:7])
    same(opened(path, split="train[70%:]"), frames[7:])
    with pytest.raises(ValueError, match=r"dataset.load_dataset_kwargs.split=test: give train"):
        opened(path, split="test")
    with pytest.raises(ValueError, match="has none"):
        opened(path, split="train[:1%]")


def test_fixed_atoms_keep_their_forces(tmp_path):
    atoms = labelled(1)[0]
    expected = atoms.calc.results["forces"].copy()
    atoms.set_constraint(FixAtoms([0, 1]))
    ase.io.write(tmp_path / "a.traj", atoms)
    assert np.array_equal(opened(tmp_path / "a.traj").forces, expected)


def test_labels_by_other_names(tmp_path):
    atoms = labelled(1)[0]
    other = Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=True)
    other.info |= {
        "REF_energy": -1.5,
        "my_energy": -2.5,
        "REF_virial": np.arange(9.0).reshape(3, 3),
        "kind": "hot",
        "charge": 2,
    }
    other.arrays["REF_forces"] = np.ones((len(other), 3))
    path = write([other], tmp_path / "a.extxyz")
    found = opened(path)
    assert found.energy[0] == -1.5 and (found.forces == 1).all() and found.charge[0] == 2
    assert np.allclose(found.stress[0], -np.arange(9.0).reshape(3, 3) / atoms.get_volume())
    kwargs = {"path": "structures", "data_files": path}
    rows = open_structures("dataset", kwargs, {"energy": "my_energy", "data_set": "kind"})
    assert rows[0]["energy"] == -2.5 and rows[0]["data_set"] == "hot" and rows[0]["source"] == "a.extxyz"
    with pytest.raises(ValueError, match=r"dataset.label_keys.energie: there is no such key"):
        opened(path, label_keys={"energie": "E"})


def test_units(tmp_path):
    frames = labelled(2)
    path = write(frames, tmp_path / "a.extxyz")
    found = opened(path, units={"energy": "hartree", "forces": "-hartree/bohr", "stress": "-kbar"})
    assert np.allclose(found.energy, [27.211386246 * a.calc.results["energy"] for a in frames], atol=0)
    assert np.allclose(
        found.forces, -51.422067 * np.concatenate([a.calc.results["forces"] for a in frames]), rtol=1e-6
    )
    assert np.allclose(found.stress[0], -frames[0].get_stress(voigt=False) / 1602.17663)
    found = opened(path, units={"length": "bohr"})
    assert np.allclose(found.cell[0], 0.529177210903 * frames[0].cell.array)
    assert np.allclose(found.forces * 0.529177210903, np.concatenate([a.calc.results["forces"] for a in frames]))
    assert unit_factor("s", "stress", "eV/Ang^3") == unit_factor("s", "stress", "eV/A**3") == 1
    for units, words in (({"energy": "joule"}, "units.energy=joule"), ({"enrgy": "eV"}, "units.enrgy")):
        with pytest.raises(ValueError, match=words):
            opened(path, units=units)


def molecules(number=5):
    random = np.random.default_rng(0)
    frames = []
    for _ in range(number):
        atoms = Atoms(
            "Cu4Ni2", positions=random.permutation(6)[:, None] * [[1.5, 1.4, 1.2]] + random.normal(0, 0.1, (6, 3))
        )
        atoms.numbers = [29, 29, 29, 29, 28, 28]
        frames.append(with_labels(atoms, stress=False))
    return frames


KCAL = 0.0433641042


def test_rmd17_and_sgdml(tmp_path):
    frames = molecules()
    some = arrays(frames)
    np.savez(tmp_path / "rmd17.npz", nuclear_charges=some["numbers"], coords=some["positions"],
             energies=some["energy"] / KCAL, forces=some["forces"] / KCAL, old_indices=np.arange(5),
             old_energies=some["energy"])  # fmt: skip
    same(opened(tmp_path / "rmd17.npz"), frames, stress=False)
    np.savez(tmp_path / "sgdml.npz", z=some["numbers"].astype(np.uint8), R=some["positions"] / 0.529177210903,
             type="d", E=some["energy"][:, None] / 27.211386246, F=some["forces"] / 27.211386246 * 0.529177210903,
             r_unit="bohr", e_unit="hartree", name="x", theory="y")  # fmt: skip
    same(opened(tmp_path / "sgdml.npz"), frames, stress=False)
    np.savez(tmp_path / "plain.npz", **some)
    found = opened(tmp_path / "plain.npz")
    assert np.allclose(found.energy, some["energy"])


def test_hdf5_of_three_kinds(tmp_path):
    frames = molecules()
    some = arrays(frames)
    bohr, hartree = 0.529177210903, 27.211386246
    with h5py.File(tmp_path / "spice.h5", "w") as file:
        group = file.create_group("water dimer")
        group["atomic_numbers"] = some["numbers"]
        for name, values, unit in (
            ("conformations", some["positions"] / bohr, "bohr"),
            ("dft_total_energy", some["energy"] / hartree, "hartree"),
            ("dft_total_gradient", -some["forces"] / hartree * bohr, "hartree/bohr"),
        ):  # fmt: skip
            group[name] = values
            group[name].attrs["units"] = unit
    same(opened(tmp_path / "spice.h5"), frames, stress=False)
    with h5py.File(tmp_path / "ani.h5", "w") as file:
        file["Cu4Ni2/atomic_numbers"], file["Cu4Ni2/coordinates"] = some["numbers"], some["positions"]
        file["Cu4Ni2/wb97x.energy"], file["Cu4Ni2/wb97x.forces"] = some["energy"] / hartree, some["forces"] / hartree
    names = {"energy": "wb97x.energy", "forces": "wb97x.forces"}
    same(opened(tmp_path / "ani.h5", label_keys=names, units={"energy": "hartree"}), frames, stress=False)
    crystals = labelled(3)
    with h5py.File(tmp_path / "mace.h5", "w") as file:
        for i, atoms in enumerate(crystals):
            group = file.create_group(f"config_batch_0/config_{i}")
            group["atomic_numbers"], group["positions"], group["cell"] = (
                atoms.numbers,
                atoms.positions,
                atoms.cell.array,
            )
            group["pbc"] = atoms.pbc
            group["properties/energy"], group["properties/forces"] = (
                atoms.calc.results["energy"],
                atoms.calc.results["forces"],
            )
            group["properties/stress"], group["properties/dipole"] = atoms.calc.results["stress"], "None"
    same(opened(tmp_path / "mace.h5"), crystals)


def test_parquet(tmp_path):
    frames = labelled(4)
    rows = [{"atomic_numbers": a.numbers.tolist(), "positions": a.positions.tolist(), "cell": a.cell.tolist(),
             "pbc": a.pbc.tolist(), "energy": a.calc.results["energy"], "forces": a.calc.results["forces"].tolist(),
             "stress": a.get_stress(voigt=False).tolist()} for a in frames]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    same(opened(tmp_path / "a.parquet"), frames)
    # As a data set of the hub would come, by its own columns and then by ours.
    found = open_structures(
        "dataset", {"path": "parquet", "data_files": str(tmp_path / "a.parquet"), "split": "train"}
    )
    same(structures_of(found.with_format("arrow")[:]), frames)
    pq.write_table(found.with_format("arrow")[:], tmp_path / "ours.parquet")
    again = open_structures(
        "dataset", {"path": "parquet", "data_files": str(tmp_path / "ours.parquet"), "split": "train"}
    )
    assert again.column_names == SCHEMA.names
    same(structures_of(again.with_format("arrow")[:]), frames)
    same(opened(tmp_path / "ours.parquet"), frames)


def cut_short(tmp_path):
    (tmp_path / "a.extxyz").write_text("\n".join(text(labelled(3)).splitlines()[:-4]) + "\n")
    return tmp_path / "a.extxyz"


def no_count(tmp_path):
    (tmp_path / "a.extxyz").write_text(text(labelled(1)) + "oops\n")
    return tmp_path / "a.extxyz"


def bad_number(tmp_path):
    (tmp_path / "a.extxyz").write_text(
        text(labelled(2)).replace("Lattice=", "Lattice=x", 2).replace("Lattice=x", "Lattice=", 1)
    )
    return tmp_path / "a.extxyz"


def pickled(tmp_path):
    (tmp_path / "a.lmdb").write_bytes(b"data")
    return tmp_path / "a.lmdb"


def unknown(tmp_path):
    (tmp_path / "a.abc").write_text("nothing")
    return tmp_path / "a.abc"


def empty(tmp_path):
    (tmp_path / "a.extxyz").write_text("")
    return tmp_path / "a.extxyz"


def no_labels(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    return tmp_path / "a.npz"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (cut_short, "frame 2, the last, is cut short"),
        (no_count, "frame 1 should begin with its number of atoms, not 'oops'"), (unknown, "cannot be read"),
        (bad_number, "frame 1 cannot be read"), (pickled, "Python objects, which could run code"),
        (empty, "the file is empty"), (no_labels, "has no numbers among x"),
        (lambda folder: folder / "none.extxyz", "no such file"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(make, words, tmp_path):
    path = make(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        opened(path)
    assert str(path.name) in str(error.value) and "\n" not in str(error.value)


def test_memory_is_that_of_a_part(tmp_path, monkeypatch):
    """Writers get a few hundred rows at a time, however many a file has."""
    monkeypatch.setattr(arrow_cache, "ROWS_AT_ONCE", 3)
    most = []
    table_of = arrow_cache.table_of
    monkeypatch.setattr(arrow_cache, "table_of", lambda rows: most.append(len(rows)) or table_of(rows))
    frames = labelled(10)
    same(opened(write(frames, tmp_path / "a.extxyz")), frames)
    assert max(most) == 3 and sum(most) == 10


@pytest.mark.parametrize("kind", ["npz", "h5"])
def test_arrays_that_do_not_go_together(kind, tmp_path):
    values = {"numbers": [29, 29], "positions": np.arange(24.0).reshape(4, 2, 3), "energy": np.arange(3.0)}
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez(path, **values)
    else:
        with h5py.File(path, "w") as file:
            for name, array in values.items():
                file[f"group/{name}"] = array
    with pytest.raises(ValueError, match="energy has 3 entries, and there are 4 structures"):
        open_structures("dataset", {"path": "structures", "data_files": str(path)})


def test_hdf5_without_structures(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x/y"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"a\.h5 has no group with numbers and positions"):
        open_structures("dataset", {"path": "structures", "data_files": str(tmp_path / "a.h5")})


@pytest.mark.parametrize(
    ("old", "new", "words"), [("Al", "Qq", "there is no 'Qq'"), (" ", "\n", r"a line has \d columns, not 7")]
)
def test_what_is_wrong_in_an_extxyz(old, new, words, tmp_path):
    lines = text(labelled(3)).splitlines(True)
    last = max(i for i, line in enumerate(lines) if line.startswith("Al"))
    if new == "\n":  # cut short within the last line
        lines[-1] = " ".join(lines[-1].split()[:5])
    else:
        lines[last] = lines[last].replace(old, new)
    (tmp_path / "a.extxyz").write_text("".join(lines))
    with pytest.raises(ValueError, match=rf"a\.extxyz, frame \d cannot be read: {words}"):
        open_structures("dataset", {"path": "structures", "data_files": str(tmp_path / "a.extxyz")})


def test_a_damaged_part_is_converted_anew(tmp_path):
    given = {"path": "structures", "data_files": write(labelled(3), tmp_path / "a.extxyz")}
    rows = open_structures("dataset", given)
    part, energies = Path(rows.cache_files[0]["filename"]), rows["energy"][:]
    part.write_bytes(part.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"000000\.arrow was damaged and is removed; start again"):
        open_structures("dataset", given)
    assert open_structures("dataset", given)["energy"][:] == energies


def test_a_file_without_structures(tmp_path):
    (tmp_path / "a.out").write_text("Program PWSCF v.7.2 starts\n")
    with pytest.raises(ValueError, match=r"a\.out has no structures, or none that ASE finds"):
        open_structures("dataset", {"path": "structures", "data_files": str(tmp_path / "a.out")})
