# SPDX-License-Identifier: Apache-2.0
"""Measure a model as the trainers' validation does, without training: any data, any number of ranks.

    python evaluate.py my_run                             # a run: its newest checkpoint, its own validation data
    python evaluate.py my_run/step_400 validation.load_dataset_kwargs.data_files=other_file
    torchrun --nproc_per_node=2 evaluate.py MODEL --config-name CONFIG key=value ...

MODEL is a run's folder, a checkpoint, a final model, or what else the recipe starts from. The keys are the trainers',
first as the run had them, else as --config-name has (defaults); another file is read whole unless `split` is given
too. One line of JSON goes to standard output.
"""

from common import quiet  # noqa: F401  # isort: skip (first, before those that talk)
import argparse
import json
import sys
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from build_model import open_evaluation
from common.command import command
from common.command_line import typed_text
from common.config import FOLDER, one_sentence, register_resolvers
from common.distributed import Distributed, end_of_process, process_group
from common.files import finite
from common.own_data import read_whole
from common.redaction import without_hidden
from common.step_folder import complete_steps
from dataset import EXAMPLE, WITHOUT_A_RUN
from keys import check_config


DATA = "validation.load_dataset_kwargs"


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
            given = WITHOUT_A_RUN if config_name == "defaults" else ()
            with initialize_config_dir(str(FOLDER), version_base=None):
                config = compose(config_name, [*given, *overrides])
        else:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "of_the_run.yaml").write_text(OmegaConf.to_yaml(without_hidden(run, ("validation",))))
                with initialize_config_dir(folder, version_base=None):
                    config = compose("of_the_run", overrides)
        missing = OmegaConf.missing_keys(config)
        if not config.validation.load_dataset_kwargs or (unset := sorted(k for k in missing if k.startswith(DATA))):
            key = unset[0] if config.validation.load_dataset_kwargs else f"{DATA}.path"
            raise ValueError(f"{key} is not set, so there is no data; give {EXAMPLE}.")
        read_whole(config, typed_text(overrides))
        OmegaConf.update(config, "validation", OmegaConf.to_container(config.validation, resolve=True))
        if run is not None or "model_tag" in missing:  # what a run began from may be gone
            config.model_tag = source
        if "init_from" in config:
            config.init_from = None
        if "num_train_steps" in missing:
            config.num_train_steps = 1
        config.dataset.load_dataset_kwargs = {"path": "none"}  # nothing is trained on
        if "mix" in config.dataset:
            config.dataset.mix = None
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_sentence(error)) from error
    return config


def evaluate(distributed: Distributed, config: DictConfig, source: str, out: Path = Path("outputs")) -> dict:
    """The metrics of a model on what `config.validation` names, the same on all ranks."""
    with distributed.fail_together():
        model, validator, forward = open_evaluation(config, source, distributed)
    found = validator.run(model, forward)
    if hasattr(validator.metrics, "report"):
        with distributed.fail_together():
            validator.metrics.report(distributed, found, source, out)
    return found


def parse(words: list[str]) -> argparse.Namespace:
    """The command line: one model, and keys, which are the words with = in them. Raises ValueError for others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="MODEL key=value", help="in any order")
    parser.add_argument("--config-name", default="defaults", help="for a model whose run is not beside it")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for plots, if there are any")
    options = parser.parse_intermixed_args(words)
    sources = [word for word in options.words if "=" not in word]
    options.overrides = [word for word in options.words if "=" in word]
    if len(sources) != 1:
        raise ValueError(f"one model, and then key=value, not {' '.join(sources) or 'no model'}; see --help.")
    options.source = sources[0]
    return options


def main(words: list[str]) -> None:
    """The command line. Raises ValueError for a mistake in it."""
    options = parse(words)
    source, run = find_run(options.source)
    config = read_settings(source, run, options.config_name, options.overrides)
    check_config(config)
    with process_group(config.seed, config.deterministic) as distributed:
        result = evaluate(distributed, config, source, options.out)
        if distributed.is_main:
            print(json.dumps({"model": source, **finite(result)}))


if __name__ == "__main__":
    with end_of_process(), command():
        main(sys.argv[1:])
