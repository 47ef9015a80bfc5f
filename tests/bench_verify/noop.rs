//! The floor: an authorization server of the same stack (hyper, tonic, the same listener and limits) that decides
//! nothing. It reads what Envoy or a proxy sends, lets it pass, and sets one header.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    pin::Pin,
    task::{Context, Poll},
};

use anyhow::Result;
use http::{HeaderValue, Request, Response};
use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use keywright::verify::{
    envoy_grpc::{self, CheckRequest, CheckResponse, HeaderValueOption, OkHttpResponse, RpcStatus, check_response},
    server,
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
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        Box::pin(async move {
            if request.uri().path() == envoy_grpc::PATH {
                let codec = tonic_prost::ProstCodec::<CheckResponse, CheckRequest>::default();
                let mut grpc = tonic::server::Grpc::new(codec);
                let call = grpc.unary(Noop, request);
                return Ok(server::within_patience(async { call.await.map(Either::Right) }).await);
            }
            let mut response = Response::new(Full::<Bytes>::default());
            response.headers_mut().insert("x-keywright-team", HeaderValue::from_static("shop"));
            Ok(response.map(Either::Left))
        })
    }
}

/// Serves until it is killed.
pub async fn serve(address: &str) -> Result<()> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let mut server = axum_server::from_tcp(listener)?;
    server::limit(server.http_builder());
    let make = tower::service_fn(|_: std::net::SocketAddr| ready(Ok::<_, Infallible>(Noop)));
    Ok(server.serve(make).await?)
}
