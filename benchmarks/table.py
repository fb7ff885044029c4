"""The table of what has been measured: `python benchmarks/table.py` writes results.md from build/results/.

Rows that were not measured say so.
"""

import json
from pathlib import Path
from typing import Any

from measure import BUILD, HERE, machine

Row = tuple[str, str, str]


def read(folder: Path) -> dict[str, Any]:
    """Name of a benchmark -> what it saved."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def spread(value: dict[str, float], unit: str = "") -> str:
    return f"{value['median']:.3g}{unit} ({value['low']:.3g} to {value['high']:.3g})"


def rows(results: dict[str, Any]) -> list[Row]:
    """Work, measured, target; every figure is median (lowest to highest)."""
    found = []
    for name, tokens, approx, target in (
        ("peer_64_binary", 64, "binary", "4 times faster, half the memory"),
        ("peer_64_topk", 64, "top-K", ""),
        ("peer_256_binary", 256, "binary", "7 times faster, a third of the memory"),
    ):
        text = "not measured"
        if name in results:
            r = results[name]
            text = (
                f"{spread(r['speedup'])} times faster: {spread(r['ours_seconds'], ' s')} against "
                f"{spread(r['peer_seconds'], ' s')}; memory {r['memory_ratio']:.2f} of the peer's: "
                f"{r['ours_gib']:.2f} against {r['peer_gib']:.2f} GiB"
            )
        found.append((f"step at {tokens} new tokens, {approx}, against TRL 1.8.0", text, target))
    for name, target in (("topk", "1.03 times the time"), ("full", "1.4 times the time")):
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


def main() -> None:
    lines = ["| work | measured, median (lowest to highest) | target |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(read(BUILD / "results"))]
    text = f"{machine()}\n\n" + "\n".join(lines) + "\n"
    (HERE / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
