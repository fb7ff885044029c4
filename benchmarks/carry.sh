#!/bin/sh
# Wheels for a CUDA machine without a network that has torch, transformers, accelerate and their dependencies. Run it where
# there is a network, from the root of a checkout; carry the folder; there, `sh FOLDER/install.sh`.
#
#   sh benchmarks/carry.sh [FOLDER]        TARGET=3.13 sh benchmarks/carry.sh (its Python; 3.12 if not given)
set -eu
out=${1:-benchmarks/build/carry}
python=${PYTHON:-.venv/bin/python}
pip="$python -m pip --disable-pip-version-check --quiet"
rm -rf "$out" && mkdir -p "$out"
# This project, and what has no wheel of its own.
$pip wheel --no-deps --wheel-dir "$out" . antlr4-python3-runtime==4.9.3
# Pure Python. `datasets`, `dill`, `multiprocess` and `trl` are for the comparison with TRL.
$pip download --no-deps --only-binary=:all: --dest "$out" --python-version "${TARGET:-3.12}" --constraint constraints.txt \
	hydra-core omegaconf peft datasets dill multiprocess rich markdown-it-py mdurl pygments pytest iniconfig pluggy
$pip download --no-deps --only-binary=:all: --dest "$out" trl==1.8.0
# bitsandbytes brings a library for every CUDA: 43 MB, of which one machine needs 4.
$pip download --no-deps --only-binary=:all: --dest "$out/whole" --constraint constraints.txt \
	--platform manylinux_2_24_x86_64 bitsandbytes
$python - "$out" <<'EOF'
import sys
import zipfile
from pathlib import Path

KEPT = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")
out = Path(sys.argv[1])
(whole,) = (out / "whole").glob("*.whl")
with zipfile.ZipFile(whole) as old, zipfile.ZipFile(out / whole.name, "w", zipfile.ZIP_DEFLATED) as new:
    names = old.namelist()
    dropped = {n for n in names if n.endswith(".so") and not n.endswith(KEPT)}
    assert all(any(n.endswith(kept) for n in names) for kept in KEPT), "bitsandbytes has other libraries now"
    for name in names:
        data = old.read(name)
        if name.endswith(".dist-info/RECORD"):
            lines = data.decode().splitlines(keepends=True)
            data = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
        if name not in dropped:
            new.writestr(name, data)
whole.unlink()
whole.parent.rmdir()
EOF
# Without dependencies: what is there stays as it is.
cat > "$out/install.sh" <<'EOF'
#!/bin/sh
exec "${PYTHON:-python3}" -m pip install --no-index --no-deps "$(dirname "$0")"/*.whl
EOF
ls -l "$out"
