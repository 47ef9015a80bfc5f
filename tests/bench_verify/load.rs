//! Load without a proxy: each connection sends its next request after the response.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use http_body_util::{BodyExt, Full};
use hyper::{
    Request,
    body::Bytes,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use keywright::verify::envoy_grpc;
use prost::Message;
use tokio::net::TcpStream;

/// The protocol of checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1 with one connection for each worker, like nginx and Caddy.
    Http,
    /// gRPC with one connection for all workers, like Envoy.
    Grpc,
}

/// The result of a measurement.
pub struct Outcome {
    pub checks: u64,
    pub elapsed: Duration,
    pub latencies: Vec<Duration>,
}

const CONCURRENCY: usize = 16;

/// Sends checks for `time`, with all `keys` in turn.
pub async fn run(address: &str, protocol: Protocol, keys: &Arc<Vec<String>>, time: Duration) -> Result<Outcome> {
    let stop = Arc::new(AtomicBool::new(false));
    let next = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    let shared = match protocol {
        Protocol::Http => None,
        Protocol::Grpc => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            Some(sender)
        }
    };
    let mut workers = vec![];
    for _ in 0..CONCURRENCY {
        let (stop, next, keys, address) = (Arc::clone(&stop), Arc::clone(&next), Arc::clone(keys), address.to_owned());
        let shared = shared.clone();
        workers.push(tokio::spawn(async move {
            let mut own = None;
            if shared.is_none() {
                let stream = TcpStream::connect(&address).await?;
                stream.set_nodelay(true)?;
                let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
                tokio::spawn(connection);
                own = Some(sender);
            }
            let mut latencies = vec![];
            while !stop.load(Ordering::Relaxed) {
                let number = next.fetch_add(1, Ordering::Relaxed);
                // A stride coprime to the number of keys: consecutive checks use keys that are not adjacent in memory.
                let key = &keys[(number.wrapping_mul(7919) % keys.len() as u64) as usize];
                let sent = Instant::now();
                if let Some(sender) = &mut own {
                    let request = Request::get("/nginx/permission=alerts:ReadConfig")
                        .header("host", "verifier")
                        .header("authorization", format!("Bearer {key}"))
                        .header("x-original-uri", "/api/v1/alerts?limit=100")
                        .header("x-request-id", "6f1c4d1e-7a04-4f0e-9d2b-0f4f4b8b9d11")
                        .header("user-agent", "curl/8.14.1")
                        .header("accept", "*/*")
                        .body(Full::<Bytes>::default())?;
                    let response = sender.send_request(request).await?;
                    ensure!(response.status() == 200, "{}", response.status());
                    response.into_body().collect().await?;
                } else if let Some(sender) = &shared {
                    let request = Request::post(format!("http://verifier{}", envoy_grpc::PATH))
                        .header("content-type", "application/grpc")
                        .header("te", "trailers")
                        .header("grpc-timeout", "200m")
                        .body(Full::new(framed(&message(key))))?;
                    let response = sender.clone().send_request(request).await?;
                    let body = response.into_body().collect().await?;
                    let trailers = body.trailers().cloned().unwrap_or_default();
                    ensure!(trailers.get("grpc-status").is_some_and(|code| code == "0"), "{trailers:?}");
                    let answer = body.to_bytes();
                    let answer = envoy_grpc::CheckResponse::decode(answer.get(5..).context("no message")?)?;
                    ensure!(answer.status.is_some_and(|status| status.code == 0), "the check was denied");
                }
                latencies.push(sent.elapsed());
            }
            anyhow::Ok(latencies)
        }));
    }
    tokio::time::sleep(time).await;
    stop.store(true, Ordering::Relaxed);
    let mut latencies = vec![];
    for worker in workers {
        latencies.append(&mut worker.await??);
    }
    let elapsed = started.elapsed();
    latencies.sort_unstable();
    Ok(Outcome { checks: latencies.len() as u64, elapsed, latencies })
}

/// A message with gRPC's prefix of five bytes.
fn framed(message: &[u8]) -> Bytes {
    let mut framed = vec![0];
    framed.extend_from_slice(&(message.len() as u32).to_be_bytes());
    framed.extend_from_slice(message);
    framed.into()
}

/// The message that Envoy 1.40 sends for a GET request of curl.
fn message(key: &str) -> Vec<u8> {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Check {
        #[prost(message, optional, tag = "1")]
        attributes: Option<Attributes>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct Attributes {
        #[prost(message, optional, tag = "1")]
        source: Option<Peer>,
        #[prost(message, optional, tag = "2")]
        destination: Option<Peer>,
        #[prost(message, optional, tag = "4")]
        request: Option<Req>,
        #[prost(message, repeated, tag = "10")]
        context_extensions: Vec<Pair>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct Peer {
        #[prost(message, optional, tag = "1")]
        address: Option<Address>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct Address {
        #[prost(message, optional, tag = "1")]
        socket: Option<Socket>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct Socket {
        #[prost(string, tag = "2")]
        address: String,
        #[prost(uint32, tag = "3")]
        port: u32,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct Req {
        #[prost(message, optional, tag = "1")]
        time: Option<Time>,
        #[prost(message, optional, tag = "2")]
        http: Option<Http>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct Time {
        #[prost(int64, tag = "1")]
        seconds: i64,
        #[prost(int32, tag = "2")]
        nanos: i32,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct Http {
        #[prost(string, tag = "1")]
        id: String,
        #[prost(string, tag = "2")]
        method: String,
        #[prost(message, repeated, tag = "3")]
        headers: Vec<Pair>,
        #[prost(string, tag = "4")]
        path: String,
        #[prost(string, tag = "5")]
        host: String,
        #[prost(string, tag = "6")]
        scheme: String,
        #[prost(int64, tag = "9")]
        size: i64,
        #[prost(string, tag = "10")]
        protocol: String,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct Pair {
        #[prost(string, tag = "1")]
        key: String,
        #[prost(string, tag = "2")]
        value: String,
    }
    let pair = |(key, value): (&str, &str)| Pair { key: key.to_owned(), value: value.to_owned() };
    let peer = |port| {
        let socket = Socket { address: "10.244.1.17".to_owned(), port };
        Some(Peer { address: Some(Address { socket: Some(socket) }) })
    };
    let bearer = format!("Bearer {key}");
    let headers = [
        (":authority", "api.example.com"),
        (":method", "GET"),
        (":path", "/api/v1/alerts?limit=100"),
        (":scheme", "http"),
        ("accept", "*/*"),
        ("authorization", &bearer),
        ("user-agent", "curl/8.14.1"),
        ("x-envoy-external-address", "203.0.113.9"),
        ("x-forwarded-for", "203.0.113.9"),
        ("x-forwarded-proto", "http"),
        ("x-request-id", "6f1c4d1e-7a04-4f0e-9d2b-0f4f4b8b9d11"),
    ];
    let http = Http {
        id: "13359530607844510314".to_owned(),
        method: "GET".to_owned(),
        headers: headers.into_iter().map(pair).collect(),
        path: "/api/v1/alerts?limit=100".to_owned(),
        host: "api.example.com".to_owned(),
        scheme: "http".to_owned(),
        size: -1,
        protocol: "HTTP/1.1".to_owned(),
    };
    let attributes = Attributes {
        source: peer(41_234),
        destination: peer(8080),
        request: Some(Req { time: Some(Time { seconds: 1_790_000_000, nanos: 123_456_000 }), http: Some(http) }),
        context_extensions: vec![pair(("permission", "alerts:ReadConfig"))],
    };
    Check { attributes: Some(attributes) }.encode_to_vec()
}
