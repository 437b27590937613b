//! Signals that end a command: what must not be left half done is cleaned up first.

use std::{
    fs, io,
    panic::{self, AssertUnwindSafe},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

static INSTALLED: AtomicBool = AtomicBool::new(false);

/// Calls `handler` in a thread of its own for every Ctrl-C, SIGTERM and SIGHUP, in place of the end that they are.
/// The first handler of a process stays.
///
/// Signals that whoever started the process ignores, as `nohup` and shells do for what runs in the background, stay
/// ignored.
///
/// # Errors
/// The operating system's.
pub(super) fn on_end(mut handler: impl FnMut() + Send + 'static) -> io::Result<()> {
    if INSTALLED.swap(true, Ordering::SeqCst) {
        return Ok(());
    }
    let begun = begin(move || {
        // Without this thread signals would do nothing at all.
        let _ = panic::catch_unwind(AssertUnwindSafe(&mut handler));
    });
    if begun.is_err() {
        INSTALLED.store(false, Ordering::SeqCst);
    }
    begun
}

fn begin(mut handler: impl FnMut() + Send + 'static) -> io::Result<()> {
    let ignored = ignored();
    let heard = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !ignored.contains(signal));
    let mut signals = Signals::new(heard)?;
    let wait = move || signals.forever().for_each(|_| handler());
    thread::Builder::new().name("signals".to_owned()).spawn(wait)?;
    Ok(())
}

/// Numbers of the signals that are ignored; none where the system does not tell.
fn ignored() -> Vec<i32> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    // Bit 0 is signal 1.
    (1..=64).filter(|signal| mask >> (signal - 1) & 1 == 1).collect()
}
