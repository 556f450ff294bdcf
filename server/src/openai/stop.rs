//! Stop strings in a text that arrives in pieces.

/// Finds the first stop string in a stream of text pieces, and holds back text that may turn out
/// to be the beginning of one.
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text not yet given out: always a proper prefix of some stop string, or empty.
    held: String,
}

/// What a piece of text led to.
#[derive(Debug, PartialEq, Eq)]
pub struct Matched {
    /// Text that can be given out now.
    pub text: String,
    /// True once a stop string was found; the text ends before it.
    pub stopped: bool,
}

impl StopMatcher {
    pub fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Takes the next piece of the text.
    pub fn push(&mut self, piece: &str) -> Matched {
        if self.stops.is_empty() {
            return Matched {
                text: piece.to_owned(),
                stopped: false,
            };
        }
        self.held.push_str(piece);
        if let Some(at) = first_stop(&self.held, &self.stops) {
            self.held.truncate(at);
            return Matched {
                text: std::mem::take(&mut self.held),
                stopped: true,
            };
        }
        let keep = self.possible_stop_start();
        let rest = self.held.split_off(keep);
        Matched {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }

    /// The held text, when no more pieces come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the longest suffix of the held text begins that some stop string starts with.
    fn possible_stop_start(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        (from..self.held.len())
            .filter(|&at| self.held.is_char_boundary(at))
            .find(|&at| {
                let tail = &self.held[at..];
                self.stops.iter().any(|stop| stop.starts_with(tail))
            })
            .unwrap_or(self.held.len())
    }
}

/// Where the stop string begins that is complete first, so that the result doesn't depend on how
/// the text is cut into pieces.
fn first_stop(text: &str, stops: &[String]) -> Option<usize> {
    stops
        .iter()
        .filter_map(|stop| text.find(stop).map(|at| (at + stop.len(), at)))
        .min()
        .map(|(_, at)| at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(ToString::to_string).collect());
        let mut out = String::new();
        for piece in pieces {
            let matched = matcher.push(piece);
            out.push_str(&matched.text);
            if matched.stopped {
                return (out, true);
            }
        }
        out.push_str(&matcher.finish());
        (out, false)
    }

    #[test]
    fn a_stop_split_over_pieces_is_held_back() {
        let mut matcher = StopMatcher::new(vec!["END".into()]);
        assert_eq!(matcher.push("the E").text, "the ");
        assert_eq!(matcher.push("N").text, "");
        assert_eq!(
            matcher.push("D of it"),
            Matched {
                text: String::new(),
                stopped: true
            }
        );
    }

    #[test]
    fn a_false_start_is_given_out() {
        assert_eq!(
            run(&["END"], &["EN", "ENE", "NX"]),
            ("ENENENX".into(), false)
        );
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]), ("a".into(), true));
        assert_eq!(run(&["."], &["no stop"]), ("no stop".into(), false));
    }

    #[test]
    fn multi_byte_text() {
        assert_eq!(run(&["é!"], &["caf", "é", "?"]), ("café?".into(), false));
        assert_eq!(run(&["é!"], &["caf", "é", "! x"]), ("caf".into(), true));
    }

    proptest! {
        /// However the text is cut, the result is that of the whole text.
        #[test]
        fn cuts_do_not_matter(text in "[abé]{0,24}", stops in prop::collection::vec("[abé]{1,4}", 0..4),
                              cuts in prop::collection::vec(1usize..5, 0..24)) {
            let expected = match first_stop(&text, &stops) {
                Some(at) => (text[..at].to_owned(), true),
                None => (text.clone(), false),
            };
            let chars: Vec<char> = text.chars().collect();
            let mut pieces = Vec::new();
            let mut rest = chars.as_slice();
            for cut in cuts {
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                pieces.push(head.iter().collect::<String>());
                rest = tail;
            }
            pieces.push(rest.iter().collect());
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops, &pieces), expected);
        }
    }
}
