use super::*;

pub(super) fn all(path: &Path) -> Result<Vec<Document>> {
    open(path)?.collect()
}

fn message(path: &Path) -> String {
    all(path).expect_err("an error").to_string()
}

#[test]
fn a_text_file_is_one_document() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    std::fs::write(&path, "one\n\ntwo\n").unwrap();
    let docs = all(&path).unwrap();
    assert_eq!(docs, [Document { text: "one\n\ntwo\n".into(), subset: None }]);
    std::fs::write(&path, b"ab\xff").unwrap();
    assert!(message(&path).contains("not UTF-8 at byte 2"));
}

#[test]
fn directories_unknown_and_missing_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(message(dir.path()).contains("is a directory"));
    let path = dir.path().join("a.csv");
    std::fs::write(&path, "text\n").unwrap();
    assert!(message(&path).contains("unknown kind"));
    assert!(message(&dir.path().join("none.jsonl")).contains("none.jsonl"));
}

#[test]
fn meta_is_an_object_or_a_string_of_one() {
    let object = serde_json::json!({"pile_set_name": "Github"});
    assert_eq!(subset_of(&object).as_deref(), Some("Github"));
    assert_eq!(subset_of(&object.to_string().into()).as_deref(), Some("Github"));
    assert_eq!(subset_of(&serde_json::json!({"source": "x"})), None);
    assert_eq!(subset_of_json("\"{}\""), None);
    assert_eq!(subset_of_json("not json"), None);
}
