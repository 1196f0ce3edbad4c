# SPDX-License-Identifier: Apache-2.0
"""JSON, read object by object: what other columns hold, and how that changes, does not matter."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice, takewhile

import pyarrow as pa
from datasets.builder import Key
from datasets.packaged_modules.json import json as json_lines

from common.readers.narrow import Narrow


@dataclass
class JsonConfig(json_lines.JsonConfig):
    """With the columns to read."""

    columns: list[str] | None = None


class Json(Narrow, json_lines.Json):
    """JSON lines, or a list of objects, or an object of columns."""

    BUILDER_CONFIG_CLASS = JsonConfig

    def _generate_tables(
        self, base_files: list[str], files_iterables: list, original_files: list, allow_full_read: bool = True
    ) -> Iterator[tuple]:
        if not self.config.columns or self.config.features is not None:
            yield from super()._generate_tables(base_files, files_iterables, original_files, allow_full_read)
            return
        for shard, files in enumerate(files_iterables):
            for file in files:
                rows = self._rows(file)
                for number, some in enumerate(takewhile(bool, (list(islice(rows, 10_000)) for _ in count()))):
                    names = dict.fromkeys(name for row in some for name in row)
                    if number == 0:
                        self.present(names, file)
                    first, *others = self.config.columns
                    try:
                        table = {first: pa.array([row.get(first) for row in some])}
                    except (pa.ArrowInvalid, pa.ArrowTypeError):
                        kinds = sorted({type(row[first]).__name__ for row in some if row.get(first) is not None})
                        raise ValueError(f"{file}: {first} is now {', now '.join(kinds)}; it must be text.") from None
                    for name in others:
                        if name in names:
                            values = (row.get(name) for row in some)
                            table[name] = pa.array([None if v is None else str(v) for v in values], pa.string())
                    yield Key(shard, number), self._cast_table(self.narrowed(pa.table(table), file))

    def _rows(self, file: str) -> Iterator[dict]:
        encoding = "utf-8-sig" if self.config.encoding == "utf-8" else self.config.encoding
        with open(file, encoding=encoding, errors=self.config.encoding_errors) as opened:
            lines = ((number, line) for number, line in enumerate(opened, 1) if line.strip())
            number, first = next(lines, (1, "[]"))
            whole = self.config.field is not None
            try:
                value = None if whole else json.loads(first)
            except json.JSONDecodeError:  # an object of several lines, or none
                whole = True
            if whole:
                value = parsed(first + "".join(line for _, line in lines), file, number)
                value = value if self.config.field is None else value[self.config.field]
            yield from self._objects(value, file, number)
            for number, line in lines:
                yield from self._objects(parsed(line, file, number), file, number)

    def _objects(self, value, file: str, line: int) -> Iterator[dict]:
        first = self.config.columns[0]
        if isinstance(value, list):
            yield from ({"text": item} if isinstance(item, str) else item for item in value)
        elif not isinstance(value, dict):
            raise ValueError(f"{file}, line {line}: JSON, but no object with columns.")
        elif isinstance(value.get(first), dict):  # as pandas writes tables: by column, and in that by row
            names = [name for name in self.config.columns if isinstance(value.get(name), dict)]
            yield from ({name: value[name].get(row) for name in names} for row in value[first])
        else:
            yield value


def parsed(text: str, file: str, line: int):
    """The value. Raises ValueError that says where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {line + error.lineno - 1}: JSON parse error: {error.msg}.") from None
