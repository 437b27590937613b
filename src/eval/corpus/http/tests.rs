use super::testing::Server;
use super::*;
use crate::eval::corpus::{Document, Source};
use crate::eval::observer::{Observer, Silent};
use arrow_array::{ArrayRef, RecordBatch, StringArray};
use parquet::file::properties::WriterProperties;
use std::io::Write as _;
use std::sync::Mutex;

/// Impatient, for tests.
pub(in crate::eval::corpus) fn quick() -> Client {
    let pause = Duration::from_millis(1);
    Client::new(Retry { tries: 3, pause, longest: pause, silence: Duration::from_secs(5) })
}

fn source(server: &Server, path: &str) -> Source {
    Source::remote(quick().remote(&server.at(path), None)).unwrap()
}

fn read(source: &Source, count: usize) -> Result<Vec<Document>> {
    source.open(&Silent)?.take(count).collect()
}

/// Texts that do not compress.
fn texts(count: usize) -> Vec<String> {
    use rand_pcg::rand_core::{Rng as _, SeedableRng as _};
    let mut random = rand_pcg::Pcg64::seed_from_u64(1);
    let mut text =
        |at| (0..30).fold(format!("{at}:"), |t, _| t + &format!("{:x}", random.next_u64()));
    (0..count).map(&mut text).collect()
}

/// A parquet file with these texts beside a large column that nobody asks for.
pub(in crate::eval::corpus) fn parquet(texts: &[String], group: usize) -> Vec<u8> {
    let ballast: Vec<_> = texts.iter().map(|text| text.repeat(3)).collect();
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("ballast", Arc::new(StringArray::from(ballast))),
        ("text", Arc::new(StringArray::from(texts.to_vec()))),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(group))
        .set_data_page_size_limit(32 << 10)
        .set_write_batch_size(64)
        .set_dictionary_enabled(false)
        .build();
    let mut bytes = Vec::new();
    let mut writer =
        parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    bytes
}

fn jsonl(texts: &[String]) -> Vec<u8> {
    let line = |text: &String| format!("{}\n", serde_json::json!({"text": text}));
    texts.iter().map(line).collect::<String>().into_bytes()
}

#[test]
fn a_hundred_documents_transfer_a_small_share_of_the_file() {
    let texts = texts(20_000);
    let lines = jsonl(&texts);
    let compressed = zstd::encode_all(&lines[..], 1).unwrap();
    let files = [
        ("one.parquet", parquet(&texts, usize::MAX >> 1)),
        ("many.parquet", parquet(&texts, 1_000)),
        ("a.jsonl", lines),
        ("a.jsonl.zst", compressed),
    ];
    for (path, bytes) in files {
        let length = bytes.len() as u64;
        let server = Server::new([(path, bytes)]);
        let documents = read(&source(&server, path), 100).unwrap();
        assert!(documents.iter().map(|d| &d.text).eq(&texts[..100]), "{path}");
        let (sent, requests) = server.seen(|state| (state.sent, state.requests.len()));
        assert!(sent < 600 << 10 && sent * 8 < length, "{path}: {sent} of {length}");
        assert!(requests <= 6, "{path}: {requests} requests");
        // All of it: every document, without a request a page.
        let documents = read(&source(&server, path), usize::MAX).unwrap();
        assert!(documents.iter().map(|d| &d.text).eq(&texts), "{path}");
        let (sent, requests) =
            server.seen(|state| (state.sent - sent, state.requests.len() - requests));
        // The column that nobody asks for is three quarters of a parquet file.
        let most = if path.ends_with("parquet") { length * 3 / 10 } else { length * 11 / 10 };
        assert!(sent < most && requests < 100, "{path}: {sent} of {length}, {requests}");
    }
}

#[test]
fn rows_are_picked_without_those_before_them() {
    let texts = texts(20_000);
    let bytes = parquet(&texts, 5_000);
    let length = bytes.len() as u64;
    let server = Server::new([("a.parquet", bytes)]);
    let rows = vec![3, 7_000, 7_001, 19_999];
    let picked = source(&server, "a.parquet").pick(rows, &Silent).unwrap();
    let picked: Vec<_> = picked.map(|d| d.unwrap().text).collect();
    assert_eq!(picked, [3, 7_000, 7_001, 19_999].map(|row: usize| texts[row].clone()));
    let sent = server.state().sent;
    assert!(sent * 20 < length, "{sent} of {length}");
}

