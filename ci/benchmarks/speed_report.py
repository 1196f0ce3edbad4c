# SPDX-License-Identifier: Apache-2.0
"""Tables and bars of what train_speed.py has measured."""

from pathlib import Path
from statistics import median

from subject import SUBJECTS, suffix


from common import quiet  # noqa: F401  # isort: skip
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from common.contract.running import marks, with_table
from plot_metrics import COLOURS, INK, STYLE


NAME = "train_speed"
HEAD = (
    "", "precision", "real tokens/s", "ours is faster by", "from – to", "TFLOP/s", "of matrix products",
    "peak memory, GiB", "fill", "data wait",
)  # fmt: skip
OTHERS = "#AEB4BD"
# What a processor's products have, by the flags of `contestant_process.SIMD`, the strongest first.
SIMD = {
    "amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2",
    "sve": "SVE", "asimd": "NEON",
}  # fmt: skip


def figures(entry: dict) -> list[dict]:
    """Each contestant's numbers over the rounds. A ratio is one of rates within the same round."""
    first, found = entry["contestants"][0], []
    ours = {turn["round"]: turn["tokens"] / turn["seconds"] for turn in first["rounds"]}
    machine = {turn["round"]: turn for turn in entry["products"]}
    for contestant in entry["contestants"]:
        line = {"name": contestant["name"], "failed": contestant.get("failed")}
        found.append(line)
        turns = contestant["rounds"]
        if not turns:
            continue
        rates = {turn["round"]: turn["tokens"] / turn["seconds"] for turn in turns}
        tflops = {turn["round"]: turn["flops"] / turn["seconds"] / 1e12 for turn in turns}
        of_products = [tflops[i] / machine[i][contestant["precision"]]["layer"] for i in tflops if i in machine]
        ratios = [ours[i] / rates[i] for i in rates if i in ours]
        seconds = sum(turn["seconds"] for turn in turns)
        fp8 = contestant["options"].get("fp8_config.enabled")
        line |= {
            "precision": "fp8" if fp8 else contestant["precision"],
            "rate": median(rates.values()), "lowest": min(rates.values()), "highest": max(rates.values()),
            "ratio": median(ratios), "ratios": (min(ratios), max(ratios)),
            "tflops": median(tflops.values()), "of_products": median(of_products) if of_products else None,
            "memory": turns[-1]["peak_memory_gib"],
            "fill": sum(turn["tokens"] for turn in turns) / sum(turn["slots"] for turn in turns),
            "data_wait": sum(turn["data_wait_s"] for turn in turns) / seconds,
        }  # fmt: skip
    return found


