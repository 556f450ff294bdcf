//! A hub on loopback that speaks the protocol of the real one (revisions, etags, redirects to
//! another host, ranges, gated models) and misbehaves when told to. The server's tests use it as
//! well.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "each test file uses a part; a failed helper fails its test"
)]

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

pub const GOOD_TOKEN: &str = "hf_goodgoodgood";
/// Valid, but of an account without access to gated models.
pub const OTHER_TOKEN: &str = "hf_otherother";

/// What a request gets instead of its answer.
#[derive(Clone, Debug)]
pub enum Fault {
    Status(u16, Vec<(&'static str, &'static str)>),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// Content-Length is off by this much, and so is the body.
    Length(i64),
    /// A byte of the body is another one.
    Damage,
    /// Nothing more comes after so many bytes, but the connection stays.
    Stall(usize),
    /// The whole file, whatever range was asked for.
    NoRanges,
    /// A range that begins one byte later than asked for.
    WrongRange,
    /// A pause before each of this many parts of the body.
    Slow(usize, Duration),
}

/// A request as it came in.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub path: String,
    /// Came to the host that redirects lead to.
    pub storage: bool,
    pub token: Option<String>,
    /// First byte that was asked for.
    pub from: usize,
    /// Bytes of the body that were sent.
    pub sent: usize,
}

#[derive(Clone, Default)]
pub struct Repository {
    pub commit: String,
    pub files: BTreeMap<String, Vec<u8>>,
    pub gated: bool,
    /// Sizes that are claimed for files instead of their own.
    pub claimed: BTreeMap<String, u64>,
}

#[derive(Default)]
struct State {
    repositories: BTreeMap<String, Repository>,
    /// Old names.
    moved: BTreeMap<String, String>,
    faults: Vec<(String, usize, Fault)>,
    seen: Vec<Seen>,
    down: bool,
    /// Where redirects lead instead of the second port.
    other_storage: Option<String>,
}

#[derive(Clone)]
pub struct StandIn {
    /// The endpoint.
    pub url: String,
    storage: String,
    state: Arc<Mutex<State>>,
}

