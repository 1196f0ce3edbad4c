# SPDX-License-Identifier: Apache-2.0
"""The FASTA reader of `datasets` for files as people have them.

By itself it loses the first record behind a byte order mark, which editors on Windows write, and ends at the first
byte that is not UTF-8, such as a letter of a name in Latin-1.
"""

import hashlib
import inspect
import re
import sys
from collections.abc import Iterator

from datasets import packaged_modules
from datasets.packaged_modules.fasta import fasta


def plain(line: str) -> str:
    """The line without a byte order mark: one is inside a file as well, if several were put together."""
    if "\0" in line:
        raise ValueError("no plain text, there are zero bytes in it (UTF-16? packed?); save it as UTF-8 text.")
    return line.lstrip("\ufeff")


PIR = re.compile(r">?(P1|F1|D[LC]|R[LC]|N[13]|XX);")


def without_titles(lines: Iterator[str]) -> Iterator[str]:
    """The lines without those in PIR's format that follow a header, as `>P1;CRAB_ANAPL`, and say what it is."""
    for line in lines:
        yield line
        if line.startswith(">") and PIR.match(line):
            next(lines, None)


class Fasta(fasta.Fasta):
    """A byte that is not UTF-8 is read as one unknown sign; columns that FASTA does not have are not asked for."""

    def _info(self):
        if self.config.columns is not None:
            self.config.columns = [name for name in self.config.columns if name in ("id", "description", "sequence")]
        return super()._info()

    def _parse_fasta(self, fp, include_record: bool = False) -> Iterator[tuple]:
        fp.reconfigure(encoding="utf-8", errors="replace")
        return super()._parse_fasta(without_titles(map(plain, fp)), include_record)


def register() -> None:
    """Let `datasets.load_dataset("fasta", ...)` use it; what the other reader left in the cache does not count."""
    name, others = packaged_modules._PACKAGED_DATASETS_MODULES["fasta"]
    if name != __name__:
        code = others + inspect.getsource(sys.modules[__name__])
        packaged_modules._PACKAGED_DATASETS_MODULES["fasta"] = (__name__, hashlib.sha256(code.encode()).hexdigest())
