"""The scripts of benchmarks/ that need nothing but this package."""

from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in ("peer_step", "convert"))
