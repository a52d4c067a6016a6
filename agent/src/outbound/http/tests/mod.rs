//! The engine with peers over loopback that stand for pods: what is between them and the engine in
//! production, the kernel, has no part in how requests are routed, attempted and judged.

mod harness;
mod judged;
mod refused;
mod retried;
mod routed;
mod shared;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::*;
use crate::http::Wire;
use crate::mesh::route::{Backend, BackendTarget, Filters, PathMatch, RequestMatch, Rule};
use harness::*;