struct Request {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl StandIn {
    pub fn start() -> Self {
        let (hub, storage) = (listen(), listen());
        let url = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let this = Self {
            url: url(&hub),
            storage: url(&storage),
            state: Arc::default(),
        };
        for (listener, is_storage) in [(hub, false), (storage, true)] {
            let this = this.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let this = this.clone();
                    std::thread::spawn(move || this.serve(&stream, is_storage));
                }
            });
        }
        this
    }

    pub fn add(&self, name: &str, files: &[(&str, Vec<u8>)]) {
        let mut sum = Sha1::new();
        for (path, content) in files {
            sum.update(path);
            sum.update(content);
        }
        let repository = Repository {
            commit: hex(&sum.finalize()),
            files: files
                .iter()
                .map(|(path, content)| ((*path).to_owned(), content.clone()))
                .collect(),
            ..Repository::default()
        };
        self.change(|state| {
            state.repositories.insert(name.to_owned(), repository);
        });
    }

    pub fn repository(&self, name: &str, change: impl FnOnce(&mut Repository)) {
        self.change(|state| change(state.repositories.get_mut(name).unwrap()));
    }

    pub fn commit(&self, name: &str) -> String {
        self.state.lock().unwrap().repositories[name].commit.clone()
    }

    pub fn moved(&self, from: &str, to: &str) {
        self.change(|state| {
            state.moved.insert(from.to_owned(), to.to_owned());
        });
    }

    /// The next `times` requests whose path has this part get the fault.
    pub fn fault(&self, part: &str, times: usize, fault: Fault) {
        self.change(|state| state.faults.push((part.to_owned(), times, fault)));
    }

    /// Where redirects lead.
    pub fn storage(&self) -> String {
        self.storage.clone()
    }

    /// Has redirects lead elsewhere.
    pub fn set_storage(&self, url: &str) {
        self.change(|state| state.other_storage = Some(url.to_owned()));
    }

    /// Cuts every connection from now on.
    pub fn go_down(&self) {
        self.change(|state| state.down = true);
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.state.lock().unwrap().seen.clone()
    }

    /// Bytes of file contents that storage has sent.
    pub fn sent(&self) -> usize {
        self.seen()
            .iter()
            .filter(|s| s.storage)
            .map(|s| s.sent)
            .sum()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    fn serve(&self, stream: &TcpStream, storage: bool) {
        let mut reader = BufReader::new(stream);
        // Ends when the client has gone, or the stream was cut on purpose.
        while let Ok(Some(request)) = read_request(&mut reader) {
            if self.state.lock().unwrap().down || self.answer(stream, &request, storage).is_err() {
                let _ = stream.shutdown(std::net::Shutdown::Both);
                return;
            }
        }
    }

    fn answer(&self, stream: &TcpStream, request: &Request, storage: bool) -> io::Result<()> {
        let range = request.headers.get("range");
        let from = range
            .and_then(|range| {
                range
                    .strip_prefix("bytes=")?
                    .strip_suffix('-')?
                    .parse()
                    .ok()
            })
            .unwrap_or(0);
        let index = {
            let mut state = self.state.lock().unwrap();
            state.seen.push(Seen {
                method: request.method.clone(),
                path: request.path.clone(),
                storage,
                token: request.headers.get("authorization").cloned(),
                from,
                sent: 0,
            });
            state.seen.len() - 1
        };
        let fault = self.take_fault(&request.path);
        let mut answer = match storage {
            true => self.content(&request.path),
            false => self.hub(request),
        };
        if let Some(Fault::Status(status, headers)) = &fault {
            answer = Answer::plain(*status, "no");
            let headers = headers
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
            answer.headers.extend(headers);
        }
        let ranges = !matches!(fault, Some(Fault::NoRanges));
        if from > 0 && answer.status == 200 && ranges {
            let from = from + usize::from(matches!(fault, Some(Fault::WrongRange)));
            let total = answer.body.len();
            answer.status = 206;
            answer.body.drain(..from.min(total));
            let range = format!("bytes {from}-{}/{total}", total - 1);
            answer.headers.push(("content-range".into(), range));
        }
        if let Some(Fault::Damage) = fault
            && let Some(byte) = answer.body.last_mut()
        {
            *byte ^= 1;
        }
        self.write(stream, request, answer, fault, index)
    }

    fn write(
        &self,
        mut stream: &TcpStream,
        request: &Request,
        mut answer: Answer,
        fault: Option<Fault>,
        index: usize,
    ) -> io::Result<()> {
        if let Some(Fault::Length(by)) = fault {
            let length = (answer.body.len() as i64 + by) as usize;
            answer.body.resize(length, 7);
        }
        let mut head = format!("HTTP/1.1 {} x\r\n", answer.status);
        if !answer
            .headers
            .iter()
            .any(|(name, _)| name == "content-length")
        {
            head += &format!("content-length: {}\r\n", answer.body.len());
        }
        for (name, value) in &answer.headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all(format!("{head}\r\n").as_bytes())?;
        if request.method == "HEAD" {
            return Ok(());
        }
        let (limit, part, pause) = match fault {
            Some(Fault::Cut(limit) | Fault::Stall(limit)) => (limit, 1000, Duration::ZERO),
            Some(Fault::Slow(parts, pause)) => {
                (usize::MAX, answer.body.len().div_ceil(parts).max(1), pause)
            }
            _ => (usize::MAX, 1 << 16, Duration::ZERO),
        };
        let limit = limit.min(answer.body.len());
        for part in answer.body[..limit].chunks(part) {
            std::thread::sleep(pause);
            stream.write_all(part)?;
            self.change(|state| state.seen[index].sent += part.len());
        }
        match fault {
            Some(Fault::Cut(_)) => Err(io::ErrorKind::ConnectionAborted.into()),
            Some(Fault::Stall(_)) => {
                std::thread::sleep(Duration::from_secs(5));
                Err(io::ErrorKind::ConnectionAborted.into())
            }
            _ => Ok(()),
        }
    }

    fn take_fault(&self, path: &str) -> Option<Fault> {
        let mut state = self.state.lock().unwrap();
        let found = state
            .faults
            .iter_mut()
            .find(|(part, times, _)| *times > 0 && path.contains(part.as_str()))?;
        found.1 -= 1;
        Some(found.2.clone())
    }

    fn hub(&self, request: &Request) -> Answer {
        let path = request.path.split('?').next().unwrap_or_default();
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        match parts.as_slice() {
            ["api", "models", org, name, "revision", revision] => {
                self.revision(&format!("{org}/{name}"), revision)
            }
            [org, name, "resolve", revision, path @ ..] => {
                self.resolve(request, &format!("{org}/{name}"), revision, &path.join("/"))
            }
            _ => Answer::plain(404, "not a path of a hub"),
        }
    }

    fn revision(&self, name: &str, revision: &str) -> Answer {
        let state = self.state.lock().unwrap();
        let name = state.moved.get(name).map_or(name, String::as_str);
        let Some(repository) = state.repositories.get(name) else {
            return Answer::error(401, "RepoNotFound");
        };
        if !repository.is(revision) {
            return Answer::error(404, "RevisionNotFound");
        }
        let siblings: Vec<_> = repository
            .files
            .keys()
            .map(|f| json!({"rfilename": f}))
            .collect();
        let body = json!({"id": name, "sha": repository.commit, "siblings": siblings});
        Answer::plain(200, &body.to_string())
    }

    fn resolve(&self, request: &Request, name: &str, revision: &str, path: &str) -> Answer {
        let state = self.state.lock().unwrap();
        if let Some(new) = state.moved.get(name) {
            let mut answer = Answer::plain(307, "moved");
            let target = format!("/{new}/resolve/{revision}/{path}");
            answer.headers.push(("location".into(), target));
            return answer;
        }
        let Some(repository) = state.repositories.get(name) else {
            return Answer::error(401, "RepoNotFound");
        };
        if repository.gated {
            let token = request.headers.get("authorization").map(String::as_str);
            match token.and_then(|token| token.strip_prefix("Bearer ")) {
                Some(GOOD_TOKEN) => {}
                Some(OTHER_TOKEN) => return Answer::error(403, "GatedRepo"),
                Some(_) => return Answer::error(401, ""),
                None => return Answer::error(401, "GatedRepo"),
            }
        }
        if !repository.is(revision) {
            return Answer::error(404, "RevisionNotFound");
        }
        let Some(content) = repository.files.get(path) else {
            return Answer::error(404, "EntryNotFound");
        };
        let commit = ("x-repo-commit".to_owned(), repository.commit.clone());
        // What is large lies on another host, by its checksum.
        if path.ends_with(".safetensors") || path.ends_with(".gguf") {
            let sum = hex(&Sha256::digest(content));
            let size = repository.claimed.get(path).copied();
            let size = size.unwrap_or(content.len() as u64);
            let storage = state.other_storage.as_ref().unwrap_or(&self.storage);
            let mut answer = Answer::plain(302, "Found. Redirecting");
            answer.headers.extend([
                (
                    "location".into(),
                    format!("{storage}/{sum}?signature=s3cr3t"),
                ),
                ("x-linked-etag".into(), format!("\"{sum}\"")),
                ("x-linked-size".into(), size.to_string()),
                commit,
            ]);
            return answer;
        }
        let mut sum = Sha1::new_with_prefix(format!("blob {}\0", content.len()));
        sum.update(content);
        Answer {
            status: 200,
            headers: vec![
                ("etag".into(), format!("\"{}\"", hex(&sum.finalize()))),
                commit,
            ],
            body: content.clone(),
        }
    }

    fn content(&self, path: &str) -> Answer {
        let sum = path
            .trim_start_matches('/')
            .split('?')
            .next()
            .unwrap_or_default();
        let state = self.state.lock().unwrap();
        let mut files = state.repositories.values().flat_map(|r| r.files.values());
        match files.find(|content| hex(&Sha256::digest(content)) == sum) {
            Some(content) => Answer {
                status: 200,
                headers: vec![("etag".into(), "\"storage-1\"".into())],
                body: content.clone(),
            },
            None => Answer::plain(403, "Request has expired"),
        }
    }
}

impl Repository {
    fn is(&self, revision: &str) -> bool {
        revision == "main" || revision == self.commit
    }
}

impl Answer {
    fn plain(status: u16, body: &str) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.as_bytes().to_vec(),
        }
    }

    fn error(status: u16, code: &str) -> Self {
        let mut answer = Self::plain(status, "{}");
        if !code.is_empty() {
            answer.headers.push(("x-error-code".into(), code.into()));
            let message = format!("Sorry: {code}");
            answer.headers.push(("x-error-message".into(), message));
        }
        answer
    }
}

fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

fn read_request(reader: &mut BufReader<&TcpStream>) -> io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let mut word = || words.next().unwrap_or_default().to_owned();
    let (method, path) = (word(), word());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(':') else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|l| l.parse().ok());
    reader
        .take(length.unwrap_or(0))
        .read_to_end(&mut Vec::new())?;
    Ok(Some(Request {
        method,
        path,
        headers,
    }))
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
