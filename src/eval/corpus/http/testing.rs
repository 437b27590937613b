//! A web server for tests, on this machine: counts what it is asked and what it sends, and can be as
//! bad as real ones.

use std::collections::{HashMap, VecDeque};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What a request said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Request {
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
}

/// How the server behaves, and what it has seen.
#[derive(Default)]
#[allow(missing_docs)]
pub struct State {
    pub files: HashMap<String, Vec<u8>>,
    /// Paths that are answered with a redirect to another address.
    pub redirects: HashMap<String, String>,
    /// Version of all files.
    pub etag: String,
    /// Ignores `Range`.
    pub no_ranges: bool,
    /// Statuses of the next answers, before files are served again.
    pub statuses: VecDeque<u16>,
    /// Answers that end after half of their body.
    pub cuts: usize,
    /// Silence before the next answers.
    pub delays: VecDeque<Duration>,
    /// Headers of every answer.
    pub headers: Vec<String>,
    pub requests: Vec<Request>,
    /// Bytes of bodies.
    pub sent: u64,
}

/// A running server; it ends with the process.
#[derive(Clone)]
pub struct Server {
    /// `http://127.0.0.1:PORT`.
    pub url: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    /// Serves `files`, by path without a slash in front.
    pub fn new<'a>(files: impl IntoIterator<Item = (&'a str, Vec<u8>)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let files = files.into_iter().map(|(path, bytes)| (format!("/{path}"), bytes)).collect();
        let state = State { files, etag: "\"one\"".into(), ..State::default() };
        let server = Self { url, state: Arc::new(Mutex::new(state)) };
        let own = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = own.clone();
                std::thread::spawn(move || server.answer(stream));
            }
        });
        server
    }

    /// Behaviour and counts.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of a file.
    pub fn at(&self, path: &str) -> String {
        format!("{}/{path}", self.url)
    }

    fn answer(&self, mut stream: TcpStream) -> Option<()> {
        let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
        let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
        let mut request = Request { path, ..Request::default() };
        for line in lines {
            let line = line.ok()?;
            let Some((name, value)) = line.split_once(": ") else { break };
            match name.to_lowercase().as_str() {
                "range" => request.range = Some(value.to_owned()),
                "authorization" => request.token = Some(value.to_owned()),
                _ => {}
            }
        }
        let (head, body, whole) = self.reply(request);
        stream.write_all(head.as_bytes()).ok()?;
        for part in body[..whole].chunks(16 << 10) {
            stream.write_all(part).ok()?;
            self.state().sent += part.len() as u64;
        }
        Some(())
    }

    /// Head and body of an answer, and how much of the body is sent.
    fn reply(&self, request: Request) -> (String, Vec<u8>, usize) {
        let delay = self.state().delays.pop_front();
        std::thread::sleep(delay.unwrap_or_default());
        let mut state = self.state();
        state.requests.push(request.clone());
        let file = request.path.split('?').next().unwrap_or_default();
        let mut headers = state.headers.clone();
        let mut body = Vec::new();
        let status = if let Some(status) = state.statuses.pop_front() {
            status
        } else if let Some(url) = state.redirects.get(&request.path) {
            headers.push(format!("Location: {url}"));
            302
        } else if let Some(bytes) = state.files.get(file) {
            headers.push(format!("ETag: {}", state.etag));
            let range = request.range.as_ref().filter(|_| !state.no_ranges);
            match range.map(|range| bounds(range, bytes.len())) {
                None => {
                    body.clone_from(bytes);
                    200
                }
                Some(None) => {
                    headers.push(format!("Content-Range: bytes */{}", bytes.len()));
                    416
                }
                Some(Some((first, last))) => {
                    let all = bytes.len();
                    headers.push(format!("Content-Range: bytes {first}-{last}/{all}"));
                    body = bytes[first..=last].to_vec();
                    206
                }
            }
        } else {
            404
        };
        let mut sent = body.len();
        if state.cuts > 0 && sent > 1 {
            state.cuts -= 1;
            sent /= 2;
        }
        let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
        let head = format!(
            "HTTP/1.1 {status} x\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n",
            body.len()
        );
        (head, body, sent)
    }
}

/// First and last byte of `bytes=FIRST-[LAST]` in a file of `length` bytes.
fn bounds(range: &str, length: usize) -> Option<(usize, usize)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let first: usize = first.parse().ok()?;
    let last = last.parse().unwrap_or(usize::MAX).min(length.checked_sub(1)?);
    (first <= last).then_some((first, last))
}
