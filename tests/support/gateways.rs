//! Real proxies, configured by the files in `examples/gateways`, and an upstream application that records every byte
//! that it receives.

use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::process::{Process, local};
use super::tools::find;
use super::{ControlPlane, TIMEOUT, free_port, repository, retry, serial};

/// The verifier's host name in the examples.
pub const VERIFIER_HOST: &str = "keywright-verifier.keywright-system.svc";
const VERIFIER_PORT: u16 = 9191;
const UPSTREAM_HOST: &str = "shop.shop.svc";
const UPSTREAM_PORT: u16 = 8080;
const PROXY_PORT: u16 = 10_000;
const CA_FILE: &str = "/etc/keywright/ca.crt";

/// A proxy, and the example that configures it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    EnvoyGrpc,
    EnvoyHttp,
    Nginx,
    Caddy,
    Traefik,
}

impl Kind {
    pub const ALL: [Self; 5] = [Self::EnvoyGrpc, Self::EnvoyHttp, Self::Nginx, Self::Caddy, Self::Traefik];

    /// The files below `examples/gateways`. The proxy is started with the first.
    fn files(self) -> &'static [&'static str] {
        match self {
            Self::EnvoyGrpc => &["envoy/grpc.yaml"],
            Self::EnvoyHttp => &["envoy/http.yaml"],
            Self::Nginx => &["nginx/keywright.conf"],
            Self::Caddy => &["caddy/Caddyfile"],
            Self::Traefik => &["traefik/traefik.yaml", "traefik/dynamic.yaml"],
        }
    }

    /// A host and a port in the syntax of the example.
    fn endpoint(self, host: &str, port: u16) -> String {
        match self {
            Self::EnvoyGrpc | Self::EnvoyHttp => format!("address: {host}, port_value: {port} "),
            Self::Nginx | Self::Caddy | Self::Traefik => format!("{host}:{port}"),
        }
    }

    /// The listen address in the example, and `address` in the same syntax.
    fn listen_address(self, address: SocketAddr) -> (String, String) {
        let unspecified = Ipv4Addr::UNSPECIFIED.to_string();
        match self {
            Self::Caddy => (format!("http://:{PROXY_PORT} "), format!("http://:{} ", address.port())),
            Self::Traefik => (format!("address: \":{PROXY_PORT}\""), format!("address: \"{address}\"")),
            _ => (self.endpoint(&unspecified, PROXY_PORT), self.endpoint(&address.ip().to_string(), address.port())),
        }
    }
}

/// A running proxy. Dropping it kills it.
pub struct Gateway {
    pub kind: Kind,
    pub address: SocketAddr,
    process: Process,
}

impl Gateway {
    /// Runs a proxy with its example. Only the addresses are replaced; an address that the example lacks is an error.
    pub async fn start(plane: &ControlPlane, kind: Kind, verifier: SocketAddr, upstream: SocketAddr) -> Result<Self> {
        Self::start_with(plane, kind, Example::of(kind)?, verifier, upstream).await
    }

    /// Like [`Self::start`], with the changes for TLS that the first lines of the example describe, and the CA in the
    /// file `ca`.
    pub async fn start_with_tls(
        plane: &ControlPlane,
        kind: Kind,
        verifier: SocketAddr,
        upstream: SocketAddr,
        ca: &Path,
    ) -> Result<Self> {
        let mut example = Example::of(kind)?;
        for (_, text) in &mut example.0 {
            *text = with_tls(text);
        }
        example.replace(CA_FILE, &ca.to_string_lossy())?;
        Self::start_with(plane, kind, example, verifier, upstream).await
    }

