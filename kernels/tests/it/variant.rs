//! The choice of a variant at run time.

use std::process::Command;

use mx_kernels::cpu;

/// Set in the processes that the test starts: what they should find chosen.
const EXPECTED: &str = "MX_TEST_EXPECTED";

/// Runs itself in processes of their own, as the environment is read once.
#[test]
fn environment_forces_a_variant() {
    if let Ok(expected) = std::env::var(EXPECTED) {
        assert_eq!(expected, cpu::variant());
        return;
    }
    let available = cpu::available_variants();
    assert_eq!(available.last(), Some(&"scalar"));
    let cases = available.iter().map(|&name| (name, name));
    for (wish, expected) in cases.chain([("none-such", available[0])]) {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "variant::environment_forces_a_variant"])
            .env("MX_CPU_VARIANT", wish)
            .env(EXPECTED, expected)
            .output()
            .unwrap();
        assert!(status.status.success(), "{wish}: {}", String::from_utf8_lossy(&status.stdout));
        assert!(String::from_utf8_lossy(&status.stdout).contains("1 passed"));
    }
}
