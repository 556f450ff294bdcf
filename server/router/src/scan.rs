//! Reads from a request's JSON body what routing needs, in one pass and without building a
//! value: the replica parses the rest, and reports what is wrong with it.

use std::borrow::Cow;
use std::ops::Range;

use memchr::{memchr2, memchr3};
use thiserror::Error;

/// What routing needs to know.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scan {
    pub model: Option<String>,
    /// `max_completion_tokens`, or `max_tokens`.
    pub max_tokens: Option<u64>,
    pub priority: i32,
    pub stream: bool,
    /// Where the prompt (or the messages, or the input) is in the body.
    pub prompt: Range<usize>,
    /// Number of tokens, when the prompt is an array of them.
    pub token_ids: Option<u64>,
}

#[derive(Debug, Error, PartialEq)]
#[error("the body is not a JSON object: {what} at byte {at}")]
pub struct ScanError {
    pub what: &'static str,
    pub at: usize,
}

/// Scans a body. Values that have the wrong type count as absent.
///
/// # Errors
/// When it isn't an object, or ends early: such a body would only waste a replica's time.
pub fn scan(body: &[u8]) -> Result<Scan, ScanError> {
    let mut scanner = Scanner { body, at: 0 };
    let mut scan = Scan::default();
    let mut completion_tokens = None;
    scanner.spaces();
    scanner.expect(b'{', "no object starts")?;
    scanner.spaces();
    if scanner.peek() == Some(b'}') {
        return Ok(scan);
    }
    loop {
        scanner.spaces();
        let key = scanner.string()?;
        scanner.spaces();
        scanner.expect(b':', "no colon")?;
        scanner.spaces();
        let value = scanner.value()?;
        let text = &body[value.clone()];
        match &body[key] {
            b"model" => scan.model = unquote(text).map(Cow::into_owned),
            b"max_tokens" => scan.max_tokens = number(text),
            b"max_completion_tokens" => completion_tokens = number(text),
            b"priority" => {
                scan.priority = std::str::from_utf8(text)
                    .ok()
                    .and_then(|text| text.parse().ok())
                    .unwrap_or(0);
            }
            b"stream" => scan.stream = text == b"true",
            b"prompt" | b"messages" | b"input" if text != b"null" => {
                scan.token_ids = token_ids(text);
                scan.prompt = value;
            }
            _ => {}
        }
        scanner.spaces();
        match scanner.peek() {
            Some(b',') => scanner.at += 1,
            Some(b'}') => break,
            _ => return Err(scanner.error("no comma or closing brace")),
        }
    }
    scan.max_tokens = completion_tokens.or(scan.max_tokens);
    Ok(scan)
}

struct Scanner<'a> {
    body: &'a [u8],
    at: usize,
}

impl Scanner<'_> {
    fn peek(&self) -> Option<u8> {
        self.body.get(self.at).copied()
    }

    fn error(&self, what: &'static str) -> ScanError {
        ScanError { what, at: self.at }
    }

    fn spaces(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.at += 1;
        }
    }

    fn expect(&mut self, byte: u8, what: &'static str) -> Result<(), ScanError> {
        if self.peek() != Some(byte) {
            return Err(self.error(what));
        }
        self.at += 1;
        Ok(())
    }

    /// Past a string; returns what is between the quotes.
    fn string(&mut self) -> Result<Range<usize>, ScanError> {
        self.expect(b'"', "no string")?;
        let start = self.at;
        loop {
            let rest = self.body.get(self.at..).unwrap_or_default();
            let Some(found) = memchr2(b'"', b'\\', rest) else {
                return Err(self.error("a string has no end"));
            };
            if rest[found] == b'"' {
                let end = self.at + found;
                self.at = end + 1;
                return Ok(start..end);
            }
            self.at += found + 2;
        }
    }

    /// Past a value of any kind; returns where it is.
    fn value(&mut self) -> Result<Range<usize>, ScanError> {
        let start = self.at;
        match self.peek() {
            Some(b'"') => {
                self.string()?;
            }
            Some(b'{' | b'[') => self.nested()?,
            Some(_) => {
                let rest = &self.body[self.at..];
                let end = rest.iter().position(|byte| {
                    matches!(byte, b',' | b'}' | b']' | b' ' | b'\n' | b'\r' | b'\t')
                });
                let length = end.ok_or_else(|| self.error("a value has no end"))?;
                if length == 0 {
                    return Err(self.error("no value"));
                }
                self.at += length;
            }
            None => return Err(self.error("no value")),
        }
        Ok(start..self.at)
    }

    /// Past an array or object, by depth: which bracket closes which is the replica's matter.
    fn nested(&mut self) -> Result<(), ScanError> {
        let mut depth = 0usize;
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.string()?;
                }
                Some(b'{' | b'[') => {
                    depth += 1;
                    self.at += 1;
                }
                Some(b'}' | b']') => {
                    depth -= 1;
                    self.at += 1;
                    if depth == 0 {
                        return Ok(());
                    }
                }
                Some(_) => self.at += 1,
                None => return Err(self.error("an array or object has no end")),
            }
        }
    }
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn unquote(text: &[u8]) -> Option<Cow<'_, str>> {
    let inner = text.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    if memchr::memchr(b'\\', inner).is_some() {
        return serde_json::from_slice(text).ok().map(Cow::Owned);
    }
    std::str::from_utf8(inner).ok().map(Cow::Borrowed)
}

