//! Limits of connections, heads and bodies: a peer that exhausts its share does not affect others.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Instant;

use futures::{StreamExt, stream};
use http::Request;
use http_body_util::StreamBody;
use hyper::body::{Bytes, Frame};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;

async fn connect(address: SocketAddr) -> TcpStream {
    TcpStream::connect(address).await.expect("a connection")
}

/// Sends a check over an open connection, and returns the status line.
async fn check_over(connection: &mut TcpStream, value: &str) -> String {
    let text =
        format!("GET /nginx/permission=none HTTP/1.1\r\nHost: verifier\r\nAuthorization: Bearer {value}\r\n\r\n");
    connection.write_all(text.as_bytes()).await.expect("the verifier reads the request");
    let mut answer = vec![];
    while !answer.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        connection.read_exact(&mut byte).await.expect("an answer");
        answer.push(byte[0]);
    }
    String::from_utf8(answer).unwrap().lines().next().unwrap().to_owned()
}

/// Whether the verifier closes a connection without an answer.
async fn is_closed(connection: &mut TcpStream) -> bool {
    matches!(tokio::time::timeout(TIMEOUT, connection.read(&mut [0])).await, Ok(Ok(0) | Err(_)))
}

/// When all connections are in use, the verifier closes the longest-idle one for a new one. A proxy that sends checks
/// keeps its connection.
#[tokio::test]
async fn idle_connections_are_closed_for_new_ones() {
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let verifier = start(Options { args: vec!["--max-connections=3".to_owned()], ..Options::default() }).await.unwrap();
    let metric = async |name: &str, expected: f64| {
        eventually(&format!("{name} is {expected}"), TIMEOUT, async || {
            let found = crate::support::keys::metric(&verifier.get("/metrics").await?, name);
            ensure!(found == Some(expected), "{found:?}");
            Ok(())
        })
        .await;
    };
    metric("keywright_verifier_connections", 0.0).await;

    let mut proxy = connect(verifier.address()).await;
    let (mut silent, mut slow) = (connect(verifier.address()).await, connect(verifier.address()).await);
    slow.write_all(b"GET /nginx/permission=none HTTP/1.1\r\nHost: ver").await.unwrap();
    metric("keywright_verifier_connections", 3.0).await;
    assert_eq!(check_over(&mut proxy, &value).await, "HTTP/1.1 200 OK");

    let mut more = connect(verifier.address()).await;
    assert_eq!(check_over(&mut more, &value).await, "HTTP/1.1 200 OK", "a new connection was rejected");
    assert!(is_closed(&mut silent).await, "the longest-idle connection is open");
    let mut last = connect(verifier.address()).await;
    assert_eq!(check_over(&mut last, &value).await, "HTTP/1.1 200 OK");
    assert!(is_closed(&mut slow).await, "a connection with an incomplete head does not count as idle");
    for connection in [&mut proxy, &mut more, &mut last] {
        assert_eq!(check_over(connection, &value).await, "HTTP/1.1 200 OK", "an active connection was closed");
    }
    metric("keywright_verifier_connections_closed_idle_total", 2.0).await;
    metric("keywright_verifier_connections_turned_away_total", 0.0).await;
    assert!(verifier.log().contains("idle connections are closed"), "{}", verifier.log());

    // Idle connections are also closed after a time, without new connections.
    drop((more, last));
    metric("keywright_verifier_connections", 1.0).await;
    let mut silent = connect(verifier.address()).await;
    assert!(is_closed(&mut silent).await);
    assert_eq!(check_over(&mut proxy, &value).await, "HTTP/1.1 200 OK");
}

#[tokio::test]
async fn a_request_with_an_incomplete_body_is_answered_with_408() {
    let team = Team::new().await;
    let caller = team.mint("k", &json!({"type": "Team", "permissions": ["team-custom-api-keys:ReadConfig"]})).await;
    let mut connection = connect(verifier().await.address()).await;
    let text = format!(
        "POST /introspect HTTP/1.1\r\nHost: verifier\r\nAuthorization: Bearer {caller}\r\n\
         Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 100\r\n\r\ntoken="
    );
    connection.write_all(text.as_bytes()).await.unwrap();
    let mut start = [0; 12];
    connection.read_exact(&mut start).await.unwrap();
    assert_eq!(&start, b"HTTP/1.1 408");
}

