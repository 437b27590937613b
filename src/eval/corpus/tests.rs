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
    let directory = message(dir.path());
    assert!(directory.contains("is a directory") && directory.contains("/*.parquet'"));
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

fn texts(names: &[std::path::PathBuf], max_samples: usize) -> Result<Vec<String>> {
    let text = Text::new(resolve(names)?, None);
    text.documents(max_samples, &Silent)?.map(|document| Ok(document?.text)).collect()
}

#[test]
fn files_follow_each_other_and_globs_are_sorted() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["b.txt", "a.txt", "c[1].txt"] {
        std::fs::write(at(name), name).unwrap();
    }
    std::fs::create_dir(at("d.txt")).unwrap();
    std::fs::write(at("x.jsonl"), "{\"text\": \"one\"}\n{\"text\": \"two\"}\n").unwrap();
    let names = [at("x.jsonl"), at("*.txt"), at("a.txt"), at("c[1].txt")];
    let all = ["one", "two", "a.txt", "b.txt", "c[1].txt", "a.txt", "c[1].txt"];
    assert_eq!(texts(&names, 99).unwrap(), all);
    assert_eq!(texts(&names, 4).unwrap(), all[..4]);
    assert!(texts(&[], 4).unwrap().is_empty());

    let message = |names: &[std::path::PathBuf]| texts(names, 99).unwrap_err().to_string();
    let nothing = message(&[at("a.txt"), at("*.parquet")]);
    assert!(nothing.contains("/*.parquet: the glob matches no file"), "{nothing}");
    assert!(message(&[at("a***b")]).contains("not a glob"));
    // A fault in the middle names its file, and what comes before it can be read.
    std::fs::write(at("y.jsonl"), "{\"text\": 1}").unwrap();
    let names = [at("x.jsonl"), at("y.jsonl"), at("a.txt")];
    assert!(message(&names).contains("y.jsonl: line 1: `text` is not a string"));
    assert_eq!(texts(&names, 2).unwrap(), ["one", "two"]);
    // Missing ones are found at once, even if they would never be read.
    assert!(texts(&[at("x.jsonl"), at("z.jsonl")], 1).unwrap_err().to_string().contains("z.jsonl"));
}

#[test]
fn digests_are_of_documents_and_where_they_end() {
    let digest = |documents: &[(&str, Option<&str>)]| {
        let mut digest = TextDigest::default();
        for (text, subset) in documents {
            let subset = subset.map(str::to_owned);
            digest.update(&Document { text: (*text).into(), subset });
        }
        digest.finish()
    };
    let all = [
        digest(&[]),
        digest(&[("ab", None)]),
        digest(&[("a", None), ("b", None)]),
        digest(&[("b", None), ("a", None)]),
        digest(&[("a", Some("")), ("b", None)]),
        digest(&[("a", Some("b"))]),
    ];
    let different: std::collections::HashSet<_> = all.iter().collect();
    assert_eq!(different.len(), all.len());
    // printf '\x02\0\0\0\0\0\0\0ab\xff\xff\xff\xff\xff\xff\xff\xff' | sha256sum
    assert_eq!(all[1], "1f7567ec56cf0d0bac9be9bb69f7c990dfb4d69f2a692f9cba46d8b6ba5ab162");
}

/// Interrupts after a number of documents.
struct Stop(std::sync::atomic::AtomicUsize);

impl crate::eval::Observer for Stop {
    fn interrupted(&self) -> bool {
        use std::sync::atomic::Ordering::SeqCst;
        self.0.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_err()
    }
}

#[test]
fn reading_stops_where_the_user_stops_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    std::fs::write(&path, "{\"text\": \"x\"}\n".repeat(50)).unwrap();
    for seed in [None, Some(1)] {
        let text = Text::new(resolve(std::slice::from_ref(&path)).unwrap(), seed);
        let stop = Stop(10.into());
        let all = text.documents(99, &stop).and_then(Iterator::collect::<Result<Vec<_>>>);
        assert!(matches!(all, Err(crate::eval::Error::Interrupted)), "{seed:?}");
    }
}
