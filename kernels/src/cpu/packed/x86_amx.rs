//! bfloat16 tiles of AMX: 32 rows of x by 32 output features at a time.
//!
//! A decoded panel is what the second operand of `tdpbf16ps` has to be: sixteen pairs of k by sixteen
//! columns in 1024 bytes. Blocks of integers go this way too: a tile of eight-bit integers would have to
//! be read back and scaled every 32 k, which costs more than bfloat16's half rate.
//!
//! The intrinsics are not stable, so the instructions are written out. Tile registers are no registers
//! that the compiler uses.
#![allow(unsafe_code)]

use std::{
    arch::{
        asm,
        x86_64::{_mm512_add_ps, _mm512_load_ps, _mm512_loadu_ps, _mm512_storeu_ps},
    },
    mem::MaybeUninit,
    sync::OnceLock,
};

use super::{
    super::{info::cpuid, panel::PANEL},
    integer::DotArgs,
    layout::BLOCK,
};

/// Rows and columns of a tile of sums.
const SIDE: usize = 16;
/// Bytes from one row of x to the next, one row of a panel to the next: 32 bfloat16.
const STRIDE: usize = 2 * BLOCK;

/// Shapes of the tile registers, as `ldtilecfg` reads them.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row.
    columns: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// Sums in tiles 0 to 3, x in 4 and 5, the weight in 6 and 7; `low` rows in the second row of tiles.
    const fn new(high: u8, low: u8) -> Self {
        let mut config =
            Self { palette: 1, start_row: 0, reserved: [0; 14], columns: [0; 16], rows: [0; 16] };
        let rows = [high, high, low, low, high, low, SIDE as u8, SIDE as u8];
        let mut i = 0;
        while i < 8 {
            // A tile of no rows has no columns either.
            if rows[i] > 0 {
                config.rows[i] = rows[i];
                config.columns[i] = STRIDE as u16;
            }
            i += 1;
        }
        config
    }
}

/// The variants besides this one, as `MX_CPU_VARIANT` names them.
const OTHERS: [&str; 6] = ["avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2", "scalar"];

/// Whether the processor has AMX's bfloat16 tiles and the system lets this process use them.
pub(crate) fn detect() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let features = cpuid(7)[3];
        let (bf16, tile) = (features >> 22 & 1, features >> 24 & 1);
        // The permission is the whole process's and makes signal frames larger, so it is not asked for
        // where another variant is wanted.
        let wish = std::env::var("MX_CPU_VARIANT").unwrap_or_default();
        let wanted = !OTHERS.contains(&wish.as_str());
        bf16 == 1 && tile == 1 && wanted && permitted()
    })
}

/// Asks Linux for the tiles' state, which it hands out only then.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call that changes nothing but this permission; it clobbers rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// c[MR][32] (+)= x * two panels `panel_stride` bytes apart; x in `parts` parts.
///
/// # Safety
/// [`detect`] said yes and AVX-512F is there; 1 <= MR <= 32; x and the panels hold `args.blocks` blocks, `c` MR rows.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn tile<const MR: usize>(args: &DotArgs, panel_stride: usize) {
    const { assert!(MR > 0 && MR <= 2 * SIDE) };
    let (high, low) = const { if MR > SIDE { (SIDE, MR - SIDE) } else { (MR, 0) } };
    let config = const {
        if MR > SIDE {
            Config::new(SIDE as u8, (MR - SIDE) as u8)
        } else {
            Config::new(MR as u8, 0)
        }
    };
    // SAFETY: all offsets stay within what the caller vouches for; the tiles are released at the end.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly));
        asm!("tilezero tmm0", "tilezero tmm1", options(nostack, nomem));
        if low > 0 {
            asm!("tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        }
        for b in 0..args.blocks {
            let w = args.panel.codes.add(b * PANEL * STRIDE);
            asm!(
                "tileloadd tmm6, [{w} + {stride}*1]",
                "tileloadd tmm7, [{v} + {stride}*1]",
                w = in(reg) w,
                v = in(reg) w.add(panel_stride),
                stride = in(reg) STRIDE,
                options(nostack, readonly),
            );
            for part in 0..args.parts {
                let x = args.x.add((b * args.parts + part) * MR * STRIDE);
                asm!(
                    "tileloadd tmm4, [{x} + {stride}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    x = in(reg) x,
                    stride = in(reg) STRIDE,
                    options(nostack, readonly),
                );
                if low > 0 {
                    asm!(
                        "tileloadd tmm5, [{x} + {stride}*1]",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7",
                        x = in(reg) x.add(SIDE * STRIDE),
                        stride = in(reg) STRIDE,
                        options(nostack, readonly),
                    );
                }
            }
        }
        if args.add {
            let mut sums = MaybeUninit::<Sums>::uninit();
            let sums = sums.as_mut_ptr().cast::<f32>();
            store(sums, 2 * PANEL, low > 0);
            for r in 0..high + low {
                for half in [0, PANEL] {
                    let c = args.c.add(r * args.ldc + half);
                    let sum = _mm512_load_ps(sums.add(r * 2 * PANEL + half));
                    _mm512_storeu_ps(c, _mm512_add_ps(_mm512_loadu_ps(c), sum));
                }
            }
        } else {
            store(args.c, args.ldc, low > 0);
        }
        asm!("tilerelease", options(nostack, nomem));
    }
}

#[repr(align(64))]
struct Sums(#[allow(dead_code)] [f32; 2 * SIDE * 2 * PANEL]);

/// Writes the tiles of sums, rows `ld` floats apart.
///
/// # Safety
/// `to` has room for the configured rows of 32 floats.
unsafe fn store(to: *mut f32, ld: usize, low: bool) {
    // SAFETY: the caller vouches for the rows.
    unsafe {
        asm!(
            "tilestored [{first} + {stride}*1], tmm0",
            "tilestored [{second} + {stride}*1], tmm1",
            first = in(reg) to,
            second = in(reg) to.add(PANEL),
            stride = in(reg) 4 * ld,
            options(nostack),
        );
        if low {
            let to = to.add(SIDE * ld);
            asm!(
                "tilestored [{first} + {stride}*1], tmm2",
                "tilestored [{second} + {stride}*1], tmm3",
                first = in(reg) to,
                second = in(reg) to.add(PANEL),
                stride = in(reg) 4 * ld,
                options(nostack),
            );
        }
    }
}
