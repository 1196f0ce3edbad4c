# SPDX-License-Identifier: Apache-2.0
"""Tables and picture of what scaling_model.py has calculated and scaling_ranks.py has measured."""

import json
from pathlib import Path
from statistics import median

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scaling_model import GPUS, LINKS, STRATEGIES

from common.contract.running import with_table, write_table
from plot_metrics import COLOURS, INK, MARKERS, STYLE


LARGE = ("650M", "3B", "15B")
NAMES = {"ib400": "400 Gb/s a GPU", "ethernet": "Ethernet"}


def dump(numbers: dict) -> str:
    """JSON with a line for each row."""
    parts = []
    for key, value in numbers.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def pivot(lines: list[dict], column: str, cell, head: list[str]) -> str:
    """A row for each size and strategy, a column for each value of `column`; what is fastest, within 2%, is bold."""
    rows, places = [], list(dict.fromkeys(line[column] for line in lines))
    for size in dict.fromkeys(line["size"] for line in lines):
        of_size = [line for line in lines if line["size"] == size]
        best = {
            place: max((line.get("tokens_per_second", 0) for line in of_size if line[column] == place), default=0)
            for place in places
        }
        for strategy, name in STRATEGIES.items():
            cells = []
            for place in places:
                line = next(x for x in of_size if x["strategy"] == strategy and x[column] == place)
                if "refused" in line:
                    cells.append("does not fit")
                else:
                    text = cell(line)
                    cells.append(f"**{text}**" if line["tokens_per_second"] > 0.98 * best[place] else text)
            rows.append([size, name, *cells])
    return markdown(["size", "strategy", *head], rows)


def rate(line: dict) -> str:
    """Tokens/s a GPU, and the efficiency in brackets."""
    return f"{figure(line['tokens_per_second'])} ({line['efficiency']:.0%})"


def figure(value: float) -> str:
    """A whole number with three digits, since the model is no better than that."""
    return f"{float(f'{value:.3g}'):,.0f}"


def three_digits(value: float) -> str:
    """Without an exponent."""
    return f"{float(f'{value:.3g}'):,g}"


def prediction_table(lines: list[dict]) -> str:
    """Sizes and strategies down, numbers of GPUs across."""
    counts = dict.fromkeys(line["num_gpus"] for line in lines)
    return pivot(lines, "num_gpus", rate, [f"{count:,} GPUs" for count in counts])


def check_table(numbers: dict) -> str:
    """Published figures beside predicted ones."""
    rows = []
    for line in numbers["checks"]:
        calibrates = f"calibrates {', '.join(line['calibrates'])}" if line["calibrates"] else "check"
        rows.append(
            [
                f"{line['size']}, {line['name']}", f"{line['figure']:,} {line['unit']}", figure(line["predicted"]),
                "(1)" if line["calibrates"] else f"{line['ratio']:.2f}", calibrates, line["note"],
            ]
        )  # fmt: skip
    shares = ", ".join(f"{gpu} {share:.0%}" for gpu, share in numbers["shares_of_peak"].items())
    head = ["case", "published, a GPU", "predicted", "predicted / published", "", ""]
    arithmetic = "; ".join(
        f"{line['name']}: published {line['published']}, with this recipe's count {line['counted']}"
        for line in numbers["arithmetic"]
    )
    return f"{markdown(head, rows)}\n\nShare of peak *e*: {shares}.\n\nThe count of operations: {arithmetic}."


def traffic_table(numbers: dict) -> str:
    """Bytes, and the seconds they take."""
    places = ["nvlink", *LINKS]
    rows = [
        [
            line["size"], f"{line['parameters'] / 1e6:,.1f}", three_digits(line['bytes'] / 1e9),
            f"{line['micro_tokens']:,}", three_digits(line['compute_s'] * 1e3),
            *(three_digits(line[place] * 1e3) for place in places),
        ]
        for line in numbers["traffic"]
    ]  # fmt: skip
    names = ["NVLink", "400 Gb/s a GPU", "200 Gb/s a GPU", "Ethernet, 100 Gb/s a node"]
    head = ["size", "parameters, M", "GB sent a GPU", "tokens a pass", "compute, ms", *(f"{n}, ms" for n in names)]
    return markdown(head, rows)


def hiding_table(numbers: dict) -> str:
    """Tokens a pass from which traffic can hide."""
    rows = [[line["gpu"], *(f"{line[place]:,}" for place in ("nvlink", *LINKS))] for line in numbers["hiding"]]
    return markdown(["", "NVLink", "400 Gb/s a GPU", "200 Gb/s a GPU", "Ethernet, 100 Gb/s a node"], rows)


def memory_table(numbers: dict) -> str:
    """GiB a GPU; in brackets with recomputation."""
    rows, lines = [], numbers["memory"]
    slower = {line["size"]: line["slower_by"] for line in numbers["recomputation"]}
    for size in dict.fromkeys(line["size"] for line in lines):
        cells = []
        for strategy in STRATEGIES:
            without, with_it = (line for line in lines if line["size"] == size and line["strategy"] == strategy)
            cells.append(f"{without['most']:.1f} ({with_it['most']:.1f})")
        held = [line["activations"] for line in lines if line["size"] == size and line["strategy"] == "fsdp2"]
        tokens = next(f"{line['micro_tokens']:,}" for line in lines if line["size"] == size)
        rows.append([size, tokens, *cells, f"{held[0]:.1f} ({held[1]:.1f})", f"{slower[size]:.2f}"])
    head = ["size", "tokens a pass", *STRATEGIES.values(), "of it activations", "step with recomputation, times"]
    return markdown(head, rows)


