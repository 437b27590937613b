//! What reports say, and that nothing in them does more than say it.

use super::*;
use crate::eval::figures::Verdict;
use crate::eval::record::Status;
const DEFINITION: &str = "per-document: each document by itself";
use ::scraper::{Html, Selector};
use serde_json::json;

fn facts() -> Map<String, Value> {
    let facts = json!({"mxeval": "0.1.0", "date": "2026-11-26T08:00:00Z",
        "keys": {"x": "secret"}, "definition": DEFINITION,
        "data": {"path": "dir/d.parquet", "sha256": "abc"},
        "command": ["mxeval", "--sweep", "my model.onnx", "--exclude", "layers\\.0\\.", "--data", "it's <b>.jsonl"]});
    facts.as_object().cloned().unwrap()
}

fn report<'a>(records: &'a [Record], facts: &'a Map<String, Value>) -> Report<'a> {
    Report { records, facts, definition: DEFINITION, sensitivity: None, front: &[] }
}

/// What a browser makes of it; malformed HTML fails.
fn parse(html: &str) -> Html {
    let page = Html::parse_document(html);
    assert!(page.errors.is_empty(), "{:?}", page.errors);
    page
}

fn texts(page: &Html, selector: &str) -> Vec<String> {
    let selector = Selector::parse(selector).unwrap();
    page.select(&selector).map(|element| element.text().collect::<String>()).collect()
}

/// Writes into MX_REPORT_DIR, for scripts/check_report.py.
fn keep(name: &str, text: &str) {
    if let Some(folder) = std::env::var_os("MX_REPORT_DIR") {
        std::fs::write(std::path::Path::new(&folder).join(name), text).unwrap();
    }
}

/// A page that needs nothing else, with words for every plot.
fn sound(html: &str) -> Html {
    let page = parse(html);
    assert!(html.len() < 2_000_000, "{} bytes", html.len());
    for what in ["script", "iframe", "object", "embed", "base", "form", "image", "use"] {
        assert!(texts(&page, what).is_empty(), "<{what}>");
    }
    let all = Selector::parse("*").unwrap();
    for element in page.select(&all) {
        for (name, value) in element.value().attrs() {
            let reference =
                matches!(name, "src" | "href" | "srcset" | "data" | "action" | "poster");
            assert!(!reference || value.starts_with('#') || value == "data:,", "{name}={value}");
            assert!(!name.starts_with("on") && !value.contains("://"), "{name}={value}");
        }
    }
    assert!(!html.contains("url(") && !html.contains("@import"));
    let svg = Selector::parse("svg").unwrap();
    for element in page.select(&svg) {
        let value = element.value();
        assert_eq!(value.attr("role"), Some("img"));
        assert!(value.attr("aria-label").is_some_and(|label| label.len() > 20));
        let inside = |name: &str| {
            let child = element.child_elements().find(|child| child.value().name() == name);
            child.map(|child| child.text().collect::<String>()).unwrap_or_default()
        };
        assert!(!inside("title").is_empty() && inside("desc").len() > 20, "{value:?}");
    }
    let ids: Vec<_> = page
        .select(&all)
        .filter_map(|element| element.value().attr("id").map(str::to_owned))
        .collect();
    let mut unique = ids.clone();
    unique.sort();
    unique.dedup();
    assert_eq!(unique.len(), ids.len());
    page
}

#[test]
fn a_page_of_everything_is_sound_and_says_what_the_records_say() {
    let (records, facts) = (fake::records(), facts());
    let (sensitivity, front) = (fake::sensitivity(), fake::front());
    let report =
        Report { sensitivity: Some(&sensitivity), front: &front, ..report(&records, &facts) };
    let html = html(&report);
    keep("full.html", &html);
    keep("full.md", &markdown(&report));
    keep("full.csv", &csv(&records).unwrap());
    let page = sound(&html);
    assert_eq!(texts(&page, "svg").len(), 6);
    let quality = &texts(&page, "table")[0];
    for record in records.iter().filter(|record| record.xent.is_some()) {
        let of = &record.statistics.as_ref().unwrap().all;
        let mut wanted = vec![
            record.stage.clone(),
            format!("{:.3}", record.ppl.unwrap()),
            format!("{:.5}", record.xent.unwrap()),
            format!("{:.4}", record.bits_per_byte.unwrap()),
        ];
        if let Some(versus) = &of.versus {
            let delta = versus.delta_xent;
            wanted.push(format!("{:+.5}", delta.value.unwrap()));
            wanted.push(format!("[{:+.5}, {:+.5}]", delta.low.unwrap(), delta.high.unwrap()));
            wanted.push(format!("{:+.2}", versus.delta_ppl_percent.value.unwrap()));
            wanted.push(format!("{:.2}", versus.agreement.unwrap().value.unwrap() * 100.0));
        }
        for text in wanted {
            assert!(quality.contains(&text), "{}: no {text} in {quality}", record.stage);
        }
    }
    let all = texts(&page, "body").concat();
    for text in ["needs CUDA", "interrupted after 1,412", "Wikipedia (en)", DEFINITION, "abc"] {
        assert!(all.contains(text), "{text}");
    }
    assert!(!html.contains("secret"));
    let alarms = texts(&page, ".alarm").concat();
    assert!(alarms.contains("Partial results: mx-fp4_e2m1 was interrupted"), "{alarms}");
    let command = &texts(&page, "pre code")[0];
    assert_eq!(
        shlex::split(command).unwrap(),
        facts["command"]
            .as_array()
            .unwrap()
            .iter()
            .map(|w| w.as_str().unwrap())
            .collect::<Vec<_>>()
    );
}

