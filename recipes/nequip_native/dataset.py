# SPDX-License-Identifier: Apache-2.0
"""Read structures for training and validation, and group them into micro-batches."""

import os
from functools import cached_property
from hashlib import sha256

import datasets
import numpy as np
import pyarrow.compute as pc
from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveInt

from atoms.arrow_cache import open_structures
from atoms.checks import composition
from atoms.findings import Policy, judge
from atoms.neighbours import Cutoffs, as_cutoffs
from atoms.structures import NUMBERS, Structures, concatenated, structures_of
from atoms.survey import Survey, Surveys, statistics, survey
from collator import GraphCollator
from common.distributed import Distributed
from common.epoch_plan import EpochPlan, Grouping
from common.loader import Loader, start_worker_server
from common.mixture import Mixture, sources_of_mix
from common.open_data import whence
from common.validation import Validator
from metrics import Errors


# What evaluate.py assumes for a model whose run is not known.
WITHOUT_A_RUN = (
    "model_tag=nequip_S",  # nothing is built of it
    "validation.load_dataset_kwargs={path: structures, data_files: ???, split: train}",
    "dataset.atom_micro_batch_size=1000",
)
EXAMPLE = "validation.load_dataset_kwargs.data_files=my.xyz"
READ = ("numbers", "positions", "cell", "pbc", "energy", "forces", "stress", "charge", "spin")


