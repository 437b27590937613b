#!/usr/bin/env bash
# Compiles every GPU kernel ahead of time with nvcc, for machines without NVRTC. MX_CUBIN_DIR names the folder there.
#
#   scripts/build_cubins.sh OUT_DIR [ARCH...]      default: every architecture that is tested
#
# nvcc is taken from NVCC or PATH. Needs Rust: the library itself says what it wants compiled, and the
# key that it checks (kernels/src/cuda/cache.rs).
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
. "$(dirname "$0")/env.sh"
setup_rust
nvcc=${NVCC:-nvcc}
command -v "$nvcc" >/dev/null || { echo "error: '$nvcc' is missing: put the CUDA toolkit's bin on PATH or name it in NVCC" >&2; exit 1; }

build() { # build STEM ARCH KEY SOURCE OPTION...
    local stem=$1 arch=$2 key=$3 source=$4
    shift 4
    # The frontend needs no `-I`: headers lie beside the sources.
    "$nvcc" -cubin "$@" -o "$out/$stem.$arch.cubin.new" "$source"
    mv "$out/$stem.$arch.cubin.new" "$out/$stem.$arch.cubin"
    printf '%s %s\n' "$key" "$(sha256sum < "$out/$stem.$arch.cubin" | cut -d' ' -f1)" > "$out/$stem.$arch.key"
    say "$stem for $arch"
}
export -f build say
export nvcc out

list=$(cargo run --quiet --locked -p mx-kernels --example cuda_units -- "$@")
# Two at a time by default; a compilation takes seconds and some hundred MB.
printf '%s\n' "$list" | xargs -P "${MX_BUILD_JOBS:-2}" -I{} bash -c 'set -euo pipefail; build {}'
say "$(printf '%s\n' "$list" | wc -l) cubins in $out"
