//! A request's place at a replica. Dropping it frees the place and lets the next one in.

use std::sync::Arc;

use crate::clock;
use crate::replica::Replica;
use crate::service::{Service, State};

#[derive(Debug)]
pub struct Lease {
    service: Arc<Service>,
    pub replica: Arc<Replica>,
    /// Tokens counted as still to do.
    prompt: i64,
    output: i64,
    since: f64,
    released: bool,
}

impl Lease {
    /// Under the service's lock.
    pub(crate) fn new(
        service: Arc<Service>,
        replica: Arc<Replica>,
        prompt_tokens: u64,
        output_tokens: u64,
    ) -> Self {
        let prompt = i64::try_from(prompt_tokens).unwrap_or(i64::MAX / 4);
        let output = i64::try_from(output_tokens).unwrap_or(i64::MAX / 4);
        replica.begin(prompt + output);
        Self {
            service,
            replica,
            prompt,
            output,
            since: clock::now(),
            released: false,
        }
    }

    /// So many more tokens came: the prompt is done, and the answer so much shorter.
    pub fn progress(&mut self, tokens: u64) {
        let tokens = i64::try_from(tokens).unwrap_or(0).min(self.output);
        let done = std::mem::take(&mut self.prompt) + tokens;
        self.output -= tokens;
        self.replica.progress(done);
    }

    /// The answer is complete: its duration is what a place at this service lasts.
    pub fn completed(&self) {
        self.service.learn_duration(clock::now() - self.since);
        self.replica.succeeded();
    }

    /// Frees the place without letting the next one in; under the service's lock.
    pub(crate) fn release(&mut self, _locked: &mut State) {
        if !std::mem::replace(&mut self.released, true) {
            self.replica.end(self.prompt + self.output);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        let service = Arc::clone(&self.service);
        let mut state = service.lock();
        self.release(&mut state);
        service.pump(&mut state);
    }
}
