//! Refuses objects that hold the value of a key. It is asked in the mutating webhook, since the API server calls that before
//! it holds an object to the schema: a refusal by the schema repeats the value.

use kube::core::{
    DynamicObject, Status,
    admission::{AdmissionRequest, AdmissionResponse},
    response::{StatusCause, StatusDetails, StatusSummary},
};
use serde_json::Value;

use crate::{api::GROUP, domain::pasted};

/// What is wrong with such a field. The value is not in it.
const WHY: &str = "must not hold the value of an API key, which is not repeated here: remove it, and rotate that key \
                   if others could see this manifest";

/// The refusal, if the object in this review holds the value of a key that it did not hold before.
pub(super) fn refuse(request: &AdmissionRequest<DynamicObject>, body: &[u8]) -> Option<AdmissionResponse> {
    // The usual case is decided without a look at fields.
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
