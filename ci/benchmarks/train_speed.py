# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of training, side by side: one of these recipes, and Hugging Face's own model in a plain loop.

python ci/benchmarks/train_speed.py --sizes 8M,35M,150M               # writes docs/results/train_speed.json
python ci/benchmarks/train_speed.py --sizes 8M --data my.fasta --output mine.json use_torch_compile=true
python ci/benchmarks/train_speed.py --device cuda --sizes 150M,650M,3B
python ci/benchmarks/train_speed.py --recipe recipes/NAME             # another than ESM-2, if subject.py knows it
python ci/benchmarks/train_speed.py --quick --output quick.json       # a tiny model, less than a minute
python ci/benchmarks/train_speed.py --from docs/results/train_speed.json --check docs/speed.md

Every contestant is a process of its own, which builds its model, optimizer and data and then waits. In each round each
of them takes some steps, one contestant at a time, so that all of them meet the machine as it is then;
the speed of ours over that of another is a ratio within one round. Another process measures the machine's matrix
products in the same rounds. docs/speed.md says what the contestants do. Nothing is downloaded.

key=value goes to our recipe, in all its contestants.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from command_line import add_recipe, parse_with_overrides, positive
from contestants import MAX_SEQ_LENGTH, PRODUCTS, SIZES, TAKEN, Contestant, contestants, defaults, held_at_once
from subject import RECIPE, ROOT, SUBJECT, suffix
from tqdm import tqdm


HERE = Path(__file__).resolve().parent
REAL, BUNDLED = ROOT.parent / "shared" / "data" / SUBJECT.real, RECIPE / "data" / "train.parquet"
OUTPUT = ROOT / "docs" / "results" / f"train_speed{suffix(RECIPE.name)}.json"


MIXED_STEPS = 4  # a round, at least, of those whose steps have rows of like lengths: then lengths are mixed
MIXED_KINDS = ("ours", "trainer")
SETTLING_STEPS = 1  # before each turn: whoever waits gives its free memory to the others, and has to get it back


class Failed(Exception):
    """A contestant's process ended by itself; the text says why."""


def run_contestant(*arguments) -> None:
    """The target of every process. Only there torch is imported."""
    from contestant_process import run

    run(*arguments)


