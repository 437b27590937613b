//! A recipe from arbitrary text: what is understood is printed as what is read back as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mxrewrite::rewrite::Recipe;

fuzz_target!(|text: &str| {
    let recipe = match Recipe::from_text(text, "fuzz") {
        Ok(recipe) => recipe,
        Err(error) => return assert!(error.to_string().starts_with("fuzz"), "{error}"),
    };
    let printed = recipe.to_toml();
    let again = Recipe::from_text(&printed, "printed").unwrap_or_else(|e| panic!("{e}: {printed}"));
    assert_eq!(recipe, again, "{printed}");
    let _ = recipe.filter();
});
