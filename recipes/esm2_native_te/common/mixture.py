# SPDX-License-Identifier: Apache-2.0
"""Several sources of rows as one, each with a share of every epoch; the plan knows of it what it knows of any source.

Source k has its share of the draws: after e epochs of N rows, e N w_k / sum(w), rounded down (what rounding leaves is
the largest's). Its draws go through its own rows in passes, each by a keyed permutation, whatever the epoch: no row
comes twice before all have come. So a draw is a function of (seed, epoch, row), as everything in the plan is.
"""

import math
from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np

from common.epoch_plan import permuted
from common.open_data import plain


MIXTURE = 3  # what a random number is for, as a part of its key


def sources_of_mix(key: str, mix: Mapping, of_all: Mapping) -> dict[str, dict]:
    """What a configuration says of each source, filled up with what it says of all; `weight` besides.

    Raises ValueError, which names `key`, for a mistake.
    """
    mix, of_all, found = plain(mix), plain(of_all), {}
    if len(mix) < 2:
        raise ValueError(f"{key}={mix} must name two sources or more; for one, null and what the section says of all.")
    for name, given in mix.items():
        if not isinstance(given, dict) or {*given} - {"weight", *of_all}:
            raise ValueError(f"{key}.{name}={given} must be a section with some of {', '.join(['weight', *of_all])}.")
        weight = given.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"{key}.{name}.weight={weight} must be a number above 0.")
        kwargs = {**of_all["load_dataset_kwargs"], **(given.get("load_dataset_kwargs") or {})}
        if kwargs.get("streaming"):
            raise ValueError(f"{key} needs {key}.{name}.load_dataset_kwargs.streaming=false.")
        found[name] = {**of_all, **given, "load_dataset_kwargs": kwargs}
    files = of_all["load_dataset_kwargs"].get("data_files")
    if files and all(one["load_dataset_kwargs"]["data_files"] != files for one in found.values()):
        raise ValueError(
            f"{key.rpartition('.')[0]}.load_dataset_kwargs.data_files={files} is read by none of {', '.join(found)}, "
            f"which name their own in {key}; {key}=null reads it alone."
        )
    return found


class Mixture:
    """A source (common/loader.py) made of others by name; an epoch has as many rows as all of them together.

    `weights` are numbers of rows, in any unit. Raises ValueError for fewer rows than shares can be rounded to.
    """

    def __init__(self, sources: Mapping[str, object], weights: Mapping[str, float], seed: int):
        self.names, self.sources = list(sources), list(sources.values())
        self.weights, self.seed = [float(weights[name]) for name in self.names], seed
        self.lengths = [len(source) for source in self.sources]
        self.num_rows = sum(self.lengths)
        # What rounding leaves, up to a row a source, is the largest's, which must not lose more than it has.
        if self.num_rows * max(self.weights) < (len(sources) - 1) * sum(self.weights):
            raise ValueError(
                f"mix: {len(sources)} sources of {self.num_rows} rows together cannot be mixed; take fewer."
            )

    def __len__(self) -> int:
        return self.num_rows

    @property
    def max_size(self) -> int:
        """To how much a row is cut."""
        return max(source.max_size for source in self.sources)

    @cached_property
    def identity(self) -> dict:
        """What tells this data from other data."""
        parts = {name: source.identity for name, source in zip(self.names, self.sources, strict=True)}
        return {"num_rows": len(self), "weights": dict(zip(self.names, self.weights, strict=True)), "sources": parts}

    def draws_before(self, epoch: int) -> list[int]:
        """How many rows of each source have been drawn when this epoch begins."""
        largest, total = int(np.argmax(self.weights)), sum(self.weights)
        draws = [int(epoch * self.num_rows * weight / total) for weight in self.weights]
        draws[largest] += epoch * self.num_rows - sum(draws)
        return draws

    def _parts(self, rows: np.ndarray, epoch: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, int]]:
        """For each source and pass that has some of these rows: source, their places in `rows`, its rows, the pass."""
        before, after, first = self.draws_before(epoch), self.draws_before(epoch + 1), 0
        for k, (start, end) in enumerate(zip(before, after, strict=True)):
            places = np.flatnonzero((rows >= first) & (rows < first + end - start))
            draws = rows[places] - first + start
            first += end - start
            for turn in np.unique(draws // self.lengths[k]).tolist():
                now = draws // self.lengths[k] == turn
                own = permuted(draws[now] % self.lengths[k], self.lengths[k], self.seed, turn, MIXTURE, k)
                yield k, places[now], own, turn

    def sizes(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Of each row, as its source has it."""
        found = np.zeros(len(rows), dtype=np.int64)
        for k, places, own, turn in self._parts(rows, epoch):
            found[places] = self.sources[k].sizes(own, turn)
        return found

    def read(self, rows: np.ndarray, epoch: int) -> list:
        """What the collator takes of each row."""
        return self._gathered(rows, epoch, lambda k, own, turn: self.sources[k].read(own, turn))

    def describe(self, rows: np.ndarray, epoch: int) -> list[str]:
        """A line a row, which begins with its source."""
        return self._gathered(
            rows, epoch, lambda k, own, turn: [f"{self.names[k]}: {x}" for x in self.sources[k].describe(own, turn)]
        )

    def _gathered(self, rows: np.ndarray, epoch: int, get) -> list:
        found = [None] * len(rows)
        for k, places, own, turn in self._parts(rows, epoch):
            for place, item in zip(places.tolist(), get(k, own, turn), strict=True):
                found[place] = item
        return found

    def note(self) -> str:
        """One sentence for the log."""
        shares = (
            f"{share:,} of {name} ({share / length:.2g} times its {length:,} rows)"
            for name, share, length in zip(self.names, self.draws_before(1), self.lengths, strict=True)
        )
        return f"an epoch of {len(self):,} rows has {', '.join(shares)}"
