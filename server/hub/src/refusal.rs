//! What a server's no means, and what to do about it.

use http::StatusCode;

use crate::client::Response;

/// The most of a server's own words that is passed on.
const MAX_WORDS: usize = 300;

/// Words for an answer that means no. A hub says more in `X-Error-Code` and `X-Error-Message`.
pub(crate) fn describe(response: &Response, with_token: bool) -> String {
    let code = response.header("x-error-code").unwrap_or_default();
    let words: String = response
        .header("x-error-message")
        .unwrap_or_default()
        .chars()
        .filter(|c| !c.is_control())
        .take(MAX_WORDS)
        .collect();
    let advice = advice(response.status, code, with_token);
    let status = response.status;
    match words.is_empty() {
        true => format!("the server answered {status}: {advice}"),
        false => format!("the server answered {status} ({words}): {advice}"),
    }
}

fn advice(status: StatusCode, code: &str, with_token: bool) -> &'static str {
    match (status, code, with_token) {
        (_, "RepoNotFound", false) => {
            "there is no such model, or it is private; check its name, or give a token that may \
             read it (HF_TOKEN, from spec.model.secretRef)"
        }
        (_, "RepoNotFound", true) => {
            "there is no such model, or the token in HF_TOKEN may not read it; check its name and \
             whose token it is"
        }
        (_, "RevisionNotFound", _) => "there is no such revision; check what follows the @",
        (_, "EntryNotFound", _) => "the revision has no such file",
        (_, "GatedRepo", true) => {
            "the model is gated, and the token's account hasn't been granted access; accept its \
             terms on the model's page with that account"
        }
        (_, "GatedRepo", false) | (StatusCode::UNAUTHORIZED, _, false) => {
            "the model is gated, private or not there; accept its terms on the model's page and \
             give a token of that account (HF_TOKEN, from spec.model.secretRef)"
        }
        (StatusCode::UNAUTHORIZED, _, true) => {
            "the token in HF_TOKEN isn't accepted; it may be mistyped, expired or revoked"
        }
        (StatusCode::FORBIDDEN, _, true) => {
            "the token in HF_TOKEN may not read this; check its permissions, and accept the \
             model's terms with its account"
        }
        (StatusCode::FORBIDDEN, _, false) => {
            "access is denied; if it takes a token, give one (HF_TOKEN, from spec.model.secretRef)"
        }
        (StatusCode::NOT_FOUND | StatusCode::GONE, _, _) => {
            "it isn't there; check the name and the revision"
        }
        _ => "that isn't an answer to retry",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_no_has_its_advice() {
        let cases = [
            (401, "", false, "give a token"),
            (401, "", true, "isn't accepted"),
            (401, "GatedRepo", false, "accept its terms"),
            (403, "GatedRepo", true, "accept its terms"),
            (401, "RepoNotFound", false, "check its name"),
            (404, "RepoNotFound", true, "whose token"),
            (404, "RevisionNotFound", false, "follows the @"),
            (404, "EntryNotFound", false, "no such file"),
            (404, "", false, "isn't there"),
            (403, "", true, "permissions"),
            (403, "", false, "denied"),
            (418, "", false, "isn't an answer"),
        ];
        for (status, code, with_token, word) in cases {
            let status = StatusCode::from_u16(status).unwrap();
            let text = advice(status, code, with_token);
            assert!(text.contains(word), "{status} {code}: {text}");
        }
    }
}
