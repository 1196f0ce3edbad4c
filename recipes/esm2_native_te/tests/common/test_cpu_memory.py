# SPDX-License-Identifier: Apache-2.0
"""Memory that is kept: in processes of its own, since it is that of a whole process."""

import subprocess
import sys

import pytest
import torch

from common.compile_cpp import compiled
from common.contract.running import RECIPE, environment
from common.cpu_memory import SOURCE


def has_compiler() -> bool:
    try:
        compiled(SOURCE)
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")

START = """
import re, sys, threading
from pathlib import Path
import torch
from common.cpu_memory import keep_freed_memory, trim
MIB = 2**20
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
def block(mib):
    return torch.ones(int(mib * MIB), dtype=torch.uint8)
"""


def run(text, **more):
    command = [sys.executable, "-c", START + text]
    kept = {key: value for key, value in environment().items() if not key.endswith("_CACHE_CAPACITY")}  # other tests'
    done = subprocess.run(command, cwd=RECIPE, env=kept | more, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_freed_block_serves_again():
    run("""
before, small = block(10), torch.arange(5)
keep_freed_memory(); keep_freed_memory()
first = block(10)
place = first.data_ptr()
assert place % 64 == 0
del first, before
for mib in (10, 9.5, 9):
    again = block(mib)
    assert again.data_ptr() == place and again.sum() == int(mib * MIB)
    del again
assert block(5).data_ptr() != place, "it would lie half empty"
a, b = block(10), block(10)
assert place in (a.data_ptr(), b.data_ptr()) and a.data_ptr() != b.data_ptr()
assert torch.equal(small, torch.arange(5)) and torch.empty(0).sum() == 0
x = torch.ones(3)
x.resize_(MIB); x.fill_(2)
assert x[:3].sum() == 6 and torch.equal(torch.from_numpy(x.numpy()).clone(), x)
""")


def test_little_more_is_held_than_was_in_use():
    run("""
block(64)
keep_freed_memory()
before = resident()
for mib in range(20, 80):  # a padded batch after the other, none as long as the one before
    block(mib)
assert resident() - before < 80 * 1.25, resident() - before
for factor in (1.03, 1.04, 1.05):  # hundreds of MiB, in other pieces each time
    held = [block(factor**i) for i in range(100) if factor**i < 40]
    del held
assert 300 < resident() - before < 1.2 * 1013, resident() - before
trim()
assert resident() - before < 10
""")


def test_threads():
    run("""
keep_freed_memory()
wrong = []
def work(number):
    generator = torch.Generator().manual_seed(number)
    for i in range(300):
        size = int(torch.randint(1, 2 * MIB, (), generator=generator))
        tensors = [torch.full((size,), number, dtype=torch.uint8) for _ in range(3)]
        if any(int(x.min()) != number or int(x.max()) != number for x in tensors):
            wrong.append(number)
threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not wrong
""")


SHAPES = """
from common.distributed import process_group
def products(rows):
    weight = torch.randn(64, 64)
    for number in rows:  # as a batch padded to another length each time
        torch.ops.mkldnn._linear_pointwise(torch.randn(number, 64), weight, None, "none", [], "")
    return resident()
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_onednn_does_not_keep_a_product_for_each_shape():
    run(
        SHAPES
        + """
with process_group(seed=0):
    before = products(range(100, 600))
    assert products(range(600, 1000)) - before < 60, "half a MiB each would be 200"
"""
    )


def test_what_the_environment_says_of_caches_is_left_alone():
    run(
        """
import os
from common.cpu_memory import keep_fewer_products
keep_fewer_products()
assert os.environ["LRU_CACHE_CAPACITY"] == "7" and os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "256"
""",
        LRU_CACHE_CAPACITY="7",
    )


def test_more_than_there_is():
    run("""
keep_freed_memory()
try:
    torch.empty(2**62, dtype=torch.uint8)
except RuntimeError as error:
    assert "not enough memory: you tried to allocate" in str(error)
else:
    raise AssertionError
assert block(20).sum() == 20 * MIB
""")


def test_without_a_compiler(tmp_path):
    run(
        "keep_freed_memory(); trim(); assert block(20).sum() == 20 * MIB",
        CXX="no_such_compiler",
        TORCH_EXTENSIONS_DIR=str(tmp_path),
    )
