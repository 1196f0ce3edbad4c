# SPDX-License-Identifier: Apache-2.0
"""Parquet, of which other columns are not even read from the disk."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key
from datasets.packaged_modules.parquet import parquet

from common.readers.narrow import Narrow


class Parquet(Narrow, parquet.Parquet):
    """Parquet files that share a column."""

    def _split_generators(self, dl_manager) -> list:
        def schema_of(file: str) -> pa.Schema:
            with open(file, "rb") as opened:
                return pq.read_schema(opened)

        self.read_features(dl_manager, schema_of)
        return super()._split_generators(dl_manager)

    def _generate_tables(self, files: list[str], row_groups_list: list) -> Iterator[tuple]:
        if not self.config.columns:
            yield from super()._generate_tables(files, row_groups_list)
            return
        columns = self.config.columns
        for number, (file, row_groups) in enumerate(zip(files, row_groups_list, strict=True)):
            with open(file, "rb") as opened:
                self.config.columns = self.present(pq.read_schema(opened).names, file)
            try:
                for key, table in super()._generate_tables([file], [row_groups]):
                    yield Key(number, key.item_or_batch_id), table
            finally:
                self.config.columns = columns

    def _cast_table(self, table: pa.Table) -> pa.Table:
        return super()._cast_table(self.narrowed(table, "") if self.config.columns else table)
