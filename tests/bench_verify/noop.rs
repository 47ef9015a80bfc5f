//! The floor: an authorization server of the same stack (hyper, tonic, the same listener and limits) that decides
//! nothing. It reads what Envoy or a proxy sends, lets it pass, and sets one header.

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
    runtime::{
        args::LogFormat,
        listener::{self, PATIENCE, Places},
        telemetry,
    },
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
    type Future = server::Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        if request.uri().path() == envoy_grpc::PATH {
            let call = async {
                let codec = tonic_prost::ProstCodec::<CheckResponse, CheckRequest>::default();
                tonic::server::Grpc::new(codec).unary(Noop, request).await.map(Either::Right)
            };
            return EitherFuture::Right(Box::pin(within_patience(call)));
        }
        let mut response = Response::new(Full::<Bytes>::default());
        response.headers_mut().insert("x-keywright-team", HeaderValue::from_static("shop"));
        EitherFuture::Left(ready(Ok(response.map(Either::Left))))
    }
}

/// The least that keeps a request from staying in memory for ever.
async fn within_patience(
    answer: impl Future<Output = Response<server::Body>>,
) -> Result<Response<server::Body>, Infallible> {
    Ok(tokio::time::timeout(PATIENCE, answer).await.unwrap_or_else(|_| Response::new(Either::Left(Full::default()))))
}

/// Serves until it is killed.
pub async fn serve(address: &str) -> Result<()> {
    // As the verifier: without a subscriber, spans of the libraries would cost it more than they cost that.
    telemetry::start(LogFormat::Text, "info").map_err(anyhow::Error::msg)?;
    let listener = std::net::TcpListener::bind(address)?;
    let handle = axum_server::Handle::new();
    Ok(listener::serve(listener, None, handle, Places::new(4096), || Noop).await?)
}
