//! Wall clock or CPU time as a measurement of criterion, with GF/s and GB/s (of the CPU: per core).

use std::time::Instant;

use criterion::{
    Criterion, Throughput,
    measurement::{Measurement, ValueFormatter},
};

/// What is measured; values are seconds.
#[derive(Debug, Clone, Copy)]
pub enum Clock {
    Wall,
    /// Of all threads together.
    Cpu,
}

impl Clock {
    pub fn from_env() -> Self {
        match std::env::var("MX_BENCH_CLOCK").as_deref() {
            Ok("cpu") => Self::Cpu,
            _ => Self::Wall,
        }
    }

    /// How long a measurement would have taken on idle cores.
    pub fn per_thread(self, seconds: f64, threads: usize) -> f64 {
        match self {
            Self::Wall => seconds,
            Self::Cpu => seconds / threads as f64,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Wall => "wall",
            Self::Cpu => "CPU time",
        }
    }
}

/// Criterion with this clock and short runs: the kernels are measured many at a time.
pub fn criterion() -> Criterion<Clock> {
    Criterion::default()
        .with_measurement(Clock::from_env())
        .sample_size(10)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_millis(1500))
        .configure_from_args()
}

/// CPU seconds of this process.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writes; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

impl Measurement for Clock {
    type Intermediate = (Instant, f64);
    type Value = f64;

    fn start(&self) -> Self::Intermediate {
        (Instant::now(), cpu_seconds())
    }

    fn end(&self, (start, cpu): Self::Intermediate) -> f64 {
        match self {
            Self::Wall => start.elapsed().as_secs_f64(),
            Self::Cpu => cpu_seconds() - cpu,
        }
    }

    fn add(&self, a: &f64, b: &f64) -> f64 {
        a + b
    }

    fn zero(&self) -> f64 {
        0.0
    }

    fn to_f64(&self, value: &f64) -> f64 {
        *value
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        match self {
            Self::Wall => &Units { flops: "GF/s", bytes: "GB/s" },
            // The time is that of all threads.
            Self::Cpu => &Units { flops: "GF/s per core", bytes: "GB/s per core" },
        }
    }
}

/// Names of the rates.
struct Units {
    flops: &'static str,
    bytes: &'static str,
}

impl ValueFormatter for Units {
    fn scale_values(&self, typical: f64, values: &mut [f64]) -> &'static str {
        let (factor, unit) = if typical < 1e-3 { (1e6, "us") } else { (1e3, "ms") };
        values.iter_mut().for_each(|v| *v *= factor);
        unit
    }

    fn scale_throughputs(&self, _: f64, what: &Throughput, values: &mut [f64]) -> &'static str {
        let (amount, unit) = match *what {
            Throughput::Elements(flops) => (flops as f64, self.flops),
            Throughput::Bytes(bytes) | Throughput::BytesDecimal(bytes) => {
                (bytes as f64, self.bytes)
            }
            _ => (f64::NAN, "(no unit)"),
        };
        values.iter_mut().for_each(|v| *v = amount / *v / 1e9);
        unit
    }

    fn scale_for_machines(&self, _: &mut [f64]) -> &'static str {
        "s"
    }
}
