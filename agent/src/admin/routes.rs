//! What is answered to which path.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Query, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::negotiate::Format;
use super::{AdminState, Column, Exposure, host};
use crate::telemetry::ConnectionView;

/// Requests of one listener that are worked on at one time; the others wait.
const WORKING: usize = 4;

/// How long a request may wait for its turn and for its data.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connections that `/connections` shows unless `limit` says otherwise, and at most.
const DEFAULT_LIMIT: usize = 1_000;
const MAX_LIMIT: usize = 100_000;

/// Header that says how many connections there are, shown or not.
const TOTAL: HeaderName = HeaderName::from_static("x-total-count");

/// Columns of the table of connections.
const CONNECTION_COLUMNS: &[Column] = &[
    column("ID", &["id"]),
    column("DIRECTION", &["direction"]),
    column("PHASE", &["phase"]),
    column("SOURCE", &["source_pod", "source_workload"]),
    column("SOURCE ADDRESS", &["source_address"]),
    column("SOURCE PRINCIPAL", &["source_principal"]),
    column("DESTINATION", &["destination_pod", "destination_workload"]),
    column("DESTINATION ADDRESS", &["destination_address"]),
    column("DESTINATION PRINCIPAL", &["destination_principal"]),
    column("SERVICE", &["destination_service_name"]),
    column("SECURITY", &["connection_security_policy"]),
    column("SENT", &["sent_bytes"]),
    column("RECEIVED", &["received_bytes"]),
    column("SECONDS", &["duration_seconds"]),
];

/// Columns of the table of ended connections.
const ENDED_COLUMNS: &[Column] = &[
    column("ID", &["id"]),
    column("DIRECTION", &["direction"]),
    column("SOURCE", &["source_pod", "source_workload"]),
    column("SOURCE ADDRESS", &["source_address"]),
    column("SOURCE PRINCIPAL", &["source_principal"]),
    column("DESTINATION", &["destination_pod", "destination_workload"]),
    column("DESTINATION ADDRESS", &["destination_address"]),
    column("DESTINATION PRINCIPAL", &["destination_principal"]),
    column("SERVICE", &["destination_service_name"]),
    column("SECURITY", &["connection_security_policy"]),
    column("SENT", &["sent_bytes"]),
    column("RECEIVED", &["received_bytes"]),
    column("SECONDS", &["duration_seconds"]),
    column("END", &["close_reason"]),
    column("REASON", &["reason"]),
    column("DETAIL", &["detail"]),
];

const fn column(header: &'static str, fields: &'static [&'static str]) -> Column {
    Column { header, fields }
}

/// Reads for requests, a bounded number at one time.
#[derive(Clone)]
struct Reader {
    state: Arc<AdminState>,
    permits: Arc<Semaphore>,
}

/// The data was not there in time, or reading it failed.
struct Unread(&'static str);

impl IntoResponse for Unread {
    fn into_response(self) -> Response {
        (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", self.0)).into_response()
    }
}

impl Reader {
    fn new(state: Arc<AdminState>) -> Self {
        Self {
            state,
            permits: Arc::new(Semaphore::new(WORKING)),
        }
    }

    /// Reads on a thread that may block. The permit stays with the reading, not with the request:
    /// clients that give up do not make more of it.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&AdminState) -> T + Send + 'static,
    ) -> Result<T, Unread> {
        let working = async {
            let permit = self.permits.clone().acquire_owned().await;
            let state = self.state.clone();
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                read(&state)
            })
            .await
        };
        match tokio::time::timeout(PATIENCE, working).await {
            Ok(Ok(read)) => Ok(read),
            Ok(Err(_)) => Err(Unread("the agent failed to read its state")),
            Err(_) => Err(Unread("the agent is too busy to answer")),
        }
    }
}

/// The admin endpoint.
pub(super) fn admin(state: Arc<AdminState>, exposure: Exposure) -> Router {
    let router = Router::new()
        .route("/", get(index))
        .route("/healthz", get(health))
        .route("/readyz", get(conditions))
        .route("/connections", get(connections))
        .route("/connections/ended", get(ended))
        .route("/{view}", get(view))
        .with_state(Reader::new(state))
        .layer(middleware::from_fn(move |request, next| {
            only_for_us(exposure, request, next)
        }));
    get_only(router)
}

/// Metrics.
pub(super) fn metrics(state: Arc<AdminState>) -> Router {
    get_only(
        Router::new()
            .route("/metrics", get(scrape))
            .route("/stats/prometheus", get(scrape))
            .with_state(Reader::new(state)),
    )
}

/// Readiness, for those who can see the node: names of conditions and no more.
pub(super) fn readiness(state: Arc<AdminState>) -> Router {
    get_only(
        Router::new()
            .route("/healthz/ready", get(ready))
            .route("/readyz", get(ready))
            .with_state(Reader::new(state)),
    )
}

fn get_only(router: Router) -> Router {
    router.layer(middleware::from_fn(refuse_other_methods))
}