def table(entry: dict) -> str:
    """Markdown: a row for each contestant."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for number, line in enumerate(figures(entry)):
        name = f"**{line['name']}**" if number == 0 else line["name"]
        if "rate" not in line:
            lines.append(f"| {name} | {'– | ' * (len(HEAD) - 2)}failed: {line['failed']} |")
            continue
        low, high = line["ratios"]
        cells = [
            name, line["precision"].upper(), f"{line['rate']:,.0f}", "1" if number == 0 else f"{line['ratio']:.2f} x",
            "" if number == 0 else f"{low:.2f} – {high:.2f}", f"{line['tflops']:.3g}",
            "–" if line["of_products"] is None else f"{line['of_products']:.0%}",
            "–" if line["memory"] is None else f"{line['memory']:.2f}", f"{line['fill']:.1%}",
            f"{line['data_wait']:.1%}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def before(entry: dict) -> str | None:
    """What happened before the rounds: both precisions, compilation."""
    rates, compiled = [], []
    for contestant in entry["contestants"]:
        found = contestant.get("qualifying_tokens_per_second", {})
        if len(found) > 1:
            listed = ", ".join(f"{fmt.upper()} {rate:,.0f}" for fmt, rate in found.items())
            rates.append(f"{contestant['name']} {listed}")
        if "compile_s" in contestant:
            compiled.append(f"Compiling took {contestant['compile_s']:.0f} s ({contestant['name']}).")
    sentences = []
    if rates:
        steps = entry["settings"]["qualifying_steps"]
        sentences = [
            f"Tokens/s in each precision, over {counted(steps, 'step')} before the rounds: {'; '.join(rates)}."
        ]
    return " ".join(sentences + compiled) or None


def facts(entry: dict) -> str:
    """The machine, the data and what a step was."""
    machine, data, settings = entry["machine"], entry["data"], entry["settings"]
    subject = SUBJECTS[recipe_of({"entries": [entry]})]
    rates = {
        fmt: median(turn[fmt]["layer"] * 1000 for turn in entry["products"]) for fmt in ("fp32", "bf16")
    }  # GFLOP/s
    square = {fmt: median(turn[fmt]["square_2048"] * 1000 for turn in entry["products"]) for fmt in rates}
    fastest, slowest = max(rates, key=rates.get), min(rates, key=rates.get)
    packages = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    more = f" (ours and Trainer {settings['mixed_steps']})" if "mixed_steps" in settings else ""
    sentences = [
        f"{machine['name']}, {counted(machine['cores'], 'core')}, {counted(machine['threads'], 'thread')}"
        + (f" ({', '.join(machine['simd'])})" if machine["simd"] else "") + ".",
        f"Matrix products of these layers: {fastest.upper()} {rates[fastest]:,.0f} GFLOP/s, the faster, and "
        f"{slowest.upper()} {rates[slowest]:,.0f}; square ones of 2,048: {square[fastest]:,.0f} and "
        f"{square[slowest]:,.0f}.",
        f"{counted(settings['rounds'], 'round')} of {counted(settings['steps'], 'step')}{more}; a step of ours "
        f"{settings['tokens_per_step'] // settings['pack_tokens']} x {settings['pack_tokens']:,} tokens, of the "
        f"others {settings['peer_passes']} x {settings['peer_rows']} rows.",
        f"{data['file']}: {data['num_rows']:,} {subject.rows}, on average {data['mean_tokens']:.0f} tokens.",
        f"`{entry['command']}`, {entry['date']}; {packages}.",
    ]  # fmt: skip
    for contestant in entry["contestants"]:
        if contestant["rounds"] and "failed" in contestant:
            sentences.append(f"{contestant['name']} failed: {contestant['failed']}.")
    sentences += [f"Left out: {name}, because {reason}." for name, reason in entry["left_out"].items()]
    return " ".join(sentences)


def profile(entry: dict) -> str | None:
    """Where the time of our steps goes, as a table."""
    found = entry["contestants"][0].get("profile")
    if not found:
        return None
    kinds, seconds = found["seconds_by_kind"], found["seconds"]
    lines = [f"| {' | '.join(kinds)} |", "|" + "---|" * len(kinds)]
    lines.append(f"| {' | '.join(f'{spent / seconds:.0%}' for spent in kinds.values())} |")
    return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def machine_name(entry: dict) -> str:
    """The processor, and what its products have: machines that name themselves alike can differ in that."""
    machine = entry["machine"]
    return ", ".join([machine["name"], *[words for flag, words in SIMD.items() if flag in machine["simd"]][:1]])


def entry_text(entry: dict) -> str:
    """All about one size, in Markdown."""
    device = "GPU" if entry["device"] == "cuda" else "CPU"
    parts = [f"### {entry['size']}, {device}: {machine_name(entry)}", table(entry), before(entry)]
    if where := profile(entry):
        name = entry["contestants"][0]["name"]
        parts += [f"Where the time of a step of {name} goes, by the profiler:", where]
    return "\n\n".join(part for part in (*parts, facts(entry)) if part)


def recipe_of(result: dict) -> str:
    """The name of what was measured; older files have none."""
    return next((entry["recipe"] for entry in result["entries"] if "recipe" in entry), next(iter(SUBJECTS)))


def tables(result: dict) -> str:
    """All sizes."""
    return "\n\n".join(map(entry_text, result["entries"]))


def summary(result: dict) -> str:
    """A line for each size: what a user gets."""
    title = SUBJECTS[recipe_of(result)].title
    head = (title, "device", "real tokens/s", "faster than a plain `transformers` loop", "than the best peer",
            "TFLOP/s", "of matrix products", "peak memory, GiB")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for entry in result["entries"]:
        ours, *rest = [line for line in figures(entry) if "rate" in line]
        others = {line["name"]: line["ratio"] for line in rest if not line["name"].startswith("ours")}
        best = min(others, key=others.get, default=None)
        of_products = "–" if ours["of_products"] is None else f"{ours['of_products']:.0%}"
        device = (
            f"{machine_name(entry)}, {counted(entry['machine']['threads'], 'thread')}, {ours['precision'].upper()}"
        )
        cells = [
            entry["size"], device, f"{ours['rate']:,.0f}",
            f"{others['transformers']:.1f} x" if "transformers" in others else "–",
            f"{others[best]:.1f} x ({best.removeprefix('transformers, ')})" if best else "–",
            f"{ours['tflops']:.3g}", of_products, "–" if ours["memory"] is None else f"{ours['memory']:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def updated(page: Path, result: dict) -> str:
    """The page with its tables, in full or in short, made from these numbers. Raises ValueError if it has no place."""
    name = NAME + suffix(recipe_of(result))
    text = page.read_text() if page.is_file() else "\n".join(marks(name)) + "\n"
    places = {f"{name}_summary": summary, name: tables}
    for place in [place for place in places if marks(place)[0] in text] or [name]:
        text = with_table(text, place, places[place](result))
    return text


def write(page: Path, result: dict) -> None:
    """Put the tables into the page, a new one if there is none."""
    page.write_text(updated(page, result))


def is_current(page: Path, result: dict) -> bool:
    """Whether the page has the tables of these numbers. Raises ValueError where it has no place for them."""
    if not page.is_file():
        raise ValueError("no such file.")
    return page.read_text() == updated(page, result)


def draw(result: dict, out: Path) -> None:
    """Bars of tokens per second, a panel a size."""
    entries = result["entries"]
    heights = [1 + 0.42 * len(entry["contestants"]) for entry in entries]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 0.5 + sum(heights)), dpi=150, layout="constrained")
        panels = figure.subplots(len(entries), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, entry in zip(panels, entries, strict=True):
            lines = [line for line in figures(entry) if "rate" in line]
            rates = [line["rate"] for line in lines]
            away = [[r - line["lowest"] for r, line in zip(rates, lines, strict=True)],
                    [line["highest"] - r for r, line in zip(rates, lines, strict=True)]]  # fmt: skip
            colours = [COLOURS[0] if line["name"].startswith("ours") else OTHERS for line in lines]
            panel.barh(range(len(lines)), rates, xerr=away, color=colours, height=0.7,
                       error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2})  # fmt: skip
            for i, line in enumerate(lines):
                label = f"{line['rate']:,.0f}" + ("" if i == 0 else f"   ours {line['ratio']:.2f} x")
                panel.text(line["highest"], i, f"  {label}", va="center", fontsize=8.5)
            labels = [f"{line['name']}, {line['precision'].upper()}" for line in lines]
            panel.set_yticks(range(len(lines)), labels, color=INK)
            panel.invert_yaxis()
            panel.grid(axis="y", visible=False)
            panel.set_xlim(0, 1.35 * max(line["highest"] for line in lines))
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.set(
                title=f"{SUBJECTS[recipe_of(result)].title} {entry['size']}, {machine_name(entry)}",
                xlabel="Real tokens/s",
            )
        figure.savefig(out)
