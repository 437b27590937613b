//! Bit for bit against microsoft/microxcaling (vectors computed by its PyTorch path).

use std::path::{Path, PathBuf};

use mx_kernels::{
    QuantSpec, Rounding, ScaleKind, ScaleRule, dequantize_rows, fake_quantize_rows, quantize_rows,
};
use safetensors::SafeTensors;

fn values(file: &SafeTensors<'_>, key: &str) -> Option<(usize, Vec<f32>)> {
    let tensor = file.tensor(key).ok()?;
    let bytes = tensor.data().chunks_exact(4);
    let values = bytes.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    Some((*tensor.shape().last()?, values))
}

/// Equal bits, but -0.0 == 0.0 and NaN == NaN.
fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b || a.is_nan() && b.is_nan())
}

/// Checks every vector of a safetensors file; returns how many there were.
fn check(bytes: &[u8]) -> usize {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let mut checked = 0;
    for key in file.names() {
        if key.starts_with("input.") {
            continue;
        }
        let parts: Vec<&str> = key.split('.').collect();
        let [format, rounding, block, case] = parts[..] else { panic!("strange key {key}") };
        let spec = QuantSpec::new(
            format.parse().unwrap(),
            ScaleKind::E8M0,
            block[1..].parse().unwrap(),
            rounding.parse::<Rounding>().unwrap(),
            ScaleRule::Floor,
        )
        .unwrap();
        let (k, want) = values(&file, key).unwrap();
        let (_, mut x) = values(&file, &format!("input.{case}")).unwrap();
        x.truncate(want.len());
        let rows = want.len() / k;
        let (mut codes, mut scales) =
            (vec![0; spec.codes_len(rows, k)], vec![0; spec.scales_len(rows, k)]);
        quantize_rows(&spec, &x, rows, k, &mut codes, &mut scales).unwrap();
        let mut got = vec![0.0; want.len()];
        dequantize_rows(&spec, &codes, &scales, rows, k, &mut got).unwrap();
        assert!(same(&got, &want), "{key}");
        fake_quantize_rows(&spec, &x, rows, k, &mut got).unwrap();
        assert!(same(&got, &want), "{key} (fake)");
        checked += 1;
    }
    checked
}

#[test]
fn committed_subset() {
    // Inside the binary, so that it can run on a machine without the sources.
    let subset = include_bytes!("../../../fixtures/golden/mx_golden_subset.safetensors");
    assert_eq!(check(subset), 495);
}

#[test]
fn full_set_when_present() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let shared = std::env::var_os("MX_SHARED").map_or(root, PathBuf::from);
    let path = shared.join("golden/mx_golden.safetensors");
    if path.exists() {
        assert!(check(&std::fs::read(path).unwrap()) >= 495);
    } else {
        println!("skipped: {} is not there (the committed subset is checked)", path.display());
    }
}
