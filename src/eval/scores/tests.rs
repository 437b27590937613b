//! Score files: what is written is what is read, whatever cut the file off.

use super::*;
use crate::eval::windows::{Source, Window};

fn corpus() -> Corpus {
    let window = |document| Window::whole(vec![1, 2, 3], 5, document);
    Corpus {
        windows: [0, 0, 1, 2].map(window).to_vec(),
        documents: [Some(0), None, Some(1)].map(|subset| Source { subset }).to_vec(),
        subsets: vec!["Github".into(), "ArXiv".into()],
        read: 4,
        ..Corpus::default()
    }
}

fn header(key: &str) -> Header {
    Header::new(&corpus(), 2, ["m.onnx", "mx-fp4_e2m1", key, "per-document"], Some("baseline"))
}

fn scored(seed: u32) -> WindowScore {
    let x = f64::from(seed) / 7.0;
    let against = Against {
        nll: x * 1.1,
        correct: 1,
        kl: if seed == 3 { f64::INFINITY } else { x / 3.0 },
        agree: 2,
        delta_p: -x / 11.0,
        delta_p_squared: x * x,
    };
    let score = DocumentScore {
        nll: 0.1 + x,
        entropy: if seed == 2 { f64::NAN } else { x },
        correct: 1,
        tokens: 2,
        bytes: 5,
        against: Some(against),
    };
    WindowScore { score, kl: vec![x as f32, f32::INFINITY] }
}

fn same(a: &Scores, b: &Scores) -> bool {
    format!("{:?}", (&a.done, &a.windows, a.seconds))
        == format!("{:?}", (&b.done, &b.windows, b.seconds))
}

#[test]
fn what_was_written_is_read_to_the_last_bit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.jsonl");
    let (mut writer, mut scores) = Writer::open(&path, &header("k"), true).unwrap();
    writer.batch(1, &[(3, 2), (0, 0)], &[scored(1), scored(2)], 0.1, &mut scores).unwrap();
    writer.batch(0, &[(1, 0), (2, 1)], &[scored(3), scored(4)], 0.2, &mut scores).unwrap();
    drop(writer);
    end(&path, serde_json::json!({"load_seconds": 1.5})).unwrap();
    let (found, read) = read(&path).unwrap();
    assert_eq!(found, header("k"));
    assert!(same(&read, &scores) && read.done.len() == 2, "{read:?}\n{scores:?}");
    assert_eq!(read.end.as_ref().unwrap()["load_seconds"], 1.5);
    let (documents, kl) = read.documents(3);
    // Windows 0 and 1 are added in their order, not in that of the batches.
    assert_eq!(documents[0].against.unwrap().delta_p, -2.0 / 7.0 / 11.0 + -3.0 / 7.0 / 11.0);
    assert!(documents[0].entropy.is_nan() && documents[0].against.unwrap().kl.is_infinite());
    assert_eq!((documents[2].nll, documents[2].tokens), (0.1 + 1.0 / 7.0, 2));
    assert_eq!((kl[0].len(), kl[1].len()), (4, 2));
}

#[test]
fn a_file_cut_off_anywhere_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.jsonl");
    let (mut writer, mut whole) = Writer::open(&path, &header("k"), false).unwrap();
    writer.batch(1, &[(3, 2), (0, 0)], &[scored(1), scored(2)], 0.1, &mut whole).unwrap();
    let one = std::fs::metadata(&path).unwrap().len() as usize;
    writer.batch(0, &[(1, 0), (2, 1)], &[scored(3), scored(4)], 0.2, &mut whole).unwrap();
    drop(writer);
    let bytes = std::fs::read(&path).unwrap();
    for length in (1..bytes.len()).step_by(7).chain([one, bytes.len() - 1]) {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let (mut writer, mut scores) = Writer::open(&path, &header("k"), true).unwrap();
        assert_eq!(scores.done.contains(&1), length >= one, "{length}");
        assert!(!scores.done.contains(&0));
        if !scores.done.contains(&1) {
            writer.batch(1, &[(3, 2), (0, 0)], &[scored(1), scored(2)], 0.1, &mut scores).unwrap();
        }
        writer.batch(0, &[(1, 0), (2, 1)], &[scored(3), scored(4)], 0.2, &mut scores).unwrap();
        drop(writer);
        assert!(same(&read(&path).unwrap().1, &whole), "{length}");
    }
    // Another key, or no wish to go on: everything anew.
    for (key, resume) in [("other", true), ("k", false)] {
        std::fs::write(&path, &bytes).unwrap();
        let (_, scores) = Writer::open(&path, &header(key), resume).unwrap();
        assert!(scores.done.is_empty());
        assert_eq!(read(&path).unwrap().0.key, key);
    }
}

#[test]
fn nonsense_is_an_error_that_names_the_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.jsonl");
    let head = line(&header("k")).unwrap();
    let row = r#"{"window":9,"document":0,"tokens":2,"bytes":1,"correct":0,"nll":1,"entropy":1}"#;
    for (text, says) in [
        (String::new(), "line 1: the file is empty"),
        ("{}\n".into(), "line 1: not the header"),
        (head.replace("\"mxeval_scores\":1", "\"mxeval_scores\":2"), "version 2"),
        (format!("{head}nonsense\n"), "line 2: not a line"),
        (format!("{head}{{\"batch\":2,\"seconds\":1,\"windows\":[]}}\n"), "line 2: batch 2"),
        (format!("{head}{{\"batch\":0,\"seconds\":1,\"windows\":[{row}]}}\n"), "window 9"),
    ] {
        std::fs::write(&path, text).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn names_of_files_are_plain_and_apart() {
    let names = ["a/b", "a_b", "ü"].map(|stage| file_name("m", stage));
    assert!(names[0].starts_with("scores/a_b-") && names[0] != names[1], "{names:?}");
    assert!(names[2].is_ascii());
}
