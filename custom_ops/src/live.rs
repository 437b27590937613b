//! Which kernels of domain `mx` live in this process: what became of each node of each session, for
//! programs (`MxKernels`) and, with `MX_LOG=info` in the environment, for people.
#![allow(unsafe_code)]

use std::{
    collections::{BTreeMap, HashMap},
    ffi::c_char,
    fmt::{self, Write as _},
    io::Write as _,
    panic::catch_unwind,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use mx_kernels::{LinearProblem, PreparedWeight};

use crate::{
    contract::{LAYOUT, MxActMatMulAttrs, MxMatMulAttrs, NO_FORMAT},
    guard::printable,
    host::Node,
    provider::Device,
};

/// What a node says about its product; `None` where its operator has no such thing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Product {
    pub weight_format: Option<&'static str>,
    pub activation_format: Option<&'static str>,
    pub block_size: Option<usize>,
    pub scale: Option<&'static str>,
    pub k: Option<usize>,
    pub n: Option<usize>,
    pub layout: Option<i64>,
}

impl Product {
    /// Of a product with a packed weight, or with a stack of them.
    pub(crate) fn of(attrs: &MxMatMulAttrs) -> Self {
        let weight = attrs.weight();
        Self {
            weight_format: Some(weight.format.name()),
            activation_format: Some(attrs.activation().map_or(NO_FORMAT, |x| x.format.name())),
            block_size: Some(weight.block_size),
            scale: Some(weight.scale.name()),
            k: Some(attrs.k()),
            n: Some(attrs.n()),
            layout: Some(LAYOUT),
        }
    }

    /// Of a product of two activations, whose sizes are not known before it runs.
    pub(crate) fn of_activations(attrs: &MxActMatMulAttrs) -> Self {
        Self {
            weight_format: Some(attrs.b().format.name()),
            activation_format: Some(attrs.a().format.name()),
            block_size: Some(attrs.b().block_size),
            scale: Some(attrs.b().scale.name()),
            ..Self::default()
        }
    }
}

/// What a product on the CPU runs on: the variant, and how one row of X is multiplied where the weight
/// was repacked.
pub(crate) fn cpu_kernel(prepared: Option<&PreparedWeight>, problem: &LinearProblem) -> String {
    let variant = mx_kernels::cpu::variant();
    match prepared {
        Some(prepared) => format!("{variant}, repacked, {}", prepared.way(problem)),
        None => format!("{variant}, the file's layout"),
    }
}

/// A kernel as it was made.
#[derive(Debug, Clone)]
struct Record {
    /// Number of the session, from 1 in the order of their first kernels.
    session: u64,
    /// The operating system's number of the thread that made it; 0 where it has none to tell.
    thread: u64,
    node: String,
    op: &'static str,
    provider: &'static str,
    kernel: String,
    product: Product,
}

#[derive(Default)]
struct Registry {
    /// Number of the last kernel and of the last session.
    last: u64,
    last_session: u64,
    kernels: BTreeMap<u64, Record>,
    /// The sessions with live kernels, by their loggers: number and count of kernels. ONNX Runtime
    /// gives every session a logger of its own that outlives its kernels, and no other name for it.
    sessions: HashMap<usize, (u64, usize)>,
}

static REGISTRY: Mutex<Option<Registry>> = Mutex::new(None);

fn registry<R>(f: impl FnOnce(&mut Registry) -> R) -> R {
    let mut guard: MutexGuard<'_, Option<Registry>> =
        REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
    f(guard.get_or_insert_default())
}

/// Keeps a kernel in the list; it leaves the list with this value.
#[derive(Debug)]
pub(crate) struct Live {
    id: u64,
    logger: usize,
}

/// Lists the kernel of `node`, and says so where `MX_LOG` asks for it.
pub(crate) fn register(
    node: &Node<'_, '_>,
    op: &'static str,
    device: &Device,
    kernel: String,
    product: Product,
) -> Live {
    let provider = match device {
        Device::Cpu => "CPU",
        Device::Gpu(_) => "CUDA",
    };
    add(node.logger(), node.name(), op, provider, kernel, product)
}

