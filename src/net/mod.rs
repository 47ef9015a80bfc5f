//! HTTP servers for the webhook, the verifier and the health ports: listeners, limits on connections and request
//! bodies, and time-outs. This module does not interpret requests.

mod bodies;
pub mod connection_limit;
mod lingering;
pub mod listener;
