//! What the process is and uses: memory, date, hashes.

use super::error::{Error, Result};
use super::gpus::MemoryProbe;
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Peak resident memory since [`PeakMemory::start`].
#[derive(Debug)]
pub struct PeakMemory {
    reset: bool,
}

impl PeakMemory {
    /// Resets the kernel's high-water mark, where it lets us.
    pub fn start() -> Self {
        trim();
        // 5 resets VmHWM (proc_pid_clear_refs(5)).
        Self { reset: std::fs::write("/proc/self/clear_refs", "5").is_ok() }
    }

    /// The peak in bytes; `None` where the mark could not be reset or read.
    pub fn bytes(&self) -> Option<u64> {
        if !self.reset {
            return None;
        }
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    }
}

/// Gives what was freed back to the system: the allocator keeps it, and what an earlier stage freed would count
/// as memory of the next.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
fn trim() {
    // SAFETY: glibc's function takes its own locks; any thread may call it at any time.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
const fn trim() {}

/// Peak use of device memory while it lives, by a thread that asks NVML.
#[derive(Debug)]
pub struct PeakDeviceMemory {
    done: Arc<AtomicBool>,
    sampler: Option<JoinHandle<u64>>,
}

impl PeakDeviceMemory {
    /// How often NVML is asked.
    const EVERY: Duration = Duration::from_millis(50);

    /// Starts to watch the GPUs with these UUIDs; `None` where NVML does not say.
    pub fn start(uuids: Vec<String>) -> Option<Self> {
        let probe = MemoryProbe::new()?;
        Self::watch(move || uuids.iter().map(|uuid| probe.used(uuid)).sum())
    }

    /// Watches what `used` says.
    fn watch(used: impl Fn() -> Option<u64> + Send + 'static) -> Option<Self> {
        let first = used()?;
        let done = Arc::new(AtomicBool::new(false));
        let sampler = std::thread::spawn({
            let done = Arc::clone(&done);
            move || {
                let mut peak = first;
                while !done.load(Ordering::SeqCst) {
                    peak = peak.max(used().unwrap_or(0));
                    std::thread::park_timeout(Self::EVERY);
                }
                peak.max(used().unwrap_or(0))
            }
        });
        Some(Self { done, sampler: Some(sampler) })
    }

    /// Ends the watch; bytes in use on all the GPUs at the fullest moment seen.
    pub fn bytes(mut self) -> Option<u64> {
        self.end()
    }

    fn end(&mut self) -> Option<u64> {
        self.done.store(true, Ordering::SeqCst);
        let sampler = self.sampler.take()?;
        sampler.thread().unpark();
        sampler.join().ok()
    }
}

impl Drop for PeakDeviceMemory {
    fn drop(&mut self) {
        self.end();
    }
}

/// SHA-256 of files, one after the other, in hexadecimal.
///
/// # Errors
/// A file cannot be read.
pub fn sha256_files<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    for path in paths {
        let mut file = File::open(path).map_err(Error::io(path))?;
        loop {
            match file.read(&mut buffer).map_err(Error::io(path))? {
                0 => break,
                read => hasher.update(&buffer[..read]),
            }
        }
    }
    Ok(hex(&hasher.finalize()))
}

/// SHA-256 of a text, in hexadecimal.
pub fn sha256_text(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

/// Bytes in hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Now, as `2025-11-22T20:02:03Z`.
pub fn now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    utc(seconds)
}

/// Seconds since 1970 as a date; days to civil dates after Howard Hinnant,
/// "chrono-Compatible Low-Level Date Algorithms".
fn utc(seconds: u64) -> String {
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_763_841_723), "2025-11-22T20:02:03Z");
        assert_eq!(utc(4_107_542_399), "2100-02-28T23:59:59Z");
    }

    #[test]
    fn hashes_of_files_are_those_of_their_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, "a").unwrap();
        std::fs::write(&b, "bc").unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_files([a.as_path(), b.as_path()]).unwrap(), abc);
        assert_eq!(sha256_text("abc"), abc);
    }

    /// One test at a time looks at the process's memory.
    static MEMORY: std::sync::Mutex<()> = std::sync::Mutex::new(());

    /// Pieces that the allocator keeps when they are freed, as one behind them lives on.
    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn what_an_earlier_stage_freed_does_not_count() {
        let _alone = MEMORY.lock();
        let before = PeakMemory::start();
        let mut pieces: Vec<Vec<u8>> = (0..256 << 6).map(|_| vec![1_u8; 16 << 10]).collect();
        let last = pieces.pop();
        let Some(with) = before.bytes() else {
            return; // The kernel does not let us reset the mark here.
        };
        drop(pieces);
        let then = PeakMemory::start().bytes().unwrap();
        assert!(then + (128 << 20) < with, "{then} bytes after {with}");
        drop(last);
    }

    #[test]
    fn the_peak_is_that_of_the_stage() {
        let _alone = MEMORY.lock();
        let peak = PeakMemory::start();
        let block = vec![1u8; 64 << 20];
        assert_eq!(block.iter().map(|&byte| u64::from(byte)).sum::<u64>(), 64 << 20);
        let Some(with) = peak.bytes() else {
            return; // The kernel does not let us reset the mark here.
        };
        assert!(with >= 64 << 20);
        drop(block);
        let after = PeakMemory::start().bytes().unwrap_or(0);
        assert!(after < with, "{after} {with}");
    }

    #[test]
    fn the_fullest_moment_of_a_device_is_kept() {
        use std::sync::atomic::AtomicU64;
        let used = Arc::new(AtomicU64::new(7));
        let seen = Arc::clone(&used);
        let watch = PeakDeviceMemory::watch(move || Some(seen.load(Ordering::SeqCst))).unwrap();
        used.store(90, Ordering::SeqCst);
        std::thread::sleep(PeakDeviceMemory::EVERY * 3);
        used.store(5, Ordering::SeqCst);
        assert_eq!(watch.bytes(), Some(90));
        assert!(PeakDeviceMemory::watch(|| None).is_none());
    }
}
