# SPDX-License-Identifier: Apache-2.0
"""All the code that a final model needs, in one file, and the folder that it makes."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from atoms.potential import PotentialConfig
from common import RECIPE


# In this order their sources make one file.
SOURCES = (
    "atoms/elements.py", "atoms/irreps.py", "atoms/spherical_harmonics.py", "atoms/radial.py", "atoms/zbl.py",
    "atoms/tensor_product.py", "atoms/potential.py", "modeling_{kind}.py", "atoms/ase_calculator.py",
)  # fmt: skip
HEAD = '''# SPDX-License-Identifier: Apache-2.0
"""An interatomic potential as an ASE calculator. Needs torch, ase and vesin; energies in eV, lengths in A.

from calculator import PotentialCalculator
atoms.calc = PotentialCalculator()  # of the folder that this file is in
"""

'''


def calculator_source(kind: str, config_class: type, model_class: type) -> str:
    """All that a calculator of this kind of model needs, in one file."""
    imports, bodies = set(), []
    for name in SOURCES:
        text = (RECIPE / name.format(kind=kind)).read_text()
        text = re.sub(r"\A# SPDX[^\n]*\n(\"\"\".*?\"\"\"\n)?", "", text, flags=re.DOTALL)
        # What other files of ours are imported is in this one already.
        text = re.sub(r"^from atoms[.\w]* import (\([^)]*\)|.*)\n", "", text, flags=re.MULTILINE)
        lines = re.findall(r"^(?:from|import) .*\n", text, flags=re.MULTILINE)
        imports |= set(lines)
        bodies.append(re.sub(r"^(?:from|import) .*\n", "", text, flags=re.MULTILINE).strip("\n"))
    tail = f'POTENTIALS["{kind}"] = ({config_class.__name__}, {model_class.__name__})\n'
    return HEAD + "".join(sorted(imports)) + "\n\n" + "\n\n\n".join([*bodies, tail])


def write_potential(folder: Path, config: PotentialConfig, model_class: type, weights: Mapping[str, Tensor]) -> None:
    """Weights, configuration, calculator, and a model of torch-sim."""
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    (folder / "calculator.py").write_text(calculator_source(config.model_type, type(config), model_class))
    text = (RECIPE / "atoms" / "torch_sim_model.py").read_text()
    (folder / "torch_sim_model.py").write_text(text.replace("from atoms.ase_calculator", "from calculator"))
