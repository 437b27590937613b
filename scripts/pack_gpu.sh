#!/usr/bin/env bash
# Builds what scripts/test_gpu.sh runs into .gpu/, for a GPU machine that has neither Rust nor a network.
# Take the repository with .gpu/ there and run scripts/test_gpu.sh.
#
#   scripts/pack_gpu.sh [ARCH...]      with architectures (sm_90a), kernels are also compiled ahead of
#                                      time into .gpu/cubins, by nvcc; otherwise there, by NVRTC
set -euo pipefail
. "$(dirname "$0")/env.sh"
setup_rust
out=$root/.gpu
mkdir -p "$out/bin"

say "building (release)"
cargo build --release --locked --workspace >&2
target=$(cargo metadata --format-version 1 --no-deps --locked | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')

# The executables of test targets have a hash in their names; cargo says which they are.
test_binary() { # test_binary PACKAGE TARGET -> path
    cargo test --release --locked -p "$1" --test "$2" --no-run --message-format=json 2>/dev/null |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1
}
cargo test --release --locked -p mx-kernels --test it --no-run >&2
kernels=$(test_binary mx-kernels it)
cargo build --release --locked -p mx-kernels --example bench_cuda >&2

put() { # put FILE NAME: without debug information, which is most of its size
    [ -f "$1" ] || { echo "error: $2 was not built ($1)" >&2; exit 1; }
    cp "$1" "$out/bin/$2.new"
    strip --strip-debug "$out/bin/$2.new"
    mv "$out/bin/$2.new" "$out/bin/$2"
}
put "$kernels" kernels_it
put "$target/release/examples/bench_cuda" bench_cuda
put "$target/release/libmx_custom_ops.so" libmx_custom_ops.so
put "$target/release/mxrewrite" mxrewrite
put "$target/release/mxeval" mxeval
git rev-parse HEAD > "$out/commit" 2>/dev/null || true

rm -rf "$out/cubins"
[ $# -eq 0 ] || scripts/build_cubins.sh "$out/cubins" "$@"

packed=$(tar -C "$out" -c bin $([ $# -eq 0 ] || echo cubins) | gzip | wc -c)
say "$out: $((packed / 1024)) KiB when compressed"