#[tokio::test]
async fn a_grpc_call_without_a_message_is_answered_with_408() {
    let stream = TokioIo::new(connect(verifier().await.address()).await);
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post("http://verifier/envoy.service.auth.v3.Authorization/Check")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(StreamBody::new(stream::pending::<Result<Frame<Bytes>, Infallible>>()))
        .unwrap();
    let answer =
        tokio::time::timeout(TIMEOUT, sender.send_request(request)).await.expect("an answer before the time-out");
    assert_eq!(answer.unwrap().status(), 408);
}

/// The verifier reads the rest of the head, so that the client receives the answer. With a reset, a proxy would report
/// an error of its own.
#[tokio::test]
async fn a_head_that_is_too_large_is_answered_with_431_and_not_with_a_reset() {
    let mut connection = connect(verifier().await.address()).await;
    let filling = vec![b'a'; 1_000_000];
    connection.write_all(b"GET /nginx/permission=none HTTP/1.1\r\nHost: verifier\r\nX-API-Key: ").await.unwrap();
    for part in filling.chunks(50_000) {
        connection.write_all(part).await.expect("the verifier reads the rest of the head");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.expect("an answer, and not a reset");
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
}

/// A client that continues to send after its answer is disconnected: after a time if it sends slowly, at once if it
/// sends much.
#[tokio::test]
async fn a_client_that_sends_on_after_its_answer_is_disconnected() {
    let head = b"GET /nginx/permission=none HTTP/1.1\r\nHost: verifier\r\nX-API-Key: ";
    let (mut slow, mut fast) = (connect(verifier().await.address()).await, connect(verifier().await.address()).await);
    // A first request, since the time until the first request of a connection has another limit.
    assert_eq!(check_over(&mut slow, "unknown").await, "HTTP/1.1 401 Unauthorized");
    slow.write_all(&[head, &*vec![b'a'; 100_000]].concat()).await.unwrap();
    let trickle = async {
        while slow.write_all(b"a").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, trickle).await.expect("the slow client is disconnected");

    // More than the buffers between client and verifier hold.
    fast.write_all(head).await.unwrap();
    fast.write_all(&vec![b'a'; 64 << 20]).await.expect_err("the fast client is disconnected");
}

/// Eight connections, each with the maximum of streams and an incomplete message on every stream: the memory of all
/// bodies has one budget, and other clients are answered.
#[tokio::test]
async fn incomplete_messages_of_many_grpc_streams_use_no_more_memory_than_the_budget_of_bodies() {
    const CONNECTIONS: usize = 8;
    const STREAMS: usize = 128;
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let verifier = start(Options::default()).await.unwrap();
    assert_eq!(check(&verifier, "permission=none", &value).await.status, 200);
    let before = verifier.memory().unwrap();
    let mut senders = vec![];
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..CONNECTIONS {
        let stream = TokioIo::new(connect(verifier.address()).await);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
        tokio::spawn(connection);
        for _ in 0..STREAMS {
            // A message of 128 KiB without its end.
            let mut message = vec![0; 127 << 10];
            message[1..5].copy_from_slice(&(128_u32 << 10).to_be_bytes());
            let parts = message.chunks(8 << 10).map(|part| Ok(Frame::data(Bytes::copy_from_slice(part))));
            let body = stream::iter(parts.collect::<Vec<Result<_, Infallible>>>()).chain(stream::pending());
            let request = Request::post("http://verifier/envoy.service.auth.v3.Authorization/Check")
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .body(StreamBody::new(body))
                .unwrap();
            calls.spawn(sender.clone().send_request(request));
        }
        senders.push(sender);
    }
    let end = Instant::now() + Duration::from_secs(5);
    let mut peak = before;
    while Instant::now() < end {
        peak = peak.max(verifier.memory().unwrap());
        assert_eq!(check(&verifier, "permission=none", &value).await.status, 200, "another client was rejected");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let held = (peak - before) as f64 / 1e6;
    println!("{CONNECTIONS} connections of {STREAMS} streams hold {held:.1} MB");
    assert!(held < 40.0, "{held} MB");
    let metrics = verifier.get("/metrics").await.unwrap();
    let refused = crate::support::keys::metric(&metrics, "keywright_verifier_bodies_refused_total{reason=\"GivenUp\"}");
    assert!(refused.unwrap() > 0.0, "{metrics}");
    drop(senders);
}
