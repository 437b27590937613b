//! `mxrewrite --cpu-info`.

use mx_kernels::cpu::{CpuInfo, info};
use serde_json::{Value, json};

/// The facts as JSON.
pub(crate) fn value() -> Value {
    let CpuInfo { processor, threads, chosen, variants, products } = info();
    let variants: Vec<Value> = variants
        .iter()
        .map(|v| json!({"name": v.name, "needs": v.needs, "runs": v.runs}))
        .collect();
    let products: Vec<Value> = products
        .iter()
        .map(|p| {
            let ways: Vec<Value> =
                p.ways.iter().map(|(m, way)| json!({"from_m": m, "kernels": way})).collect();
            json!({
                "weight_format": p.weight.name(),
                "activation_format": p.activation.map_or("none", |format| format.name()),
                "kernels": ways,
            })
        })
        .collect();
    json!({
        "processor": processor,
        "threads": threads,
        "variant": chosen,
        "variants": variants,
        "products": products,
    })
}

/// The same as text.
pub(crate) fn text() -> String {
    let info = info();
    let mut text = format!(
        "{}, {} threads\nvariant in use: {}\n\nvariants of this build, the best first\n",
        info.processor, info.threads, info.chosen
    );
    for v in &info.variants {
        let state = if v.runs { "runs here" } else { "not here " };
        text.push_str(format!("  {:<11} {state}  {}", v.name, v.needs.join(" ")).trim_end());
        text.push('\n');
    }
    text.push_str("\nMxMatMul with repacked weights, by rows of X (m)\n");
    for p in &info.products {
        let x = p.activation.map_or("none", |format| format.name());
        let ways: Vec<String> = p.ways.iter().map(|(m, way)| format!("m>={m} {way}")).collect();
        text.push_str(&format!("  {:<9} x {:<9} {}\n", p.weight.name(), x, ways.join("; ")));
    }
    text
}