#[test]
fn breaks_and_passing_errors_are_tried_again_where_they_happened() {
    let texts = texts(3_000);
    for (path, bytes) in [("a.jsonl", jsonl(&texts)), ("a.parquet", parquet(&texts, 700))] {
        for no_ranges in [false, true] {
            let server = Server::new([(path, bytes.clone())]);
            server.state().no_ranges = no_ranges;
            server.state().statuses.extend([503, 429]);
            // Breaks of the first answer are at the same place, which counts as no progress.
            server.state().cuts = 2;
            let documents = read(&source(&server, path), usize::MAX).unwrap();
            assert!(documents.iter().map(|d| &d.text).eq(&texts), "{path}, {no_ranges}");
            let left = server.seen(|state| state.cuts + state.statuses.len());
            assert_eq!(left, 0);
            if !no_ranges {
                // What has come is not asked for again.
                let sent = server.state().sent;
                assert!(sent < bytes.len() as u64 * 12 / 10, "{path}: {sent} of {}", bytes.len());
            }
        }
    }
    let server = Server::new([("a.jsonl", jsonl(&texts))]);
    server.state().statuses.extend([500; 10]);
    let message = read(&source(&server, "a.jsonl"), 1).unwrap_err().to_string();
    assert!(message.contains("/a.jsonl: HTTP 500") && message.contains("3 tries"), "{message}");
    assert_eq!(server.state().requests.len(), 3);
}

#[test]
fn a_server_that_always_breaks_at_one_place_is_given_up() {
    let texts = texts(3_000);
    let server = Server::new([("a.parquet", parquet(&texts, 700))]);
    server.state().cuts = 1_000;
    let message = read(&source(&server, "a.parquet"), 1).unwrap_err().to_string();
    assert!(message.contains("the connection broke"), "{message}");
    assert!(server.state().requests.len() < 20, "{}", server.state().requests.len());
}

#[test]
fn a_silent_server_is_left_and_asked_again() {
    let texts = texts(10);
    let server = Server::new([("a.jsonl", jsonl(&texts))]);
    server.state().delays.push_back(Duration::from_secs(3));
    let pause = Duration::from_millis(1);
    let silence = Duration::from_millis(200);
    let client = Client::new(Retry { tries: 3, pause, longest: pause, silence });
    let source = Source::remote(client.remote(&server.at("a.jsonl"), None)).unwrap();
    assert_eq!(read(&source, 99).unwrap().len(), 10);
}

#[test]
fn refusals_say_what_is_wrong_and_are_not_repeated() {
    let server = Server::new([("a.jsonl", jsonl(&texts(5)))]);
    let message = |path: &str| read(&source(&server, path), 1).unwrap_err().to_string();
    assert!(
        message("none.parquet").contains("/none.parquet: HTTP 404 Not Found: there is no such")
    );
    server.state().statuses.push_back(401);
    assert!(message("a.jsonl").contains("set HF_TOKEN"));
    assert_eq!(server.state().requests.len(), 2);
    server.state().headers.push("Content-Type: text/html".into());
    assert!(message("a.jsonl").contains("a web page"));
    server.state().headers = vec!["Content-Encoding: gzip".into()];
    assert!(message("a.jsonl").contains("compresses"));
    let nobody = quick().remote("http://127.0.0.1:1/a.parquet", None);
    let message = read(&Source::remote(nobody).unwrap(), 1).unwrap_err().to_string();
    assert!(message.contains("127.0.0.1:1/a.parquet: no answer"), "{message}");
    let kind = Source::remote(quick().remote("https://x/a.csv", None)).unwrap_err();
    assert!(kind.to_string().contains("unknown kind"));
}

