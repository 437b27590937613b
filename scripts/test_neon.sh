#!/usr/bin/env bash
# mx-kernels for 64-bit Arm: lints, then the tests of the crate with the variants neondotprod, neon and scalar,
# under qemu-user where the machine is another one. On a fresh Debian or Ubuntu machine with Rust it installs
# qemu and a cross compiler by apt when it may; what it downloads and builds goes to target/neon.
#
#   scripts/test_neon.sh [TEST]...      names of tests as for cargo test; default: all
#
# The standard library for Arm is, in this order: one that rustc has; one that rustup fetches; one built
# here (a minute) from the sources that Debian has for this version of rustc. MX_RUST_SRC names a
# folder `library` of those sources where there is one.
# What cannot be had is a skip with its reason; MX_REQUIRE=neon turns that into a failure.
set -euo pipefail
. "$(dirname "$0")/env.sh"
setup_rust
target=aarch64-unknown-linux-gnu
work=${CARGO_TARGET_DIR:-$root/target}/neon
# They would take the place of the flags set here.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_TARGET
mkdir -p "$work"

skip() {
    case ",${MX_REQUIRE:-}," in
        *,neon,*) echo "failed: MX_REQUIRE names neon, but $*" >&2; exit 1 ;;
    esac
    echo "skipped: $*"
    exit 0
}

has_std() { compgen -G "$1/lib/rustlib/$target/lib/libstd*.rlib" > /dev/null; }

# Debian's apt with lists and archives of its own, so that the machine's stay as they are.
debian_apt() {
    local tool=$1
    shift
    "$tool" -o Dir::Etc::sourcelist="$work/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$work/apt/lists" -o Dir::Cache="$work/apt/cache" -o Acquire::Languages=none \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false "$@"
}

# Prints the folder `library` of Debian's package of rustc's sources, or fails.
debian_sources() { # debian_sources VERSION
    local found package keys=/usr/share/keyrings/debian-archive-keyring.gpg
    found=$work/rust-src/usr/src/rustc-$1/library
    [ -f "$found/Cargo.lock" ] && { echo "$found"; return 0; }
    command -v apt-get > /dev/null && [ -f "$keys" ] || return 1
    mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial"
    for suite in stable stable-backports testing unstable experimental; do
        echo "deb [arch=amd64 signed-by=$keys] http://deb.debian.org/debian $suite main"
    done > "$work/apt/sources.list"
    say "looking for Debian's sources of rustc $1"
    debian_apt apt-get update -qq >&2 || return 1
    package=$(debian_apt apt-cache madison rust-src | awk -v v="$1" '$3 ~ "^" v "[+]" { print $3; exit }')
    [ -n "$package" ] || return 1
    rm -f "$work"/rust-src_*.deb
    (cd "$work" && debian_apt apt-get download -qq "rust-src=$package") >&2 || return 1
    dpkg -x "$work"/rust-src_*.deb "$work/rust-src" >&2 || return 1
    [ -f "$found/Cargo.lock" ] && echo "$found"
}

# Builds the standard library from a folder `library` into $work/sysroot.
build_std() { # build_std LIBRARY
    say "building the standard library from $1"
    # As rustc's own build marks it: crates that std is made of are not for others to name.
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS=-Zforce-unstable-if-unmarked RUSTC_BOOTSTRAP=1 \
        cargo build --quiet --release --locked --manifest-path "$1/sysroot/Cargo.toml" --features panic-unwind,backtrace \
        --target "$target" --target-dir "$work/std" >&2 || return 1
    rm -rf "$work/sysroot"
    mkdir -p "$work/sysroot/lib/rustlib/$target/lib"
    cp "$work/std/$target/release/deps/"*.rlib "$work/sysroot/lib/rustlib/$target/lib/"
    rm -rf "$work/std"
    rustc -vV > "$work/sysroot/made-for"
}

# Leaves in `flags` what rustc has to be told.
standard_library() {
    local own version library
    own=$(rustc --print sysroot)
    flags=
    if has_std "$own"; then return 0; fi
    if command -v rustup > /dev/null && [ -z "${MX_RUST_SRC:-}" ] && [ ! -d "$work/sysroot" ]; then
        say "rustup target add $target"
        if timeout 300 rustup target add "$target" >&2 && has_std "$own"; then return 0; fi
    fi
    flags="--sysroot $work/sysroot"
    if [ "$(rustc -vV)" = "$(cat "$work/sysroot/made-for" 2> /dev/null)" ]; then return 0; fi
    version=$(rustc -vV | sed -n 's/^release: //p')
    library=${MX_RUST_SRC:-$own/lib/rustlib/src/rust/library}
    [ -f "$library/Cargo.lock" ] || library=$(debian_sources "$version") ||
        skip "no standard library for $target: rustup has none, and Debian no sources of rustc $version"
    build_std "$library" || skip "the standard library for $target did not build from $library"
}

# Runs the tests once; prints what they exercised.
run_tests() { # run_tests HEADING REQUIRED RUNNER TEST...
    local log=$work/tests.log heading=$1 required=$2 status=0
    shift
    export MX_TEST_RUNNER=$2 CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=$2
    [ -n "$2" ] || unset CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER
    shift 2
    say "cargo test -p mx-kernels, $heading"
    MX_REQUIRE=$required cargo test --release --locked -p mx-kernels --lib --test it --target "$target" \
        -- --nocapture --test-threads="${MX_TEST_THREADS:-2}" "$@" > "$log" 2>&1 || status=$?
    if [ "$status" != 0 ]; then
        grep -v '^skipped: ' "$log" >&2
        echo "failed: $heading" >&2
        exit 1
    fi
    if ! grep -Eq '^test result: .* [1-9][0-9]* passed' "$log"; then
        echo "failed: $heading: no test ran${*:+ that is named} $*" >&2
        exit 1
    fi
    echo "$heading:"
    sed -n 's/^test result: /    /p' "$log"
    grep -E '^(variant|instructions) ' "$log" | sort | uniq -c | sed 's/^ *\([0-9]*\) \(.*\)/    \2 (\1 tests)/' || true
    grep '^skipped: ' "$log" | cut -c -110 | sort | uniq -c | sed 's/^ *\([0-9]*\) \(.*\)/    \2 (\1 tests)/' || true
}

lint() {
    say "cargo clippy for $target"
    # Shared code that only kernels of x86 use is no fault.
    cargo clippy --quiet --release --locked -p mx-kernels --all-targets --target "$target" -- -D warnings -A dead_code
}

if [ "$(uname -m)" = aarch64 ]; then
    lint
    run_tests "this machine" neon "" "$@"
    exit 0
fi
need_tool qemu-aarch64 qemu-user || skip "qemu-aarch64 is missing"
need_tool aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu || skip "aarch64-linux-gnu-gcc is missing"
arm=/usr/aarch64-linux-gnu
# Comes with the compiler, unless apt leaves out what is only recommended.
[ -f $arm/lib/crt1.o ] || skip "the C library for Arm is missing (apt-get install libc6-dev-arm64-cross)"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
standard_library
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS=$flags

lint
qemu="qemu-aarch64 $(qemu-aarch64 --version | sed -n 's/.*version \([0-9.]*\).*/\1/p')"
# A core of Armv8.0, which faults on every later instruction, and one with all that qemu knows.
run_tests "$qemu, -cpu cortex-a53" neon "qemu-aarch64 -L $arm -cpu cortex-a53" "$@"
run_tests "$qemu, -cpu max" neon,neondotprod,dotprod,bf16 "qemu-aarch64 -L $arm -cpu max" "$@"