class Process:
    """A contestant's process, seen from outside."""

    def __init__(self, scratch: Path, name: str, job: dict):
        self.name, self.log = name, scratch / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}_{job.get('precision')}.log"
        # Forked from a process that has imported torch once; but CUDA outlives no fork.
        context = multiprocessing.get_context("spawn" if job["device"] == "cuda" else "forkserver")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=run_contestant, args=(theirs, str(self.log), job))
        self.process.start()
        theirs.close()  # or its end would not be noticed here

    def report(self) -> dict:
        """What it says next. Raises Failed where it has ended instead."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
            code = self.process.exitcode
            reason = lines[-1] if lines else f"exit code {code}"
            if code < 0:
                reason = f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
            raise Failed(reason) from None

    def steps(self, steps: int, settling: int = 0, profile: bool = False) -> dict:
        """Let it take so many steps, after some that do not count; its report."""
        self.pipe.send({"steps": steps, "settling": settling, "profile": profile})
        return self.report()

    def cpu_seconds(self) -> float:
        """What it and its data workers have used so far."""
        pids = [self.process.pid]
        for pid in pids:
            children = Path(f"/proc/{pid}/task/{pid}/children")
            pids += map(int, children.read_text().split()) if children.exists() else []
        return sum(_cpu_seconds(pid) for pid in pids)

    def let_go(self) -> None:
        """Tell it that nothing more is wanted."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)

    def end(self) -> None:
        """Let it go, by force if it does not."""
        self.let_go()
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # gone, or no Linux
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Benchmark:
    """The contestants of one size, from their start to the numbers."""

    def __init__(self, arguments: argparse.Namespace, size: str, scratch: Path):
        self.arguments, self.size, self.scratch = arguments, size, scratch
        given = defaults(arguments.device, size)
        self.settings = {key: getattr(arguments, key) or value for key, value in given._asdict().items()}
        self.settings |= {key: getattr(arguments, key) for key in ("rounds", "warmup_steps", "qualifying_steps")}
        self.settings["mixed_steps"] = max(self.settings["steps"], MIXED_STEPS)
        self.job = {
            "device": arguments.device, "threads": arguments.threads, "seed": arguments.seed, "quick": arguments.quick,
            "model_tag": SIZES[size].model_tag, "data": arguments.source, "scratch": str(scratch),
            "rows_file": str(scratch / "rows.npz"), "collator_file": str(scratch / "collator.pickle"),
            "overrides": [f"{k}={v}" for k, v in arguments.overrides.items()],
            "pack_passes": self.settings["tokens_per_step"] // self.settings["pack_tokens"],
            "warmup": arguments.warmup_steps + arguments.qualifying_steps, "settling": SETTLING_STEPS, **self.settings,
        }  # fmt: skip
        self.alive: dict[str, Process] = {}
        self.results: dict[str, dict] = {}
        self.waiting_share = 0.0
        self.bar: tqdm | None = None

    def measure(self) -> dict:
        """All of it; the entry of this size in the JSON."""
        try:
            facts = self.prepared()
            data = facts["data"]
            self.job |= {key: data[key] for key in ("passes", "micro_rows")}
            chosen, left_out = contestants(facts, self.arguments.overrides, self.arguments.quick)
            if self.arguments.only is not None or self.arguments.without:
                chosen[1:] = [c for c in chosen[1:] if self.asked(c.name)]
                left_out = {name: reason for name, reason in left_out.items() if self.asked(name)}
            self.rounds(chosen, facts)
        finally:
            for process in self.alive.values():
                process.let_go()
            for process in self.alive.values():
                process.end()
            if self.bar is not None:
                self.bar.close()
        return self.entry(facts, data, left_out)

    def asked(self, name: str) -> bool:
        """Whether --only names this contestant, or nothing, and --without does not."""
        only, without = self.arguments.only, self.arguments.without
        return (only is None or any(part in name for part in only)) and not any(part in name for part in without)

    def prepared(self) -> dict:
        """What a process finds out about machine and data before the first contestant. Raises Failed."""
        process = Process(self.scratch, "facts", {**self.job, "kind": "facts"})
        try:
            return process.report()
        finally:
            process.end()

    def steps_of(self, kind: str | None) -> int:
        """How many such a contestant takes a round."""
        return self.settings["mixed_steps" if kind in MIXED_KINDS else "steps"]

    def start(self, contestant: Contestant, precision: str) -> tuple[Process, dict]:
        """A process that is ready to train, and what it says of itself."""
        job = {**self.job, "kind": contestant.kind, "options": contestant.options, "precision": precision}
        job["steps"] = self.steps_of(contestant.kind)
        started = time.perf_counter()
        process = Process(self.scratch, contestant.name, job)
        try:
            return process, process.report() | {"start_s": time.perf_counter() - started}
        except BaseException:
            process.end()
            raise

    def rounds(self, chosen: list[Contestant], facts: dict) -> None:
        """Let all contestants qualify and take their rounds, as many at once as the memory takes."""
        arguments, first = self.arguments, chosen[0]
        at_once = arguments.at_once or self.at_once(facts["memory_gib"])
        others = chosen[1:]
        groups = [others[i : i + at_once - 1] for i in range(0, len(others), at_once - 1)] or [[]]
        turns = arguments.rounds * (len(others) + 2 * len(groups))  # of ours and of the products in each group
        self.bar = tqdm(
            total=turns + len(chosen), unit="turn", desc=self.size, disable=None, dynamic_ncols=True, file=sys.stderr
        )
        products = Contestant(PRODUCTS, "products", ("both",), {})
        self.alive[PRODUCTS], _ = self.start(products, "both")
        self.results[PRODUCTS] = {"rounds": []}
        self.alive[PRODUCTS].steps(1)
        self.qualify(first)
        if first.name not in self.alive:
            raise Failed(self.results[first.name]["failed"].partition(": ")[2])
        for number, group in enumerate(groups):
            for contestant in group:
                self.qualify(contestant)
            for turn in range(number * arguments.rounds, (number + 1) * arguments.rounds):
                names = [first.name, PRODUCTS, *(c.name for c in group if c.name in self.alive)]
                # There and back, so that a drift of the machine favours nobody.
                for name in names if turn % 2 == 0 else reversed(names):
                    self.take_turn(name, turn)
            for contestant in group:
                if contestant.name in self.alive:
                    self.alive.pop(contestant.name).end()
        if arguments.profile:
            self.say(f"profile of {first.name}")
            profile = self.alive[first.name].steps(arguments.profile, SETTLING_STEPS, profile=True)
            self.results[first.name]["profile"] = profile

    def at_once(self, memory_gib: float | None) -> int:
        """How many models the memory takes side by side. Raises Failed for less than ours and another."""
        rows, device = self.settings["peer_batch"], self.arguments.device
        fitting = held_at_once(memory_gib or 8.0, device, self.size, rows)  # unknown: no Linux
        if fitting < 2 and device == "cpu":  # a GPU would say so by itself
            raise Failed(
                f"{self.size} with --peer-batch {rows} may need more than the {memory_gib or 8.0:.0f} GiB that are "
                "free; give fewer rows, or --at-once 2 to try it."
            )
        return max(2, fitting)

    def qualify(self, contestant: Contestant) -> None:
        """Start a contestant in each of its precisions, and keep the faster one."""
        arguments, name = self.arguments, contestant.name
        result = self.results[name] = {"kind": contestant.kind, "options": contestant.options, "rounds": []}
        precisions = contestant.precisions
        if contestant.precision_of:
            precisions = (self.results[contestant.precision_of]["precision"],)
        started, ready, counts = {}, {}, {p: {"tokens": 0, "seconds": 0.0} for p in precisions}
        try:
            for precision in precisions:
                self.say(f"{name}: starting in {precision}")
                try:
                    started[precision], ready[precision] = self.start(contestant, precision)
                    seconds = warm_up(started[precision], contestant, arguments.warmup_steps)
                    ready[precision]["warmup_s"] = seconds
                except Failed as failure:
                    self.fail(name, f"{precision}: {failure}")
                    if precision in started:
                        started.pop(precision).end()
            for _ in range(arguments.qualifying_steps):
                for precision, process in started.items():
                    report = process.steps(1)
                    for key in ("tokens", "seconds"):
                        counts[precision][key] += report[key]
            rates = {p: counts[p]["tokens"] / counts[p]["seconds"] for p in started}
            if not rates:
                return
            best = max(rates, key=rates.get)
            self.alive[name] = started.pop(best)
        except Failed as failure:
            self.fail(name, str(failure))
            return
        finally:
            for process in started.values():
                process.end()
        result |= {"precision": best, **ready[best], "qualifying_tokens_per_second": rates}
        self.say(f"{name}: {', '.join(f'{p} {rate:,.0f} tokens/s' for p, rate in rates.items())}")
        self.bar.update()

    def fail(self, name: str, reason: str) -> None:
        """Keep the reason for the table, and say it now."""
        self.results[name]["failed"] = reason
        self.say(f"{name}: {reason}")

    def take_turn(self, name: str, turn: int) -> None:
        """One contestant's steps of one round; what the others use meanwhile is held against them."""
        process, others = self.alive[name], [p for n, p in self.alive.items() if n != name]
        self.bar.set_postfix_str(name)
        before, started = [p.cpu_seconds() for p in others], time.perf_counter()
        try:
            report = process.steps(self.steps_of(self.results[name].get("kind")), SETTLING_STEPS)
        except Failed as failure:
            self.fail(name, str(failure))
            self.alive.pop(name).end()
            if name in list(self.results)[:2]:  # the products and ours, which the others are held against
                raise
            return
        seconds = time.perf_counter() - started
        used = sum(p.cpu_seconds() - b for p, b in zip(others, before, strict=True))
        self.waiting_share = max(self.waiting_share, used / seconds / self.arguments.threads)
        self.results[name]["rounds"].append({"round": turn, **report})
        if "tokens" in report:
            self.say(f"round {turn + 1}: {name}: {report['tokens'] / report['seconds']:,.0f} tokens/s")
        self.bar.update()

    def say(self, text: str) -> None:
        """A line beside the progress bar."""
        tqdm.write(f"{self.size}  {text}", file=sys.stderr)

    def entry(self, facts: dict, data: dict, left_out: dict) -> dict:
        """What the JSON has of this size."""
        arguments = self.arguments
        return {
            "recipe": RECIPE.name,
            "size": self.size,
            "device": arguments.device,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": shlex.join(arguments.command),
            "git": facts["git"],
            "machine": facts["machine"],
            "versions": facts["versions"],
            "data": {
                "file": Path(arguments.source["data_files"]).name,
                "num_rows": data["num_rows"],
                "mean_tokens": data["mean_tokens"],
            },
            "settings": {
                **self.settings,
                "seed": arguments.seed,
                "peer_passes": data["passes"],
                "peer_rows": data["micro_rows"],
                "overrides": self.job["overrides"],
            },
            "waiting_cpu_share": self.waiting_share,
            "left_out": left_out,
            "products": self.results.pop(PRODUCTS)["rounds"],
            "contestants": [{"name": name, **result} for name, result in self.results.items()],
        }


