# SPDX-License-Identifier: Apache-2.0
"""Turn a YAML of `nequip-train` into one of this recipe; every key of it is taken over, or named as one that is not.

    python convert_config.py tutorial.yaml hydra_config/mine.yaml --num-structures 400
    python train_ddp.py --config-name mine

Epochs become steps by --num-structures, how many structures are trained on; without it num_train_steps stays open.
"""

from common import quiet  # noqa: F401  # isort: skip
import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf, errors
from yaml import YAMLError

import convert_allegro
import convert_nequip
from atoms.elements import SYMBOLS
from atoms.final_model import refuse_existing
from common.command import command, one_line, writing
from modeling_allegro import AllegroConfig
from modeling_nequip import SIZES


MEASURED = "measured: "  # what stands for ${training_data_stats:...}
LOSSES = {"MeanSquaredError": "mse", "MeanAbsoluteError": "mae", "HuberLoss": "huber"}
FIELDS = {"total_energy": "energy", "forces": "forces", "stress": "stress", "virial": "virial"}
NEEDLESS = ("ChemicalSpeciesToAtomTypeMapper", "NeighborListTransform", "LearningRateMonitor")
NOT_HERE = {
    "run": "training validates; for a test: python evaluate.py RUN validation.load_dataset_kwargs.data_files=...",
    "data.seed": "seed draws the order of structures too",
    "data.test_file_path": "for a test: python evaluate.py RUN with that file",
    "data.ase_args": "files are read whole, by their endings",
    "trainer.max_time": "a time limit is Slurm's: the run saves before it and goes on",
    **dict.fromkeys(("trainer.accelerator", "trainer.devices", "trainer.num_nodes"), "torchrun or slurm.sh says it"),
    "trainer.strategy": "the script says it: train_ddp.py, train_fsdp2.py",
}


