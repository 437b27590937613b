//! The choice of a variant at run time.

use std::process::Command;

use mx_kernels::cpu;

/// Runs the test below in a process of its own, as the environment is read once.
#[test]
fn environment_forces_a_variant() {
    let available = cpu::available_variants();
    assert_eq!(available.last(), Some(&"scalar"));
    let cases = available.iter().map(|&name| (name, name));
    for (wish, expected) in cases.chain([("none-such", available[0])]) {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "variant::child", "--ignored"])
            .env("MX_CPU_VARIANT", wish)
            .env("MX_TEST_EXPECTED", expected)
            .output()
            .unwrap();
        assert!(status.status.success(), "{wish}: {}", String::from_utf8_lossy(&status.stdout));
        assert!(String::from_utf8_lossy(&status.stdout).contains("1 passed"));
    }
}

#[test]
#[ignore = "run by environment_forces_a_variant in a process with the variables set"]
fn child() {
    assert_eq!(std::env::var("MX_TEST_EXPECTED").as_deref(), Ok(cpu::variant()));
}