fn add(
    logger: usize,
    node: String,
    op: &'static str,
    provider: &'static str,
    kernel: String,
    product: Product,
) -> Live {
    let thread = thread_id();
    let mut record = Record { session: 0, thread, node, op, provider, kernel, product };
    let (id, line) = registry(|registry| {
        let (session, count) = registry.sessions.entry(logger).or_insert_with(|| {
            registry.last_session += 1;
            (registry.last_session, 0)
        });
        *count += 1;
        record.session = *session;
        registry.last += 1;
        let line = wanted().then(|| printable(&record.to_string()));
        registry.kernels.insert(registry.last, record);
        (registry.last, line)
    });
    if let Some(line) = line {
        // Nobody to tell where stderr is closed.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
    Live { id, logger }
}

impl Drop for Live {
    fn drop(&mut self) {
        registry(|registry| {
            registry.kernels.remove(&self.id);
            if let Some((_, count)) = registry.sessions.get_mut(&self.logger) {
                *count -= 1;
                if *count == 0 {
                    registry.sessions.remove(&self.logger);
                }
            }
        });
    }
}

/// Whether `MX_LOG` asks for a line a node. Read once; what it does not know is said once.
fn wanted() -> bool {
    static WANTED: OnceLock<bool> = OnceLock::new();
    *WANTED.get_or_init(|| {
        let value = std::env::var_os("MX_LOG").unwrap_or_default();
        level(&value.to_string_lossy()).unwrap_or_else(|warning| {
            let _ = writeln!(std::io::stderr(), "{warning}");
            false
        })
    })
}

/// Whether a value of `MX_LOG` asks for a line a node, or a warning about the value.
fn level(value: &str) -> Result<bool, String> {
    match value.to_ascii_lowercase().as_str() {
        "info" | "debug" | "trace" => Ok(true),
        "" | "off" | "error" | "warn" => Ok(false),
        _ => Err(printable(&format!(
            "mx: warning: MX_LOG={value} is unknown and ignored; known are off, error, warn, info, \
             debug, trace"
        ))),
    }
}

/// The number of the calling thread, as `gettid` and Python's `threading.get_native_id` have it.
fn thread_id() -> u64 {
    // "PID/task/TID"; std has no call for it.
    let link = std::fs::read_link("/proc/thread-self").ok();
    link.and_then(|link| link.file_name()?.to_str()?.parse().ok()).unwrap_or(0)
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { session, node, op, provider, kernel, product, .. } = self;
        write!(f, "mx: session {session}: node '{node}': {op}")?;
        let mut end = ":";
        if let (Some(weight), Some(x)) = (product.weight_format, product.activation_format) {
            write!(f, " {weight} x {x}")?;
            end = "";
        }
        let sizes = [("k", product.k), ("n", product.n), ("block", product.block_size)];
        let sizes = sizes.into_iter().filter_map(|(name, size)| Some((name, size?)));
        for (name, size) in sizes {
            write!(f, ", {name} {size}")?;
        }
        if end.is_empty() {
            f.write_str(":")?;
        } else {
            f.write_str(end)?;
        }
        write!(f, " {provider}, {kernel}")
    }
}

/// The live kernels as a JSON array of objects, in the order of their creation.
pub fn json() -> String {
    let kernels = registry(|registry| registry.kernels.clone());
    let mut out = String::from("[");
    for (id, record) in kernels {
        if out.len() > 1 {
            out.push(',');
        }
        write_record(&mut out, id, &record);
    }
    out.push(']');
    out
}

fn write_record(out: &mut String, id: u64, record: &Record) {
    let product = &record.product;
    let number = |n: Option<i64>| n.map_or("null".to_owned(), |n| n.to_string());
    let size = |n: Option<usize>| number(n.and_then(|n| i64::try_from(n).ok()));
    let text = |text: Option<&str>| text.map_or("null".to_owned(), quoted);
    let fields = [
        ("id", id.to_string()),
        ("session", record.session.to_string()),
        ("thread", record.thread.to_string()),
        ("node", quoted(&record.node)),
        ("op", quoted(record.op)),
        ("provider", quoted(record.provider)),
        ("kernel", quoted(&record.kernel)),
        ("weight_format", text(product.weight_format)),
        ("activation_format", text(product.activation_format)),
        ("block_size", size(product.block_size)),
        ("scale", text(product.scale)),
        ("k", size(product.k)),
        ("n", size(product.n)),
        ("layout", number(product.layout)),
    ];
    let mut start = '{';
    for (name, value) in fields {
        let _ = write!(out, "{start}\"{name}\":{value}");
        start = ',';
    }
    out.push('}');
}

/// A JSON string (RFC 8259, section 7).
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Writes the list of live kernels, a NUL-terminated JSON array in UTF-8, into `buffer` where all of it
/// fits `size` bytes, and returns how many bytes it takes, the NUL included. A null or too small buffer is
/// left alone. The list may grow between two calls: call again while the answer is larger than `size`. 0 is
/// an internal error.
///
/// Each object has `id` (number of the kernel, rising), `session` (number of its session in this process,
/// from 1), `thread` (the operating system's number of the thread that made it), `node`, `op`, `provider`
/// (`CPU` or `CUDA`), `kernel` (what computes it, in words), and `weight_format`, `activation_format`,
/// `block_size`, `scale`, `k`, `n`, `layout`: the node's attributes, defaults included, null where the
/// operator has none. `MxActMatMul` has B's format as `weight_format` and A's as `activation_format`.
///
/// # Safety
/// `buffer` is null or has room for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn MxKernels(buffer: *mut c_char, size: usize) -> usize {
    let Ok(text) = catch_unwind(json) else { return 0 };
    let needed = text.len() + 1;
    if !buffer.is_null() && size >= needed {
        // SAFETY: the caller's buffer has room for `size` bytes; the text has no NUL, being JSON.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buffer, text.len());
            *buffer.add(text.len()) = 0;
        }
    }
    needed
}