/// How many numbers an array (or an array of arrays) of them has; None when it holds text.
fn token_ids(text: &[u8]) -> Option<u64> {
    if !text.starts_with(b"[") || memchr3(b'"', b'{', b't', text).is_some() {
        return None;
    }
    let mut count = 0;
    let mut inside = false;
    for byte in text {
        let digit = byte.is_ascii_digit();
        count += u64::from(digit && !inside);
        inside = digit;
    }
    (count > 0).then_some(count)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn reads_a_chat_request() {
        let body = br#" { "messages" : [{"role":"user","content":"say \"model\": {x]"}],
            "model":"a\u0062c", "max_tokens": 7, "priority":-3 ,"stream": true,"n":1 } "#;
        let scan = scan(body).unwrap();
        assert_eq!(scan.model.as_deref(), Some("abc"));
        assert_eq!((scan.max_tokens, scan.priority), (Some(7), -3));
        assert!(scan.stream);
        assert!(body[scan.prompt].starts_with(b"[{\"role\""));
        assert_eq!(scan.token_ids, None);
    }

    #[test]
    fn counts_token_ids() {
        for (prompt, count) in [
            ("[1, 22,333]", Some(3)),
            ("[[1,2],[3]]", Some(3)),
            ("[\"a\",\"b\"]", None),
            ("\"1,2\"", None),
            ("[]", None),
        ] {
            let body = format!("{{\"prompt\":{prompt},\"max_completion_tokens\":5}}");
            let scan = scan(body.as_bytes()).unwrap();
            assert_eq!(scan.token_ids, count, "{prompt}");
            assert_eq!(scan.max_tokens, Some(5));
        }
    }

    #[test]
    fn wrong_types_count_as_absent() {
        let scan = scan(br#"{"model":7,"max_tokens":-1,"stream":"true","priority":1.5}"#).unwrap();
        assert_eq!(scan, Scan::default());
    }

    #[test]
    fn says_where_a_body_breaks() {
        for (body, what) in [
            ("", "no object starts"),
            ("[1]", "no object starts"),
            ("{\"a\":1", "a value has no end"),
            ("{\"a\":[1,{\"b\":2}", "an array or object has no end"),
            ("{\"a\":\"x\\", "a string has no end"),
            ("{\"a\" 1}", "no colon"),
            ("{\"a\":}", "no value"),
            ("{\"a\":1 \"b\":2}", "no comma"),
            ("{a:1}", "no string"),
        ] {
            let error = scan(body.as_bytes()).unwrap_err();
            assert!(error.what.contains(what), "{body}: {error}");
        }
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 20, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::hash_map(".{0,6}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = scan(&body);
        }

        #[test]
        fn any_cut_is_noticed(cut in 1usize..60) {
            let body = br#"{"model":"m","prompt":"a \" b","max_tokens":3,"x":[{"y":1}]}"#;
            prop_assume!(cut < body.len());
            prop_assert!(scan(&body[..cut]).is_err());
        }

        /// Agrees with a full parser, whatever stands around the fields.
        #[test]
        fn agrees_with_serde(model in ".{0,20}", prompt in ".{0,40}", tokens in 0u32..100_000,
                             before in values(), after in values(), pretty in any::<bool>()) {
            let value = json!({"a": before, "model": model, "prompt": prompt,
                               "max_tokens": tokens, "stream": true, "z": after});
            let body = if pretty { serde_json::to_vec_pretty(&value) } else { serde_json::to_vec(&value) }.unwrap();
            let scan = scan(&body).unwrap();
            prop_assert_eq!(scan.model, Some(model));
            prop_assert_eq!(scan.max_tokens, Some(u64::from(tokens)));
            prop_assert!(scan.stream);
            let read: String = serde_json::from_slice(&body[scan.prompt]).unwrap();
            prop_assert_eq!(read, prompt);
        }
    }
}
