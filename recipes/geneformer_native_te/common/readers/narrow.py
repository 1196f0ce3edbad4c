# SPDX-License-Identifier: Apache-2.0
"""What the readers share: only some columns, in types that the files have in common."""

from collections.abc import Callable, Iterable

import pyarrow as pa
from datasets import Features


class NoColumn(ValueError):
    """A file without the first of the columns."""

    def __init__(self, file: str, names: list[str]):
        super().__init__(f"{file} has the columns {', '.join(map(str, names))}.")
        self.file, self.names = file, names


class Narrow:
    """Of `config.columns` every file has the first; the others say what a row is, null where a file lacks them."""

    def present(self, names: Iterable[str], file: str) -> list[str]:
        """Those of the columns that this file has. Raises NoColumn where the first is missing."""
        names = list(names)
        if self.config.columns[0] not in names:
            raise NoColumn(file, names)
        return [name for name in self.config.columns if name in names]

    def narrowed(self, table: pa.Table, file: str) -> pa.Table:
        """The columns, in types that files share."""
        found = {}
        for name in self.present(table.column_names, file):
            column = table[name]
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            if pa.types.is_null(column.type):
                column = column.cast(pa.string())
            elif pa.types.is_list(column.type) and pa.types.is_null(column.type.value_type):
                column = column.cast(pa.list_(pa.string()))
            if name == self.config.columns[0] or pa.types.is_string(column.type):
                found[name] = column
            elif pa.types.is_large_string(column.type) or pa.types.is_primitive(column.type):
                found[name] = column.cast(pa.string())
        if self.info.features is not None:
            for field in self.info.features.arrow_schema:
                if field.name not in found:
                    found[field.name] = pa.nulls(len(table), field.type)
            found = {name: found[name] for name in self.info.features}
        return pa.table(found)

    def read_features(self, dl_manager, schema_of: Callable[[str], pa.Schema]) -> None:
        """From the first file's schema: that of columns nobody needs may be none that `datasets` knows."""
        if self.config.columns and self.info.features is None:
            files = dl_manager.download(self.config.data_files)
            first = next(file for some in files.values() for file in some)
            schema = self.narrowed(schema_of(first).empty_table(), first).schema
            self.info.features = Features.from_arrow_schema(schema)
