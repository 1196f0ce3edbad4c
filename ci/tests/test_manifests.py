# SPDX-License-Identifier: Apache-2.0
"""Manifests for clusters and clouds follow their schemas, and start what exists."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import jsonschema
import pytest
import yaml


ROOT = Path(__file__).resolve().parents[2]


def config_names(recipe):
    return {path.stem for path in recipe.glob("hydra_config/*.yaml")}


def recipes_with(name):
    """For each recipe that has this file."""
    found = sorted(path.parent for path in ROOT.glob(f"recipes/*/{name}"))
    return pytest.mark.parametrize("recipe", found, ids=lambda path: path.name)


@recipes_with("slurm.sh")
def test_slurm_scripts_differ_in_what_they_start_alone(recipe):
    """So one is tried on a cluster by each change, the others weekly."""

    def shared(folder):
        own = r"# .*\bsbatch\b|#SBATCH --job-name=|\[ \$# -gt 0 \]"
        return [line for line in (folder / "slurm.sh").read_text().splitlines() if not re.match(own, line)]

    assert shared(recipe) == shared(ROOT / "recipes" / "esm2_native_te")
    (config,) = re.findall(r"--config-name (\w+)$", (recipe / "slurm.sh").read_text(), re.MULTILINE)
    assert config in config_names(recipe)


@recipes_with("slurm.sh")
def test_what_slurm_starts_has_micro_batches_for_each_gpu(recipe):
    script = (recipe / "slurm.sh").read_text()
    nodes, gpus = (
        int(re.search(rf"^#SBATCH --{name}=(\d+)$", script, re.M)[1]) for name in ("nodes", "gpus-per-node")
    )
    words = re.search(r"\[ \$# -gt 0 \] \|\| set -- (.*)", script)[1].split()
    of_a_step = micro_batches(recipe, words[words.index("--config-name") + 1], words)
    assert of_a_step in (None, "null") or int(of_a_step) % (nodes * gpus) == 0


def micro_batches(recipe, config, words):
    """`micro_batches_per_step` of a command: its own, or that of the configuration or of one that it builds on."""
    if given := [word.partition("=")[2].strip('"') for word in words if word.startswith("micro_batches_per_step=")]:
        return given[-1]
    read = yaml.safe_load((recipe / "hydra_config" / f"{config}.yaml").read_text())
    if "micro_batches_per_step" in read:
        return read["micro_batches_per_step"]
    bases = [name for name in read.get("defaults", []) if isinstance(name, str) and name != "_self_"]
    return next(filter(None, (micro_batches(recipe, base, []) for base in reversed(bases))), None)


@recipes_with("sky.yaml")
def test_a_step_has_micro_batches_for_each_gpu(recipe):
    job = yaml.safe_load((recipe / "trainjob.yaml").read_text())["spec"]["trainer"]
    config, ranks = job["args"][1].partition("=")[2], job["numNodes"] * job["numProcPerNode"]
    assert int(micro_batches(recipe, config, job["args"]) or ranks) % ranks == 0
    told = yaml.safe_load((recipe / "sky.yaml").read_text())
    gpus = told["resources"]["accelerators"].rpartition(":")[2]
    words = told["run"].replace("$SKYPILOT_NUM_GPUS_PER_NODE", gpus).split()
    config = words[words.index("--config-name") + 1]
    assert int(micro_batches(recipe, config, words) or gpus) % (int(gpus) * told["num_nodes"]) == 0


@recipes_with("trainjob.yaml")
def test_kubeflow_trainer(recipe):
    job = pytest.importorskip("kubeflow_trainer_api.models.trainer_v1alpha1_train_job").TrainerV1alpha1TrainJob
    told = yaml.safe_load((recipe / "trainjob.yaml").read_text())
    assert job.from_dict(told).to_dict() == told  # the schema drops what it does not know
    trainer = told["spec"]["trainer"]
    script, config, *_ = trainer["args"]
    assert (recipe / script).is_file() and config.partition("=")[2] in config_names(recipe)
    (patch,) = told["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    places = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(places) and places["shm"] == "/dev/shm"
    variables = {entry["name"]: entry["value"] for entry in trainer["env"]}
    assert variables["HF_HOME"].startswith(places["volume"])
    assert pod["terminationGracePeriodSeconds"] > int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 30


def ignored(path, patterns):
    """Whether Docker leaves a file out: the last pattern that fits it or a folder above it decides."""
    found = False
    for pattern in patterns:
        words = re.escape(pattern.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.match(words + "(/|$)", path):
            found = not pattern.startswith("!")
    return found


@recipes_with(".dockerignore")
def test_an_image_has_the_recipe_and_nothing_of_its_user(recipe):
    lines = (recipe / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    known = subprocess.run(["git", "-C", recipe, "ls-files", "."], capture_output=True, text=True, check=True).stdout
    left_out = {path for path in known.splitlines() if ignored(path, patterns)}
    assert left_out == {"Dockerfile", ".dockerignore"}
    users = (
        "my.fasta", "my.csv.gz", "data/mine.parquet", "mine/final_model/model.safetensors", "outputs/run.json",
        ".venv/bin/python", ".git/config", "common/__pycache__/batch.pyc", "tests/__pycache__/x.pyc", "slurm-1.out",
    )  # fmt: skip
    assert [path for path in users if not ignored(path, patterns)] == []


@recipes_with("Dockerfile")
def test_an_image_does_not_run_as_root(recipe):
    lines = (recipe / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")][-1] not in ("USER root", "USER 0")
    assert any(line.startswith("ARG TORCH_INDEX=https://") for line in lines)


@recipes_with("sky.yaml")
def test_skypilot(recipe):
    told = yaml.safe_load((recipe / "sky.yaml").read_text())
    assert set(told) <= {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}
    script = re.search(r"train_\w+\.py", told["run"])[0]
    config = re.search(r"--config-name (\w+)", told["run"])[1]
    assert (recipe / script).is_file() and config in config_names(recipe)
    assert all((recipe / name).is_file() for name in re.findall(r"-r (\S+)", told["setup"]))
    subprocess.run(["bash", "-n", "-c", told["run"]], check=True)


@pytest.mark.slow  # SkyPilot brings 460 MB
@recipes_with("sky.yaml")
def test_skypilot_itself_reads_it(recipe, tmp_path):
    python = tmp_path / "environment" / "bin" / "python"
    venv.create(tmp_path / "environment", with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "skypilot==0.14.1"], check=True)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((recipe / "sky.yaml").read_text().replace("num_nodes:", "num_node:"))
    reading = [python, "-c", "import sys, sky; print(sky.Task.from_yaml(sys.argv[1]).num_nodes)"]
    for file, told in ((recipe / "sky.yaml", "1\n"), (wrong, "")):
        done = subprocess.run(
            [*reading, file], capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)}
        )
        assert (done.stdout, done.returncode == 0) == (told, bool(told)), done.stderr


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [("vendor.github-workflows", ".github/workflows/*.yml"), ("vendor.citation-file-format", "CITATION.cff")],
)
def test_files_with_a_published_schema(schema, pattern):
    files = sorted(map(str, ROOT.glob(pattern)))
    if not files:
        pytest.skip(f"no {pattern} around this copy")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


TEXT, TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}}


def keys(properties, *required):
    """The schema of a section with these keys and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


