//! What one peer can take of a verifier, and what is left for the others.

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

/// A connection that a proxy keeps.
async fn kept(address: SocketAddr) -> TcpStream {
    TcpStream::connect(address).await.expect("a connection")
}

/// Asks over a connection that stays, and returns the status line.
async fn ask_over(connection: &mut TcpStream, value: &str) -> String {
    let text =
        format!("GET /nginx/permission=none HTTP/1.1\r\nHost: verifier\r\nAuthorization: Bearer {value}\r\n\r\n");
    connection.write_all(text.as_bytes()).await.expect("it takes a request");
    let mut answer = vec![];
    while !answer.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        connection.read_exact(&mut byte).await.expect("an answer");
        answer.push(byte[0]);
    }
    String::from_utf8(answer).unwrap().lines().next().unwrap().to_owned()
}

/// Whether the other side closes a connection without a word.
async fn is_closed(connection: &mut TcpStream) -> bool {
    matches!(tokio::time::timeout(PATIENCE, connection.read(&mut [0])).await, Ok(Ok(0) | Err(_)))
}

/// Connections that say nothing take every place. The one that was waited for the longest makes room for the next, and a
/// proxy that asks all the time keeps its own.
#[tokio::test]
async fn connections_that_say_nothing_keep_nobody_out() {
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let verifier = start(Options { args: vec!["--max-connections=3".to_owned()], ..Options::default() }).await.unwrap();
    let metric = async |name: &str, expected: f64| {
        eventually(&format!("{name} is {expected}"), PATIENCE, async || {
            let found = support::keys::metric(&verifier.get("/metrics").await?, name);
            ensure!(found == Some(expected), "{found:?}");
            Ok(())
        })
        .await;
    };
    metric("keywright_verifier_connections", 0.0).await;

    let mut proxy = kept(verifier.address()).await;
    let (mut silent, mut slow) = (kept(verifier.address()).await, kept(verifier.address()).await);
    slow.write_all(b"GET /nginx/permission=none HTTP/1.1\r\nHost: ver").await.unwrap();
    metric("keywright_verifier_connections", 3.0).await;
    assert_eq!(ask_over(&mut proxy, &value).await, "HTTP/1.1 200 OK");

    let mut more = kept(verifier.address()).await;
    assert_eq!(ask_over(&mut more, &value).await, "HTTP/1.1 200 OK", "there is a place for who asks");
    assert!(is_closed(&mut silent).await, "it was waited for the longest");
    let mut last = kept(verifier.address()).await;
    assert_eq!(ask_over(&mut last, &value).await, "HTTP/1.1 200 OK");
    assert!(is_closed(&mut slow).await, "the beginning of a request is none");
    for connection in [&mut proxy, &mut more, &mut last] {
        assert_eq!(ask_over(connection, &value).await, "HTTP/1.1 200 OK", "who is at work stays");
    }
    metric("keywright_verifier_connections_closed_idle_total", 2.0).await;
    metric("keywright_verifier_connections_turned_away_total", 0.0).await;
    assert!(verifier.log().contains("idle connections are closed"), "{}", verifier.log());

    // Without others that need a place, those that say nothing leave after a while too.
    drop((more, last));
    metric("keywright_verifier_connections", 1.0).await;
    let mut silent = kept(verifier.address()).await;
    assert!(is_closed(&mut silent).await);
    assert_eq!(ask_over(&mut proxy, &value).await, "HTTP/1.1 200 OK");
}

/// A request whose body stops coming is given up.
#[tokio::test]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let team = Team::new().await;
    let asker = team.mint("k", &json!({"type": "Team", "permissions": ["team-custom-api-keys:ReadConfig"]})).await;
    let mut connection = kept(verifier().await.address()).await;
    let text = format!(
        "POST /introspect HTTP/1.1\r\nHost: verifier\r\nAuthorization: Bearer {asker}\r\n\
         Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 100\r\n\r\ntoken="
    );
    connection.write_all(text.as_bytes()).await.unwrap();
    let mut start = [0; 12];
    connection.read_exact(&mut start).await.unwrap();
    assert_eq!(&start, b"HTTP/1.1 408");
}

