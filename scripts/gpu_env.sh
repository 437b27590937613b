# Sourced by the scripts for GPU machines (test_gpu.sh, gpu_bars.sh), which need neither Rust nor a network.
# Sets root, bin (programs that scripts/pack_gpu.sh has packed; MX_BIN names another folder), logs and python,
# exports MX_CUBIN_DIR and MX_NVRTC where they are found, and defines part, report and finish.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2
bin=${MX_BIN:-$root/.gpu/bin}
logs=${MX_GPU_LOGS:-$root/.gpu/logs}
python=${MX_PYTHON:-python3}

# Programs: packed, or packed now where there is Rust.
need_programs() { # need_programs NAME...
    local name
    # What travelled may have lost its mode.
    chmod +x "$bin"/* 2>/dev/null
    for name in "$@"; do
        [ ! -x "$bin/$name" ] || continue
        if [ -z "${MX_BIN:-}" ] && { command -v cargo >/dev/null 2>&1 || [ -x "$HOME/.cargo/bin/cargo" ]; }; then
            scripts/pack_gpu.sh || exit 2
        else
            echo "error: $bin/$name is missing: run scripts/pack_gpu.sh on a machine with Rust and bring .gpu/ along" >&2
            exit 2
        fi
    done
    mkdir -p "$logs"
}

if [ -z "${MX_CUBIN_DIR:-}" ] && [ -d "$root/.gpu/cubins" ]; then
    export MX_CUBIN_DIR=$root/.gpu/cubins
fi
# Where the loader finds no NVRTC, that of a Python package will do.
if [ -z "${MX_NVRTC:-}" ] && ! ldconfig -p 2>/dev/null | grep -q 'libnvrtc\.so\.1[23]' &&
    ! ls /usr/local/cuda/lib64/libnvrtc.so.1[23] >/dev/null 2>&1; then
    MX_NVRTC=$("$python" scripts/find_nvrtc.py 2>/dev/null) && [ -n "$MX_NVRTC" ] && export MX_NVRTC || unset MX_NVRTC
fi

say_machine() {
    nvidia-smi -L 2>/dev/null || echo "nvidia-smi: not found or no GPU"
    [ ! -f .gpu/commit ] || echo "programs of $(cat .gpu/commit)"
    echo "NVRTC: ${MX_NVRTC:-where the loader looks}; cubins built ahead: ${MX_CUBIN_DIR:-none}"
}

table=()
failed=0
report() { # report PART RESULT SECONDS NOTE
    table+=("$(printf '%-10s %-8s %6s s  %s' "$1" "$2" "$3" "$4")")
    [ "$2" != failed ] || failed=1
}

# Runs a part with its log shown and kept; the note is the last lines that say how it went.
part() { # part NAME COMMAND...
    local name=$1 log=$logs/$1.log start=$SECONDS code note skips
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$log"
    code=${PIPESTATUS[0]}
    note=$(grep -aE '^test result:|ERROR SUMMARY|RACECHECK SUMMARY|checks|^bar ' "$log" | tail -n 2 | tr '\n' ' ')
    skips=$(grep -ac '^skipped: ' "$log")
    [ "$skips" = 0 ] || note="$note($skips lines 'skipped', see $log)"
    if [ "$code" = 0 ]; then report "$name" ok $((SECONDS - start)) "$note"; else
        report "$name" failed $((SECONDS - start)) "exit code $code; $note see $log"
    fi
}

# Prints the table and ends.
finish() {
    echo
    printf '%s\n' "${table[@]}"
    exit "$failed"
}