#[test]
fn verdicts_have_signs_words_and_colours() {
    let (records, facts) = (fake::records(), facts());
    let page = parse(&html(&report(&records, &facts)));
    let cells = |class: &str| texts(&page, &format!("td.text.{class}"));
    assert_eq!(cells("worse3"), ["▲▲▲ worse"]);
    assert_eq!(cells("worse2").len(), 5);
    assert_eq!(cells("better"), ["▼ better"]);
    assert_eq!(cells("same"), ["≈ no difference"; 2]);
    let said = texts(&page, "section > ul").concat();
    assert!(said.contains("No significant difference from baseline: bf16, bfp16."), "{said}");
    assert!(said.contains("Smallest without a significant difference: bf16, 269.30 MB, 0.50"));
    assert!(said.contains("Better than baseline, Δxent in nats a token: int8 -0.00170 ± 0.00090"));
    assert!(said.contains("10000 resamples, seed 0"));
}

#[test]
fn records_without_statistics_still_make_every_report() {
    let facts = facts();
    let mut records = fake::records();
    for record in &mut records {
        record.statistics = None;
        record.bits_per_weight = None;
    }
    let html = html(&report(&records, &facts));
    keep("plain.html", &html);
    let page = sound(&html);
    let all = texts(&page, "body").concat();
    for text in ["No plot “Loss against bits a weight”", "No plot “Loss by subset”", "No plot “KL"]
    {
        assert!(all.contains(text), "{text}");
    }
    assert!(all.contains("+0.62090") && !all.contains("▲ worse"));
    let markdown = markdown(&report(&records, &facts));
    assert!(markdown.contains("+0.62090") && !markdown.contains("| verdict"), "{markdown}");
    assert_eq!(subsets_csv(&records).unwrap(), None);
    // Nothing at all is a report as well.
    sound(&super::html(&report(&[], &Map::new())));
    let failed = [Record::new("m.onnx", "baseline", "cpu", Status::Failed)];
    let page = sound(&super::html(&report(&failed, &Map::new())));
    assert!(texts(&page, "section").concat().contains("No stage has figures"));
}

#[test]
fn what_an_interrupted_stage_saw_is_not_compared_without_statistics() {
    let mut records = fake::records();
    for record in &mut records {
        record.statistics = None;
    }
    records[9].tokens = Some(10);
    let text = terminal(&records, DEFINITION);
    let line = text.lines().find(|line| line.starts_with("mx-fp4_e2m1 ")).unwrap();
    assert!(line.contains("3.52090") && !line.contains('+'), "{line}");
}

#[test]
fn names_are_only_names() {
    let (records, facts) = (fake::hostile(), facts());
    let report = report(&records, &facts);
    let html = html(&report);
    keep("hostile.html", &html);
    sound(&html);
    let markdown = markdown(&report);
    assert!(!markdown.contains("<script") && !markdown.contains('\u{1b}'));
    let table: Vec<_> =
        markdown.lines().skip_while(|line| !line.starts_with('|')).take(5).collect();
    let cells = |line: &str| line.replace("\\|", "").matches('|').count();
    assert!(table.iter().all(|line| cells(line) == cells(table[0])), "{table:#?}");
    let terminal = terminal(&records, DEFINITION);
    assert!(!terminal.contains('\u{1b}'));
    for text in [csv(&records).unwrap(), subsets_csv(&records).unwrap().unwrap()] {
        let mut reader = ::csv::Reader::from_reader(text.as_bytes());
        let width = reader.headers().unwrap().len();
        for row in reader.records() {
            let row = row.unwrap();
            assert_eq!(row.len(), width);
            for field in &row {
                let number = field.parse::<f64>().is_ok();
                assert!(number || !field.starts_with(['=', '+', '-', '@']), "{field}");
            }
        }
    }
}

