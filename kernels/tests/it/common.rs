//! What the tests of the kernels share: variants to run, seeded data, guarded memory.
#![allow(unsafe_code)]

use mx_kernels::{ElementFormat, QuantSpec, Rounding, ScaleKind, ScaleRule, cpu};

/// Variants to test on this machine. Prints which; `MX_REQUIRE=avx2,neon` turns a missing one into
/// a failure.
pub fn variants() -> Vec<&'static str> {
    let available = cpu::available_variants();
    let required = std::env::var("MX_REQUIRE").unwrap_or_default();
    let x86 = ["avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx"];
    for name in ["scalar"].into_iter().chain(x86).chain(["neon", "neondotprod"]) {
        if available.contains(&name) {
            println!("variant {name}: tested");
        } else {
            println!("variant {name}: skipped, this machine lacks the instructions");
            assert!(!required.split(',').any(|r| r == name), "MX_REQUIRE names {name}");
        }
    }
    available
}

/// Whether MX_REQUIRE names something, so that a test that cannot run without it fails.
pub fn required(what: &str) -> bool {
    std::env::var("MX_REQUIRE").unwrap_or_default().split(',').any(|r| r == what)
}

/// Whether an emulator runs this; see `scripts/test_neon.sh`.
pub fn emulated() -> bool {
    std::env::var("MX_TEST_RUNNER").is_ok_and(|runner| !runner.is_empty())
}

/// Every pair of format and scale that exists.
pub fn specs() -> Vec<QuantSpec> {
    let mut all = Vec::new();
    for format in ElementFormat::ALL {
        for scale in ScaleKind::ALL {
            let spec = QuantSpec::new(format, *scale, 32, Rounding::Even, ScaleRule::Floor);
            all.extend(spec);
        }
    }
    assert_eq!(all.len(), 6 + 3 + 2);
    all
}

/// A small deterministic generator (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Zero-mean, roughly normal.
    pub fn normal(&mut self) -> f32 {
        let mut unit = || (self.bits() >> 40) as f32 / (1 << 24) as f32 - 0.5;
        unit() + unit() + unit() + unit()
    }

    pub fn normals(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal()).collect()
    }
}

/// `len` elements whose end is the end of a page, with an unreadable page behind.
pub struct Guarded<T> {
    map: *mut libc::c_void,
    size: usize,
    start: *mut T,
    len: usize,
}

impl<T: Copy> Guarded<T> {
    pub fn new(values: &[T]) -> Self {
        const PAGE: usize = 4096;
        let bytes = size_of_val(values);
        let size = bytes.next_multiple_of(PAGE) + PAGE;
        // SAFETY: an anonymous mapping of our own; the data lies in front of the guard page and is
        // aligned because sizes of T divide the page.
        unsafe {
            let map = libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(map, libc::MAP_FAILED);
            let guard = map.cast::<u8>().add(size - PAGE);
            assert_eq!(libc::mprotect(guard.cast(), PAGE, libc::PROT_NONE), 0);
            let start = guard.sub(bytes).cast::<T>();
            std::ptr::copy_nonoverlapping(values.as_ptr(), start, values.len());
            Self { map, size, start, len: values.len() }
        }
    }

    pub fn get(&self) -> &[T] {
        // SAFETY: `len` elements were written at `start`, and the mapping lives as long as self.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    pub fn get_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and self is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is our own and nothing borrows it any more.
        unsafe { libc::munmap(self.map, self.size) };
    }
}