/// The version of this library, a static C string such as `0.1.0`.
#[unsafe(no_mangle)]
pub extern "C" fn MxVersion() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    fn product() -> Product {
        Product {
            weight_format: Some("fp4_e2m1"),
            activation_format: Some("none"),
            block_size: Some(32),
            scale: Some("e8m0"),
            k: Some(576),
            n: Some(1536),
            layout: Some(1),
        }
    }

    /// Tests of one process share the list; each looks at nodes with names of its own.
    fn listed(node: &str) -> usize {
        json().matches(&format!("\"node\":{}", quoted(node))).count()
    }

    #[test]
    fn a_kernel_is_listed_while_it_lives() {
        let live =
            add(1, "a \"b\"\\\n".into(), "MxMatMul", "CPU", "avx2, repacked".into(), product());
        let text = json();
        let at = text.find(r#""node":"a \"b\"\\\u000a","op":"MxMatMul","provider":"CPU""#).unwrap();
        let rest = concat!(
            r#","kernel":"avx2, repacked","weight_format":"fp4_e2m1","activation_format":"none","#,
            r#""block_size":32,"scale":"e8m0","k":576,"n":1536,"layout":1}"#
        );
        assert!(text[at..].contains(rest), "{text}");
        assert!(thread_id() > 0 && text.contains(&format!("\"thread\":{}", thread_id())));
        drop(live);
        assert_eq!(listed("a \"b\"\\\n"), 0);
    }

    #[test]
    fn a_session_is_what_has_one_logger_at_one_time() {
        let session = |live: &Live| registry(|r| r.kernels[&live.id].session);
        let new =
            |logger| add(logger, "s".into(), "TokenScores", "CPU", "x".into(), Product::default());
        let (a, b, other) = (new(70), new(70), new(71));
        assert_eq!(session(&a), session(&b));
        assert_ne!(session(&a), session(&other));
        let first = session(&a);
        drop((a, b));
        // The address serves another session once the first one's kernels are gone.
        let later = new(70);
        assert!(session(&later) > first);
        assert_eq!(listed("s"), 2);
    }

    #[test]
    fn buffers_are_filled_where_they_suffice() {
        let live = add(90, "é".into(), "MxMatMul", "CPU", "k".into(), product());
        // Other tests change the list meanwhile: ask until an answer fits.
        let mut buffer = vec![1 as c_char; 16];
        loop {
            // SAFETY: the buffer has its length.
            let needed = unsafe { MxKernels(buffer.as_mut_ptr(), buffer.len()) };
            if needed <= buffer.len() {
                break;
            }
            assert_eq!(buffer[0], 1, "a buffer that is too small was written");
            buffer.resize(needed, 1);
        }
        // SAFETY: it was written, with a NUL.
        let text = unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_str().unwrap();
        assert!(
            text.starts_with("[{\"id\":") && text.ends_with("}]") && text.contains("é"),
            "{text}"
        );
        // SAFETY: null is allowed.
        assert!(unsafe { MxKernels(std::ptr::null_mut(), 99) } > 2);
        // SAFETY: a static C string.
        let version = unsafe { CStr::from_ptr(MxVersion()) };
        assert_eq!(version.to_str(), Ok(env!("CARGO_PKG_VERSION")));
        drop(live);
    }

    #[test]
    fn lines_say_what_became_of_a_node() {
        let record = |op, product| Record {
            session: 1,
            thread: 2,
            node: "X".into(),
            op,
            provider: "CPU",
            kernel: "avx2, repacked".into(),
            product,
        };
        assert_eq!(
            record("MxMatMul", product()).to_string(),
            "mx: session 1: node 'X': MxMatMul fp4_e2m1 x none, k 576, n 1536, block 32: CPU, avx2, \
             repacked"
        );
        assert_eq!(
            record("TokenScores", Product::default()).to_string(),
            "mx: session 1: node 'X': TokenScores: CPU, avx2, repacked"
        );
    }

    #[test]
    fn levels_are_known_or_warned_about() {
        for quiet in ["", "off", "error", "WARN"] {
            assert_eq!(level(quiet), Ok(false));
        }
        for loud in ["info", "Debug", "trace"] {
            assert_eq!(level(loud), Ok(true));
        }
        let warning = level("verbose\n").unwrap_err();
        assert!(warning.contains("MX_LOG=verbose") && !warning.contains('\n'), "{warning}");
    }
}
