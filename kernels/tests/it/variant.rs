//! The choice of a variant at run time.

use std::process::Command;

use mx_kernels::cpu;

/// Set in the processes that the test starts: what they should find chosen.
const EXPECTED: &str = "MX_TEST_EXPECTED";

/// This program again, by way of the words in `MX_TEST_RUNNER`: an emulator starts no programs of
/// the machine that it emulates by itself.
fn this_program() -> Command {
    let program = std::env::current_exe().unwrap();
    let runner = std::env::var("MX_TEST_RUNNER").unwrap_or_default();
    let mut words = runner.split_whitespace();
    let Some(first) = words.next() else { return Command::new(program) };
    let mut command = Command::new(first);
    command.args(words).arg(program);
    command
}

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
        let status = this_program()
            .args(["--exact", "variant::environment_forces_a_variant"])
            .env("MX_CPU_VARIANT", wish)
            .env(EXPECTED, expected)
            .output()
            .unwrap();
        assert!(status.status.success(), "{wish}: {}", String::from_utf8_lossy(&status.stdout));
        assert!(String::from_utf8_lossy(&status.stdout).contains("1 passed"));
    }
}
