//! Formats on NumPy arrays: the kernels' quantisation, which is bit-exact against the scalar reference.

use mx_kernels::{ElementFormat, QuantSpec, Rounding, ScaleKind, ScaleRule, pack};
use numpy::{PyArray1, PyArray2, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods as _};
use pyo3::prelude::*;

use crate::error::Failure;
use crate::options::parse;

/// A byte array that Python owns.
type Bytes2<'py> = Bound<'py, PyArray2<u8>>;
/// Its scales.
type Bytes1<'py> = Bound<'py, PyArray1<u8>>;

/// How an array is quantised, by names.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Spec {
    format: String,
    scale: String,
    block_size: usize,
    rounding: String,
    scale_rule: String,
}

impl Spec {
    fn resolve(&self) -> Result<QuantSpec, Failure> {
        let scale = self.scale.parse::<ScaleKind>()?;
        let format: ElementFormat = parse("format", &self.format)?;
        let rounding: Rounding = parse("rounding", &self.rounding)?;
        let scale_rule: ScaleRule = parse("scale_rule", &self.scale_rule)?;
        Ok(QuantSpec::new(format, scale, self.block_size, rounding, scale_rule)?)
    }
}

/// Packed codes (uint8 [rows, row bytes]) and scale bytes (uint8, flat) of x (float32 [rows, k], C order).
#[pyfunction]
pub(crate) fn quantize<'py>(
    py: Python<'py>,
    x: PyReadonlyArray2<'py, f32>,
    spec: Spec,
) -> Result<(Bytes2<'py>, Bytes1<'py>), Failure> {
    let spec = spec.resolve()?;
    let [rows, k] = shape(&x);
    let values = x.as_slice().map_err(|error| Failure::usage(error.to_string()))?;
    let (row_bytes, scales_len) = (spec.row_bytes(k), spec.scales_len(rows, k));
    let (codes, scales) = py.detach(|| {
        let (mut codes, mut scales) = (vec![0; rows * row_bytes], vec![0; scales_len]);
        mx_kernels::quantize_rows(&spec, values, rows, k, &mut codes, &mut scales)
            .map(|()| (codes, scales))
    })?;
    let codes = PyArray1::from_vec(py, codes);
    let codes = numpy::PyArrayMethods::reshape(&codes, [rows, row_bytes])?;
    Ok((codes, PyArray1::from_vec(py, scales)))
}

/// The values (float32 [rows, k]) of packed codes and scales.
#[pyfunction]
pub(crate) fn dequantize<'py>(
    py: Python<'py>,
    codes: PyReadonlyArray2<'py, u8>,
    scales: PyReadonlyArray1<'py, u8>,
    k: usize,
    spec: Spec,
) -> Result<Bound<'py, PyArray2<f32>>, Failure> {
    let spec = spec.resolve()?;
    let rows = codes.shape()[0];
    let contiguous = |error: numpy::AsSliceError| Failure::usage(error.to_string());
    let codes = codes.as_slice().map_err(contiguous)?;
    let scales = scales.as_slice().map_err(contiguous)?;
    let len = rows.checked_mul(k).ok_or_else(|| Failure::usage("k: too large"))?;
    // Before room is made for it: k comes from the caller, and codes have to be there for it.
    if codes.len() != rows.saturating_mul(spec.row_bytes(k)) {
        return Err(Failure::usage(format!(
            "codes: {} bytes, but {rows} rows of k = {k} take {} each",
            codes.len(),
            spec.row_bytes(k)
        )));
    }
    let values = py.detach(|| {
        let mut values = vec![0.0; len];
        mx_kernels::quantize::dequantize_rows(&spec, codes, scales, rows, k, &mut values)
            .map(|()| values)
    })?;
    let values = PyArray1::from_vec(py, values);
    Ok(numpy::PyArrayMethods::reshape(&values, [rows, k])?)
}

/// The codes (uint8, one a byte) in packed ones, `count` a row.
#[pyfunction]
pub(crate) fn unpack<'py>(
    py: Python<'py>,
    codes: PyReadonlyArray2<'py, u8>,
    format: &str,
) -> Result<Bound<'py, PyArray1<u16>>, Failure> {
    let format: ElementFormat = parse("format", format)?;
    let bytes = codes.as_slice().map_err(|error| Failure::usage(error.to_string()))?;
    let mut unpacked = vec![0; bytes.len() * 8 / format.bits() as usize];
    pack::unpack(format, bytes, &mut unpacked);
    Ok(PyArray1::from_vec(py, unpacked))
}

fn shape<T: numpy::Element>(array: &PyReadonlyArray2<'_, T>) -> [usize; 2] {
    [array.shape()[0], array.shape()[1]]
}
