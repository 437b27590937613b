#!/usr/bin/env bash
# The suite that needs a GPU, for a machine with an NVIDIA driver and neither Rust nor a network:
# scripts/pack_gpu.sh has put the programs into .gpu/ before (with Rust here, it is called).
#
#   scripts/test_gpu.sh [PART...]      default: kernels memcheck racecheck operators
#
#   kernels     mx-kernels on the device against the CPU: values, formats, shapes, streams, graphs, devices
#   memcheck    a short version of that under compute-sanitizer: accesses out of bounds, misaligned, uninitialised contexts
#   racecheck   the same: races in shared memory
#   operators   the ONNX Runtime operators from Python, where onnxruntime has the CUDA provider
#
# MX_REQUIRE (default cuda,sanitizer) names what must be there; add `ort` for the operators. What is
# missing otherwise is a skip with its reason. MX_NVRTC, MX_CUBIN_DIR, MX_CACHE_DIR as in docs/cuda.md.
# Logs go to MX_GPU_LOGS (default .gpu/logs). Exit code 0: every part passed or was skipped.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/gpu_env.sh"
export MX_REQUIRE=${MX_REQUIRE:-cuda,sanitizer}
need_programs kernels_it

required() { case ",$MX_REQUIRE," in *",$1,"*) return 0 ;; *) return 1 ;; esac; }

skip() { # skip PART NEEDS REASON
    if required "$2"; then report "$1" failed 0 "MX_REQUIRE names $2, but $3"; else report "$1" skipped 0 "$3"; fi
}

kernels() {
    # That every kernel compiles for every architecture is tested where there need be no GPU: scripts/test.sh.
    part kernels "$bin/kernels_it" cuda:: --skip every_unit_compiles --nocapture --test-threads="${MX_TEST_THREADS:-4}"
}

sanitize() { # sanitize TOOL OPTION...
    local tool=$1
    shift
    local sanitizer
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
    if [ -z "$sanitizer" ]; then
        skip "$tool" sanitizer "compute-sanitizer is not on PATH nor in /usr/local/cuda/bin"
        return
    fi
    # Refused calls are what some tests check, so only what kernels do counts as an error.
    MX_GPU_QUICK=1 part "$tool" "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 9 "$@" \
        "$bin/kernels_it" cuda:: --skip cuda::units --nocapture --test-threads=1
}

operators() {
    local missing
    missing=$("$python" - 2>&1 <<'PY'
import importlib.util, sys
absent = [m for m in ("numpy", "onnx", "torch", "onnxruntime") if importlib.util.find_spec(m) is None]
if absent:
    sys.exit("no " + ", ".join(absent))
import onnxruntime
if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
    sys.exit("this onnxruntime has no CUDA provider (install onnxruntime-gpu)")
PY
    )
    if [ $? -ne 0 ]; then
        skip operators ort "$python: $(printf '%s' "$missing" | tail -n 1)"
        return
    fi
    MX_CUSTOM_OPS=${MX_CUSTOM_OPS:-$bin/libmx_custom_ops.so} part operators "$python" tests/python/gpu_ops.py
}

say_machine
echo "required: $MX_REQUIRE"
[ $# -gt 0 ] || set -- kernels memcheck racecheck operators
for name in "$@"; do
    case $name in
        kernels | operators) "$name" ;;
        memcheck) sanitize memcheck ;;
        racecheck) sanitize racecheck --racecheck-report analysis ;;
        *) echo "error: no part named '$name' (kernels, memcheck, racecheck, operators)" >&2; exit 2 ;;
    esac
done
finish
