//! The baseline: an authorization server of the same stack (hyper, tonic, the same listener and limits) that allows
//! every request and sets one header.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll},
};

use anyhow::Result;
use futures::future::Either as EitherFuture;
use http::{HeaderValue, Request, Response};
use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use keywright::{
    net::listener::{self, ConnectionLimit, REQUEST_TIMEOUT},
    telemetry::{Telemetry, TelemetryArgs, logs::LogFormat},
    verify::{
        envoy_grpc::{self, CheckRequest, CheckResponse, HeaderValueOption, OkHttpResponse, RpcStatus, check_response},
        server,
    },
};
use tonic::{Status, server::UnaryService};
use tower::Service;

#[derive(Clone)]
struct Noop;

impl UnaryService<CheckRequest> for Noop {
    type Response = CheckResponse;
    type Future = Ready<Result<tonic::Response<CheckResponse>, Status>>;

    fn call(&mut self, _: tonic::Request<CheckRequest>) -> Self::Future {
        let header = HeaderValueOption::set(Bytes::from_static(b"x-keywright-team"), Bytes::from_static(b"shop"));
        let ok = OkHttpResponse { headers: vec![header], ..OkHttpResponse::default() };
        let response = Some(check_response::HttpResponse::Ok(ok));
        ready(Ok(tonic::Response::new(CheckResponse { status: Some(RpcStatus { code: 0 }), response })))
    }
}

impl Service<Request<Incoming>> for Noop {
    type Response = Response<server::Body>;
    type Error = Infallible;
    type Future = server::CheckFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        if request.uri().path() == envoy_grpc::PATH {
            let call = async {
                let codec = tonic_prost::ProstCodec::<CheckResponse, CheckRequest>::default();
                tonic::server::Grpc::new(codec).unary(Noop, request).await.map(Either::Right)
            };
            return EitherFuture::Right(Box::pin(with_timeout(call)));
        }
        let mut response = Response::new(Full::<Bytes>::default());
        response.headers_mut().insert("x-keywright-team", HeaderValue::from_static("shop"));
        EitherFuture::Left(ready(Ok(response.map(Either::Left))))
    }
}

/// Limits the time of a request, as the verifier does.
async fn with_timeout(
    answer: impl Future<Output = Response<server::Body>>,
) -> Result<Response<server::Body>, Infallible> {
    Ok(tokio::time::timeout(REQUEST_TIMEOUT, answer)
        .await
        .unwrap_or_else(|_| Response::new(Either::Left(Full::default()))))
}

/// Serves until the process is killed.
pub async fn serve(address: &str) -> Result<()> {
    // Like the verifier: without a subscriber, spans of the libraries would cost more than in the verifier.
    let args = TelemetryArgs { log_format: LogFormat::Text, log: "info".to_owned(), otlp_endpoint: None };
    let _telemetry = Telemetry::start(&args, "noop")?;
    let listener = std::net::TcpListener::bind(address)?;
    let handle = axum_server::Handle::new();
    Ok(listener::serve(listener, None, handle, ConnectionLimit::new(4096), || Noop).await?)
}