/// Nor is a message of gRPC.
#[tokio::test]
async fn a_message_that_does_not_come_is_not_waited_for() {
    let stream = TokioIo::new(kept(verifier().await.address()).await);
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post("http://verifier/envoy.service.auth.v3.Authorization/Check")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(StreamBody::new(stream::pending::<Result<Frame<Bytes>, Infallible>>()))
        .unwrap();
    let answer = tokio::time::timeout(PATIENCE, sender.send_request(request)).await.expect("it is given up");
    assert_eq!(answer.unwrap().status(), 408);
}

/// Who sends more than the verifier takes can read why, though it has not sent all of it when the answer is there: else a
/// proxy between them makes an error of its own out of a refusal.
#[tokio::test]
async fn a_head_that_is_too_large_is_answered_before_it_is_all_there() {
    let mut connection = kept(verifier().await.address()).await;
    let filling = vec![b'a'; 1_000_000];
    connection.write_all(b"GET /nginx/permission=none HTTP/1.1\r\nHost: verifier\r\nX-API-Key: ").await.unwrap();
    for part in filling.chunks(50_000) {
        connection.write_all(part).await.expect("it takes the rest, or there is no answer to be read");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.expect("an answer, and not a reset");
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
}

/// Who has its answer and goes on sending is cut off: soon if it sends little, and at once if it sends much.
#[tokio::test]
async fn who_goes_on_sending_is_cut_off() {
    let head = b"GET /nginx/permission=none HTTP/1.1\r\nHost: verifier\r\nX-API-Key: ";
    let (mut slow, mut fast) = (kept(verifier().await.address()).await, kept(verifier().await.address()).await);
    // After a first request, whose time has a bound of its own.
    assert_eq!(ask_over(&mut slow, "unknown").await, "HTTP/1.1 401 Unauthorized");
    slow.write_all(&[head, &*vec![b'a'; 100_000]].concat()).await.unwrap();
    let trickle = async {
        while slow.write_all(b"a").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, trickle).await.expect("it is cut off");

    // More than any buffer between the two holds.
    fast.write_all(head).await.unwrap();
    fast.write_all(&vec![b'a'; 64 << 20]).await.expect_err("nobody takes all of it");
}

/// Eight connections with as many streams as each may have, and messages on each that never end: what they hold is bounded
/// for all of them together, and Envoy is answered.
#[tokio::test]
async fn eight_grpc_connections_hold_no_more_than_the_budget_of_all() {
    const CONNECTIONS: usize = 8;
    const STREAMS: usize = 128;
    let team = Team::new().await;
    let value = team.mint("k", &reader()).await;
    let verifier = start(Options::default()).await.unwrap();
    assert_eq!(ask(&verifier, "permission=none", &value).await.status, 200);
    let before = verifier.memory().unwrap();
    let mut senders = vec![];
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..CONNECTIONS {
        let stream = TokioIo::new(kept(verifier.address()).await);
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
    let until = Instant::now() + Duration::from_secs(5);
    let mut most = before;
    while Instant::now() < until {
        most = most.max(verifier.memory().unwrap());
        assert_eq!(ask(&verifier, "permission=none", &value).await.status, 200, "others are answered");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let held = (most - before) as f64 / 1e6;
    println!("{CONNECTIONS} connections of {STREAMS} streams hold {held:.1} MB");
    assert!(held < 40.0, "{held} MB");
    let metrics = verifier.get("/metrics").await.unwrap();
    let refused = support::keys::metric(&metrics, "keywright_verifier_bodies_refused_total{reason=\"GivenUp\"}");
    assert!(refused.unwrap() > 0.0, "{metrics}");
    drop(senders);
}