class StructureRows:
    """A source of structures whose size is their number of atoms or edges; those not `kept` have size 0."""

    def __init__(self, rows: datasets.Dataset, found: Survey, by: str, kept: np.ndarray, by_data_set: bool = False):
        self.rows, self.index, self.kept = rows, found.size_index(by), None if kept.all() else kept
        self.atoms = found.size_index("sizes").digest
        self.table = rows.with_format("arrow", columns=list(READ))
        self.data_set, self.data_sets = data_sets_of(rows) if by_data_set else (None, [])

    def __len__(self) -> int:
        return len(self.rows)

    def sizes(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Return the atoms, or edges, of each row: at least 1, and 0 for a row that is left out."""
        sizes = np.maximum(self.index.sizes[rows], 1)
        return sizes if self.kept is None else sizes * self.kept[rows]

    def read(self, rows: np.ndarray, epoch: int) -> Structures:
        """Read structures, laid end to end."""
        found = structures_of(self.table[rows])
        found.data_set = None if self.data_set is None else self.data_set[rows]
        return found

    def describe(self, rows: np.ndarray, epoch: int) -> list[str]:
        """Return a line for each row: composition, energy, file and frame."""
        some, lines = self.rows.with_format(None)[rows], []
        for numbers, energy, source, key in zip(
            *(some[k] for k in ("numbers", "energy", "source", "key")), strict=True
        ):
            label = "no energy" if energy is None else f"{energy:.4f} eV"
            lines.append(f"{composition(np.array(numbers))}  {label}  {source} frame {key}")
        return lines

    @cached_property
    def identity(self) -> dict:
        """Identify the data wherever it lies, by the sizes of all rows and the contents of 64 of them."""
        some = structures_of(self.table[np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64))])
        return {
            "num_rows": len(self), "sizes": self.atoms,
            "content": digest(some.numbers, some.positions, some.energy, some.forces),
            "kept": digest(*([] if self.kept is None else [self.kept])),
            "cells": digest(some.cell, some.pbc, some.stress, some.charge, some.spin),
        }  # fmt: skip


def digest(*arrays: np.ndarray) -> str:
    """Hash arrays."""
    return sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


class StructureMixture(Mixture):
    """Several sources, each with an exact share of every epoch (`dataset.mix`)."""

    def read(self, rows: np.ndarray, epoch: int) -> Structures:
        """Read structures, laid end to end in the order of `rows`."""
        parts = [(places, self.sources[k].read(own, turn)) for k, places, own, turn in self._parts(rows, epoch)]
        order = np.argsort(np.concatenate([places for places, _ in parts]))
        return concatenated([structures for _, structures in parts]).take(order)


def data_sets_of(rows: datasets.Dataset) -> tuple[np.ndarray, list[str]]:
    """Return the number of each row's data set, and the names of the data sets: of a label, or the file's."""
    table = rows.with_format("arrow", columns=["data_set", "source"])[:]
    names = pc.coalesce(table["data_set"], table["source"]).combine_chunks()
    encoded = names.dictionary_encode()
    encoded = encoded.combine_chunks() if hasattr(encoded, "combine_chunks") else encoded
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def grouping_of(
    section: str, micro_batch_size: int | None, atom_micro_batch_size: int | None, edge_micro_batch_size: int | None
) -> tuple[Grouping, str]:
    """Return how rows become micro-batches, and by which sizes. Raises ValueError unless exactly one key is set."""
    given = {
        "micro_batch_size": micro_batch_size, "atom_micro_batch_size": atom_micro_batch_size,
        "edge_micro_batch_size": edge_micro_batch_size,
    }  # fmt: skip
    found = [key for key, value in given.items() if value is not None]
    if len(found) != 1:
        what = (
            " and ".join(f"{section}.{key}={given[key]}" for key in found) + " are both set"
            if found
            else "none is set"
        )
        raise ValueError(f"{what}: give one of {', '.join(f'{section}.{key}' for key in given)}.")
    if micro_batch_size:
        return Grouping(num_rows=micro_batch_size), "sizes"
    return Grouping(budget=given[found[0]]), "edges" if edge_micro_batch_size else "sizes"


def open_source(distributed: Distributed, section: str, cutoffs: Cutoffs, load_dataset_kwargs: dict,
                label_keys: dict | None, units: dict | None, max_neighbors: int | None, bad_frames: Policy,
                odd_frames: Policy, max_rows: int | None = None,
                ) -> tuple[datasets.Dataset, Survey, np.ndarray, list[str]]:  # fmt: skip
    """Return the rows, a survey of them, a mask of those that are kept, and notes for the log; all ranks call it."""
    processes = max(1, (os.cpu_count() or 1) // distributed.num_local_ranks)
    with distributed.main_first():
        quiet = not distributed.is_main
        rows = open_structures(section, load_dataset_kwargs, label_keys, units, processes, quiet)
        if max_rows is not None and max_rows < len(rows):
            fingerprint, rows = rows._fingerprint, rows.select(range(max_rows))
            rows._fingerprint = sha256(f"{fingerprint} {max_rows}".encode()).hexdigest()[:32]
    found = survey(distributed, section, rows, cutoffs, max_neighbors)
    with distributed.shared_errors():
        kept, notes = judge(section, found, bad_frames, odd_frames)
    found.only(kept, distributed)
    return rows, found, kept, notes


def amount_of(found: Survey, kept: np.ndarray) -> str:
    """Say how many structures and atoms are kept."""
    num_atoms = int((found.size_index("sizes").sizes * kept).sum(dtype=np.int64))
    return f"{int(kept.sum()):,} structures, {num_atoms:,} atoms"


def plan_of(section: str, source: StructureRows | StructureMixture, grouping: Grouping, by: str, seed: int | None,
            window_rows: int) -> tuple[EpochPlan, list[str]]:  # fmt: skip
    """Return the plan, and a note if its first window is under 99% full. Raises ValueError for too small a budget."""
    plan = EpochPlan(source, grouping, seed, window_rows)
    if grouping.budget is None:
        return plan, []
    unit, key = ("edges", "edge") if by == "edges" else ("atoms", "atom")
    for one in getattr(source, "sources", [source]):
        sizes = one.sizes(np.arange(len(one)), 0)
        if (largest := int(sizes.max())) > grouping.budget:
            place = one.rows[int(sizes.argmax())]
            raise ValueError(
                f"{section}.{key}_micro_batch_size={grouping.budget}: frame {place['key']} of {place['source']} alone "
                f"has {largest} {unit}; give at least that."
            )
    sizes = source.sizes(np.arange(len(source)), 0)
    largest = int(sizes.max())
    batches = plan.window(0, 0)
    full = sizes.sum() / grouping.budget if len(source) <= plan.window_rows else len(batches)
    fill = sum(int(source.sizes(batch.rows, 0).sum()) for batch in batches) / (grouping.budget * max(len(batches), 1))
    if fill >= 0.99 or full < 20:
        return plan, []
    alike, key = int(sizes[sizes > 0].min()), f"{section}.{key}_micro_batch_size"
    better = f"{grouping.budget // alike * alike} would suit structures of {alike} {unit}"
    way = f"{key}={better}" if alike == largest else f"a larger {key} fills better"
    return plan, [f"{section}: micro-batches are {fill:.0%} full, since structures are not cut; {way}."]


class TrainLoader(Loader):
    """The training data: the section `dataset`; `elements` are the model's types (None: those of the data)."""

    def __init__(
        self,
        distributed: Distributed,
        seed: int,
        cutoffs: Cutoffs | float,
        elements: list[str] | None,
        *,
        load_dataset_kwargs: dict,
        mix: dict | None = None,
        label_keys: dict | None = None,
        units: dict | None = None,
        micro_batch_size: PositiveInt | None = None,
        atom_micro_batch_size: PositiveInt | None = None,
        edge_micro_batch_size: PositiveInt | None = None,
        max_neighbors: PositiveInt | None = None,
        bad_frames: Policy = "refuse",
        odd_frames: Policy = "keep",
        num_workers: NonNegativeInt = 1,
        window_rows: PositiveInt = 10_000,
    ):
        section, cutoffs = "dataset", as_cutoffs(cutoffs)
        grouping, by = grouping_of(section, micro_batch_size, atom_micro_batch_size, edge_micro_batch_size)
        if num_workers:
            start_worker_server()
        asked = {
            section: {
                "load_dataset_kwargs": load_dataset_kwargs, "label_keys": label_keys, "units": units,
                "bad_frames": bad_frames, "odd_frames": odd_frames,
            }
        }  # fmt: skip
        if mix is not None:
            parts = sources_of_mix(f"{section}.mix", mix, asked[section])
            asked = {f"{section}.mix.{name}": part for name, part in parts.items()}
        sources, surveys, facts, notes = [], [], [], []
        for name, part in asked.items():
            keys = {key: value for key, value in part.items() if key != "weight"}
            rows, found, kept, told = open_source(distributed, name, cutoffs, max_neighbors=max_neighbors, **keys)
            sources.append(StructureRows(rows, found, by, kept))
            surveys.append(found)
            facts.append(f"{name}: {amount_of(found, kept)} from {whence(part['load_dataset_kwargs'])}")
            notes += told
        found, source = Surveys(surveys), sources[0]
        if mix is not None:
            weights = {name: part["weight"] for name, part in parts.items()}
            source = StructureMixture(dict(zip(parts, sources, strict=True)), weights, seed)
            notes.append(f"{section}.mix: {source.note()}.")
        self.elements = check_elements(section, found, elements)
        self.statistics, told = statistics(found, self.elements)
        plan, full = plan_of(section, source, grouping, by, seed, window_rows)
        collate = GraphCollator(section, cutoffs, self.elements, max_neighbors)
        super().__init__(distributed, section, plan, collate, num_workers)
        self.notes += [*notes, *told, *full]
        self.sources += facts

    def facts(self, config: DictConfig) -> list[str]:
        """Say what is read, and which terms of the loss have no labels."""
        notes, scheduled = [], config.loss_schedules or {}
        for label, number in self.statistics["num_labels"].items():
            key = f"{label}_weight"
            if not number and (config.loss_kwargs[key] or key in scheduled):
                notes.append(
                    f"{self.section}: no structure has {label} [{label}], so loss_kwargs.{key}="
                    f"{config.loss_kwargs[key]} has no effect; name what the file calls it, "
                    f"+dataset.label_keys.{label}=..., or set the weight to 0."
                )
        return [*super().facts(config), *notes]


def open_plan(config: DictConfig, distributed: Distributed) -> EpochPlan:
    """Return the plan that a run with this configuration follows, for commands that do not train."""
    from build_model import model_config

    wanted = model_config(config.model_tag, config.precision, config.init_from, **config.model_kwargs)
    return TrainLoader(distributed, config.seed, wanted.cutoffs, wanted.elements, **config.dataset).plan


def check_elements(section: str, found: Survey | Surveys, elements: list[str] | None) -> list[str]:
    """Return the model's elements, by default those of the data. Raises ValueError if the data has others."""
    present = found.elements()
    if elements is None:
        return present
    if unknown := [symbol for symbol in elements if symbol not in NUMBERS]:
        raise ValueError(f"{unknown[0]} is no symbol of an element.")
    if missing := [symbol for symbol in present if symbol not in elements]:
        raise ValueError(
            f"{section}: there is {missing[0]} in the data, and the model knows {', '.join(elements)}; "
            f"model_kwargs.elements=[{','.join([*elements, *missing])}] adds it."
        )
    return list(elements)


def open_validation(
    distributed: Distributed,
    cutoffs: Cutoffs | float,
    elements: list[str],
    *,
    load_dataset_kwargs: dict | None = None,
    every_n_steps: PositiveInt | None = None,
    max_rows: PositiveInt | None = None,
    label_keys: dict | None = None,
    units: dict | None = None,
    micro_batch_size: PositiveInt | None = None,
    atom_micro_batch_size: PositiveInt | None = None,
    edge_micro_batch_size: PositiveInt | None = None,
    max_neighbors: PositiveInt | None = None,
    bad_frames: Policy = "refuse",
    odd_frames: Policy = "keep",
    window_rows: PositiveInt = 10_000,
) -> Validator:
    """Open the validation data: the section `validation`; rows of `load_dataset_kwargs` (null: none), in order."""
    section, cutoffs = "validation", as_cutoffs(cutoffs)
    if load_dataset_kwargs is None:
        return Validator(distributed, None, None, Errors(elements, []), every_n_steps)
    grouping, by = grouping_of(section, micro_batch_size, atom_micro_batch_size, edge_micro_batch_size)
    rows, found, kept, notes = open_source(
        distributed,
        section,
        cutoffs,
        load_dataset_kwargs,
        label_keys,
        units,
        max_neighbors,
        bad_frames,
        odd_frames,
        max_rows,
    )
    check_elements(section, found, elements)
    source = StructureRows(rows, found, by, kept, by_data_set=True)
    plan, _ = plan_of(section, source, grouping, by, None, window_rows)
    collate = GraphCollator(section, cutoffs, elements, max_neighbors, with_data_sets=True)
    numbers = statistics(found, found.elements())[0]["num_labels"]
    errors = Errors(elements, source.data_sets, [label for label, number in numbers.items() if number])
    validator = Validator(distributed, plan, collate, errors, every_n_steps)
    validator.facts += [f"{section}: {amount_of(found, kept)} from {whence(load_dataset_kwargs)}", *notes]
    return validator