def warm_up(process: Process, contestant: Contestant, steps: int) -> float:
    """Steps that do not count; of ours more, while torch.compile still meets new shapes. Returns their seconds."""
    report = process.steps(steps)
    seconds, unchanged, more = report["seconds"], 0, 20 if contestant.kind == "ours" and "graphs" in report else 0
    while unchanged < 2 and more:
        graphs, more, report = report["graphs"], more - 1, process.steps(1)
        unchanged = unchanged + 1 if report["graphs"] == graphs else 0
        seconds += report["seconds"]
    return seconds


def source(path: str) -> dict:
    """Arguments of `datasets.load_dataset` for a file. Raises ValueError for one that is not there or not known."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--data {path}: no such file; give {SUBJECT.give}.")
    kind = "".join(file.suffixes[-2:] if file.suffix == ".gz" else file.suffixes[-1:]).lower()
    for name, endings in SUBJECT.file_endings.items():
        if kind in endings:
            return {"path": name, "data_files": str(file.resolve())}
    raise ValueError(f"--data {path}: its name ends on none of {', '.join(sum(SUBJECT.file_endings.values(), ()))}.")


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; `key=value` may stand anywhere."""
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", default=None, metavar="A,B", help=f"of {', '.join(SIZES)}; default: {SUBJECT.usual}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--data", metavar="FILE",
        help=f"{SUBJECT.give}; default: ../shared/data/{SUBJECT.real} if it is there, else the bundled sample",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=positive, help="optimizer steps a round, of ours and Trainer 4 at least; default: by size"
    )
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--warmup-steps", type=positive, default=1, help="before anything counts; default: 1")
    parser.add_argument("--qualifying-steps", type=positive, default=2, help="in each precision; default: 2")
    parser.add_argument("--tokens-per-step", type=positive, help="real tokens an optimizer step; default: by size")
    parser.add_argument("--pack-tokens", type=positive, help="tokens of our packed micro-batches; default: by size")
    parser.add_argument("--peer-batch", type=positive, help="rows of a peer's micro-batch, about; default: by size")
    parser.add_argument("--at-once", type=positive, help="models in memory at once; default: what it takes")
    parser.add_argument("--threads", type=positive, default=len(cores()), help="default: the machine's cores")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--only", nargs="*", metavar="TEXT", help="beside ours only those whose name has one of these in it"
    )
    parser.add_argument(
        "--without", nargs="*", default=(), metavar="TEXT", help="and those whose name has none of these in it"
    )
    parser.add_argument("--quick", action="store_true", help="the tiny model, two rounds, little of everything")
    parser.add_argument(
        "--profile",
        type=positive,
        nargs="?",
        const=MIXED_STEPS,
        metavar="STEPS",
        help="where the time of our steps goes",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="entries of other sizes in it are kept")
    parser.add_argument(
        "--from", dest="numbers", type=Path, metavar="FILE.json", help="run nothing, take these numbers"
    )
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the tables into this page")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the bars")
    parser.add_argument("--check", type=Path, metavar="FILE.md", help="fail if its tables are not those of --from")

    add_recipe(parser)

    found = parse_with_overrides(parser, arguments)
    overrides, found.overrides = found.overrides, {}
    for override in overrides:
        key, _, value = override.partition("=")
        known = next((k for k in TAKEN if key.lstrip("+") == k or key.lstrip("+").startswith(f"{k}.")), None)
        if known:
            parser.error(f"{override}: the benchmark sets that itself: {TAKEN[known]}.")
        if key == "precision" and value not in ("fp32", "bf16"):
            parser.error(f"{override}: fp32 or bf16; without it, whichever is faster.")
        found.overrides[key] = value
    if found.check and not found.numbers:
        parser.error("--check needs the numbers: --from FILE.json.")
    if found.numbers:
        if found.quick or found.sizes or found.output or overrides:
            parser.error("--from runs nothing; leave it or what belongs to runs out.")
        if not found.numbers.is_file():
            parser.error(f"--from {found.numbers}: no such file.")
        return found

    found.sizes = (found.sizes or (SUBJECT.quick if found.quick else SUBJECT.usual)).split(",")
    for size in found.sizes:
        if size not in SIZES:
            parser.error(f"--sizes {size}: known are {', '.join(SIZES)}.")
        given = defaults(found.device, size)
        tokens, pack = found.tokens_per_step or given.tokens_per_step, found.pack_tokens or given.pack_tokens
        if tokens % pack:
            parser.error(f"--tokens-per-step {tokens} must divide by --pack-tokens {pack}.")
        if pack < MAX_SEQ_LENGTH:
            parser.error(f"--pack-tokens {pack} must be at least {MAX_SEQ_LENGTH}, the longest row.")
    try:
        found.source = source(found.data or str(REAL if REAL.is_file() else BUNDLED))
    except ValueError as error:
        parser.error(str(error))
    if found.quick:
        found.rounds, found.qualifying_steps = min(found.rounds, 2), 1
    if found.output is None:
        found.output = OUTPUT
    found.command = ["python", "ci/benchmarks/train_speed.py", *(no_path(argument) for argument in arguments)]
    return found


