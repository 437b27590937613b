//! Files on web servers, read by parts: HTTP/1.1 range requests (RFC 9110, section 14).
//!
//! A file is asked for its first bytes. The answer tells its length, its version (ETag and date) and
//! whether the server serves ranges; from then on only what is needed is asked for. Broken
//! connections, 429 and 5xx are tried again with growing pauses, from the byte where they broke.

mod blocks;
mod stream;
#[cfg(test)]
mod testing;

#[cfg(test)]
pub(super) use {testing::Server, tests::parquet as testing_parquet, tests::quick};

pub(super) use blocks::Blocks;
pub(super) use stream::{Ranges, Whole};

use crate::eval::error::{Error, Result};
use bytes::Bytes;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;
use ureq::http::{HeaderMap, Response, StatusCode, header};
use ureq::{Agent, Body};

/// Bytes of the first request: more than most footers and the first documents need.
const HEAD: u64 = 64 << 10;

/// How often and how patiently a request is tried again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retry {
    /// Failures in a row, without a byte in between, after which to give up.
    pub tries: u32,
    /// Pause before the second try; doubles from try to try.
    pub pause: Duration,
    /// Longest pause, also where the server asks for a longer one (`Retry-After`).
    pub longest: Duration,
    /// Silence after which a connection counts as broken.
    pub silence: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            tries: 6,
            pause: Duration::from_millis(250),
            longest: Duration::from_secs(60),
            silence: Duration::from_secs(60),
        }
    }
}

/// Connections, shared by all files of a text.
#[derive(Clone, Debug)]
pub(super) struct Client {
    agent: Agent,
    retry: Retry,
}

impl Client {
    pub(super) fn new(retry: Retry) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // The hub redirects to storage elsewhere, which must not see the hub's token.
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(retry.silence))
            .timeout_recv_response(Some(retry.silence))
            .timeout_per_read(Some(retry.silence))
            .user_agent(concat!("mxeval/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.into(), retry }
    }

    /// A file of this client; `token` goes to the file's own host only.
    pub(super) fn remote(&self, url: &str, token: Option<String>) -> Remote {
        Remote(Arc::new(Address {
            client: self.clone(),
            url: url.to_owned(),
            shown: shown(url),
            token: token.map(Secret),
        }))
    }
}

/// Text that no message, log or `Debug` output shows.
struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// An address, without what may be secret in it: user, password, query.
fn shown(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (host, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    format!("{scheme}://{host}{path}")
}

#[derive(Debug)]
struct Address {
    client: Client,
    url: String,
    shown: String,
    token: Option<Secret>,
}

/// A file on a web server.
#[derive(Clone, Debug)]
pub struct Remote(Arc<Address>);

/// What tells one version of a file from another.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Version {
    etag: Option<String>,
    modified: Option<String>,
    length: Option<u64>,
}

/// A request that failed.
pub(super) struct Fault {
    reason: String,
    /// Whether another try may help, and how long the server says to wait.
    again: Option<Option<Duration>>,
}

impl Fault {
    fn fatal(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), again: None }
    }

    fn broken(reason: impl std::fmt::Display) -> Self {
        Self { reason: format!("the connection broke: {reason}"), again: Some(None) }
    }
}

/// A server's answer to a request for a range.
enum Answer {
    Range(Body, Version),
    Whole(Body, Version),
    /// The range begins past the end.
    Nothing,
}

/// A file whose server has answered.
pub(super) enum Opened {
    /// The server serves ranges.
    Ranged(Ranged),
    /// The server only serves the whole.
    Whole(Whole),
}

/// A file on a server that serves ranges.
#[derive(Debug)]
pub(super) struct Ranged {
    remote: Remote,
    version: Version,
    length: u64,
    /// The file's first bytes.
    head: Bytes,
}

impl Remote {
    /// The address, without secrets.
    pub fn name(&self) -> &str {
        &self.0.shown
    }

    fn error(&self, reason: impl std::fmt::Display) -> Error {
        Error::Corpus { path: self.name().into(), reason: reason.to_string() }
    }