def read(path: Path) -> dict:
    """Their configuration with its interpolations resolved. Raises ValueError for what is none."""
    resolvers = {
        "training_data_stats": lambda name: f"{MEASURED}{name}", "hydra": lambda name: "outputs",
        "int_mul": lambda a, b: int(a) * int(b), "int_div": lambda a, b: int(a) // int(b),
        "concat_lists": lambda a, b: [*a, *b], "list_to_identity_dict": lambda names: {name: name for name in names},
        "list_to_constant_dict": lambda names, value: dict.fromkeys(names, value),
        "type_names_from_package": lambda path: [], "cutoff_radius_from_package": lambda path, key=None: None,
    }  # fmt: skip
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (errors.OmegaConfBaseException, YAMLError) as error:
        advice = "; write the value in its place" * isinstance(error, errors.UnsupportedInterpolationType)
        raise ValueError(f"{path} cannot be read: {one_line(error)}{advice}") from error
    finally:
        for name in resolvers:
            OmegaConf.clear_resolver(name)
    if not isinstance(found, dict) or not isinstance(found.get("training_module"), dict):
        raise ValueError(f"{path} has no section training_module; it is no configuration of nequip-train.")
    return found


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Single values by their keys; of lists of sections the keys have numbers."""
    if isinstance(value, dict) and value:
        return {k: v for name, one in value.items() for k, v in leaves(one, f"{key}.{name}" if key else name).items()}
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return {k: v for i, one in enumerate(value) for k, v in leaves(one, f"{key}.{i}").items()}
    return {key: value}


class Conversion:
    """`ours` is what is set here, by dotted keys; `notes` what is not taken over, or not as it was."""

    def __init__(self, theirs: dict, num_structures: int | None):
        self.theirs, self.num_structures = theirs, num_structures
        self.ours: dict[str, Any] = {}
        self.notes: dict[str, str] = {}
        needless = ("data.include_keys", "data.stats_manager", "trainer.enable_checkpointing")
        self.left = {k: v for k, v in leaves(theirs).items() if not k.startswith(needless)}
        for part in (self.model, self.data, self.loss, self.optimizer, self.trainer):
            part()
        for key in [*self.left]:
            if known := next((k for k in NOT_HERE if key == k or key.startswith(f"{k}.")), None):
                self.notes[known] = NOT_HERE[known]
            elif key.partition(".")[0] in ("data", "trainer", "training_module", "global_options", "hydra"):
                self.notes[key] = f"{self.left[key]} has no counterpart here"
            else:
                self.notes[key] = "a name within that file, whose value is where it was used"

    def take(self, key: str, default: Any = None) -> Any:
        """A value or a whole section, which is then done with."""
        node: Any = self.theirs
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        for one in [k for k in self.left if k == key or k.startswith(f"{key}.")]:
            del self.left[one]
        return default if node is None else node

    def set(self, key: str, value: Any) -> None:
        """Set one of ours, unless it is None."""
        if value is not None:
            self.ours[key] = value

    def target(self, key: str) -> str:
        """The last name of a section's `_target_`."""
        return str(self.take(f"{key}._target_", "")).rpartition(".")[2]

    def steps(self, epochs: float | None, key: str, ours: str) -> None:
        """Set one of ours to the steps that so many epochs are."""
        batch = self.ours.get("dataset.micro_batch_size", 1)
        if epochs and self.num_structures:
            self.ours[ours] = max(1, round(epochs * self.num_structures / batch))
        elif epochs:
            self.notes[key] = f"{epochs} epochs are {epochs} times the structures over {batch} steps: set {ours}"

    def model(self) -> None:
        """`training_module.model`, to `model_tag` and `model_kwargs`."""
        at = "training_module.model"
        modifiers = self.take(f"{at}.modifiers", [])
        if (kind := self.target(at)) == "modify":
            kind = self.target(at := f"{at}.model")
        for one in modifiers:
            if (name := one["modifier"]) != "modify_PerTypeScaleShift":
                self.notes[f"{at}: {name}"] = "kernels are chosen by layer_backend"
            for name in ("scales", "shifts"):
                self.numbers(f"{at}.{name}", one.get(name), f"model_kwargs.energy_{name}")
                self.set(f"model_kwargs.train_{name}", one.get(f"{name}_trainable"))
        if source := self.take(f"{at}.checkpoint_path") or self.take(f"{at}.package_path"):
            self.ours |= {"init_from": source, "model_tag": source, "model_kwargs.cutoff": None}
            return
        allegro = "llegro" in kind
        radial = {f"radial_chemical_embed.{theirs}": ours for theirs, ours in convert_allegro.RADIAL.items()}
        names = convert_allegro.ARGUMENTS | radial if allegro else convert_nequip.ARGUMENTS
        preset = str(self.take(f"{at}.preset", "")).upper()
        self.ours["model_tag"] = f"{'allegro' if allegro else 'nequip'}_{preset or 'S'}"
        if not allegro:
            sizes = SIZES.get(f"nequip_{preset}", {})
            features = self.take(f"{at}.num_features", sizes.get("num_features", 32))
            l_max = self.take(f"{at}.l_max", len(sizes.get("num_features", [0, 0])) - 1)
            features = [features] * (l_max + 1) if isinstance(features, int) else features
            width, depth = 32 if preset else features[0], sizes.get("num_layers", 4)
            given = {
                "num_features": features,
                "num_layers": depth,
                "parity": not preset,
                "num_element_features": width,
            }
        else:
            spline = "Spline" in self.target(f"{at}.radial_chemical_embed")
            given = {"radial": "spline" if spline else "bessel", "num_tensors": AllegroConfig.num_tensors}
        self.ours |= {f"model_kwargs.{name}": value for name, value in given.items()}
        for theirs, ours in names.items():
            self.set(f"model_kwargs.{ours}", self.take(f"{at}.{theirs}"))
        for name in convert_allegro.DEPTHS:
            if self.take(key := f"{at}.{name}_mlp_nonlinearity", "silu") != "silu":
                self.notes[key] = "it is silu here"
        self.set("use_torch_compile", self.take(f"{at}.compile_mode") == "compile")
        self.elements(at)
        for name, default in (("scales", 1.0), ("shifts", 0.0)):
            key = f"{at}.per_type_energy_{name}"
            self.set(f"model_kwargs.train_{name}", self.take(f"{key}_trainable"))
            self.numbers(key, self.take(key, default), f"model_kwargs.energy_{name}")
        self.numbers(key := f"{at}.avg_num_neighbors", self.take(key), "model_kwargs.num_neighbors")
        if (pair := self.take(f"{at}.pair_potential")) is not None:
            if str(pair.get("_target_", "")).endswith("ZBL"):
                self.ours["model_kwargs.zbl"] = pair.get("units")
                if float(power := pair.get("polynomial_cutoff_p", 6)) != 6:
                    self.notes[f"{at}.pair_potential.polynomial_cutoff_p"] = f"{power} cannot be chosen; it is 6 here"
            else:
                self.notes[f"{at}.pair_potential"] = f"{pair.get('_target_')} is not ZBL, the only one here"
        single = "tf32" if self.take("global_options.allow_tf32") else "fp32"
        self.ours["precision"] = "fp64" if self.take(f"{at}.model_dtype") == "float64" else single
        for key in ("global_options.seed", "seed", f"{at}.seed"):
            self.set("seed", self.take(key))

    def elements(self, at: str) -> None:
        """The types and their cutoffs."""
        types = self.take(f"{at}.type_names") or []
        if strange := [name for name in types if name not in SYMBOLS[1:]]:
            self.notes[f"{at}.type_names"] = f"{strange[0]} is no element, and types are elements here"
        else:
            self.set("model_kwargs.elements", types or None)
        cutoff = self.take(f"{at}.r_max")
        self.set("model_kwargs.cutoff", cutoff)
        if (pairs := self.take(f"{at}.per_edge_type_cutoff")) is not None:
            found = {f"{a}-{b}": cutoff for a in types for b in types}
            for a, reach in pairs.items():
                found |= {f"{a}-{b}": reach.get(b, cutoff) if isinstance(reach, dict) else reach for b in types}
            self.ours["model_kwargs.pair_cutoffs"] = found

    def numbers(self, theirs: str, value: Any, ours: str) -> None:
        """A number, or one by element; what was measured is measured here too."""
        if not isinstance(value, str):
            self.set(ours, value)
        elif value.endswith("per_atom_energy_mean"):
            self.notes[theirs] = "the mean energy per atom there; here energies of elements by least squares"
        elif value.startswith(f"{MEASURED}per_type_"):
            self.notes[theirs] = "measured by type there; here of all atoms together"
        elif not value.startswith(MEASURED):
            self.notes[theirs] = f"{value} is no number"

    def data(self) -> None:
        """Files, their parts, labels and batches."""
        module, split = self.target("data"), self.take("data.split_dataset")
        files = {"dataset": self.take("data.train_file_path"), "validation": self.take("data.val_file_path")}
        if split:
            one, *others = split if isinstance(split, list) else [split]
            if others:
                self.notes["data.split_dataset"] = "only the first of several files is taken; name all in data_files"
            files["dataset"] = files["validation"] = one.get("file_path")
            ends = [one.get("train", 0), one.get("train", 0) + one.get("val", 0)]
            shown = [f"{100 * end:.0f}%" if isinstance(end, float) and end <= 1 else str(end) for end in ends]
            self.ours["dataset.load_dataset_kwargs.split"] = f"train[:{shown[0]}]"
            self.ours["validation.load_dataset_kwargs.split"] = f"train[{shown[0]}:{shown[1]}]"
            self.notes["data.split_dataset.train"] = "parts are taken in the file's order here, and not drawn"
        if module != "ASEDataModule" and not files["dataset"]:
            self.notes["data._target_"] = f"{module}: name its file by dataset.load_dataset_kwargs.data_files"
        self.ours["dataset.load_dataset_kwargs.data_files"] = files["dataset"] or "???"
        if files["validation"]:
            at = "validation.load_dataset_kwargs"
            self.ours |= {f"{at}.data_files": files["validation"], f"{at}.path": "structures"}
            self.ours.setdefault(f"{at}.split", "train")
        for theirs, name in (self.take("data.key_mapping") or {}).items():
            if name in FIELDS:
                self.ours[f"dataset.label_keys.{FIELDS[name]}"] = theirs
            else:
                self.notes[f"data.key_mapping.{theirs}"] = f"{name} is not read here"
        for i, transform in enumerate(self.take("data.transforms") or []):
            name = str(transform.get("_target_")).rpartition(".")[2]
            if name == "StressSignFlipTransform":
                self.ours["dataset.units.stress"] = "-eV/Ang^3"
            elif name == "VirialToStressTransform":
                self.ours.setdefault("dataset.label_keys.virial", "virial")
            elif name not in NEEDLESS:
                self.notes[f"data.transforms.{i}"] = f"{name} has no counterpart here"
        for theirs, ours in (("train", "dataset"), ("val", "validation"), ("test", None)):
            for form in ("", "_kwargs"):
                loader = self.take(f"data.{theirs}_dataloader{form}") or {}
                self.set(f"{ours}.micro_batch_size", loader.get("batch_size") if ours else None)
                self.set("dataset.num_workers", loader.get("num_workers") if theirs == "train" else None)
        self.ours.setdefault("dataset.micro_batch_size", 1)

    def loss(self) -> None:
        """`training_module.loss`, its coefficients and what changes them."""
        at = "training_module.loss"
        weights = dict.fromkeys(("energy", "forces", "stress"), 0.0)
        self.target(at)
        for term, weight in (self.take(f"{at}.coeffs") or {}).items():
            weights[term_of(term)] += float(weight)
        self.set("loss_kwargs.per_atom_energy", self.take(f"{at}.per_atom_energy"))
        for i, metric in enumerate(self.take(f"{at}.metrics") or []):
            field = metric.get("field")
            if isinstance(field, Mapping):
                self.ours["loss_kwargs.per_atom_energy"] = str(field.get("_target_")).endswith("PerAtomModifier")
                field = field.get("field")
            elif field == "total_energy":
                self.ours["loss_kwargs.per_atom_energy"] = False
            kind = str((metric.get("metric") or {}).get("_target_")).rpartition(".")[2]
            if field not in ("total_energy", "forces", "stress") or kind not in (*LOSSES, "StratifiedHuberForceLoss"):
                self.notes[f"{at}.metrics.{i}"] = f"{kind} of {field} has no counterpart here"
                continue
            label = FIELDS[field]
            weights[label] += float(metric.get("coeff") or 0.0)
            self.ours[f"loss_kwargs.{label}_loss"] = LOSSES.get(kind, "stratified_huber")
            if kind == "HuberLoss":
                self.ours[f"loss_kwargs.{label}_delta"] = metric["metric"].get("delta", 1.0)
            elif kind == "StratifiedHuberForceLoss":
                self.ours["loss_kwargs.forces_strata"] = dict(metric["metric"]["delta_dict"])
        self.ours |= {f"loss_kwargs.{label}_weight": weight for label, weight in weights.items()}
        self.left = {k: v for k, v in self.left.items() if "_metrics." not in k}  # here all, always

    def optimizer(self) -> None:
        """The optimizer, its schedule, and the averaged weights."""
        module, at = self.target("training_module"), "training_module.optimizer"
        decay = self.take("training_module.ema_decay", 0.999)
        self.ours["ema_decay"] = decay if module.startswith("EMA") else None
        if module not in ("EMALightningModule", "NequIPLightningModule"):
            self.notes["training_module._target_"] = f"{module} has no counterpart here"
        name, rate = self.target(at), self.take(f"{at}.lr", 1e-3)
        if name == "MuonWithAuxAdam":
            groups = self.take(at := f"{at}.param_groups")
            rate, decay = groups["adam"].get("lr", 3e-4), groups["muon"].get("weight_decay", 0.0)
            self.ours["adamw_kwargs.groups"] = [{"names": "layers.*", "muon": True, "weight_decay": decay}]
            self.notes[f"{at}.muon.lr"] = "updates are scaled to AdamW's here, and have its rate; else set lr_factor"
            at = f"{at}.adam"
        elif name not in ("Adam", "AdamW", ""):
            self.notes[f"{at}._target_"] = f"{name}: there are AdamW and Muon"
        self.ours["adamw_kwargs.lr"] = rate
        self.ours["adamw_kwargs.weight_decay"] = self.take(f"{at}.weight_decay", 0.01 if name == "AdamW" else 0.0)
        self.set("adamw_kwargs.betas", self.take(f"{at}.betas"))
        self.set("adamw_kwargs.eps", self.take(f"{at}.eps"))
        if self.take(f"{at}.amsgrad"):
            self.notes[f"{at}.amsgrad"] = "there is none"
        at = "training_module.lr_scheduler"
        kind = self.target(f"{at}.scheduler")
        rates = {"num_warmup_steps": 0, "num_training_steps": "${num_train_steps}", "decay_fraction": 1.0}
        if kind == "ReduceLROnPlateau":
            rates |= {"kind": "plateau", "factor": self.take(f"{at}.scheduler.factor", 0.1),
                      "patience": self.take(f"{at}.scheduler.patience", 10),
                      "metric": metric_of(self.take(f"{at}.monitor", "")),
                      "min_lr_fraction": self.take(f"{at}.scheduler.min_lr", 0.0) / rate}  # fmt: skip
        elif kind == "CosineAnnealingLR":
            self.take(f"{at}.scheduler.T_max")
            rates |= {"kind": "cosine", "min_lr_fraction": self.take(f"{at}.scheduler.eta_min", 0.0) / rate}
        else:
            rates |= {"kind": "linear", "min_lr_fraction": 1.0}
            self.notes[f"{at}.scheduler"] = f"{kind or 'none'}: the rate stays as it is; see lr_scheduler_kwargs.kind"
        self.left = {k: v for k, v in self.left.items() if k.rpartition(".")[0] != at}  # interval, frequency
        self.ours |= {f"lr_scheduler_kwargs.{key}": value for key, value in rates.items()}

    def trainer(self) -> None:
        """How long, how it is watched, and what is kept."""
        self.target("trainer")
        self.ours["num_train_steps"] = max(0, self.take("trainer.max_steps", 0)) or "???"
        self.steps(self.take("trainer.max_epochs"), "trainer.max_epochs", "num_train_steps")
        if "validation.load_dataset_kwargs.data_files" in self.ours:
            every = self.take("trainer.check_val_every_n_epoch", 1)
            self.steps(every, "trainer.check_val_every_n_epoch", "validation.every_n_steps")
        self.set("logger.frequency", self.take("trainer.log_every_n_steps"))
        self.ours["max_grad_norm"] = self.take("trainer.gradient_clip_val") or math.inf
        logger = self.take("trainer.logger")
        for one in logger if isinstance(logger, list) else [logger] if isinstance(logger, dict) else []:
            if str(one.get("_target_")).endswith("WandbLogger"):
                self.ours["wandb_init_args.mode"] = "online"
                self.set("wandb_init_args.project", one.get("project"))
                self.set("wandb_init_args.name", one.get("name"))
        self.ours |= {"checkpoint.ckpt_dir": "outputs", "checkpoint.save_final_model": True}
        for i, callback in enumerate(self.take("trainer.callbacks") or []):
            name, key = str(callback.get("_target_")).rpartition(".")[2], f"trainer.callbacks.{i}"
            if name == "ModelCheckpoint":
                monitored = callback.get("monitor") or ""
                if "validation.load_dataset_kwargs.data_files" in self.ours and monitored:
                    self.ours["checkpoint.keep_best"] = metric_of(monitored)
                if "weighted" in monitored:
                    self.notes[key] = "the best is by the forces' mean error here, not by a weighted sum"
            elif name == "LossCoefficientScheduler":
                self.schedule({int(epoch): weights for epoch, weights in callback["schedule"].items()})
            elif name == "LinearLossCoefficientScheduler":
                first, number = int(callback["start_epoch"]), int(callback["transition_epochs"])
                line = {"kind": "linear", "first": first, "last": first + number, "by": "epoch"}
                for term, end in callback["final_coeffs"].items():
                    weight = f"{term_of(term)}_weight"
                    ends = {"start": self.ours[f"loss_kwargs.{weight}"], "end": float(end)}
                    self.ours[f"loss_schedules.{weight}"] = line | ends
            elif name not in NEEDLESS:
                self.notes[key] = f"{name} has no counterpart here"

    def schedule(self, by_epoch: dict[int, dict[str, float]]) -> None:
        """Weights that change at epochs."""
        for label in sorted({term_of(term) for terms in by_epoch.values() for term in terms}):
            values, at = [self.ours[f"loss_kwargs.{label}_weight"]], []
            for epoch, terms in sorted(by_epoch.items()):
                now = float(next((v for term, v in terms.items() if term_of(term) == label), values[-1]))
                values, at = ([now], []) if epoch == 0 else ([*values, now], [*at, epoch])
            self.ours[f"loss_schedules.{label}_weight"] = {"kind": "step", "values": values, "at": at, "by": "epoch"}


