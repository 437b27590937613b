use super::*;
use crate::eval::report::fake;
use serde_json::json;

/// A run's folder, with what `edit` makes of its facts and records.
fn folder(name: &str, edit: impl FnOnce(&mut Value, &mut Vec<Record>)) -> Folder {
    let mut run = json!({
        "mxeval": "0.1.0", "device": "cpu", "threads": 2, "definition": "per-document",
        "data": {"path": "d", "sha256": "d".repeat(64)},
        "options": {"max_samples": 2000, "seq_len": 512},
        "models": [{"model": "smollm2/model.onnx", "sha256": "m".repeat(64),
                    "tokenizer": {"sha256": "t".repeat(64)}}],
    });
    let mut records = fake::records();
    edit(&mut run, &mut records);
    Folder { path: name.into(), records, run: run.as_object().cloned().unwrap() }
}

fn compared(edit: impl FnOnce(&mut Value, &mut Vec<Record>)) -> Compared {
    compare(&[folder("a", |_, _| ()), folder("b", edit)]).unwrap()
}

fn delta_of(compared: &Compared, stage: &str) -> Option<Delta> {
    let row = compared.rows.iter().find(|row| row.stage == stage).unwrap();
    row.sides[1].as_ref().unwrap().delta
}

fn said(compared: &Compared, kind: Kind, words: &str) -> bool {
    compared.remarks.iter().any(|remark| remark.kind == kind && remark.text.contains(words))
}

#[test]
fn the_same_run_twice_differs_in_nothing() {
    let same = compared(|_, _| ());
    assert!(same.remarks.is_empty(), "{:?}", same.remarks);
    let delta = delta_of(&same, "mx-fp8_e4m3").unwrap();
    assert_eq!((delta.xent, delta.bits_per_byte), (Some(Estimate::exact(0.0)), Some(0.0)));
    // Failed and skipped stages are in the table, without differences.
    assert_eq!(delta_of(&same, "mx-fp8_e5m2"), None);
    assert!(same.text().contains("nvfp8") && same.text().contains("skipped"));
}

#[test]
fn what_was_not_measured_alike_is_not_subtracted() {
    let text = compared(|run, _| run["data"]["sha256"] = json!("e".repeat(64)));
    assert!(said(&text, Kind::NotComparable, "the text differs (sha256 dddddddddddd and"));
    assert_eq!(delta_of(&text, "int8"), None);
    assert!(text.text().contains("NOT COMPARABLE: a and b"), "{}", text.text());
    let rolling = json!("rolling, seq-len 512, bos first");
    for (name, value) in
        [("max_samples", json!(100)), ("seq_len", json!(256)), ("definition", rolling)]
    {
        let options = compared(|run, records| {
            run["options"][name] = value.clone();
            records.iter_mut().for_each(|record| record.docs = record.docs.map(|_| 100));
        });
        assert!(said(&options, Kind::NotComparable, name), "{name}: {:?}", options.remarks);
        assert_eq!(delta_of(&options, "int8"), None);
    }
    // The documents measured say more than how many were asked for, or the file's digest.
    let documents = |one: &str| json!({"sha256": one, "documents_sha256": "f".repeat(64)});
    let folders = ["a", "b"].map(|name| {
        folder(name, |run, _| {
            run["data"] = documents(name);
            run["options"]["max_samples"] = json!(name.len() + 1000);
        })
    });
    let same = compare(&folders).unwrap();
    assert!(!same.remarks.iter().any(|r| r.kind == Kind::NotComparable), "{:?}", same.remarks);
    let definition = compared(|run, _| run["definition"] = json!("rolling"));
    assert!(said(&definition, Kind::NotComparable, "definitions"));
    let short = compared(|_, records| records[9].tokens = Some(10));
    assert!(said(&short, Kind::NotComparable, "mx-fp4_e2m1 was interrupted"));
    assert!(delta_of(&short, "mx-fp4_e2m1").is_none() && delta_of(&short, "int8").is_some());
    // More was asked for than there is.
    let more = compared(|run, _| run["options"]["max_samples"] = json!(5000));
    assert!(more.remarks.is_empty(), "{:?}", more.remarks);
}