    /// Asks for the first bytes.
    pub(super) fn open(&self) -> Result<Opened> {
        let mut head = Vec::new();
        // Every try begins anew: only more than any has brought is progress.
        let mut most = 0;
        let answer = self.retrying(|progress| {
            head.clear();
            match self.request(0, Some(HEAD))? {
                Answer::Range(body, version) => {
                    let length = version.length.unwrap_or(0);
                    let read = read_part(body, length.min(HEAD), &mut head, &mut false);
                    *progress = head.len() > most;
                    most = most.max(head.len());
                    read?;
                    Ok((Some(version), None))
                }
                Answer::Whole(body, version) => Ok((Some(version), Some(body))),
                Answer::Nothing => Ok((None, None)),
            }
        });
        Ok(match answer.map_err(|reason| self.error(reason))? {
            (Some(version), Some(body)) => {
                Opened::Whole(Whole::new(self.clone(), version, body.into_reader()))
            }
            (version, _) => {
                let none = Version { etag: None, modified: None, length: Some(0) };
                let version = version.unwrap_or(none);
                let length = version.length.unwrap_or(0);
                Opened::Ranged(Ranged { remote: self.clone(), version, length, head: head.into() })
            }
        })
    }

    /// The whole body of a small answer, such as a listing, and its headers.
    pub(super) fn document(&self, limit: u64) -> Result<(Vec<u8>, HeaderMap)> {
        let answer = self.retrying(|_| {
            let response = self.send(None)?;
            let (parts, mut body) = response.into_parts();
            let bytes = body.with_config().limit(limit).read_to_vec().map_err(Fault::broken)?;
            Ok((bytes, parts.headers))
        });
        answer.map_err(|reason| self.error(reason))
    }

    /// Tries `attempt` until it succeeds, fails for good, or fails too often without any progress,
    /// which it reports through its argument.
    fn retrying<T>(
        &self,
        mut attempt: impl FnMut(&mut bool) -> std::result::Result<T, Fault>,
    ) -> std::result::Result<T, String> {
        let retry = self.0.client.retry;
        let (mut tries, mut pause) = (1, retry.pause);
        loop {
            let mut progress = false;
            let fault = match attempt(&mut progress) {
                Ok(value) => return Ok(value),
                Err(fault) => fault,
            };
            let Some(asked) = fault.again else { return Err(fault.reason) };
            if progress {
                (tries, pause) = (1, retry.pause);
            }
            if tries >= retry.tries {
                return Err(format!("{} ({tries} tries)", fault.reason));
            }
            std::thread::sleep(asked.unwrap_or(pause).min(retry.longest));
            (tries, pause) = (tries + 1, pause * 2);
        }
    }

    fn send(&self, range: Option<&str>) -> std::result::Result<Response<Body>, Fault> {
        let address = &self.0;
        // Bytes of a range have to be bytes of the file, not of its compressed form.
        let mut request =
            address.client.agent.get(&address.url).header(header::ACCEPT_ENCODING, "identity");
        if let Some(range) = range {
            request = request.header(header::RANGE, range);
        }
        if let Some(Secret(token)) = &address.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let response = request.call().map_err(fault)?;
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(response),
            StatusCode::RANGE_NOT_SATISFIABLE if range.is_some() => Ok(response),
            status => Err(self.refusal(status, response.headers())),
        }
    }

    fn refusal(&self, status: StatusCode, headers: &HeaderMap) -> Fault {
        let token = || match self.0.token {
            Some(_) => "the token does not give access to it",
            None => "it needs a token: set HF_TOKEN if it is on the Hugging Face hub",
        };
        let reason = match status.as_u16() {
            404 | 410 => format!("HTTP {status}: there is no such file"),
            401 | 403 => format!("HTTP {status}: {}", token()),
            _ => format!("HTTP {status}"),
        };
        let passing = status.is_server_error()
            || [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT].contains(&status);
        let seconds = text(headers, header::RETRY_AFTER).and_then(|text| text.parse().ok());
        Fault { reason, again: passing.then(|| seconds.map(Duration::from_secs)) }
    }

    /// Asks for `length` bytes from `start`, or for everything from there.
    fn request(&self, start: u64, length: Option<u64>) -> std::result::Result<Answer, Fault> {
        let last = length.map(|length| (start + length.max(1) - 1).to_string()).unwrap_or_default();
        let response = self.send(Some(&format!("bytes={start}-{last}")))?;
        let (parts, body) = response.into_parts();
        let headers = &parts.headers;
        if text(headers, header::CONTENT_ENCODING).is_some_and(|coding| coding != "identity") {
            return Err(Fault::fatal("the server compresses the file on the way"));
        }
        let range = text(headers, header::CONTENT_RANGE);
        let kind = text(headers, header::CONTENT_TYPE).unwrap_or_default();
        if kind.starts_with("text/html") {
            return Err(Fault::fatal("the server answers with a web page, not with a file"));
        }
        let version = |length| Version {
            etag: text(headers, header::ETAG).map(str::to_owned),
            modified: text(headers, header::LAST_MODIFIED).map(str::to_owned),
            length,
        };
        match parts.status {
            StatusCode::PARTIAL_CONTENT => match range.and_then(content_range) {
                Some((first, total)) if first == start => {
                    Ok(Answer::Range(body, version(Some(total))))
                }
                _ => Err(Fault::fatal(format!(
                    "the server answers a request for bytes from {start} with Content-Range {:?}",
                    range.unwrap_or("none")
                ))),
            },
            StatusCode::OK => {
                let length = text(headers, header::CONTENT_LENGTH).and_then(|t| t.parse().ok());
                Ok(Answer::Whole(body, version(length)))
            }
            _ => Ok(Answer::Nothing),
        }
    }
}

