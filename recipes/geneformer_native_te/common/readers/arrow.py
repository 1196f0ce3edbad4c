# SPDX-License-Identifier: Apache-2.0
"""Arrow, streams and files."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
from datasets.builder import Key
from datasets.packaged_modules.arrow import arrow

from common.readers.narrow import Narrow


@dataclass
class ArrowConfig(arrow.ArrowConfig):
    """With the columns to read."""

    columns: list[str] | None = None


class Arrow(Narrow, arrow.Arrow):
    """Arrow files that share a column."""

    BUILDER_CONFIG_CLASS = ArrowConfig

    def _split_generators(self, dl_manager) -> list:
        def schema_of(file: str) -> pa.Schema:
            with open(file, "rb") as opened:
                try:
                    return pa.ipc.open_stream(opened).schema
                except pa.ArrowInvalid:
                    return pa.ipc.open_file(opened).schema

        self.read_features(dl_manager, schema_of)
        return super()._split_generators(dl_manager)

    def _generate_tables(self, files: list[str]) -> Iterator[tuple]:
        for number, file in enumerate(files):
            self.file = file
            for key, table in super()._generate_tables([file]):
                yield Key(number, key.item_or_batch_id), table

    def _cast_table(self, table: pa.Table) -> pa.Table:
        return super()._cast_table(self.narrowed(table, self.file) if self.config.columns else table)
