# SPDX-License-Identifier: Apache-2.0
"""Hold a run's loss against what residue frequencies alone would give, and draw its curves."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


def unigram_entropy(file: str) -> float:
    """Entropy of the residues' frequencies, in nats: the loss of a model that knows nothing else."""
    text = "".join(pq.read_table(file, columns=["sequence"])["sequence"].to_pylist()).encode()
    counts = np.bincount(np.frombuffer(text, dtype=np.uint8))
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def main(run: Path, train_file: str, validation_file: str) -> None:
    """Print the comparison, write it to `summary.json`, and fail if the model has not learnt more than frequencies."""
    facts = json.loads((run / "run.json").read_text())
    summary = {key: facts[key] for key in ("device", "num_ranks", "threads_per_rank", "precision", "versions", "git")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name, kind, file in (("training", "train", train_file), ("validation", "validation", validation_file)):
        losses, entropy = [line["loss"] for line in lines if line["kind"] == kind], unigram_entropy(file)
        summary[name] = {"first_loss": losses[0], "last_loss": losses[-1], "unigram_entropy": entropy}
        print(
            f"{name} loss: {losses[0]:.3f} -> {losses[-1]:.3f}; unigram entropy of the sample: {entropy:.3f}; "
            f"{'well below' if losses[-1] < 0.9 * entropy else 'NOT well below'} it"
        )
        if losses[-1] >= 0.9 * entropy:
            sys.exit(
                "error: the model has learnt little more than how often each residue occurs; train for more steps."
            )
    steps = [line for line in lines if line["kind"] == "train"]
    summary["validation"]["accuracy"] = [line["accuracy"] for line in lines if line["kind"] == "validation"][-1]
    summary["median_tokens_per_second"] = float(np.median([line["tokens_per_second"] for line in steps]))
    summary["training_minutes"] = steps[-1]["num_tokens"] / summary["median_tokens_per_second"] / 60
    (run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot = [sys.executable, "plot_metrics.py", str(run), "--reference-loss", f"{unigram_entropy(train_file):.4f}"]
    subprocess.run([*plot, "--reference-label", "unigram entropy", "--out", str(run / "metrics.png")], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
