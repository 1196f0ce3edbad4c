# SPDX-License-Identifier: Apache-2.0
"""Whatever is hidden in a checkpoint, checksums put right, nothing of it runs: on resume, and when it is exported."""

import hashlib
import io
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.contract.running import command_here, run_here
from common.safe_reading import read_metadata


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    run_here("train_ddp", path, f"checkpoint.ckpt_dir={path}", "num_train_steps=2")
    return path


@pytest.fixture(params=["metadata", "entry", "inside metadata"])
def planted(request, whole, tmp_path) -> tuple[Path, Path]:
    """A copy with a trap in it, and the file that appears if it runs."""
    run, marker = shutil.copytree(whole, tmp_path / "run"), tmp_path / "it_ran"
    folder = run / "step_2"
    if request.param == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(Trap(marker)))
    else:
        metadata = read_metadata(folder)
        if request.param == "entry":  # a model's tensor is a pickle at the end of the file
            index = next(i for i in metadata.storage_data if i.fqn.startswith("model."))
            info, evil = metadata.storage_data[index], io.BytesIO()
            torch.save(Trap(marker), evil)
            file = folder / info.relative_path
            metadata.storage_data[index] = replace(info, offset=file.stat().st_size, length=len(evil.getvalue()))
            file.write_bytes(file.read_bytes() + evil.getvalue())
        else:
            metadata.planner_data = {**metadata.planner_data, "trap": Trap(marker)}
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    lines = [line.split("  ", 1)[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in lines]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return run, marker


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "it_ran")))
    assert (tmp_path / "it_ran").exists()


def test_on_resume(planted, capsys):
    run, marker = planted
    with pytest.raises(SystemExit) as end:
        run_here("train_fsdp2", run, f"checkpoint.ckpt_dir={run}", "num_train_steps=3")
    sentence = capsys.readouterr().err
    assert end.value.code == 2 and "cannot be trusted" in sentence and not marker.exists()


def test_on_export(planted, capsys):
    run, marker = planted
    code = command_here("export.py", run / "step_2", run / "exported")
    assert not marker.exists()
    if code:  # the optimizer's numbers are not read for an export
        assert "cannot be trusted" in capsys.readouterr().err


def test_what_dcp_writes_is_read(whole):
    names = read_metadata(whole / "step_2").state_dict_metadata
    assert any(name.startswith("model.") for name in names) and any(name.startswith("optimizer.") for name in names)
