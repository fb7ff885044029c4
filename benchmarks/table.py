"""Write results.md: the figures that the other scripts have saved in build/results/, as tables.

python benchmarks/table.py
"""

import json
from pathlib import Path
from typing import Any

from measure import BUILD, HERE, machine

Row = tuple[str, str, str]


def read(folder: Path) -> dict[str, Any]:
    """What each benchmark saved, by its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def spread(value: dict[str, float], unit: str = "") -> str:
    return f"{value['median']:.3g}{unit} ({value['low']:.3g} to {value['high']:.3g})"


def rows(results: dict[str, Any]) -> list[Row]:
    """Work, measured, target. Every figure is the median (lowest to highest); missing results are "not measured"."""
    found = []
    for name, tokens, approx, target in (
        ("peer_64_binary_float32", 64, "binary", "4 times faster, half the memory"),
        ("peer_64_binary_float32_all_differ", 64, "binary, a reward that differs between samples", ""),
        ("peer_64_topk_float32", 64, "top-K", ""),
        ("peer_64_binary_bfloat16", 64, "binary, both in bfloat16", ""),
        ("peer_256_binary_float32", 256, "binary", "7 times faster, a third of the memory"),
    ):
        text = "not measured"
        r = results.get(name)
        if r and "not_run" in r:
            text = f"not run: {r['not_run']}"
        elif r:
            text = (
                f"{spread(r['speedup'])} times faster: {spread(r['ours_seconds'], ' s')} against "
                f"{spread(r['peer_seconds'], ' s')}; memory {r['memory_ratio']:.2f} of the peer's: "
                f"{r['ours_gib']:.2f} against {r['peer_gib']:.2f} GiB; {r['ours_skipped']:.0%} of our samples skipped"
            )
        found.append((f"step at {tokens} new tokens, {approx}, against TRL 1.8.0", text, target))
    for name, target in (("topk", "1.03 times the time, 1.02 times the memory"), ("full", "1.4 times the time")):
        text = "not measured"
        if "approx" in results:
            r = results["approx"][name]
            text = f"{spread(r['ratio'])} times the time, {r['memory_ratio']:.2f} times the memory"
        found.append((f"approx={name} against binary, whole step", text, target))
    head = results.get("head")
    found.append(
        (
            "head, 4,096 tokens x 2,048 x 128,256, against materialised logits",
            f"1/{spread(head['memory_ratio'])} of the extra memory, {spread(head['time_ratio'])} times the time"
            if head
            else "not measured",
            "1/15 of the extra memory, no more time",
        )
    )
    for tokens in (64, 256):
        r = results.get(f"rollout_{tokens}")
        text = f"{spread(r['ratio'])} times as many tokens a second" if r else "not measured"
        found.append((f"sampling at {tokens} new tokens against transformers' generate", text, "2.5 times"))
    commands = results.get("commands")
    for name, target in (
        ("help", "0.5 s"),
        ("misspelt choice", "0.5 s"),
        ("misspelt key", "0.5 s"),
        ("default run", "60 s"),
    ):
        value = commands[name]["seconds"] if commands and name == "default run" else (commands or {}).get(name)
        found.append((name, spread(value, " s") if value else "not measured", target))
    return found


def floor_table(floor: dict[str, Any]) -> list[str]:
    """Each phase of the benchmark's step against its floor."""
    lines = [
        "## How close to the machine's limits",
        "",
        f"Measured peaks: {floor['gflops']:.0f} GFLOP/s (float32 matrix product), {floor['gb_per_second']:.0f} GB/s "
        "(copy). A phase's floor is the larger of its operations and its bytes over these; elementwise work, attention "
        "and Python count as zero.",
        "",
        "| new tokens | phase | seconds | floor by operations | floor by bytes | times the floor |",
        "|---|---|---|---|---|---|",
    ]
    for tokens in ("64", "256"):
        for phase, r in floor[tokens].items():
            lines.append(
                f"| {tokens} | {phase} | {spread(r['seconds'])} | {r['operations_seconds']:.2g} s | "
                f"{r['bytes_seconds']:.2g} s | {spread(r['times_floor'])} |"
            )
    return lines


def growth_table(growth: dict[str, Any]) -> list[str]:
    """Time and memory along each axis, and how well a straight line fits them."""
    lines = [
        "## Growth",
        "",
        "A random Llama (hidden 384, 6 layers), 4 prompts; every response has the length asked for. Seconds of a step, "
        "median (lowest to highest). Attention alone grows faster than the response: each token sees all before it.",
    ]
    for axis, found in growth.items():
        lines += [
            "",
            f"By {axis}: R² of a straight line {found['r2_time']:.3f} for the time, {found['r2_memory']:.3f} for the "
            f"memory; over the last doubling the time grows by 2^{found['time_exponent']:.2f}, the memory by "
            f"2^{found['memory_exponent']:.2f}.",
            "",
            f"| {axis} | step, s | sampling, s | update, s | ms per response token | peak memory, GiB |",
            "|---|---|---|---|---|---|",
        ]
        for point in found["points"]:
            seconds = " | ".join(spread(point[name]) for name in ("seconds", "rollout", "update"))
            lines.append(f"| {point[axis]:,} | {seconds} | {point['ms_per_token']:.2f} | {point['gib']:.2f} |")
    return [*lines, "", "![time and memory against each](growth.png)"]


def main() -> None:
    results = read(BUILD / "results")
    lines = ["| work | measured, median (lowest to highest) | target |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(results)]
    for name, section in (("floor", floor_table), ("growth", growth_table)):
        if name in results:
            lines += ["", *section(results[name])]
    text = f"{machine()}\n\n" + "\n".join(lines) + "\n"
    (HERE / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