    /// Like [`Self::start`], with an example that the test has changed.
    pub async fn start_with(
        plane: &ControlPlane,
        kind: Kind,
        mut example: Example,
        verifier: SocketAddr,
        upstream: SocketAddr,
    ) -> Result<Self> {
        let address = local(free_port()?);
        let folder = plane.folder().join(format!("gateway-{}", serial()));
        std::fs::create_dir_all(&folder)?;
        let (from, to) = kind.listen_address(address);
        example.replace(&from, &to)?;
        for (host, port, to) in [(VERIFIER_HOST, VERIFIER_PORT, verifier), (UPSTREAM_HOST, UPSTREAM_PORT, upstream)] {
            example.replace(&kind.endpoint(host, port), &kind.endpoint(&to.ip().to_string(), to.port()))?;
        }

        for (name, text) in &example.0 {
            std::fs::write(folder.join(name), text)?;
        }
        let file = folder.join(example.0[0].0).to_string_lossy().into_owned();
        let (program, arguments) = match kind {
            Kind::EnvoyGrpc | Kind::EnvoyHttp => {
                // With hot restart, Envoy ends together with the thread that started it, here that of one test.
                let arguments = ["-c", &file, "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"];
                (find("envoy", "envoy")?, arguments.map(str::to_owned).to_vec())
            }
            Kind::Nginx => {
                // The settings that a system's nginx.conf has around the included example.
                let main = format!(
                    "daemon off;\nmaster_process off;\npid nginx.pid;\nerror_log stderr warn;\nevents {{}}\nhttp {{\n\
                     access_log off;\nclient_body_temp_path a;\nproxy_temp_path b;\nfastcgi_temp_path c;\n\
                     uwsgi_temp_path d;\nscgi_temp_path e;\ninclude {file};\n}}\n"
                );
                std::fs::write(folder.join("nginx.conf"), main)?;
                let prefix = format!("{}/", folder.display());
                let arguments = ["-p", &prefix, "-c", "nginx.conf", "-e", "stderr"];
                (find("nginx", "nginx")?, arguments.map(str::to_owned).to_vec())
            }
            Kind::Caddy => {
                let arguments = ["run", "--adapter", "caddyfile", "--config", &file];
                (find("caddy", "caddy")?, arguments.map(str::to_owned).to_vec())
            }
            Kind::Traefik => (find("traefik", "traefik")?, vec![format!("--configFile={file}")]),
        };
        // Caddy needs an address for its admin endpoint, and writes files to its home folder.
        let admin = PathBuf::from(format!("unix/{}", folder.join("admin.sock").display()));
        let environment = [("HOME", folder.as_path()), ("CADDY_ADMIN", admin.as_path())];
        let process = Process::start(plane, &program, &folder, &arguments, &environment)?;
        process.wait_for(address).await.with_context(|| format!("{kind:?}"))?;
        // Traefik listens before it has loaded its routes.
        let request = b"GET /public/ready HTTP/1.1\r\nHost: shop.example.com\r\nConnection: close\r\n\r\n";
        let ready = retry("the proxy is ready", TIMEOUT, async || {
            let answer = send(address, request).await?;
            ensure!(answer.status == 200, "{}", answer.head);
            Ok(())
        });
        ready.await.with_context(|| format!("{kind:?}: {}", process.tail()))?;
        Ok(Self { kind, address, process })
    }

    /// Its output until now.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Sends a GET request with `headers`, and reads the response.
    pub async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let mut text = format!("GET {path} HTTP/1.1\r\nHost: shop.example.com\r\n");
        for (name, value) in headers {
            let _ = write!(text, "{name}: {value}\r\n");
        }
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("connection")) {
            text += "Connection: close\r\n";
        }
        self.send(format!("{text}\r\n").as_bytes()).await
    }

    /// Sends `bytes`, and reads the response.
    pub async fn send(&self, bytes: &[u8]) -> Answer {
        let answer = send(self.address, bytes).await;
        answer.unwrap_or_else(|error| panic!("{:?}: {error:#}\n{}", self.kind, self.process.tail()))
    }
}

/// The files of an example: name and text.
pub struct Example(Vec<(&'static str, String)>);

impl Example {
    /// Reads the example of a proxy.
    pub fn of(kind: Kind) -> Result<Self> {
        let read = |file: &&'static str| {
            let path = repository().join("examples/gateways").join(file);
            let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            anyhow::Ok((file.rsplit('/').next().unwrap_or(file), text))
        };
        Ok(Self(kind.files().iter().map(read).collect::<Result<_>>()?))
    }

    /// Replaces `from`, which must occur, by `to` in all files.
    pub fn replace(&mut self, from: &str, to: &str) -> Result<()> {
        ensure!(self.0.iter().any(|(_, text)| text.contains(from)), "the example does not contain {from:?}");
        for (_, text) in &mut self.0 {
            *text = text.replace(from, to);
        }
        Ok(())
    }
}

/// The change for TLS that the examples describe: `sed -e '/# plain$/d' -e 's/#tls //'`.
pub fn with_tls(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.ends_with("# plain"));
    lines.map(|line| line.replacen("#tls ", "", 1) + "\n").collect()
}

