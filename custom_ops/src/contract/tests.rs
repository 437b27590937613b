use std::collections::HashMap;

use mx_kernels::{Rounding, ScaleKind, ScaleRule};

use super::*;

/// A node as a bag of attributes.
#[derive(Clone, Default)]
struct Bag(HashMap<&'static str, AttributeValue>);

impl Bag {
    fn of(attrs: &MxMatMulAttrs) -> Self {
        Self(attrs.to_attributes().into_iter().collect())
    }

    fn with(&self, name: &'static str, value: AttributeValue) -> Self {
        let mut bag = self.clone();
        bag.0.insert(name, value);
        bag
    }

    fn without(&self, name: &'static str) -> Self {
        let mut bag = self.clone();
        bag.0.remove(name);
        bag
    }
}

impl AttributeSource for Bag {
    fn attribute(&self, name: &str) -> Option<AttributeValue> {
        self.0.get(name).cloned()
    }
}

fn spec(format: ElementFormat, scale: ScaleKind, block_size: usize) -> QuantSpec {
    QuantSpec::new(format, scale, block_size, Rounding::Even, ScaleRule::Floor).unwrap()
}

fn fp8() -> MxMatMulAttrs {
    let weight = spec(ElementFormat::Fp8E4M3, ScaleKind::E8M0, 32);
    MxMatMulAttrs::new(7, 100, weight, Some(ElementFormat::Fp8E4M3)).unwrap()
}

fn text(value: &'static str) -> AttributeValue {
    AttributeValue::Text(Cow::Borrowed(value))
}

#[test]
fn every_combination_reads_back_what_was_written() {
    let mut seen = 0;
    for format in ["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "mxint8"] {
        for activation in ["none", "fp8_e5m2", "fp4_e2m1", "mxint8"] {
            for (block_size, rounding, rule) in
                [(16, "even", "floor"), (64, "nearest", "rceil"), (256, "floor", "even")]
            {
                let bag = Bag::of(&fp8())
                    .with(attr::WEIGHT_FORMAT, text(format))
                    .with(attr::ACTIVATION_FORMAT, text(activation))
                    .with(attr::BLOCK_SIZE, AttributeValue::Int(block_size))
                    .with(attr::ROUNDING, text(rounding))
                    .with(attr::SCALE_RULE, text(rule))
                    .with(attr::ALPHA, AttributeValue::Float(-0.5))
                    .with(attr::BETA, AttributeValue::Float(2.0));
                let attrs = MxMatMulAttrs::read(&bag).unwrap();
                assert_eq!(Bag::of(&attrs).0, bag.0);
                seen += 1;
            }
        }
    }
    assert_eq!(seen, 6 * 4 * 3);
}

#[test]
fn unscaled_and_tensor_scaled_weights_read_back() {
    for (format, scale, expected) in [
        (ElementFormat::Bf16, ScaleKind::None, ScalesShape::Absent),
        (ElementFormat::Fp8E4M3, ScaleKind::None, ScalesShape::Absent),
        (ElementFormat::Fp8E5M2, ScaleKind::None, ScalesShape::Absent),
        (ElementFormat::Fp8E4M3, ScaleKind::Tensor, ScalesShape::Tensor),
    ] {
        let attrs = MxMatMulAttrs::new(3, 40, spec(format, scale, 32), Some(format)).unwrap();
        assert_eq!(attrs.scales_shape(), expected);
        assert_eq!(MxMatMulAttrs::read(&Bag::of(&attrs)).unwrap(), attrs);
    }
}

#[test]
fn sizes_follow_the_packing_rules() {
    // Four blocks of 32 for k = 100: 128 codes of 8, 6 and 4 bits.
    for (format, row_bytes) in [
        (ElementFormat::Fp8E5M2, 128),
        (ElementFormat::MxInt8, 128),
        (ElementFormat::Fp6E2M3, 96),
        (ElementFormat::Fp4E2M1, 64),
    ] {
        let attrs = MxMatMulAttrs::new(7, 100, spec(format, ScaleKind::E8M0, 32), None).unwrap();
        assert_eq!(attrs.codes_shape(), [7, row_bytes]);
        assert_eq!(attrs.scales_shape(), ScalesShape::Blocks([7, 4]));
    }
}

#[test]
fn defaults_are_those_of_the_format_and_nothing_else_has_one() {
    let full = Bag::of(&fp8());
    for name in [
        attr::ALPHA,
        attr::BETA,
        attr::ROUNDING,
        attr::SCALE_RULE,
        attr::SCALE,
        attr::BLOCK_SIZE,
        attr::LAYOUT,
    ] {
        assert_eq!(MxMatMulAttrs::read(&full.without(name)).unwrap(), fp8(), "{name}");
    }
    for name in [attr::K, attr::N, attr::WEIGHT_FORMAT, attr::ACTIVATION_FORMAT] {
        let error = MxMatMulAttrs::read(&full.without(name)).unwrap_err();
        assert!(matches!(error, ContractError::Missing { attribute, .. } if attribute == name));
    }
}

#[test]
fn a_wrong_type_is_an_error_even_where_a_default_exists() {
    let full = Bag::of(&fp8());
    for (name, _) in fp8().to_attributes() {
        for value in [
            AttributeValue::Int(1),
            AttributeValue::Float(1.0),
            text("even"),
            AttributeValue::Other,
        ] {
            if value.kind() == full.0[name].kind() {
                continue;
            }
            let error = MxMatMulAttrs::read(&full.with(name, value)).unwrap_err();
            assert!(
                matches!(error, ContractError::WrongKind { attribute, .. } if attribute == name),
                "{name}: {error}"
            );
            assert!(error.to_string().contains(name));
        }
    }
}

#[test]
fn values_outside_their_range_are_named() {
    let full = Bag::of(&fp8());
    let cases = [
        (attr::K, 0),
        (attr::K, -1),
        (attr::K, i64::MIN),
        (attr::N, MAX_DIM + 1),
        (attr::N, i64::MAX),
        (attr::BLOCK_SIZE, 0),
        (attr::BLOCK_SIZE, -32),
        (attr::BLOCK_SIZE, 24),
        (attr::BLOCK_SIZE, 512),
        (attr::BLOCK_SIZE, i64::MAX),
        (attr::LAYOUT, 0),
        (attr::LAYOUT, -1),
    ];
    for (name, value) in cases {
        let error = MxMatMulAttrs::read(&full.with(name, AttributeValue::Int(value))).unwrap_err();
        assert!(
            matches!(error, ContractError::OutOfRange { attribute, value: v, .. } if attribute == name && v == value),
            "{name} = {value}: {error}"
        );
    }
    for (name, value) in [(attr::ALPHA, f32::NAN), (attr::BETA, f32::NEG_INFINITY)] {
        let error =
            MxMatMulAttrs::read(&full.with(name, AttributeValue::Float(value))).unwrap_err();
        assert!(matches!(error, ContractError::NotFinite { attribute, .. } if attribute == name));
    }
}

#[test]
fn unknown_names_are_quoted_and_cut() {
    let full = Bag::of(&fp8());
    for name in [
        attr::WEIGHT_FORMAT,
        attr::ACTIVATION_FORMAT,
        attr::SCALE,
        attr::ROUNDING,
        attr::SCALE_RULE,
    ] {
        for value in ["fp7_e1m5".to_owned(), String::new(), "x".repeat(100_000)] {
            let value = AttributeValue::Text(Cow::Owned(value));
            let message = MxMatMulAttrs::read(&full.with(name, value)).unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
            assert!(message.len() < 1000, "{} bytes", message.len());
        }
    }
}

#[test]
fn formats_that_the_scale_kind_excludes_are_errors() {
    let full = Bag::of(&fp8());
    for (scale, weight, activation) in [
        ("e8m0", "bf16", "none"),
        ("e8m0", "fp8_e4m3", "bf16"),
        ("none", "fp6_e3m2", "none"),
        ("none", "fp8_e4m3", "fp4_e2m1"),
    ] {
        let bag = full
            .with(attr::SCALE, text(scale))
            .with(attr::WEIGHT_FORMAT, text(weight))
            .with(attr::ACTIVATION_FORMAT, text(activation));
        let error = MxMatMulAttrs::read(&bag).unwrap_err();
        assert!(matches!(error, ContractError::Operand { .. }), "{error}");
    }
}

#[test]
fn the_largest_dimensions_do_not_overflow() {
    let bag = Bag::of(&fp8())
        .with(attr::K, AttributeValue::Int(MAX_DIM))
        .with(attr::N, AttributeValue::Int(MAX_DIM));
    let attrs = MxMatMulAttrs::read(&bag).unwrap();
    assert_eq!(attrs.codes_shape(), [MAX_DIM as usize, 1 << 31]);
    let bf16 = bag
        .with(attr::SCALE, text("none"))
        .with(attr::WEIGHT_FORMAT, text("bf16"))
        .with(attr::ACTIVATION_FORMAT, text("none"));
    let attrs = MxMatMulAttrs::read(&bf16).unwrap();
    assert_eq!(attrs.row_bytes(), 1 << 32);
}

#[test]
fn shapes_match_dimension_by_dimension_and_unknown_ones_pass() {
    assert!(check_shape("codes", &[4, 5], &[4, 5]).is_ok());
    assert!(check_shape("codes", &[4, 5], &[-1, 5]).is_ok());
    for found in [&[4, 6][..], &[4], &[4, 5, 1], &[], &[5, 4], &[20]] {
        let error = check_shape("codes", &[4, 5], found).unwrap_err();
        assert!(error.to_string().contains("codes"));
    }
    assert!(check_x_shape(8, &[8]).is_ok());
    assert!(check_x_shape(8, &[0, 3, 8]).is_ok());
    assert!(check_x_shape(8, &[-1, -1]).is_ok());
    assert!(check_x_shape(8, &[]).is_err());
    assert!(check_x_shape(8, &[8, 7]).is_err());
}

fn experts() -> MxExpertMatMulAttrs {
    MxExpertMatMulAttrs::new(fp8(), 3, Some(1)).unwrap()
}

#[test]
fn an_experts_node_reads_back_what_was_written() {
    let bag = Bag(experts().to_attributes().into_iter().collect());
    assert_eq!(MxExpertMatMulAttrs::read(&bag).unwrap(), experts());
    assert!(!bag.0.contains_key(attr::BETA), "there is no bias");
    let unknown = MxExpertMatMulAttrs::read(&bag.without(attr::INDEX_RANK)).unwrap();
    assert_eq!(unknown.index_rank(), None);
    let again = Bag(unknown.to_attributes().into_iter().collect());
    assert_eq!(MxExpertMatMulAttrs::read(&again).unwrap(), unknown);
    for (name, value) in [
        (attr::EXPERTS, AttributeValue::Int(0)),
        (attr::EXPERTS, AttributeValue::Int(-1)),
        (attr::EXPERTS, AttributeValue::Int(i64::MAX)),
        (attr::EXPERTS, text("three")),
        (attr::INDEX_RANK, AttributeValue::Int(-2)),
        (attr::INDEX_RANK, AttributeValue::Int(63)),
        (attr::SCALE, text("tensor")),
    ] {
        let error = MxExpertMatMulAttrs::read(&bag.with(name, value)).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    assert!(MxExpertMatMulAttrs::read(&bag.without(attr::EXPERTS)).is_err());
    let weight = spec(ElementFormat::Fp8E4M3, ScaleKind::E8M0, 32);
    let large = MxMatMulAttrs::new(MAX_DIM as usize, 1 << 20, weight, None).unwrap();
    let error = MxExpertMatMulAttrs::new(large, MAX_DIM as usize, None).unwrap_err();
    assert!(matches!(error, ContractError::TooLarge { .. }), "{error}");
}

#[test]
fn shapes_of_chosen_experts_are_those_of_matmul() {
    let attrs = MxExpertMatMulAttrs::new(fp8(), 3, None).unwrap();
    assert_eq!((attrs.codes_shape(), attrs.scales_shape()), ([3, 7, 128], Some([3, 7, 4])));
    for (x, index, want) in [
        (&[5, 100][..], &[][..], &[5, 7][..]),
        (&[100], &[], &[7]),
        (&[100], &[4], &[4, 7]),
        (&[4, 1, 100], &[4], &[4, 1, 7]),
        (&[2, 1, 9, 100], &[2, 3], &[2, 3, 9, 7]),
        (&[-1, 1, 100], &[-1], &[-1, 1, 7]),
        (&[0, 2, 100], &[1], &[0, 2, 7]),
    ] {
        assert_eq!(attrs.y_dims(x, index).unwrap(), want, "{x:?} {index:?}");
    }
    for (x, index, word) in
        [(&[5, 99][..], &[][..], "X"), (&[], &[1], "X"), (&[4, 2, 100], &[3], "index")]
    {
        assert!(attrs.y_dims(x, index).unwrap_err().to_string().contains(word), "{x:?} {index:?}");
    }
    assert!(experts().y_dims(&[5, 100], &[]).unwrap_err().to_string().contains("index_rank"));
    let pairs = attrs.product(&[2, 1, 5, 100], &[3]).unwrap();
    assert_eq!((pairs.m, pairs.n, pairs.k), (5, 7, 100));
    assert_eq!(pairs.batches, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]);
}

#[test]
fn an_index_names_an_expert_from_either_end() {
    let attrs = experts();
    let named: Vec<_> = (-3..3).map(|index| attrs.expert(0, index).unwrap()).collect();
    assert_eq!(named, [0, 1, 2, 0, 1, 2]);
    for index in [3, -4, i64::MAX, i64::MIN] {
        let error = attrs.expert(9, index).unwrap_err().to_string();
        assert!(error.contains(&format!("{index} at place 9, allowed: -3 to 2")), "{error}");
    }
}

#[test]
fn a_later_version_is_refused_with_both_versions() {
    assert_eq!(check_domain_version(1), Ok(()));
    let layout = Bag::of(&fp8()).with(attr::LAYOUT, AttributeValue::Int(2));
    assert_eq!(
        MxMatMulAttrs::read(&layout),
        Err(ContractError::Newer { what: "attribute layout", found: 2, supported: 1 })
    );
    let error = check_domain_version(7).unwrap_err().to_string();
    for part in ["domain mx is 7", "1 at most", env!("CARGO_PKG_VERSION"), "update mxrewrite"] {
        assert!(error.contains(part), "{error}");
    }
}
