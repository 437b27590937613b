//! What the benches share: a clock, threads, seeded data, the memory's bandwidth.
//!
//! `MX_BENCH_CLOCK=cpu` measures the CPU time of all threads in place of the wall clock: on a busy
//! machine only that one tells anything. `MX_CPU_VARIANT` forces a variant of the kernels.
#![allow(unsafe_code)]
#![allow(clippy::print_stdout)]

pub mod clock;

use criterion::measurement::Measurement;
use mx_kernels::{Parallel, cpu};
use rayon::prelude::*;

use clock::Clock;

/// Threads that outlive a call, as ONNX Runtime's do.
pub struct Pool(rayon::ThreadPool);

impl Pool {
    pub fn new(threads: usize) -> Self {
        Self(rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads"))
    }
}

impl Parallel for Pool {
    fn threads(&self) -> usize {
        self.0.current_num_threads()
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        self.0.install(|| (0..tasks).into_par_iter().with_max_len(1).for_each(f));
    }
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

    /// Zero-mean, roughly normal.
    pub fn normal(&mut self) -> f32 {
        let mut unit = || (self.bits() >> 40) as f32 / (1 << 24) as f32 - 0.5;
        unit() + unit() + unit() + unit()
    }

    pub fn normals(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal()).collect()
    }
}

/// Bytes of the last cache level, 32 MiB where the system does not say.
pub fn last_cache() -> usize {
    let size = |index: usize| -> Option<usize> {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = std::fs::read_to_string(path).ok()?;
        text.trim().strip_suffix('K')?.parse::<usize>().ok().map(|kib| kib << 10)
    };
    (0..6).filter_map(size).max().unwrap_or(32 << 20)
}

/// How many copies of something make up four times the last cache level, at least two.
pub fn copies(bytes: usize) -> usize {
    (4 * last_cache()).div_ceil(bytes.max(1)).max(2)
}

/// Bytes a second that `threads` threads read from memory: the best of several passes over an array
/// of eight times the last cache level, every word of it or-ed together.
pub fn read_bandwidth(clock: Clock, threads: usize) -> f64 {
    let words = (8 * last_cache()).clamp(128 << 20, 2 << 30) / 8;
    let data = vec![1_u64; words];
    let pool = Pool::new(threads);
    let mut best = f64::MAX;
    for _ in 0..6 {
        let start = clock.start();
        pool.run(threads, &|i| {
            let share = words / threads;
            let mut seen = [0; 16];
            for chunk in data[i * share..(i + 1) * share].as_chunks::<16>().0 {
                for (s, w) in seen.iter_mut().zip(chunk) {
                    *s |= w;
                }
            }
            std::hint::black_box(seen);
        });
        best = best.min(clock.per_thread(clock.end(start), threads));
    }
    (words * 8) as f64 / best
}

/// The machine, for the record.
pub fn say_machine() {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or(": unknown");
    println!(
        "{}, {} logical CPUs, last cache {} MiB; kernels: {}; clock: {}",
        model.trim_start_matches(['\t', ' ', ':']),
        std::thread::available_parallelism().map_or(0, usize::from),
        last_cache() >> 20,
        cpu::variant(),
        Clock::from_env().name(),
    );
}
