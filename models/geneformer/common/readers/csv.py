# SPDX-License-Identifier: Apache-2.0
"""CSV, all of it text: words such as NA are values like others, and numbers keep their zeros."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
from datasets import Features
from datasets.builder import Key
from datasets.packaged_modules.csv import csv

from common.readers.narrow import Narrow, NoColumn


@dataclass
class CsvConfig(csv.CsvConfig):
    """With the columns to read."""

    columns: list[str] | None = None


class Csv(Narrow, csv.Csv):
    """CSV files that share a column, all of it text; where commas do not separate it, tabs, semicolons or bars may."""

    BUILDER_CONFIG_CLASS = CsvConfig

    def _split_generators(self, dl_manager) -> list:
        splits = super()._split_generators(dl_manager)
        if self.config.columns and self.info.features is None:
            _, first = next(iter(self._generate_tables(**splits[0].gen_kwargs)))
            self.info.features = Features.from_arrow_schema(first.schema)
        return splits

    def _generate_tables(self, base_files: list[str], files_iterables: list) -> Iterator[tuple]:
        if not self.config.columns or self.config.features is not None:
            yield from super()._generate_tables(base_files, files_iterables)
            return
        for shard, files in enumerate(files_iterables):
            for file in files:
                # pandas as datasets has it there, which also reads packed files and addresses
                for number, frame in enumerate(csv.pd.read_csv(file, iterator=True, **self._options(file))):
                    yield Key(shard, number), self.narrowed(pa.Table.from_pandas(frame, preserve_index=False), file)

    def _options(self, file: str) -> dict:
        """How to read this file. Raises NoColumn where no separator gives the column."""
        given = self.config.pd_read_csv_kwargs | {"dtype": str, "keep_default_na": False}
        others = ({"skipinitialspace": True}, {"sep": "\t"}, {"sep": ";"}, {"sep": "|"})
        headers = []
        for other in ({}, *(others if given["sep"] == "," else ())):
            options = given | other
            headers.append(
                list(csv.pd.read_csv(file, **options | {"nrows": 0, "chunksize": None, "usecols": None}).columns)
            )
            if self.config.columns[0] in headers[-1]:
                return options | {"usecols": given["usecols"] or self.present(headers[-1], file)}
        raise NoColumn(file, max(headers, key=len))
