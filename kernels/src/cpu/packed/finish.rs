//! From sums to y: scaled, with the bias, rounded; and the rows that the kernels cannot compute.
#![allow(unsafe_code)]

use super::{
    layout::Row,
    run::{COLUMNS, Call},
};
use crate::reference;

impl Call<'_> {
    /// Puts rows that are not plain right, then scales, adds the bias and writes y.
    pub(super) fn finish(&self, m0: usize, m1: usize, n0: usize, c: &mut [f32], ldc: usize) {
        let columns = ldc.min(self.w.n() - n0);
        let layout = &self.prepared.layout;
        for row in c.chunks_exact_mut(ldc).take(m1 - m0) {
            layout.unshift(n0, &mut row[..columns]);
        }
        let special = layout.special;
        if special || self.states[m0..m1].iter().any(|&row| row != Row::Plain) {
            self.special(m0, m1, n0, columns, c, ldc);
        }
        let mut out = [0.0_f32; COLUMNS];
        for m in m0..m1 {
            for from in (0..columns).step_by(COLUMNS) {
                let len = COLUMNS.min(columns - from);
                let c = &c[(m - m0) * ldc + from..][..len];
                let n = n0 + from;
                let (bias, out) = (&self.bias[n..n + len], &mut out[..len]);
                // SAFETY: the variant runs here; row and columns lie within y and are this task's.
                unsafe {
                    (self.kernels.scale_row)(c, f64::from(self.problem.alpha), bias, out);
                    self.y.write((self.row0 + m) * self.w.n() + n, out);
                }
            }
        }
    }

    /// NaN where a block of NaN takes part, f64 where a scale or a value is out of the kernels' range.
    #[cold]
    fn special(&self, m0: usize, m1: usize, n0: usize, columns: usize, c: &mut [f32], ldc: usize) {
        let mut w = Vec::new();
        for j in 0..columns {
            let row = self.prepared.layout.rows[n0 + j];
            let mut decoded = false;
            for m in m0..m1 {
                let out = &mut c[(m - m0) * ldc + j];
                match (row, self.states[m]) {
                    (Row::Plain, Row::Plain) => {}
                    (Row::Nan, _) | (_, Row::Nan) => *out = f32::NAN,
                    _ => {
                        if !decoded {
                            w.resize(self.problem.k, 0.0);
                            reference::weight_row_f64(self.w, n0 + j, &mut w);
                            decoded = true;
                        }
                        let x = self.exact[m].get_or_init(|| self.exact_row(m));
                        *out = x.iter().zip(&w).map(|(x, w)| x * w).sum::<f64>() as f32;
                    }
                }
            }
        }
    }

    /// Row `m` of x, quantised, in f64.
    fn exact_row(&self, m: usize) -> Vec<f64> {
        let k = self.problem.k;
        let mut raw = vec![0.0_f32; k];
        self.x.load((self.row0 + m) * k, &mut raw);
        match &self.problem.activation {
            Some(spec) => reference::fake_row_f64(spec, &raw),
            None => raw.into_iter().map(f64::from).collect(),
        }
    }
}
