"""A training step in one process with all cores against one in several with a share of the cores each.

    python benchmarks/processes.py 2              # two processes, responses of up to 64 tokens; also 64 and others

The run of step.py with a reward that differs between all samples, so that none is skipped. The two sides alternate,
each run in processes of its own; its first step is a warm-up and is left out. Memory is the peak of the main process.
"""

import shutil
import sys
from typing import Any

from measure import BUILD, HERE, Spread, save, train
from step import WARM_UP, seconds, work

ROUNDS, STEPS = 2, 4


def main(processes: int, max_new_tokens: int = 64) -> None:
    sides: dict[int, list[dict[str, Any]]] = {1: [], processes: []}
    peaks: dict[int, float] = {}
    for _ in range(ROUNDS):
        for side, steps in sides.items():
            folder = BUILD / "run"
            shutil.rmtree(folder, ignore_errors=True)
            rewarded = f"reward.path={HERE / 'reward.py'}:all_differ"
            words = work(max_new_tokens, f"steps={WARM_UP + STEPS}", rewarded, f"hardware.processes={side}")
            metrics, process = train(folder, *words)
            steps += metrics[WARM_UP:]
            peaks[side] = max(peaks.get(side, 0.0), process.peak_gib)
    one, several = (Spread.of(seconds(steps)) for steps in sides.values())
    found = {
        "processes": processes,
        "one_seconds": one,
        "several_seconds": several,
        "speedup": Spread(one.low / several.high, one.median / several.median, one.high / several.low),
        "phases": {
            str(side): {name: str(Spread.of([step["time"][name] for step in steps])) for name in ("rollout", "update")}
            for side, steps in sides.items()
        },
        "gib": {str(side): peak for side, peak in peaks.items()},
    }
    print(found, flush=True)
    save(f"processes_{processes}_{max_new_tokens}", found)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