impl Ranged {
    /// Bytes `start..start + length`, of which all have to exist.
    fn fetch(&self, start: u64, length: u64) -> std::result::Result<Bytes, String> {
        if start + length <= self.head.len() as u64 {
            let (from, to) = (start as usize, (start + length) as usize);
            return Ok(self.head.slice(from..to));
        }
        let mut bytes = Vec::new();
        self.remote.retrying(|progress| {
            let done = bytes.len() as u64;
            match self.remote.request(start + done, Some(length - done))? {
                Answer::Range(body, version) if version == self.version => {
                    read_part(body, length - done, &mut bytes, progress)
                }
                _ => Err(Fault::fatal("changed on the server while it was being read")),
            }
        })?;
        Ok(bytes.into())
    }
}

/// Appends `length` bytes of a body to `bytes`; what came before a break is kept.
fn read_part(
    body: Body,
    length: u64,
    bytes: &mut Vec<u8>,
    progress: &mut bool,
) -> std::result::Result<(), Fault> {
    let read = body.into_reader().take(length).read_to_end_from(bytes);
    let (got, outcome) = read;
    *progress = got > 0;
    outcome.map_err(Fault::broken)?;
    if got < length {
        return Err(Fault::broken(format!("{got} of {length} bytes came")));
    }
    Ok(())
}

trait ReadToEndFrom {
    /// Reads to the end; how many bytes were appended, also when it fails half way.
    fn read_to_end_from(self, bytes: &mut Vec<u8>) -> (u64, std::io::Result<()>);
}

impl<R: Read> ReadToEndFrom for R {
    fn read_to_end_from(mut self, bytes: &mut Vec<u8>) -> (u64, std::io::Result<()>) {
        let before = bytes.len();
        let outcome = self.read_to_end(bytes).map(|_| ());
        ((bytes.len() - before) as u64, outcome)
    }
}

/// First byte and total length of `bytes FIRST-LAST/TOTAL`.
fn content_range(text: &str) -> Option<(u64, u64)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, total): (u64, u64, u64) =
        (first.trim().parse().ok()?, last.trim().parse().ok()?, total.trim().parse().ok()?);
    (first <= last && last < total).then_some((first, total))
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// Failures below HTTP: those of the network may pass, those of the address or of TLS do not.
fn fault(error: ureq::Error) -> Fault {
    use ureq::Error::{ConnectionFailed, HostNotFound, Io, Protocol, Timeout};
    let again =
        matches!(&error, ConnectionFailed | HostNotFound | Io(_) | Protocol(_) | Timeout(_));
    Fault { reason: format!("no answer: {error}"), again: again.then_some(None) }
}

#[cfg(test)]
mod tests;
