# SPDX-License-Identifier: Apache-2.0
"""One table of several runs, best first: what differs in their configurations, and what came of it.

python compare_runs.py outputs/sweep_12/run_*
python compare_runs.py outputs/a outputs/b --out table.csv
python compare_runs.py outputs/a outputs/b --by forces_mae    # a column of the validation; without, the first
"""

import argparse
import csv
import sys
from pathlib import Path
from statistics import fmean

import yaml

from common.command import command
from common.files import flat, short
from plot_metrics import metrics_path, read_metrics, throughput_key, throughput_unit
from plot_metrics import read_run as read_facts


PLACES = ("logger.log_dir", "checkpoint.ckpt_dir", "wandb_init_args.name")  # differ by themselves


def read_run(run: Path) -> tuple[dict[str, object], dict[str, float | int | None]]:
    """Configuration and results. Raises ValueError for what is no run."""
    metrics = read_metrics(metrics_path(run))
    config = metrics_path(run).with_name("config.yaml")
    train, validation = metrics["train"], metrics["validation"]
    throughput = throughput_key(metrics)
    # Of potentials one column for each kind of error; of others the first number.
    wanted = [next(iter(keys.values())) for keys in read_facts(metrics_path(run)).get("curves", {}).values()]
    last = validation[-1] if validation else {}
    wanted = wanted or [next((k for k, v in last.items() if isinstance(v, float)), "loss")]
    losses = [line["loss"] for line in train[-max(1, len(train) // 10) :] if line["loss"] is not None]
    return flat(yaml.safe_load(config.read_text()) if config.exists() else {}, keep_empty=False), {
        "steps": train[-1]["step"],
        **{f"validation {name}": last.get(name) for name in wanted},
        "train loss (last tenth)": fmean(losses) if losses else None,
        throughput_unit(throughput): fmean(line[throughput] for line in train),
    }


def shown(row: list[object], num_keys: int) -> list[str]:
    """A row as in a table: keys as they are written, losses to four digits, rates to whole units or three digits."""
    run, keys, (steps, *losses, rate) = row[0], row[1 : 1 + num_keys], row[1 + num_keys :]
    losses = ["" if value is None else short(value) for value in losses]
    given = [f"{key:g}" if isinstance(key, float) else "null" if key is None else str(key) for key in keys]
    return [run, *given, f"{steps:,}", *losses, f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"]


def compare(runs: list[Path], by: str | None = None) -> list[list[object]]:
    """Rows of the table, the first with names, then by the validation's `by` (first column). Raises ValueError."""
    found = {}
    for run in runs:
        try:
            found[str(run)] = read_run(run)
        except ValueError as error:  # of a sweep some may have failed
            print(f"left out: {error}", file=sys.stderr)
    if not found:
        raise ValueError("none of these is a run with a step in it.")
    keys = dict.fromkeys(key for config, _ in found.values() for key in config)
    differ = [k for k in keys if k not in PLACES and len({repr(config.get(k)) for config, _ in found.values()}) > 1]
    # Of runs that do not have the same: every column that one of them has.
    validations = dict.fromkeys(name for _, results in found.values() for name in [*results][1:-2])
    columns = [name.removeprefix("validation ") for name in validations]
    rows = []
    for run, (config, results) in found.items():
        steps, *_, train, rate = results.values()
        rows.append([run, *(config.get(k) for k in differ), steps, *map(results.get, validations), train, rate])
    if by is not None and by not in columns:
        raise ValueError(f"--by {by}: it must be one of {', '.join(columns)}.")
    at = -2 - len(columns) + (columns.index(by) if by else 0)

    def rank(row: list[object]) -> tuple:
        validation, train = row[at], row[-2]
        return validation is None, validation or 0.0, train is None, train or 0.0

    units = dict.fromkeys([*results][-1] for _, results in found.values())
    names = ["run", *differ, "steps", *validations, "train loss (last tenth)", " or ".join(units)]
    return [names, *sorted(rows, key=rank)]


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--by", metavar="METRIC", help="sort by this column of the validation, e.g. forces_mae")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the table for a spreadsheet too")
    args = parser.parse_args()
    with command():
        first, *rows = compare(args.runs, args.by)
        if args.out:
            with args.out.open("w", newline="") as file:
                csv.writer(file).writerows([first, *rows])
        table = [first, ["---"] * len(first), *(shown(row, first.index("steps") - 1) for row in rows)]
        print("\n".join("| " + " | ".join(row) + " |" for row in table))


if __name__ == "__main__":
    main()