def gpu_table(numbers: dict) -> str:
    """Tokens/s a GPU on 64 of each kind."""
    return pivot(numbers["other_gpus"], "gpu", lambda x: figure(x["tokens_per_second"]), list(GPUS))


def tables(numbers: dict) -> dict[str, str]:
    """Each under the name of its marks."""
    fixed = numbers["fixed_step"]
    at_64 = [line for line in fixed if line["num_gpus"] == 64 and line["size"] in LARGE]
    growing = [line for line in numbers["growing_step"] if line["size"] in LARGE]
    return {
        "scaling_checks": check_table(numbers),
        "scaling_traffic": traffic_table(numbers),
        "scaling_hiding": hiding_table(numbers),
        "scaling_fixed": prediction_table([line for line in fixed if line["link"] == "ib400"]),
        "scaling_links": pivot(at_64, "link", rate, [link.name for link in LINKS.values()]),
        "scaling_growing": prediction_table(growing),
        "scaling_gpus": gpu_table(numbers),
        "scaling_memory": memory_table(numbers),
    }


def write_tables(page: Path, numbers: dict) -> None:
    """Put all of them between their marks."""
    for name, text in tables(numbers).items():
        write_table(page, name, text)


def wrong_tables(page: Path, numbers: dict) -> list[str]:
    """Names of those that are not the ones of `numbers`."""
    text = page.read_text()
    return [name for name, table in tables(numbers).items() if with_table(text, name, table) != text]


def plot(numbers: dict, path: Path) -> None:
    """Efficiency over the number of GPUs, for the three large sizes."""
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(10.5, 6.4), layout="constrained")
        axes = picture.subplots(2, len(LARGE), sharex=True, sharey=True)
        kinds = (("fixed_step", "2M tokens a step"), ("growing_step", "one pass a GPU and step"))
        for row, (kind, title) in zip(axes, kinds, strict=True):
            for axis, size in zip(row, LARGE, strict=True):
                missing = []
                for strategy, colour, marker in zip(STRATEGIES, COLOURS, MARKERS, strict=False):
                    for link, style in zip(NAMES, ("-", ":"), strict=True):
                        lines = [
                            line for line in numbers[kind]
                            if (line["size"], line["strategy"], line["link"]) == (size, strategy, link)
                        ]  # fmt: skip
                        points = [(x["num_gpus"], x["efficiency"]) for x in lines if "efficiency" in x]
                        if points:
                            axis.plot(
                                *zip(*points, strict=True), style, color=colour, marker=marker, markersize=5,
                                markerfacecolor="white" if strategy == "mfsdp" else colour,
                                label=f"{STRATEGIES[strategy]}, {NAMES[link]}",
                            )  # fmt: skip
                        elif lines and STRATEGIES[strategy] not in missing:
                            missing.append(STRATEGIES[strategy])
                if missing:
                    told_missing = (
                        f"{' and '.join(missing)}:\ndo not fit" if len(missing) > 1 else f"{missing[0]} does not fit"
                    )
                    axis.text(0.4, 0.4, told_missing, transform=axis.transAxes, fontsize=9, color=INK)
                axis.set(xscale="log", ylim=(0, 1.05), title=f"{size}, {title}")
                counts = sorted({line["num_gpus"] for line in numbers[kind]})
                axis.set_xticks(counts, [f"{count:,}" for count in counts])
                axis.minorticks_off()
                axis.yaxis.set_major_formatter(PercentFormatter(1))
        for axis in axes[1]:
            axis.set_xlabel("GPUs (H100)")
        for axis in axes[:, 0]:
            axis.set_ylabel("of one GPU's tokens/s")
        shown = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
        picture.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3)
        picture.suptitle("Predicted, not measured", color=INK, fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path, dpi=120)


def ranks_table(numbers: dict) -> str:
    """What scaling_ranks.py has measured."""
    rows = []
    for trainer, rounds in numbers["trainers"].items():
        one, two = ([turn[key] for turn in rounds] for key in ("one_rank", "two_ranks"))
        ratios = [b / a for a, b in zip(one, two, strict=True)]
        rows.append(
            [
                f"`{trainer}`", f"{median(one):,.0f}", f"{median(two):,.0f}", f"{median(ratios):.2f}",
                f"{min(ratios):.2f} – {max(ratios):.2f}",
            ]
        )  # fmt: skip
    settings, versions = numbers["settings"], ", ".join(f"{name} {v}" for name, v in numbers["versions"].items())
    head = ["trainer", "1 rank, tokens/s", "2 ranks, tokens/s", "2 ranks / 1 rank, median", "from – to"]
    facts = [
        f"{settings['model_tag']}, {settings['precision']}, data: {settings['data']}",
        f"{settings['rounds']} round(s) of {settings['steps']} steps, {settings['warmup_steps']} not counted before",
        f"{settings['micro_batches_per_step']} x {settings['pack_tokens']:,} tokens a step, one thread a rank",
        f"{numbers['machine']}, {numbers['cores']} cores, {numbers['date']}",
        versions,
        f"losses of 1 and 2 ranks differ by a relative {numbers['loss_difference']:.0e} at most",
        *settings["overrides"],
    ]
    return f"{markdown(head, rows)}\n\n{'; '.join(facts)}."