#[test]
fn csv_has_the_numbers_as_they_are() {
    let records = fake::records();
    let rows = |text: &str| -> Vec<std::collections::HashMap<String, String>> {
        ::csv::Reader::from_reader(text.as_bytes()).deserialize().map(|row| row.unwrap()).collect()
    };
    let stages = rows(&csv(&records).unwrap());
    assert_eq!(stages.len(), records.len());
    for (row, record) in stages.iter().zip(&records) {
        assert_eq!(row["stage"], record.stage);
        assert_eq!(row["xent"].parse().ok(), record.xent);
        assert_eq!(row["model_bytes"].parse().ok(), record.model_bytes);
        let versus = record.statistics.as_ref().and_then(|s| s.all.versus.as_ref());
        let delta = versus.map(|v| v.delta_xent);
        assert_eq!(row["delta_xent"].parse().ok(), delta.and_then(|d| d.value));
        assert_eq!(row["delta_xent_high"].parse().ok(), delta.and_then(|d| d.high));
        assert_eq!(row["verdict"] == "worse", versus.is_some_and(|v| v.verdict == Verdict::Worse));
    }
    let subsets = rows(&subsets_csv(&records).unwrap().unwrap());
    let measured = records.iter().filter(|record| record.statistics.is_some()).count();
    assert_eq!(subsets.len(), measured * fake::SUBSETS.len());
    assert_eq!(
        (subsets[4]["subset"].as_str(), subsets[4]["too_few"].as_str()),
        ("Enron Emails", "true")
    );
}

#[test]
fn the_terminals_table_is_narrow_and_markdown_has_the_rest() {
    let (records, facts) = (fake::records(), facts());
    let text = terminal(&records, DEFINITION);
    keep("terminal.txt", &text);
    let table: Vec<_> = text.lines().take(records.len() + 2).collect();
    assert!(table.iter().all(|line| line.chars().count() <= 115), "{text}");
    assert!(
        table[1].starts_with("stage ") && table[1].contains("Δxent") && table[1].contains("KL")
    );
    assert!(text.contains("+0.62090 ±0.01420") && text.contains("needs CUDA"), "{text}");
    assert!(text.trim_end().ends_with(DEFINITION));
    let markdown = markdown(&report(&records, &facts));
    for text in
        ["▲▲▲ worse", "[+0.60670, +0.63510]", "- data.sha256: abc", "### Subsets", "entropy"]
    {
        assert!(markdown.contains(text), "{text}: {markdown}");
    }
    assert!(markdown.contains("```sh\nmxeval --sweep 'my model.onnx'"), "{markdown}");
    assert!(!markdown.contains("secret"));
}

#[test]
fn differences_are_to_the_baseline_wherever_it_stands() {
    let mut baseline = Record::new("a.onnx", "baseline", "cpu", Status::Ok);
    (baseline.xent, baseline.ppl) = (Some(2.0), Some(2f64.exp()));
    let mut fp4 = Record::new("a.onnx", "mx-fp4_e2m1", "cpu", Status::Ok);
    (fp4.xent, fp4.ppl) = (Some(2.5), Some(2.5f64.exp()));
    let text = terminal(&[fp4, baseline], DEFINITION);
    let words =
        |line: usize| text.lines().nth(line).unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(words(1), ["stage", "ppl", "Δppl", "%", "xent", "Δxent", "status"]);
    // e^0.5 - 1 = 64.87 %.
    assert_eq!(words(2), ["mx-fp4_e2m1", "12.182", "+64.87", "2.50000", "+0.50000", "ok"]);
    assert_eq!(words(3), ["baseline", "7.389", "-", "2.00000", "-", "ok"]);
}

#[test]
fn single_graphs_share_a_table() {
    let mut first = Record::new("x/a.onnx", "a", "cpu", Status::Ok);
    first.xent = Some(1.0);
    let mut second = Record::new("x/b.onnx", "b", "cpu", Status::Ok);
    second.xent = Some(1.25);
    let text = terminal(&[first, second], DEFINITION);
    assert_eq!(text.lines().next(), Some("graphs"));
    assert!(text.contains("+0.25000"), "{text}");
}

#[test]
fn a_baseline_that_was_no_stage_is_named_and_no_stage_takes_its_place() {
    let mut records = fake::records();
    records.retain(|record| record.stage != "baseline");
    let facts = facts();
    let text = markdown(&report(&records, &facts));
    assert!(text.contains("than baseline, Δxent"), "{text}");
    // The first stage keeps its own comparison.
    let first = records.iter().find(|record| record.xent.is_some()).unwrap();
    let row = text.lines().find(|line| line.starts_with(&format!("| {} |", first.stage))).unwrap();
    assert!(row.contains("difference") || row.contains("worse") || row.contains("better"), "{row}");
    assert!(html(&report(&records, &facts)).contains("<svg"));
}