async fn refuse_other_methods(request: Request, next: Next) -> Response {
    if request.method() != Method::GET {
        let allow = [(ALLOW, HeaderValue::from_static("GET"))];
        return (StatusCode::METHOD_NOT_ALLOWED, allow, "only GET\n").into_response();
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn only_for_us(exposure: Exposure, request: Request, next: Next) -> Response {
    if host::is_for_us(&request, exposure) {
        return next.run(request).await;
    }
    let refusal = "the Host of the request is not an address of this endpoint or localhost\n";
    (StatusCode::FORBIDDEN, refusal).into_response()
}

async fn index(State(reader): State<Reader>, headers: HeaderMap) -> Response {
    let mut paths = vec![
        "/healthz".to_owned(),
        "/readyz".into(),
        "/connections".into(),
        "/connections/ended".into(),
    ];
    paths.extend(reader.state.view_names().map(|name| format!("/{name}")));
    Format::of(&headers).respond(StatusCode::OK, &json!(paths), &[])
}

async fn health(State(reader): State<Reader>, headers: HeaderMap) -> Result<Response, Unread> {
    let health = reader.read(AdminState::health).await?;
    Ok(Format::of(&headers).respond(StatusCode::OK, &health, &[]))
}

async fn conditions(State(reader): State<Reader>, headers: HeaderMap) -> Result<Response, Unread> {
    let readiness = reader.read(AdminState::readiness).await?;
    let status = status_of(readiness.is_ready());
    Ok(Format::of(&headers).respond(status, &readiness.to_value(), &[]))
}

async fn ready(State(reader): State<Reader>) -> Result<Response, Unread> {
    let readiness = reader.read(AdminState::readiness).await?;
    let unmet: Vec<_> = readiness.unmet().collect();
    let body = if unmet.is_empty() {
        "ready\n".to_owned()
    } else {
        format!("not ready: {}\n", unmet.join(", "))
    };
    Ok((status_of(unmet.is_empty()), body).into_response())
}

fn status_of(ready: bool) -> StatusCode {
    if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

/// Which connections to show.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConnectionQuery {
    limit: Option<usize>,
    /// Namespace of either side.
    namespace: Option<String>,
    /// `namespace/name` of the pod of either side.
    pod: Option<String>,
}

impl ConnectionQuery {
    fn matches(&self, view: &ConnectionView) -> bool {
        let (source, destination) = (&view.source, &view.destination);
        let namespace = self.namespace.as_deref().is_none_or(|wanted| {
            [
                source.source_workload_namespace.as_deref(),
                destination.destination_workload_namespace.as_deref(),
            ]
            .contains(&Some(wanted))
        });
        let pod = self.pod.as_deref().is_none_or(|wanted| {
            [&source.source_pod, &destination.destination_pod]
                .into_iter()
                .flatten()
                .any(|pod| pod.to_string() == wanted)
        });
        namespace && pod
    }
}

async fn connections(
    State(reader): State<Reader>,
    Query(query): Query<ConnectionQuery>,
    headers: HeaderMap,
) -> Result<Response, Unread> {
    let format = Format::of(&headers);
    reader
        .read(move |state| {
            let mut views = state.telemetry().connections();
            views.retain(|view| query.matches(view));
            list(&views, query.limit, CONNECTION_COLUMNS, format)
        })
        .await
}

async fn ended(
    State(reader): State<Reader>,
    Query(query): Query<ConnectionQuery>,
    headers: HeaderMap,
) -> Result<Response, Unread> {
    let format = Format::of(&headers);
    reader
        .read(move |state| {
            let mut views = state.telemetry().ended();
            views.retain(|view| query.matches(&view.connection));
            list(&views, query.limit, ENDED_COLUMNS, format)
        })
        .await
}

/// The first of these, as many as are wanted, and in a header how many there are.
fn list<T: Serialize>(
    views: &[T],
    limit: Option<usize>,
    columns: &[Column],
    format: Format,
) -> Response {
    let limit = limit.unwrap_or(DEFAULT_LIMIT).min(MAX_LIMIT);
    let rows: Vec<Value> = views
        .iter()
        .take(limit)
        .filter_map(|view| serde_json::to_value(view).ok())
        .collect();
    let mut response = format.respond(StatusCode::OK, &Value::Array(rows), columns);
    response.headers_mut().insert(TOTAL, views.len().into());
    response
}

async fn view(
    State(reader): State<Reader>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Unread> {
    let Some(columns) = reader.state.view_named(&name).map(|view| view.columns) else {
        return Ok((StatusCode::NOT_FOUND, "there is no such view; see /\n").into_response());
    };
    let value = reader
        .read(move |state| state.view_named(&name).map(|view| view.read()))
        .await?;
    Ok(Format::of(&headers).respond(StatusCode::OK, &value.unwrap_or_default(), columns))
}

async fn scrape(State(reader): State<Reader>) -> Result<Response, Unread> {
    let scraped = reader.read(|state| state.telemetry().scrape()).await?;
    let exposition = scraped.map_err(|_| Unread("the metrics cannot be written"))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(CONTENT_TYPE, HeaderValue::from_static(kind))], exposition).into_response())
}
