//! Files that lie.

use super::shell::linear;
use crate::onnx::{Model, wire};
use bytes::Bytes;
use proptest::prelude::*;

/// Everything that reading a model can reach.
fn read_all(bytes: Vec<u8>) -> Result<(), String> {
    let model = Model::from_bytes(bytes.into(), None).map_err(|error| error.to_string())?;
    let graph = model.graph();
    for tensor in graph.initializers() {
        let _ = model.tensor(tensor).map(|view| view.to_f32());
    }
    for (id, _) in graph.nodes() {
        let _ = graph.subgraphs(id);
    }
    let _ = model.functions();
    let _ = model.has_external_data();
    let _ = model.to_bytes();
    Ok(())
}

#[test]
fn what_is_no_model_is_named_with_its_byte() {
    let mut second = linear().bytes();
    second.extend(wire::len_field(7, &[]));
    let mut not_utf8 = linear();
    not_utf8.nodes[0].name = Some("QQQQ".into());
    let mut not_utf8 = not_utf8.bytes();
    let at = not_utf8.windows(4).position(|window| window == b"QQQQ").unwrap();
    not_utf8[at] = 0xff;
    let cases: [(&[u8], &str); 7] = [
        (b"", "the file is empty at byte 0"),
        (b"This is a text file, not a model.\n", "at byte"),
        (b"{\"json\": true}", "at byte"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "at byte"),
        (&[0x08, 8], "no graph until the end of the file at byte 2"),
        (&second, "a second graph at byte"),
        (&not_utf8, "at byte"),
    ];
    for (bytes, text) in cases {
        let error = Model::from_bytes(Bytes::copy_from_slice(bytes), None).unwrap_err().to_string();
        assert!(error.starts_with("not a valid ONNX model: ") && error.contains(text), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let no_opset = &linear().bytes()[..linear().bytes().len() - 4];
    let error = Model::from_bytes(Bytes::copy_from_slice(no_opset), None).unwrap_err().to_string();
    assert!(error.contains("no opset_import"), "{error}");
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = linear().bytes();
    for len in 0..bytes.len() {
        assert!(read_all(bytes[..len].to_vec()).is_err(), "{len} bytes of {} pass", bytes.len());
    }
    assert_eq!(read_all(bytes), Ok(()));
}

#[test]
fn every_changed_byte_is_survived() {
    let bytes = linear().bytes();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            let _ = read_all(changed);
        }
    }
}

proptest! {
    #[test]
    fn random_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = read_all(bytes);
    }

    /// Random content inside valid messages reaches deeper than random bytes do.
    #[test]
    fn random_graphs_are_survived(
        fields in proptest::collection::vec(
            (1u32..17, proptest::collection::vec((1u32..24, any::<Vec<u8>>()), 0..6)), 0..8),
    ) {
        let mut graph = Vec::new();
        for (number, inner) in fields {
            let inner: Vec<u8> = inner.iter().flat_map(|(n, b)| wire::len_field(*n, b).to_vec()).collect();
            graph.extend(wire::len_field(number, &inner));
        }
        let mut model = vec![0x08, 8];
        model.extend(wire::len_field(7, &graph));
        model.extend(wire::len_field(8, &[0x10, 18]));
        let _ = read_all(model);
    }
}