# Of the specification at containers.dev what is used here; .github/workflows/ci.yml asks its published schema.
SIZE = {"type": "string", "pattern": r"^\d+([tgmk]b)?$"}
HOST = {"cpus": {"type": "integer", "minimum": 1}, "memory": SIZE, "storage": SIZE, "gpu": {"type": "boolean"}}
COMMON = {
    "name": TEXT, "hostRequirements": keys(HOST), "postCreateCommand": TEXT, "runArgs": TEXTS,
    "customizations": keys({"vscode": keys({"extensions": TEXTS, "settings": {"type": "object"}})}),
}  # fmt: skip
BUILD = keys({"dockerfile": TEXT, "context": TEXT}, "dockerfile")
DEVCONTAINER = {"oneOf": [keys(COMMON | {"image": TEXT}, "image"), keys(COMMON | {"build": BUILD}, "build")]}


@pytest.mark.parametrize("name", ["devcontainer.json", "gpu/devcontainer.json"])
def test_devcontainers(name):
    path = ROOT / ".devcontainer" / name
    if not path.exists():
        pytest.skip("not around this copy")
    told = json.loads(path.read_text())
    jsonschema.validate(told, DEVCONTAINER)
    for wrong in ({"imagee": "x"}, {"image": "x", "build": {"dockerfile": "y"}}, {"runArgs": "--gpus=all"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(told | wrong, DEVCONTAINER)
    if "build" in told:
        assert (path.parent / told["build"]["dockerfile"]).resolve().is_file()
        assert (path.parent / told["build"]["context"]).resolve().is_dir()
    for requirement in re.findall(r"-r (\S+\.txt)", told["postCreateCommand"]):
        assert (ROOT / requirement).is_file()