def term_of(name: str) -> str:
    """Whose coefficient it is, by the name of a term of their losses."""
    return "energy" if "energy" in name else "stress" if "stress" in name or "virial" in name else "forces"


def metric_of(monitored: str) -> str:
    """Ours that is nearest to one of theirs."""
    forces = "forces_rmse" if "forces_rmse" in monitored else "forces_mae"
    return "energy_per_atom_mae" if "energy" in monitored else forces


def as_yaml(conversion: Conversion, source: Path, name: str) -> str:
    """The file's text."""
    nested = OmegaConf.create({"defaults": ["defaults", "_self_"]})
    for key, value in conversion.ours.items():
        OmegaConf.update(nested, key, value, force_add=True)
    lines = [f"# Made of {source.name} (nequip).", f"#     python train_ddp.py --config-name {name}"]
    lines += ["# Not taken over, or not as it was:"] * bool(conversion.notes)
    lines += [f"#   {key}: {note}" for key, note in conversion.notes.items()]
    return "\n".join(lines) + "\n" + OmegaConf.to_yaml(nested)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="their YAML")
    parser.add_argument("target", type=Path, help="ours; in hydra_config/ it has a name for --config-name")
    parser.add_argument("--num-structures", type=int, help="how many are trained on, to turn epochs into steps")
    a = parser.parse_args()
    with command():
        refuse_existing(a.target)
        found = Conversion(read(a.source), a.num_structures)
        with writing(a.target):
            a.target.write_text(as_yaml(found, a.source, a.target.stem))
        for key, note in found.notes.items():
            print(f"{key}: {note}")
        print(f"{a.target} is written, with these {len(found.notes)} remarks at its top")