#[test]
fn other_tokens_leave_bits_per_byte() {
    let tokens = compared(|run, records| {
        run["models"][0]["tokenizer"]["sha256"] = json!("u".repeat(64));
        records[10].tokens = Some(7);
        records[10].bytes = Some(3_000_000);
    });
    assert!(said(&tokens, Kind::OnlyBitsPerByte, "the tokenizers differ"));
    assert!(said(&tokens, Kind::OnlyBitsPerByte, "cover 4000000 and 3000000 bytes"));
    let delta = delta_of(&tokens, "mx-fp8_e4m3").unwrap();
    assert_eq!((delta.xent, delta.ppl_percent, delta.bits_per_byte), (None, None, Some(0.0)));
    assert!(tokens.text().contains("ONLY BITS/BYTE IS COMPARABLE"));
    let model = compared(|run, records| {
        run["models"][0] =
            json!({"model": "other.onnx", "sha256": "n", "tokenizer": {"sha256": "t".repeat(64)}});
        records.iter_mut().for_each(|record| record.model = "other.onnx".into());
    });
    assert!(said(
        &model,
        Kind::Note,
        "the models differ (smollm2/model.onnx mmmmmmmmmmmm and other.onnx n)"
    ));
    assert!(delta_of(&model, "int8").unwrap().xent.is_some());
    let place = compared(|run, _| run["device"] = json!("cuda:0"));
    assert!(said(&place, Kind::Note, "device differ: so may speed"));
}

#[test]
fn documents_give_paired_intervals() {
    let kept = |add: f64| {
        move |run: &mut Value, _: &mut Vec<Record>| {
            let nll: Vec<f64> = (0..40)
                .map(|d| 100.0 + f64::from(d) + add * (1.0 + 0.1 * f64::from(d % 5)))
                .collect();
            let documents = json!({"nll": nll, "tokens": vec![50; 40]});
            run["stages"] = json!({"smollm2/model.onnx int8": {"documents": documents}});
        }
    };
    let both = compare(&[folder("a", kept(0.0)), folder("b", kept(0.5))]).unwrap();
    let delta = delta_of(&both, "int8").unwrap();
    assert_eq!(delta.verdict, Some(Verdict::Worse));
    assert!((delta.xent.unwrap().value.unwrap() - 0.012).abs() < 1e-9, "{delta:?}");
    assert!(both.text().contains("▲ worse") && both.text().contains("+0.01200 ±0.000"));
    assert_eq!(delta_of(&both, "bf16").unwrap().verdict, None);
    let broken = folder("b", |run, _| {
        run["stages"] =
            json!({"smollm2/model.onnx int8": {"documents": {"nll": [1.0], "tokens": []}}});
    });
    let error = compare(&[folder("a", |_, _| ()), broken]).unwrap_err().to_string();
    assert!(error.contains("run.json") && error.contains("differ in length"), "{error}");
}

#[test]
fn folders_are_read_and_shown() {
    let dir = tempfile::tempdir().unwrap();
    let error = Folder::read(dir.path()).unwrap_err().to_string();
    assert!(error.contains("results.jsonl") && error.contains("mxeval --out"), "{error}");
    let lines: String = fake::hostile()
        .iter()
        .map(|record| serde_json::to_string(record).unwrap() + "\n")
        .collect();
    std::fs::write(dir.path().join("results.jsonl"), lines + "{\"model\":").unwrap();
    let folder = Folder::read(dir.path()).unwrap();
    let stages = |records: &[Record]| records.iter().map(|r| r.stage.clone()).collect::<Vec<_>>();
    assert_eq!(stages(&folder.records), stages(&fake::hostile()));
    let compared = compare(&[folder.clone(), folder]).unwrap();
    assert!(said(&compared, Kind::Note, "does not say what the text was"));
    let html = compared.html();
    let page = ::scraper::Html::parse_document(&html);
    assert!(page.errors.is_empty(), "{:?}", page.errors);
    assert!(
        !html.contains("<script") && !html.contains("://") && !compared.text().contains('\u{1b}')
    );
    assert!(serde_json::to_string(&compared).unwrap().contains("\"remarks\""));
    std::fs::write(dir.path().join("results.jsonl"), "{\"a\": 1}\n").unwrap();
    let error = Folder::read(dir.path()).unwrap_err().to_string();
    assert!(error.contains("line 1: not a record"), "{error}");
    assert!(compare(&[]).is_err());
}

#[test]
fn models_are_told_apart_where_a_folder_has_several() {
    let several = |name: &str| {
        folder(name, |_, records| {
            let mut second = records[0].clone();
            second.model = "other.onnx".into();
            records.push(second);
        })
    };
    let compared = compare(&[several("a"), several("b"), folder("c", |_, _| ())]).unwrap();
    let row = compared.rows.iter().find(|row| row.stage == "other.onnx baseline").unwrap();
    assert!(row.sides[1].as_ref().unwrap().delta.is_some() && row.sides[2].is_none());
}
