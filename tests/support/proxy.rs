//! A reverse proxy between one operator and the apiserver. It records every request and injects faults of a network or
//! an apiserver. The operator connects by plain HTTP; the proxy adds TLS and forwards everything else, including the
//! operator's token and its watches.

use std::fmt;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, RETRY_AFTER};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::{Method, Request, Response, StatusCode, Uri, service::service_fn};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::{self, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::ControlPlane;

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Body = UnsyncBoxBody<Bytes, BoxError>;

/// A recorded request, without body and headers, so that no secret can get into a test's output.
#[derive(Clone, Debug)]
pub struct Record {
    pub method: Method,
    pub path: String,
    pub query: String,
    /// The size of the body, in bytes.
    pub size: usize,
    /// The status of the response; `None` until there is one.
    pub status: Option<StatusCode>,
    /// The time at which the proxy received it.
    pub at: Instant,
}

impl Record {
    /// Whether the method is one of a write.
    pub fn is_mutating(&self) -> bool {
        matches!(self.method, Method::POST | Method::PUT | Method::PATCH | Method::DELETE)
    }

    /// Whether the request writes an object other than a Lease, an Event or a review (SubjectAccessReview and others).
    pub fn is_write(&self) -> bool {
        let excluded = ["/leases", "/events", "reviews"];
        self.is_mutating() && !excluded.iter().any(|part| self.path.contains(part))
    }

    /// Whether the request is a watch.
    pub fn is_watch(&self) -> bool {
        self.query.split('&').any(|pair| matches!(pair, "watch=true" | "watch=1"))
    }
}

/// A fault.
#[derive(Clone)]
pub enum Fault {
    /// The proxy answers with this status and does not forward the request.
    Reject(u16),
    /// The proxy forwards the request after this time.
    Delay(Duration),
    /// The proxy answers a watch with 410 Expired (the resource version is too old), which requires a new list.
    Expire,
    /// The proxy answers a watch with status 200 and one event, an error with this code.
    ErrorEvent(u16),
    /// The apiserver executes the request, but the proxy closes the connection instead of sending the response.
    LoseAnswer,
    /// Like `LoseAnswer`; the function is called before the connection is closed, for instance to kill the operator.
    AfterCommit(Arc<dyn Fn() + Send + Sync>),
}

impl Fault {
    /// [`Fault::AfterCommit`] with `then`.
    pub fn after_commit(then: impl Fn() + Send + Sync + 'static) -> Self {
        Self::AfterCommit(Arc::new(then))
    }

    fn is_after_commit(&self) -> bool {
        matches!(self, Self::LoseAnswer | Self::AfterCommit(_))
    }
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reject(status) => write!(f, "Reject({status})"),
            Self::Delay(time) => write!(f, "Delay({time:?})"),
            Self::Expire => write!(f, "Expire"),
            Self::ErrorEvent(code) => write!(f, "ErrorEvent({code})"),
            Self::LoseAnswer => write!(f, "LoseAnswer"),
            Self::AfterCommit(_) => write!(f, "AfterCommit"),
        }
    }
}

/// A fault that is planned for matching requests.
struct Plan {
    matches: Box<dyn Fn(&Record) -> bool + Send + Sync>,
    /// The number of matching requests before the first fault.
    skip: usize,
    /// The number of faults that are left.
    remaining: usize,
    fault: Fault,
    injected: Arc<AtomicUsize>,
}

/// A handle of a planned fault.
#[derive(Clone, Debug)]
pub struct Planned(Arc<AtomicUsize>);

impl Planned {
    /// How often the fault was injected.
    pub fn injected(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// A running proxy. It has its own thread and runtime, so that a test that blocks its runtime does not stop the
/// operator.
pub struct Proxy {
    url: String,
    state: Arc<State>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Starts a proxy in front of `plane`.
    pub fn start(plane: &ControlPlane) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let url = format!("http://{}", listener.local_addr()?);
        let state = Arc::new(State::new(plane)?);
        let stop = CancellationToken::new();
        let serve = serve(listener, state.clone(), stop.clone());
        let thread = Some(std::thread::spawn(move || runtime.block_on(serve).expect("the proxy serves")));
        Ok(Self { url, state, stop, thread })
    }

    /// Its URL, `http://127.0.0.1:...`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Injects `fault` once, at the `k`-th request from now on (counted from 1) for which `matches` is true. For faults
    /// after the commit, only requests that the apiserver answered with 2xx are counted.
    pub fn inject(&self, k: usize, matches: impl Fn(&Record) -> bool + Send + Sync + 'static, fault: Fault) -> Planned {
        self.inject_times(k, 1, matches, fault)
    }

    /// Injects `fault` `times` times in a row, from the `k`-th request on for which `matches` is true.
    pub fn inject_times(
        &self,
        k: usize,
        times: usize,
        matches: impl Fn(&Record) -> bool + Send + Sync + 'static,
        fault: Fault,
    ) -> Planned {
        assert!(k > 0, "requests are counted from 1");
        let injected = Arc::new(AtomicUsize::new(0));
        let plan =
            Plan { matches: Box::new(matches), skip: k - 1, remaining: times, fault, injected: injected.clone() };
        self.state.plans.lock().unwrap().push(plan);
        Planned(injected)
    }

    /// Removes all planned faults.
    pub fn clear_faults(&self) {
        self.state.plans.lock().unwrap().clear();
    }

    /// Breaks the connections of all open watches. The operator can open new ones.
    pub fn cut_watches(&self) {
        std::mem::take(&mut *self.state.watches.lock().unwrap()).cancel();
    }

    /// All requests until now, in order of arrival.
    pub fn requests(&self) -> Vec<Record> {
        self.state.records.lock().unwrap().clone()
    }

    /// The requests until now for which [`Record::is_write`] is true.
    pub fn writes(&self) -> Vec<Record> {
        self.requests().into_iter().filter(Record::is_write).collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(listener: std::net::TcpListener, state: Arc<State>, stop: CancellationToken) -> std::io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let connection = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            accepted = listener.accept() => match accepted {
                Ok((connection, _)) => TokioIo::new(connection),
                Err(_) => continue,
            },
        };
        let state = state.clone();
        let service = service_fn(move |request| state.clone().handle(request));
        // An error is a broken connection, which can be an injected fault.
        tokio::spawn(async move { drop(http1::Builder::new().serve_connection(connection, service).await) });
    }
}

