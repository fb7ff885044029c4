"""What a user waits for: help, a typing error, the default run.

    python benchmarks/commands.py

Help and typing errors run once before they are measured.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measure import BUILD, Spread, run, save

DPPO = Path(sys.executable).with_name("dppo")


def main(rounds: int = 7) -> None:
    found: dict[str, Any] = {}
    for name, words, status in (
        ("help", ["--help"], 0),
        ("misspelt choice", ["train", "divergence=tw"], 2),
        ("misspelt key", ["train", "sampling.temprature=1"], 2),
    ):
        run([DPPO, *words], expect=status)
        found[name] = Spread.of([run([DPPO, *words], expect=status).seconds for _ in range(rounds)])
    runs = []
    for seed in (1, 2, 3):
        folder = BUILD / "run"
        shutil.rmtree(folder, ignore_errors=True)
        process = run([DPPO, "train", f"seed={seed}", f"run_dir={folder}"])
        runs.append((process, json.loads((folder / "summary.json").read_text())))
    found["default run"] = {
        "seconds": Spread.of([process.seconds for process, _ in runs]),
        "gib": Spread.of([process.peak_gib for process, _ in runs]),
        "eval_before": Spread.of([summary["eval_before"] for _, summary in runs]),
        "eval_after": Spread.of([summary["eval_after"] for _, summary in runs]),
        "by_seed": [(process.seconds, process.peak_gib, summary) for process, summary in runs],
    }
    print(found)
    save("commands", found)


if __name__ == "__main__":
    main()
