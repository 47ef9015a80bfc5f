//! Rejects objects that contain the value of a key. The mutating webhook does this, since the API server calls it
//! before it checks the schema, and a schema error would repeat the value.

use kube::core::{
    DynamicObject, Status,
    admission::{AdmissionRequest, AdmissionResponse},
    response::{StatusCause, StatusDetails, StatusSummary},
};
use serde_json::Value;

use crate::{api::GROUP, domain::pasted};

/// The message, without the value.
const WHY: &str = "must not hold the value of an API key, which is not repeated here: remove it, and rotate that key \
                   if others could see this manifest";

/// Returns a rejection if the object in this review contains the value of a key that the old object does not contain.
pub(super) fn reject(request: &AdmissionRequest<DynamicObject>, body: &[u8]) -> Option<AdmissionResponse> {
    // The usual case, without parsing.
    if !str::from_utf8(body).is_ok_and(pasted::holds_value) {
        return None;
    }
    let review: Value = serde_json::from_slice(body).ok()?;
    let fields = pasted::fields(&review["request"]["object"], Some(&review["request"]["oldObject"]));
    if fields.is_empty() {
        return None;
    }
    let message: Vec<_> = fields.iter().map(|field| format!("{field}: Invalid value: {WHY}")).collect();
    let causes = fields.into_iter().map(|field| StatusCause {
        reason: "FieldValueInvalid".to_owned(),
        message: format!("Invalid value: {WHY}"),
        field,
    });
    let mut response = AdmissionResponse::from(request);
    response.allowed = false;
    response.result = Status {
        status: Some(StatusSummary::Failure),
        code: 422,
        reason: "Invalid".to_owned(),
        message: message.join(", "),
        details: Some(StatusDetails {
            causes: causes.collect(),
            name: String::new(),
            group: GROUP.to_owned(),
            kind: request.kind.kind.clone(),
            uid: String::new(),
            retry_after_seconds: 0,
        }),
        ..Status::default()
    };
    Some(response)
}
