# SPDX-License-Identifier: Apache-2.0
"""Measure a model as the trainers' validation does, without training: any data, any number of ranks.

    python evaluate.py my_proteins                        # a run: its newest checkpoint, its own validation data
    python evaluate.py my_proteins/step_400 validation.load_dataset_kwargs.data_files=other.fasta
    torchrun --nproc_per_node=2 evaluate.py MODEL --config-name CONFIG key=value ...

MODEL is a run's folder, a checkpoint, a final model, another folder of a model, or a name on the hub. The keys are the
trainers', first as the run had them, else as --config-name has (defaults). One line of JSON goes to standard output.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from build_model import build_model, build_precision, materialize, prepare
from common.command import command
from common.config import FOLDER, one_sentence, register_resolvers
from common.distributed import Distributed, end_of_process, process_group
from common.redaction import HIDDEN
from common.step_folder import complete_steps
from dataset import open_validation
from keys import check_config
from pretrained import open_model


def find_run(source: str) -> tuple[str, dict | None]:
    """What to open, and the configuration of the run that it is of, if there is one."""
    path = Path(source)
    if (path / "config.yaml").exists() and not complete_steps(path):  # a run's logger.log_dir
        config = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
        folder = config["checkpoint"]["ckpt_dir"]
        if not folder or not complete_steps(Path(folder)):
            raise ValueError(f"{source}: this run kept no checkpoint (checkpoint.ckpt_dir={folder}); name a model.")
        path = Path(folder)
    if steps := complete_steps(path):
        path = path / f"step_{steps[-1]}"
    beside = [path.parent / f"step_{step}" for step in complete_steps(path.parent)] if path.is_dir() else []
    for folder in (path, *reversed(beside)):
        if (folder / "run.json").exists() and (folder / ".metadata").exists():
            return str(path), json.loads((folder / "run.json").read_text())["config"]
    return str(path), None


def read_settings(source: str, run: dict | None, config_name: str, overrides: list[str]) -> DictConfig:
    """The run's configuration, or a named one, with what the command line changes. Raises ValueError for a mistake."""
    register_resolvers()
    GlobalHydra.instance().clear()
    try:
        if run is None:
            if config_name == "defaults":
                given = "validation.load_dataset_kwargs={path: ???, name: null, data_files: null, split: train}"
                overrides = [given, "dataset.token_micro_batch_size=8192", "dataset.max_seq_length=8192", *overrides]
            with initialize_config_dir(str(FOLDER), version_base=None):
                config = compose(config_name, overrides)
        else:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "of_the_run.yaml").write_text(OmegaConf.to_yaml(without_hidden(run)))
                with initialize_config_dir(folder, version_base=None):
                    config = compose("of_the_run", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_sentence(error)) from error
    missing = OmegaConf.missing_keys(config)
    for key, value in {"model_tag": source, "num_train_steps": 1, "dataset.load_dataset_kwargs.path": "none"}.items():
        if key in missing:  # of no use here
            OmegaConf.update(config, key, value)
    if not config.validation.load_dataset_kwargs or "validation.load_dataset_kwargs.path" in missing:
        raise ValueError(
            "validation.load_dataset_kwargs.path is not set, so there is no data; give it and data_files, as "
            "validation.load_dataset_kwargs.path=fasta validation.load_dataset_kwargs.data_files=my.fasta."
        )
    return config


def without_hidden(config: dict) -> dict:
    """Without the secrets that a run did not write down: the environment may have them."""
    shown = {key: without_hidden(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in shown.items() if value != HIDDEN}


def evaluate(distributed: Distributed, config: DictConfig, source: str) -> dict:
    """The metrics of a model on what `config.validation` names, the same on all ranks."""
    with distributed.fail_together():
        size = config.get("cp_size", 1)
        distributed = distributed.in_groups("cp_size", 1 if distributed.num_ranks % size else size)
        shape, weights, _ = open_model(source)
        shape.layer_backend = config.layer_backend
        precision = build_precision(config, shape, distributed)
        multiple = precision.multiple * distributed.group_size
        layout = {"packed": config.use_sequence_packing, "pad_to_multiple_of": multiple}
        validator = open_validation(distributed, **layout, **config.validation)
        model = build_model(shape, distributed)
    prepare(model, config, precision)
    materialize(model, shape, config.seed, weights, distributed.device)
    return validator.run(model, partial(precision.forward, autocast=True))


def main(words: list[str]) -> None:
    """The command line. Raises ValueError for a mistake in it."""
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return
    config_name = "defaults"
    if "--config-name" in words[:-1]:
        place = words.index("--config-name")
        _, config_name = words[place], words[place + 1]
        words = words[:place] + words[place + 2 :]
    sources, overrides = [w for w in words if "=" not in w], [w for w in words if "=" in w]
    if len(sources) != 1:
        raise ValueError(f"one model, and then key=value, not {' '.join(sources) or 'no model'}; see --help.")
    source, run = find_run(sources[0])
    config = read_settings(source, run, config_name, overrides)
    check_config(config)
    with process_group(config.seed, config.deterministic) as distributed:
        result = evaluate(distributed, config, source)
        if distributed.is_main:
            print(json.dumps({"model": source, **result}))


if __name__ == "__main__":
    with end_of_process(), command():
        main(sys.argv[1:])