struct State {
    client: legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    apiserver: Uri,
    records: Mutex<Vec<Record>>,
    plans: Mutex<Vec<Plan>>,
    watches: Mutex<CancellationToken>,
}

impl State {
    fn new(plane: &ControlPlane) -> Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(plane.ca().as_bytes()).context("the apiserver's CA")?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_only().enable_http1().build();
        Ok(Self {
            client: legacy::Client::builder(TokioExecutor::new()).build(connector),
            apiserver: plane.url().parse()?,
            records: Mutex::default(),
            plans: Mutex::default(),
            watches: Mutex::default(),
        })
    }

    /// Handles one request. On an error, hyper closes the connection without a response.
    async fn handle(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Body>, BoxError> {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let record = Record {
            method: head.method.clone(),
            path: head.uri.path().to_owned(),
            query: head.uri.query().unwrap_or_default().to_owned(),
            size: body.len(),
            status: None,
            at: Instant::now(),
        };
        let index = {
            let mut records = self.records.lock().unwrap();
            records.push(record.clone());
            records.len() - 1
        };
        let answered = |status| self.records.lock().unwrap()[index].status = Some(status);

        match self.due_fault(&record, false) {
            Some(Fault::Reject(status)) => {
                let response = error_response(StatusCode::from_u16(status)?)?;
                answered(response.status());
                return Ok(response);
            }
            Some(Fault::Expire) => {
                answered(StatusCode::OK);
                return Ok(error_event("Expired", "too old resource version: 1 (2)", 410));
            }
            Some(Fault::ErrorEvent(code)) => {
                answered(StatusCode::OK);
                return Ok(error_event("InternalError", "etcdserver: no leader", code));
            }
            Some(Fault::Delay(time)) => tokio::time::sleep(time).await,
            _ => {}
        }
        let (mut head, body) = self.forward(head, body).await?.into_parts();
        if head.status.is_success() {
            match self.due_fault(&record, true) {
                Some(Fault::LoseAnswer) => return Err("injected fault: the response is lost".into()),
                Some(Fault::AfterCommit(then)) => {
                    then();
                    return Err("injected fault: the response is lost".into());
                }
                _ => {}
            }
        }
        answered(head.status);
        let cut = if record.is_watch() { self.watches.lock().unwrap().clone() } else { CancellationToken::new() };
        head.headers.remove(CONNECTION);
        Ok(Response::from_parts(head, until(cut, body)))
    }

    /// The fault to inject for a request: before it is forwarded, or (`committed`) after the apiserver has executed it.
    fn due_fault(&self, record: &Record, committed: bool) -> Option<Fault> {
        let mut plans = self.plans.lock().unwrap();
        for plan in plans.iter_mut() {
            if plan.remaining == 0 || plan.fault.is_after_commit() != committed || !(plan.matches)(record) {
                continue;
            }
            if plan.skip > 0 {
                plan.skip -= 1;
                continue;
            }
            plan.remaining -= 1;
            plan.injected.fetch_add(1, Ordering::SeqCst);
            return Some(plan.fault.clone());
        }
        None
    }

    async fn forward(&self, mut head: Parts, body: Bytes) -> Result<Response<Incoming>, BoxError> {
        let mut uri = self.apiserver.clone().into_parts();
        uri.path_and_query = head.uri.path_and_query().cloned();
        head.uri = Uri::from_parts(uri)?;
        head.headers.remove(HOST);
        head.headers.remove(CONNECTION);
        Ok(self.client.request(Request::from_parts(head, Full::new(body))).await?)
    }
}

/// Streams `body`, and fails when `cut` is canceled.
fn until(cut: CancellationToken, body: Incoming) -> Body {
    let frames = stream::unfold((body, cut), async |(mut body, cut)| {
        let frame = tokio::select! {
            () = cut.cancelled() => Err("injected fault: the watch is cut".into()),
            frame = body.frame() => frame?.map_err(BoxError::from),
        };
        Some((frame, (body, cut)))
    });
    BodyExt::boxed_unsync(StreamBody::new(frames))
}

/// The response to a watch with one event: an error in the format of the apiserver.
fn error_event(reason: &str, message: &str, code: u16) -> Response<Body> {
    let status = serde_json::json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "reason": reason, "message": message, "code": code,
    });
    let event = serde_json::json!({"type": "ERROR", "object": status});
    Response::new(Full::from(format!("{event}\n")).map_err(|never| match never {}).boxed_unsync())
}

/// An error response in the format of the apiserver.
fn error_response(status: StatusCode) -> Result<Response<Body>, BoxError> {
    let reason = match status.as_u16() {
        409 => "Conflict",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    let body = serde_json::json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "reason": reason, "message": "injected fault: rejected by the proxy", "code": status.as_u16(),
    });
    let mut response = Response::builder().status(status).header(CONTENT_TYPE, "application/json");
    if status == StatusCode::TOO_MANY_REQUESTS {
        response = response.header(RETRY_AFTER, "1");
    }
    Ok(response.body(Full::from(body.to_string()).map_err(|never| match never {}).boxed_unsync())?)
}