/// An HTTP response.
#[derive(Debug)]
pub struct Answer {
    /// The status code; 0 if the connection was closed without a response.
    pub status: u16,
    /// Status line and headers, unchanged.
    pub head: String,
    pub body: String,
}

impl Answer {
    /// The values of a header.
    pub fn headers(&self, name: &str) -> Vec<&str> {
        values(&self.head, name)
    }
}

/// The values of a header in the head of a message.
pub fn values<'a>(head: &'a str, name: &str) -> Vec<&'a str> {
    let lines = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    lines.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).collect()
}

/// Sends `bytes` over a new connection, and reads until the response is complete or the connection is closed.
pub async fn send(address: SocketAddr, bytes: &[u8]) -> Result<Answer> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let (mut reader, mut writer) = stream.split();
        // A write error is ignored: a server may respond and close before it has read the whole request.
        let write = async {
            let _ = writer.write_all(bytes).await;
        };
        let read = async {
            let mut answer = Vec::new();
            let mut buffer = [0; 8192];
            while !is_complete(&answer) {
                match reader.read(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    Ok(length) => answer.extend_from_slice(&buffer[..length]),
                }
            }
            answer
        };
        let ((), answer) = tokio::join!(write, read);
        Ok::<_, anyhow::Error>(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(20), exchange).await.context("no response within 20 s")??;
    let text = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok(Answer { status, head: head.to_owned(), body: body.to_owned() })
}

/// Whether a message has as many bytes as its Content-Length says; false without Content-Length.
fn is_complete(message: &[u8]) -> bool {
    let Some(end) = message.windows(4).position(|four| four == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&message[..end]);
    let length = values(&head, "content-length").first().and_then(|length| length.parse::<usize>().ok());
    length.is_some_and(|length| message.len() >= end + 4 + length)
}

/// The upstream application. It has its own thread and runtime, because the tests that share it have separate runtimes.
pub struct Upstream {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
    stop: CancellationToken,
}

impl Upstream {
    /// Starts it. It answers every request with 200.
    pub fn start() -> Result<Self> {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (seen, stop) = (Arc::default(), CancellationToken::new());
        let (record, stopped) = (Arc::clone(&seen), stop.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("upstream".to_owned()).spawn(move || {
            runtime.block_on(stopped.run_until_cancelled(async {
                let listener = TcpListener::from_std(listener).expect("a listener");
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(serve(stream, Arc::clone(&record)));
                }
            }));
        })?;
        Ok(Self { address, seen, stop })
    }

    /// The requests that it received and that contain `text`, unchanged.
    pub fn seen(&self, text: &str) -> Vec<String> {
        self.seen.lock().unwrap().iter().filter(|head| head.contains(text)).cloned().collect()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn serve(mut stream: TcpStream, seen: Arc<Mutex<Vec<String>>>) {
    let mut unread = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        let length = loop {
            if let Some(length) = request_length(&unread) {
                break length;
            }
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(length) => unread.extend_from_slice(&buffer[..length]),
            }
        };
        let request: Vec<u8> = unread.drain(..length).collect();
        seen.lock().unwrap().push(String::from_utf8_lossy(&request).into_owned());
        if stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nupstream").await.is_err() {
            return;
        }
    }
}

/// The length of the first request in `bytes`; `None` if it is incomplete.
fn request_length(bytes: &[u8]) -> Option<usize> {
    let find = |from: usize, part: &[u8]| Some(from + bytes[from..].windows(part.len()).position(|w| w == part)?);
    let body = find(0, b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&bytes[..body]);
    if !values(&head, "transfer-encoding").is_empty() {
        // The last chunk, followed by trailers up to an empty line.
        let last = if bytes[body..].starts_with(b"0\r\n") { body } else { find(body, b"\r\n0\r\n")? + 2 };
        return Some(find(last, b"\r\n\r\n")? + 4);
    }
    let length = values(&head, "content-length").first().map_or(Some(0), |length| length.parse().ok())?;
    (bytes.len() >= body + length).then_some(body + length)
}
