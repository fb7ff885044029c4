"""Speed and memory on a CUDA device, with a random model in the shapes of Llama 3.1 8B: no download, at most 8 minutes.

    python benchmarks/gpu.py                              # all steps; gpu.json and gpu.md in $OUT, or benchmarks/build
    python benchmarks/gpu.py --only decode,update         # some of them
    python benchmarks/gpu.py --tiny --device cpu          # the same code with tiny shapes, to try it

Decoding is measured with 448 + 128 tokens, whose mean context is that of 256 + 512, in a quarter of the time. The floor
of a decoding step counts the bytes of weights, keys and values at the bandwidth that a copy reaches; the share is the
floor's part of the time that was taken. Each step has a time limit, and what was measured is saved after each.
"""

import argparse
import json
import os
import platform
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_cards import STEPS as CARDS
from gpu_decode import STEPS as DECODING
from gpu_families import STEPS as FAMILIES
from gpu_fused import STEPS as FUSED
from gpu_model import LLAMA_8B, TINY
from gpu_nf4 import STEPS as PRODUCTS
from gpu_peers import STEPS as PEERS
from gpu_steps import STEPS as MOST
from gpu_steps import Bench
from gpu_trace import STEPS as TRACES
from measure import BUILD

ORDER = "probe decode topk static static_topk static_ways refill long blocks generate update update_shared"
ORDER += " update_plain trace trace_update kernels gemm_nf4 step gpu_80gb decode_nf4 static_nf4 topk_nf4 update_nf4"
ORDER += " update_nf4_whole update_nf4_kept trace_nf4 trace_update_nf4 gpu_16gb gpu_24gb"
ORDER += " gemma3 phi4 peer"
STEPS = {
    name: {**MOST, **DECODING, **FUSED, **PRODUCTS, **TRACES, **CARDS, **FAMILIES, **PEERS}[name]
    for name in ORDER.split()
}
"""Two policies do not fit beside each other: those of one base follow each other."""
TOTAL = 480.0
"""Seconds for all steps together."""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so long, between two kernels."""

    def late(*_: object) -> None:
        raise TimeoutError(f"stopped after its {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def where(device: torch.device) -> str:
    """Card, versions and date."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"no GPU ({platform.machine()})"
    return (
        f"{card}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {date.today().isoformat()}"
    )


def table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"{title}", "", "| what | measured |", "|---|---|"]
    for row in rows:
        shown = {key: f"{v:.3g}" if isinstance(v, float) else v for key, v in row.items() if key != "what" and v != ""}
        lines.append(f"| {row['what']} | {', '.join(f'{key} {value}' for key, value in shown.items())} |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"steps, separated by commas: {', '.join(STEPS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all steps together")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", BUILD)), help="folder of the results")
    args = parser.parse_args(words)
    chosen = args.only.split(",") if args.only else list(STEPS)
    unknown = [name for name in chosen if name not in STEPS]
    if unknown:
        parser.error(f"there is no step {unknown[0]}; choices: {', '.join(STEPS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --tiny --device cpu tries the script")
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(TINY if args.tiny else LLAMA_8B, torch.device(args.device), out=args.out)
    start = time.monotonic()
    for name in chosen:
        limit, work = STEPS[name]
        left = args.seconds - (time.monotonic() - start)
        if left < 5:
            bench.add(name, not_run=f"the {args.seconds:g} s of all steps are over")
            continue
        try:
            with _limit(min(limit, left)):
                work(bench)
        except Exception as error:  # The steps after it are worth their time.
            traceback.print_exc()
            bench.add(name, failed=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
            bench.forget()
        about = where(bench.device)
        (args.out / "gpu.json").write_text(json.dumps({"where": about, "rows": bench.rows}, indent=1))
        (args.out / "gpu.md").write_text(table(about, bench.rows))
    print(table(where(bench.device), bench.rows))


if __name__ == "__main__":
    main()
