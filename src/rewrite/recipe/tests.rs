//! Recipes as texts: what is printed is read back, and what is not understood is told with its line.

use mx_kernels::{ElementFormat, Rounding, ScaleRule};

use super::*;
use crate::rewrite::{Role, Tier};

fn error(text: &str) -> String {
    Recipe::from_text(text, "r.toml").unwrap_err().to_string()
}

fn rule(keys: &str) -> Result<Rule, String> {
    let recipe = Recipe::from_text(&format!("[[rules]]\n{keys}\n"), "r.toml");
    Ok(recipe.map_err(|error| error.to_string())?.rules.remove(0))
}

/// TOML and JSON of the recipe, read back.
fn round_trip(recipe: &Recipe) {
    let toml = recipe.to_toml();
    assert_eq!(Recipe::from_text(&toml, "r").unwrap(), *recipe, "{toml}");
    let json = serde_json::to_string(recipe).unwrap();
    assert_eq!(Recipe::from_text(&json, "r").unwrap(), *recipe, "{json}");
    let plan = format!("{{\"sites\": [], \"skipped\": [], \"recipe\": {json}}}");
    assert_eq!(Recipe::from_text(&plan, "r").unwrap(), *recipe);
}

#[test]
fn every_recipe_that_options_make_is_read_back() {
    let mut made = 0;
    for tier in Tier::ALL {
        for lowering in Lowering::ALL {
            for base_dtype in [None, Some(BaseDtype::Bf16), Some(BaseDtype::F16)] {
                let options = RewriteOptions {
                    tier,
                    lowering,
                    base_dtype,
                    block_size: 64,
                    // QuantizeLinear knows one rounding.
                    rounding: match lowering {
                        Lowering::Qdq => Rounding::Even,
                        _ => Rounding::Floor,
                    },
                    scale_rule: ScaleRule::Rceil,
                    include: vec!["lm_head".into(), r"layers\.\d+$".into()],
                    exclude: vec![r#"'"\x{1F600}"#.into(), "a\tb".into(), "é".into()],
                    ..RewriteOptions::default()
                };
                if let Ok(recipe) = Recipe::new(&options) {
                    round_trip(&recipe);
                    made += 1;
                }
            }
        }
    }
    assert_eq!(
        made,
        7 * 9 * 3 - 7 - 7 - 7 * 2 - 2 * 5 * 3,
        "all but fp16 under bf16 and bf16 under fp16, qdq with a base type, and c and d where formats \
         are fixed"
    );
    for (name, ..) in BUILT_IN {
        round_trip(&Recipe::built_in(name).unwrap().unwrap());
    }
}

#[test]
fn a_rule_says_who_and_what() {
    let text = r#"
        name = "mine"
        exclude = 'layers\.2\.'
        [[rules]]
        role = ["mlp", "expert"]
        layers = [0, "4-7", -1]
        include = 'down'
        exclude = ["up", "gate"]
        weight_format = "fp4_e2m1"
        activation_format = "fp8_e4m3"
        block_size = 16
        rounding = "nearest"
        scale_rule = "even"
        [[rules]]
        role = "head"
        weight_format = "keep"
    "#;
    let recipe = Recipe::from_text(text, "r.toml").unwrap();
    assert_eq!((recipe.name.as_str(), &recipe.exclude[..]), ("mine", &[r"layers\.2\.".into()][..]));
    let [first, second] = &recipe.rules[..] else { panic!("{:?}", recipe.rules) };
    assert_eq!(first.select.roles, [Role::Mlp, Role::Expert]);
    assert_eq!(
        first.select.layers.iter().map(|l| l.to_string()).collect::<Vec<_>>(),
        ["0", "4-7", "-1"]
    );
    assert_eq!(first.select.include, ["down"]);
    assert_eq!(first.select.exclude, ["up", "gate"]);
    let Some(SiteFormat::Mx { weight, activation: Some(activation) }) = first.format else {
        panic!("{:?}", first.format)
    };
    assert_eq!((weight.format, weight.block_size), (ElementFormat::Fp4E2M1, 16));
    assert_eq!((weight.rounding, weight.scale_rule), (Rounding::Nearest, ScaleRule::Even));
    assert_eq!((activation.format, activation.block_size), (ElementFormat::Fp8E4M3, 16));
    assert_eq!((second.select.roles.as_slice(), second.format), (&[Role::Head][..], None));
    round_trip(&recipe);
}

#[test]
fn defaults_are_the_command_lines() {
    let bare = rule("weight_format = \"fp6_e2m3\"").unwrap();
    let options = RewriteOptions {
        tier: Tier::AllLinears,
        format: Some(ElementFormat::Fp6E2M3),
        ..RewriteOptions::default()
    };
    assert_eq!(bare, Recipe::new(&options).unwrap().rules[0]);
    let only = rule("weight_format = \"fp4_e2m1\"\nactivation_format = \"none\"").unwrap();
    assert!(matches!(only.format, Some(SiteFormat::Mx { activation: None, .. })));
}

#[test]
fn what_is_not_understood_is_told_with_line_and_suggestion() {
    for (text, parts) in [
        ("nam = 'x'", &["r.toml:1:", "no key 'nam'", "did you mean 'name'"][..]),
        ("\n\nrule = []", &["r.toml:3:", "did you mean 'rules'"]),
        ("[[rules]]\nweight = 'fp8_e4m3'", &["r.toml:2:", "did you mean 'weight_format'"]),
        ("[[rules]]\nblocksize = 32", &["r.toml:2:", "did you mean 'block_size'"]),
        ("[[rules]]\nzzz = 32", &["r.toml:2:", "known are role, layers"]),
        ("[[rules]]\nweight_format = 'fp8-e4m3'", &["r.toml:2:", "did you mean 'fp8_e4m3'"]),
        ("[[rules]]\nweight_format = 'none'", &["r.toml:2:", "keep"]),
        ("[[rules]]\nweight_format = 8", &["r.toml:2:", "text in quotes", "not 8"]),
        ("[[rules]]\nrole = 'mpl'", &["r.toml:2:", "did you mean 'mlp'"]),
        ("[[rules]]\nrole = [\n'mlp',\n'experts']", &["r.toml:4:", "did you mean 'expert'"]),
        ("[[rules]]\nrole = []", &["r.toml:2:", "empty list"]),
        ("[[rules]]\nlayers = '7-4'", &["r.toml:2:", "7-4", "empty range"]),
        ("[[rules]]\nlayers = 1.5", &["r.toml:2:", "a fraction"]),
        ("[[rules]]\ninclude = '('", &["r.toml:2:", "'('", "regular expression"]),
        ("[[rules]]\nweight_format='fp4_e2m1'\nblock_size = 24", &["r.toml:3:", "128", "not 24"]),
        ("[[rules]]\nweight_format='fp4_e2m1'\nrounding = 'evn'", &["r.toml:3:", "'even'"]),
        ("[[rules]]\nweight_format='fp4_e2m1'\nscale_rule = 'up'", &["r.toml:3:", "rceil"]),
        ("[[rules]]\nweight_format='keep'\nblock_size = 32", &["r.toml:3:", "means nothing"]),
        (
            "[[rules]]\nweight_format='fp4_e2m1'\nactivation_format='fp8'",
            &["r.toml:3:", "fp8_e4m3"],
        ),
        ("[[rules]]\nrole = 'mlp'", &["r.toml:1:", "needs a weight_format"]),
        ("lowering = 'int4'\n", &["r.toml:1:", "did you mean 'int8'"]),
        ("lowering = 'int8'\n[[rules]]\nweight_format='fp4_e2m1'", &["r.toml:3:", "fixes"]),
        ("lowering = 'int8'\n[[rules]]\nblock_size=32", &["r.toml:3:", "no blocks"]),
        ("base_dtype = 'fp61'", &["r.toml:1:", "did you mean 'fp16'"]),
        ("lowering='bf16'\nbase_dtype='fp16'", &["r.toml:2:", "the whole graph"]),
        ("rules = 3", &["r.toml:1:", "[[rules]]"]),
        ("rules = [3]", &["r.toml:1:", "a table of keys, not a number"]),
        ("", &["r.toml", "[[rules]]"]),
        ("[[rules]\n", &["r.toml:1:"]),
        ("name = 'a'\nname = 'b'", &["r.toml:2:", "duplicate"]),
        ("{\"rules\": 1", &["r.toml:1:"]),
        ("{\"rule\": []}", &["r.toml: ", "did you mean 'rules'"]),
    ] {
        let message = error(text);
        for part in parts {
            assert!(message.contains(part), "{text:?}: '{part}' in {message}");
        }
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn files_that_are_no_recipe_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mix.toml");
    let refused = |path: &std::path::Path| Recipe::open(path).unwrap_err().to_string();
    assert!(refused(&path).contains("mix.toml") && refused(&path).contains("tier-c"));
    std::fs::write(&path, [0xff, 0xfe, 0]).unwrap();
    assert!(refused(&path).contains("no recipe"));
    assert!(refused(folder.path()).contains("no recipe"));
    std::fs::write(&path, "[[rules]]\nweight_format = 'mxint8'\n").unwrap();
    assert_eq!(Recipe::open(&path).unwrap().name, "recipe mix");
    assert_eq!(Recipe::open("W6A8".as_ref()).unwrap().name, "w6a8");
}

#[test]
fn the_examples_of_the_docs_are_recipes() {
    let docs = [include_str!("../../../docs/recipes.md"), include_str!("../../../README.md")];
    let examples = docs.iter().flat_map(|text| text.split("```toml\n").skip(1));
    let mut read = 0;
    for example in examples {
        let text = example.split("```").next().unwrap();
        round_trip(
            &Recipe::from_text(text, "docs").unwrap_or_else(|error| panic!("{error}\n{text}")),
        );
        read += 1;
    }
    assert_eq!(read, 5);
}

#[test]
fn what_qdq_cannot_say_is_refused_at_its_line() {
    let toml =
        "lowering = \"qdq\"\n[[rules]]\nweight_format = \"fp8_e4m3\"\nrounding = \"nearest\"\n";
    let message = Recipe::from_text(toml, "r").unwrap_err().to_string();
    assert!(message.starts_with("r:4: rounding does not go"), "{message}");
    let weight_only = format!("{toml}activation_format = \"none\"\n");
    assert!(Recipe::from_text(&weight_only, "r").is_ok());
    let base = format!("base_dtype = \"fp16\"\n{}", weight_only);
    let message = Recipe::from_text(&base, "r").unwrap_err().to_string();
    assert!(message.starts_with("r:1: base_dtype"), "{message}");
}

#[test]
fn packed_weights_are_taken_unless_a_format_is_asked_for() {
    let checkpoint = || RewriteOptions { checkpoint: Some("ckpt".into()), ..Default::default() };
    let taken = Recipe::new(&checkpoint()).unwrap();
    assert!(taken.packed && !Recipe::new(&RewriteOptions::default()).unwrap().import);
    round_trip(&taken);
    let format = Some(ElementFormat::Fp4E2M1);
    for options in [
        RewriteOptions { format, ..checkpoint() },
        RewriteOptions { tier: Tier::C, ..checkpoint() },
        RewriteOptions { block_size: 16, ..checkpoint() },
        RewriteOptions { lowering: Lowering::Int8, ..checkpoint() },
    ] {
        let recipe = Recipe::new(&options).unwrap();
        assert!(recipe.import && !recipe.packed, "{options:?}");
        round_trip(&recipe);
        // Layers are named by the checkpoint, and codes of a rule's own format are its.
        let alone = RewriteOptions { recipe: Some(recipe), ..Default::default() };
        assert!(matches!(Recipe::new(&alone), Err(RecipeError::NoCheckpoint { .. })));
    }
    // A recipe that takes them cannot do without.
    let recipe = Some(taken);
    let alone = RewriteOptions { recipe: recipe.clone(), ..Default::default() };
    let error_text = Recipe::new(&alone).unwrap_err().to_string();
    assert!(error_text.contains("--checkpoint"), "{error_text}");
    assert!(Recipe::new(&RewriteOptions { recipe, ..checkpoint() }).unwrap().packed);
    // What a checkpoint has had a part in needs it again.
    let recipe = Recipe::built_in("w4a8").unwrap();
    assert!(Recipe::new(&RewriteOptions { recipe, ..checkpoint() }).unwrap().import);
    let rules = "[[rules]]\nweight_format = \"fp8_e4m3\"\n";
    let packed =
        Recipe::from_text(&format!("packed_weights = \"checkpoint\"\n{rules}"), "r").unwrap();
    assert!(packed.import && packed.packed);
    assert!(error(&format!("checkpoint = true\n{rules}")).contains("r.toml:1"));
    assert!(error(&format!("packed_weights = \"no\"\n{rules}")).contains("r.toml:1"));
    let int8 = "lowering = \"int8\"\npacked_weights = \"checkpoint\"\n[[rules]]\nrole = \"mlp\"\n";
    assert!(
        error(int8).starts_with("r.toml:2: packed_weights goes with lowering"),
        "{}",
        error(int8)
    );
}
