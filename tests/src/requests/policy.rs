//! The objects that say how requests are treated.

use serde_json::{Value, json};

/// One retry on 503 and its like for every request of an HTTPRoute on Service `service`, to these backends (name
/// and weight).
pub(super) fn route(service: &str, port: u16, backends: &[(&str, u32)]) -> Value {
    let backends: Vec<Value> = backends
        .iter()
        .map(|(name, weight)| json!({"name": name, "port": port, "weight": weight}))
        .collect();
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": service, "namespace": "default"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": service, "port": port}],
            "rules": [{
                "backendRefs": backends,
                "retry": {"codes": [500, 502, 503, 504], "attempts": 3, "backoff": "25ms"},
            }],
        },
    })
}

/// A TrafficPolicy on Service `service`.
#[must_use]
pub fn traffic_policy(service: &str, mut spec: Value) -> Value {
    spec["targetRefs"] = json!([{"group": "", "kind": "Service", "name": service}]);
    json!({
        "apiVersion": "undermesh.io/v1alpha1",
        "kind": "TrafficPolicy",
        "metadata": {"name": service, "namespace": "default"},
        "spec": spec,
    })
}
