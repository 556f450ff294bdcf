//! Server-sent events on their way through: whole events only, so that an error event can
//! follow at any moment and a client never sees half an event.

use bytes::{Bytes, BytesMut};
use memchr::memmem;

/// State of one stream.
#[derive(Debug, Default)]
pub struct Events {
    /// Begin of an event whose end didn't come yet.
    rest: BytesMut,
    last: Bytes,
    before_last: Bytes,
    /// Events passed on.
    pub count: u64,
}

impl Events {
    /// Takes what came; returns the whole events in it, if any. The usual case, where it ends
    /// with an event, copies nothing.
    pub fn push(&mut self, data: Bytes) -> Option<Bytes> {
        let whole = if self.rest.is_empty() && ends_event(&data) {
            data
        } else {
            self.rest.extend_from_slice(&data);
            let end = last_end(&self.rest)?;
            self.rest.split_to(end).freeze()
        };
        if whole.is_empty() {
            return None;
        }
        self.count += count(&whole);
        self.before_last = std::mem::replace(&mut self.last, whole.clone());
        Some(whole)
    }

    /// The stream said itself that it is over: [DONE], or an error of the replica's own.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let text = self.last.trim_ascii_end();
        let start = memmem::rfind(text, b"\n").map_or(0, |at| at + 1);
        let line = text.get(start..).unwrap_or_default();
        let Some(data) = line.strip_prefix(b"data:") else {
            return false;
        };
        let data = data.trim_ascii_start();
        data == b"[DONE]" || data.starts_with(b"{\"error\"")
    }

    /// (prompt, completion) tokens, if the stream ended with a usage.
    #[must_use]
    pub fn usage(&self) -> (Option<u64>, Option<u64>) {
        let (prompt, completion) = usage(&self.last);
        let (earlier_prompt, earlier_completion) = usage(&self.before_last);
        (prompt.or(earlier_prompt), completion.or(earlier_completion))
    }
}

fn ends_event(data: &[u8]) -> bool {
    data.ends_with(b"\n\n") || data.ends_with(b"\r\n\r\n")
}

/// Byte after the last whole event.
fn last_end(data: &[u8]) -> Option<usize> {
    let unix = memmem::rfind(data, b"\n\n").map(|at| at + 2);
    let crlf = memmem::rfind(data, b"\r\n\r\n").map(|at| at + 4);
    unix.max(crlf)
}

fn count(data: &[u8]) -> u64 {
    let starts = memmem::find_iter(data, b"\ndata:").count();
    starts as u64 + u64::from(data.starts_with(b"data:"))
}

/// (prompt, completion) tokens from the usage of an answer, searched in its last bytes.
#[must_use]
pub fn usage(data: &[u8]) -> (Option<u64>, Option<u64>) {
    let tail = data.get(data.len().saturating_sub(512)..).unwrap_or(data);
    let find = |name: &[u8]| {
        let at = memmem::rfind(tail, name)? + name.len();
        let rest = tail.get(at..)?.trim_ascii_start().strip_prefix(b":")?;
        let digits = rest.trim_ascii_start();
        let end = digits.iter().position(|byte| !byte.is_ascii_digit());
        let digits = digits.get(..end.unwrap_or(digits.len()))?;
        std::str::from_utf8(digits).ok()?.parse().ok()
    };
    (find(b"\"prompt_tokens\""), find(b"\"completion_tokens\""))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_half_event_waits_for_its_end() {
        let mut events = Events::default();
        assert_eq!(events.push(Bytes::from("data: a")), None);
        let whole = events.push(Bytes::from("b\n\ndata: c"));
        assert_eq!(whole.as_deref(), Some(&b"data: ab\n\n"[..]));
        assert!(!events.is_complete());
        let whole = events.push(Bytes::from("\n\ndata: [DONE]\n\n"));
        assert_eq!(whole.as_deref(), Some(&b"data: c\n\ndata: [DONE]\n\n"[..]));
        assert!(events.is_complete());
        assert_eq!(events.count, 3);
    }

    #[test]
    fn knows_how_streams_end() {
        for (text, complete) in [
            ("data: [DONE]\n\n", true),
            ("data:[DONE]\r\n\r\n", true),
            ("data: {\"error\": {}}\n\n", true),
            ("data: {\"text\": \"data: [DONE]\"}\n\n", false),
            (": ping\n\n", false),
        ] {
            let mut events = Events::default();
            events.push(Bytes::from(text));
            assert_eq!(events.is_complete(), complete, "{text}");
        }
    }

    #[test]
    fn reads_the_usage() {
        let text = br#"{"usage":{"prompt_tokens":12,"total_tokens":15,"completion_tokens": 3}}"#;
        assert_eq!(usage(text), (Some(12), Some(3)));
        assert_eq!(usage(b"{}"), (None, None));
        let mut events = Events::default();
        events.push(Bytes::from([b"data: ", &text[..], b"\n\n"].concat()));
        events.push(Bytes::from("data: [DONE]\n\n"));
        assert_eq!(events.usage(), (Some(12), Some(3)));
    }

    proptest! {
        /// However a stream is cut into pieces, the same events come out, whole.
        #[test]
        fn pieces_make_no_difference(cuts in proptest::collection::vec(1usize..9, 1..60)) {
            let text = "data: one\n\n: ping\n\ndata: two\ndata: more\n\ndata: [DONE]\n\n";
            let mut events = Events::default();
            let mut out = Vec::new();
            let mut rest = text;
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                rest = after;
                if let Some(whole) = events.push(Bytes::copy_from_slice(piece.as_bytes())) {
                    prop_assert!(whole.ends_with(b"\n\n"));
                    out.extend_from_slice(&whole);
                }
            }
            prop_assert!(text.as_bytes().starts_with(&out));
            out.extend_from_slice(&events.push(Bytes::from(rest)).unwrap_or_default());
            prop_assert_eq!(out, text.as_bytes());
        }
    }
}
