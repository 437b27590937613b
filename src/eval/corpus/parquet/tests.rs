use super::super::tests::all;
use super::*;
use arrow_array::{ArrayRef, Int64Array};
use arrow_schema::{DataType, Field};
use std::sync::Arc;

fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let file = File::create(path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn subsets(path: &Path) -> Vec<Option<String>> {
    all(path).unwrap().into_iter().map(|d| d.subset).collect()
}

#[test]
fn every_text_layout_and_both_kinds_of_meta() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let rows = ["first", "", "dritte Zeile: é"];
    let texts: [ArrayRef; 3] = [
        Arc::new(StringArray::from(rows.to_vec())),
        Arc::new(LargeStringArray::from(rows.to_vec())),
        Arc::new(StringViewArray::from(rows.to_vec())),
    ];
    let names = StringArray::from(vec![Some("Github"), None, Some("PhilPapers")]);
    let structs: ArrayRef = Arc::new(StructArray::from(vec![(
        Arc::new(Field::new("pile_set_name", DataType::Utf8, true)),
        Arc::new(names) as ArrayRef,
    )]));
    let json: ArrayRef = Arc::new(StringViewArray::from(vec![
        Some("{\"pile_set_name\": \"Github\"}"),
        None,
        Some("{\"pile_set_name\": \"PhilPapers\", \"x\": 1}"),
    ]));
    let expected = vec![Some("Github".to_owned()), None, Some("PhilPapers".to_owned())];
    for text in texts {
        let ids: ArrayRef = Arc::new(Int64Array::from(vec![1, 2, 3]));
        write(&path, vec![("id", ids), ("text", text.clone())]);
        let docs = all(&path).unwrap();
        assert_eq!(docs.iter().map(|d| d.text.as_str()).collect::<Vec<_>>(), rows);
        assert!(docs.iter().all(|d| d.subset.is_none()));
        write(&path, vec![("meta", structs.clone()), ("text", text.clone())]);
        assert_eq!(subsets(&path), expected);
        write(&path, vec![("text", text), ("meta", json.clone())]);
        assert_eq!(subsets(&path), expected);
    }
}

#[test]
fn faults_name_the_columns_and_the_row() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let ids: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
    let null: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None]));
    write(&path, vec![("content", null.clone()), ("id", ids.clone())]);
    let message = |path: &Path| all(path).unwrap_err().to_string();
    assert!(message(&path).contains("no `text` column; found content, id"));
    write(&path, vec![("text", ids)]);
    assert!(message(&path).contains("column `text` is Int64"));
    write(&path, vec![("text", null)]);
    assert!(message(&path).contains("row 1: `text` is null"));
    std::fs::write(&path, "PAR1 not really").unwrap();
    assert!(message(&path).contains("not a readable parquet file"));
}

#[test]
fn rows_before_a_fault_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    write(&path, vec![("text", Arc::new(StringArray::from(vec![Some("a"), None])))]);
    let mut documents = super::super::open(&path).unwrap();
    assert_eq!(documents.next().unwrap().unwrap().text, "a");
    assert!(documents.next().unwrap().is_err() && documents.next().is_none());
}

#[test]
fn damage_anywhere_is_an_error_or_harmless_but_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let texts: Vec<_> = (0..300).map(|number| format!("text {number}")).collect();
    let whole = super::super::http::testing_parquet(&texts, 100);
    let mut failures = 0;
    for length in (0..whole.len()).step_by(whole.len() / 40) {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(all(&path).is_err(), "cut to {length}");
    }
    // Every byte of the footer, and of the first page's header.
    let footer = whole.len()
        - 8
        - u32::from_le_bytes(whole[whole.len() - 8..whole.len() - 4].try_into().unwrap()) as usize;
    for at in (footer..whole.len()).chain(4..40) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x5a;
        std::fs::write(&path, &bytes).unwrap();
        match all(&path) {
            Ok(documents) => assert!(documents.len() <= 300),
            Err(error) => {
                assert!(error.to_string().contains("a.parquet"), "{error}");
                failures += 1;
            }
        }
    }
    assert!(failures > 100, "{failures}");
}
