# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and packages of `nequip` and `nequip-allegro`, read without running what may be hidden in them."""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from atoms.calculator_file import write_potential
from atoms.package_zip import first_words, package_folder, read_package
from atoms.potential import read_config
from common.command import command, new_folder, writing
from common.weights import open_weights


TABLES = re.compile(r"output_mask|w3j|_empty|atomic_numbers|_qqr2exesquare|spline\.(lower|upper)|_extra_state")
# Changes of a finished model that the weights of it say, or that only choose how it is computed.
HARMLESS = re.compile(r"(en|dis)able_(Triton|CuEquivariance|OpenEquivariance|ForceStressOutput)")


def read_checkpoint(path: Path, later: tuple[Path, ...] = ()) -> tuple[dict, dict[str, Tensor]]:
    """The section `model` of their YAML, resolved, and the weights, averaged (`EMALightningModule`) if it has such.

    Takes a checkpoint of `nequip-train`, a package (`*.nequip.zip`), or what `torch.save({"model": section,
    "state_dict": weights}, path)` wrote. Raises ValueError for anything else. `later` are checkpoints that began from
    this one.
    """
    if path.resolve() in later:
        raise ValueError(f"{path} began from itself, by what it says; it names no architecture.")
    if folder := package_folder(path):
        return read_package(path, folder)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle raise whatever they happen to mean
        compiled = path.suffix in (".pt2", ".pth")
        reason = "a compiled model keeps no weights that can be read" if compiled else first_words(error)
        raise ValueError(
            f"{path} is no checkpoint of tensors and plain values ({reason}); give the .ckpt of nequip-train, a "
            '.nequip.zip, or what torch.save({"model": its section of the YAML, "state_dict": ...}, path) wrote.'
        ) from error
    found = found if isinstance(found, Mapping) else {}
    arguments = found.get("model", found.get("hyper_parameters", {}).get("model"))
    if not isinstance(arguments, Mapping) or not isinstance(found.get("state_dict"), Mapping):
        raise ValueError(f"{path} has no section model (or hyper_parameters.model) and state_dict of nequip.")
    optimizer = found.get("schedulefree_optimizer_state_dict", {})
    if any(group.get("train_mode") for group in optimizer.get("param_groups", [])):
        raise ValueError(
            f"{path} has the weights that a schedule-free optimizer moves, and not their averages; give what "
            "nequip-package makes of it."
        )
    arguments = first_section(arguments, path, (*later, path.resolve()))
    return arguments, averaged(found["state_dict"], arguments)


def first_section(section: Mapping, path: Path, seen: tuple[Path, ...]) -> dict:
    """The section that says the architecture: what modifies or loads a model goes back to that model's.

    Raises ValueError for a change that we have nothing for, and where the model that was loaded is not there.
    """
    if "type_names" in section:
        return dict(section)
    if "modifiers" in section:
        found = first_section(section["model"], path, seen)
        for modifier in section["modifiers"]:
            if modifier["modifier"] == "modify_PerTypeScaleShift":
                for name in ("scales", "shifts"):
                    found[f"per_type_energy_{name}_trainable"] = modifier.get(f"{name}_trainable", False)
            elif not HARMLESS.match(modifier["modifier"]):
                raise ValueError(f"{path}: it was changed by {modifier['modifier']}, which we have nothing for.")
        return found
    source = section.get("checkpoint_path") or section.get("package_path")
    if source is None:
        raise ValueError(f"{path}: its section model names no type_names, so it is no model of nequip or allegro.")
    if not Path(source).exists():
        raise ValueError(
            f"{path} began from {source}, which says the architecture and is not there; put that file there."
        )
    return read_checkpoint(Path(source), seen)[0]


def averaged(state: Mapping, arguments: Mapping) -> dict[str, Tensor]:
    """The state of one model: averages take the place of the parameters, in whose order they are numbered.

    Raises ValueError where they cannot be told to which parameter they belong.
    """
    own = {k: v for k, v in state.items() if isinstance(v, Tensor) and not k.startswith("ema.")}
    averages = [state[k] for k in (f"ema.ema_weight_{i}" for i in range(len(state))) if k in state]
    averages = [average for average in averages if average.numel()]
    if not averages:
        return own
    trained = {
        "edge_norm._rmax_recip": False,
        "bessel_weights": arguments.get("radial_chemical_embed", arguments).get("bessel_trainable", False),
        "scale_shift.scales": arguments.get("per_type_energy_scales_trainable", False),
        "scale_shift.shifts": arguments.get("per_type_energy_shifts_trainable", False),
    }
    fixed = tuple(name for name, trains in trained.items() if not trains)
    names = [k for k, v in own.items() if k.startswith("model.") and v.numel() and not k.endswith(fixed)]
    names = [k for k in names if not TABLES.search(k)]
    if [own[k].shape for k in names] != [average.shape for average in averages]:
        raise ValueError(
            f"it has {len(averages)} averaged weights (ema) for {len(names)} parameters, and which is which cannot be "
            "told; write the evaluation_model's state_dict to a file of its own."
        )
    return own | dict(zip(names, averages, strict=True))


def kind_of(section: Mapping) -> str:
    """Which model their section `model` is."""
    return "allegro" if "llegro" in str(section.get("_target_")) else "nequip"


def converter(package: str, doc: str, config_class: type, model_class: type, read: Callable, to_native: Callable,
              arguments_of: Callable, to_package: Callable) -> None:  # fmt: skip
    """The command line of one package."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to-native", nargs=2, type=Path, metavar=("CKPT", "FOLDER"))
    direction.add_argument(f"--to-{package}", nargs=2, type=Path, metavar=("FOLDER", "FILE"), dest="to_package")
    asked = parser.parse_args()
    with command():
        try:
            if asked.to_native:
                source, target = asked.to_native
                section, state = read_checkpoint(source)
                if (kind := kind_of(section)) != package:
                    raise ValueError(f"{source} is a model of {kind}; use convert_{kind}.py.")
                config = read(section, state)
                weights = to_native(state, config)
                with new_folder(target) as folder:
                    write_potential(folder, config, model_class, weights)
                print(f"{target} is written; open it: calculator.py in it is an ASE calculator, or init_from={target}")
            else:
                source, target = asked.to_package
                values = json.loads((source / "config.json").read_text())
                if values.get("model_type") != config_class.model_type:
                    raise ValueError(f"{source}: its model_type is {values.get('model_type')}, not {package}.")
                config = read_config(config_class, values)
                content = {"model": arguments_of(config), "state_dict": to_package(dict(open_weights(source)), config)}
                write_file(target, content)
                print(f'{target} is written; open it: instantiate its "model", then load_state_dict(strict=False)')
        except KeyError as error:
            raise ValueError(f"{source}: {error} is not in it; this is no whole model of {package}.") from error


def write_file(target: Path, content: dict) -> None:
    """By torch.save; the file has its name when it is whole. Raises ValueError for one that exists."""
    if target.exists():
        raise ValueError(f"{target} exists; move it away or give another name.")
    partial = target.with_name(f".{target.name}.partial")
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, partial)
            partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