def cores() -> set[int]:
    """Those that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def no_path(argument: str) -> str:
    """An argument with absolute paths cut to the last name: where files lay is nobody's business."""
    return re.sub(r"(^|=)/\S*/", r"\1", argument)


def measure(arguments: argparse.Namespace) -> dict:
    """Run all sizes; each is in the output file as soon as it is done."""
    from speed_report import entry_text  # not above: the contestants' processes import this file

    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[0] if arguments.device == "cuda" else ""  # one, or none
    # The process that others are forked from does not have this one's sys.path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    multiprocessing.set_forkserver_preload(["contestant_process"])
    result = read_result(arguments.output)
    with tempfile.TemporaryDirectory(prefix="train_speed_") as scratch:
        os.environ |= {"HF_DATASETS_CACHE": f"{scratch}/datasets", "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor"}
        for size in arguments.sizes:
            entry = Benchmark(arguments, size, Path(scratch)).measure()
            keep(entry, result, arguments.output)
            print(entry_text(entry))
    return result


def keep(entry: dict, result: dict, output: Path) -> None:
    """Put the entry in the place of an earlier one of its size on such a machine, and write the file."""
    order = list(SIZES)

    def place(entry: dict) -> tuple:
        machine = entry["machine"]
        return entry["device"], machine["name"], machine["simd"], machine["threads"], order.index(entry["size"])

    others = [other for other in result["entries"] if place(other) != place(entry)]
    result["entries"] = sorted([*others, entry], key=place)
    write_json(result, output)


def read_result(path: Path) -> dict:
    """What the output file has from earlier runs."""
    return json.loads(path.read_text()) if path.exists() else {"entries": []}


def write_json(result: dict, path: Path) -> None:
    """Write the file, or leave the one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}")
    new.write_text(json.dumps(rounded(result), indent=1) + "\n")
    new.replace(path)


def rounded(value):
    """Numbers to six significant digits, which is more than a timing has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def main(arguments: list[str]) -> int:
    """Run or read, then report."""
    import speed_report

    arguments = read_arguments(arguments)
    try:
        result = read_result(arguments.numbers) if arguments.numbers else measure(arguments)
        result = rounded(result)
    except Failed as failure:
        print(f"error: {str(failure).removeprefix('error: ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    try:
        if arguments.numbers and not arguments.check:
            print(speed_report.tables(result))
        if arguments.table:
            speed_report.write(arguments.table, result)
        if arguments.plot:
            speed_report.draw(result, arguments.plot)
        if arguments.check and not speed_report.is_current(arguments.check, result):
            raise ValueError(f"its tables are not those of {arguments.numbers}; write them: --table.")
    except ValueError as error:
        print(f"error: {arguments.check or arguments.table or arguments.plot}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