#[test]
fn a_file_that_changes_while_it_is_read_is_an_error() {
    let texts = texts(3_000);
    for (path, bytes) in [("a.jsonl", jsonl(&texts)), ("a.parquet", parquet(&texts, 100))] {
        let server = Server::new([(path, bytes)]);
        let mut documents = source(&server, path).open(&Silent).unwrap();
        assert_eq!(documents.next().unwrap().unwrap().text, texts[0]);
        server.state().etag = "\"two\"".into();
        let error = documents.find_map(|document| document.err()).expect("an error");
        assert!(error.to_string().contains("changed on the server"), "{error}");
    }
}

/// Keeps notes.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Observer for Notes {
    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

#[test]
fn without_ranges_parquet_is_fetched_as_a_whole_and_said_to_be() {
    let texts = texts(500);
    let server = Server::new([("a.parquet", parquet(&texts, 100))]);
    server.state().no_ranges = true;
    let notes = Notes::default();
    let documents = source(&server, "a.parquet").open(&notes).unwrap();
    assert_eq!(documents.count(), 500);
    assert!(notes.0.lock().unwrap()[0].contains("serves no ranges"));
    assert_eq!(server.state().requests.len(), 1);
}

#[test]
fn truncated_and_empty_files() {
    let texts = texts(500);
    let whole = parquet(&texts, 100);
    let half = whole[..whole.len() / 2].to_vec();
    let server = Server::new([("a.parquet", half), ("b.parquet", vec![]), ("b.jsonl", vec![])]);
    for path in ["a.parquet", "b.parquet"] {
        let message = read(&source(&server, path), 1).unwrap_err().to_string();
        assert!(message.contains("not a readable parquet file"), "{message}");
    }
    assert_eq!(read(&source(&server, "b.jsonl"), 1).unwrap(), []);
}

#[test]
fn tokens_follow_redirects_within_a_host_only_and_are_never_shown() {
    let lines = jsonl(&texts(3));
    let (hub, storage) = (Server::new([]), Server::new([("blob", lines)]));
    hub.state().redirects.insert("/a.jsonl?x=secret".into(), hub.at("b.jsonl"));
    hub.state().redirects.insert("/b.jsonl".into(), storage.at("blob?signature=s"));
    // 127.0.0.1 and localhost are one machine, and two hosts.
    let away = storage.at("blob").replace("127.0.0.1", "localhost");
    hub.state().redirects.insert("/b.jsonl".into(), away);
    let address = hub.at("a.jsonl?x=secret").replace("http://", "http://user:word@");
    let remote = quick().remote(&hub.at("a.jsonl?x=secret"), Some("hf_token".into()));
    let source = Source::remote(remote.clone()).unwrap();
    assert_eq!(read(&source, 9).unwrap().len(), 3);
    let tokens = |server: &Server| -> Vec<_> {
        server.state().requests.iter().map(|request| request.token.clone()).collect()
    };
    assert!(tokens(&hub).iter().all(|token| token.as_deref() == Some("Bearer hf_token")));
    assert!(!tokens(&storage).is_empty() && tokens(&storage).iter().all(Option::is_none));
    assert!(storage.state().requests.iter().all(|request| request.range.is_some()));
    let debug = format!("{remote:?} {:?}", source.name());
    assert!(!debug.contains("hf_token"), "{debug}");
    assert_eq!(shown(&address), hub.at("a.jsonl"));
}

#[test]
fn zstd_streams_stop_where_the_reader_stops() {
    // Incompressible frames, as The Pile's concatenated shards.
    let mut bytes = Vec::new();
    for part in texts(8_000).chunks(1_000) {
        bytes.write_all(&zstd::encode_all(&jsonl(part)[..], 3).unwrap()).unwrap();
    }
    let server = Server::new([("a.jsonl.zst", bytes)]);
    assert_eq!(read(&source(&server, "a.jsonl.zst"), 1_500).unwrap().len(), 1_500);
    assert_eq!(read(&source(&server, "a.jsonl.zst"), usize::MAX).unwrap().len(), 8_000);
}

#[test]
fn content_ranges() {
    assert_eq!(content_range("bytes 0-9/10"), Some((0, 10)));
    for bad in ["bytes 0-9/9", "bytes 5-4/10", "bytes 0-9/*", "items 0-9/10", "bytes */10", ""] {
        assert_eq!(content_range(bad), None, "{bad}");
    }
}
