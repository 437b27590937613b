#!/usr/bin/env bash
# The whole gate, on a fresh Debian/Ubuntu machine with Rust and Python: format, lints, every test, docs.
# A test that cannot run here prints why; MX_REQUIRE=ort,cuda,... turns such a skip into a failure.
set -euo pipefail
. "$(dirname "$0")/env.sh"
setup_rust
setup_python
setup_nvrtc
export MX_REQUIRE=${MX_REQUIRE:-ort,nvrtc,versions}

say "cargo fmt"
cargo fmt --all --check
say "cargo clippy"
cargo clippy --workspace --all-targets --locked -- -D warnings
say "cargo test"
# The operator library, the Python module and the example must be on disk before tests load them. With
# `--tests` the dependencies have the features that the tests ask for, and are compiled once for both.
cargo build --workspace --lib --bins --tests --locked
cargo test --workspace --locked -- --nocapture --test-threads="${MX_TEST_THREADS:-2}"
say "the operators in ONNX Runtime 1.22 to 1.31"
# With a library it builds none.
built=$(realpath "${CARGO_TARGET_DIR:-target}")/debug
MX_CUSTOM_OPS=${MX_CUSTOM_OPS:-$built/libmx_custom_ops.so} scripts/test_versions.sh
say "mini_pile.parquet is what its texts say"
"$MX_PYTHON" scripts/make_mini_pile.py --check
say "cargo doc"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
say "all green"
