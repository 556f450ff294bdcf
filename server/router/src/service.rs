//! One service: its replicas, its queue, and who goes where next.
//!
//! All decisions are made under one short lock a service. The invariants: while something
//! waits, no replica that could take it has room; and a replica never has more of this router's
//! requests than its slots.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use parking_lot::{Mutex, MutexGuard, RwLock};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::{broadcast, oneshot};

use crate::choose::{Candidate, Policy, choose};
use crate::clock;
use crate::estimates::{Average, Estimates};
use crate::keys::Keys;
use crate::lease::Lease;
use crate::metrics::ServiceMetrics;
use crate::prefix::{Prefix, PrefixTable, Slot};
use crate::queue::{FlowId, Position, Queue};
use crate::replica::Replica;
use crate::table::ServiceEntry;

/// Requests that wait for one service at most, whatever the objectives allow.
const MAX_WAITING: usize = 10_000;

/// What one request asks for.
#[derive(Clone, Debug)]
pub struct Ticket {
    pub position: Position,
    /// Seconds, on the clock of `clock::now`.
    pub arrived: f64,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    pub prefix: Prefix,
    /// Replicas that failed it.
    pub tried: Vec<Slot>,
}

impl Ticket {
    fn cost(&self) -> u64 {
        self.prompt_tokens + self.output_tokens
    }
}

#[derive(Debug, PartialEq)]
pub enum Refusal {
    /// The queue is too long for what the objectives allow.
    Busy { retry_after: f64, waiting: usize },
    /// No replica came in time.
    NoReplica { waited: f64 },
    /// The service left the table.
    Removed,
}

/// Settings from the table.
#[derive(Debug)]
pub struct Settings {
    pub entry: ServiceEntry,
    pub keys: Option<Keys>,
    pub policy: Policy,
}

#[derive(Debug)]
pub struct Service {
    /// `namespace/name`.
    pub key: Arc<str>,
    pub estimates: Estimates,
    pub metrics: ServiceMetrics,
    settings: RwLock<Arc<Settings>>,
    state: Mutex<State>,
    /// Of answers, from the replica's slot being taken to its being free.
    duration: Average,
    sequence: AtomicU64,
    arrivals: AtomicU64,
    last_arrival_ms: AtomicU64,
    wakes: broadcast::Sender<Arc<str>>,
    woken: AtomicBool,
}

#[derive(Debug)]
pub(crate) struct State {
    pub replicas: Vec<Arc<Replica>>,
    queue: Queue<Waiter>,
    queued_prompt_tokens: u64,
    prefixes: PrefixTable,
    random: SmallRng,
    scratch: Vec<(usize, Candidate)>,
    closed: bool,
    /// The first request without a replica came then.
    cold_since: Option<f64>,
}

#[derive(Debug)]
struct Waiter {
    ticket: Ticket,
    sender: oneshot::Sender<Lease>,
}

/// Takes a waiter out of the queue when its request gives up.
struct Waiting<'a> {
    service: &'a Service,
    position: Position,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.service.state.lock();
        if let Some(waiter) = state.queue.remove(self.position) {
            state.queued_prompt_tokens -= waiter.ticket.prompt_tokens;
        }
        if state.queue.is_empty() {
            // Nobody waits for a replica any more: the next one who does is the first again.
            state.cold_since = None;
            self.service.woken.store(false, Relaxed);
        }
    }
}

impl Service {
    #[must_use]
    pub fn new(
        settings: Settings,
        metrics: ServiceMetrics,
        wakes: broadcast::Sender<Arc<str>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            key: settings.entry.key().into(),
            estimates: Estimates::default(),
            metrics,
            settings: RwLock::new(Arc::new(settings)),
            state: Mutex::new(State {
                replicas: Vec::new(),
                queue: Queue::default(),
                queued_prompt_tokens: 0,
                prefixes: PrefixTable::default(),
                random: SmallRng::from_os_rng(),
                scratch: Vec::new(),
                closed: false,
                cold_since: None,
            }),
            duration: Average::new(0.0),
            sequence: AtomicU64::new(0),
            arrivals: AtomicU64::new(0),
            last_arrival_ms: AtomicU64::new((clock::now() * 1000.0) as u64),
            wakes,
            woken: AtomicBool::new(false),
        })
    }

    #[must_use]
    pub fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read())
    }

    /// A ticket for a request that just arrived.
    #[must_use]
    pub fn ticket(
        &self,
        flow: FlowId,
        priority: i32,
        tokens: (u64, u64),
        prefix: Prefix,
    ) -> Ticket {
        let arrived = clock::now();
        self.arrivals.fetch_add(1, Relaxed);
        self.last_arrival_ms
            .store((arrived * 1000.0) as u64, Relaxed);
        Ticket {
            position: Position {
                flow,
                priority,
                sequence: self.sequence.fetch_add(1, Relaxed),
            },
            arrived,
            prompt_tokens: tokens.0,
            output_tokens: tokens.1,
            prefix,
            tried: Vec::new(),
        }
    }

    /// Takes new settings and replicas; what known ones run and know stays. Returns those that
    /// are new.
    pub fn update(self: &Arc<Self>, settings: Settings) -> Vec<Arc<Replica>> {
        let mut state = self.state.lock();
        let mut fresh = Vec::new();
        let mut before = std::mem::take(&mut state.replicas);
        for entry in &settings.entry.replicas {
            let known = before
                .iter()
                .position(|known| known.id == entry.id && known.address == entry.address);
            let replica = match known {
                Some(place) => before.swap_remove(place),
                None => {
                    let replica = Arc::new(Replica::new(entry));
                    fresh.push(Arc::clone(&replica));
                    replica
                }
            };
            replica.update(entry);
            state.replicas.push(replica);
        }
        for gone in before {
            gone.remove();
        }
        *self.settings.write() = Arc::new(settings);
        self.pump(&mut state);
        fresh
    }

    /// Sends everyone away: the service is no more.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        for replica in state.replicas.drain(..) {
            replica.remove();
        }
        let waiters = state.queue.clear();
        state.queued_prompt_tokens = 0;
        drop(state);
        drop(waiters);
    }

    /// A place at a replica, at once or after a wait; dropping the future gives up the wait.
    pub async fn acquire(self: &Arc<Self>, ticket: &Ticket) -> Result<Lease, Refusal> {
        let mut receiver;
        let mut deadline;
        let cold_deadline;
        {
            let mut state = self.state.lock();
            if state.closed {
                return Err(Refusal::Removed);
            }
            if state.queue.is_empty()
                && let Some(lease) = self.take(&mut state, ticket)
            {
                return Ok(lease);
            }
            let settings = self.settings();
            let usable = state.is_usable();
            let retried = !ticket.tried.is_empty();
            let allowed = allowed_wait(&settings.entry, ticket.prompt_tokens as f64);
            let waiting = state.queue.len();
            let ahead = state.queue.ahead_of(ticket.position.flow);
            let predicted = self.predict(&state, ahead);
            if waiting >= MAX_WAITING || (usable && !retried && predicted > allowed) {
                let retry_after = (predicted - allowed).max(1.0);
                return Err(Refusal::Busy {
                    retry_after,
                    waiting,
                });
            }
            cold_deadline = ticket.arrived + settings.entry.cold_start_deadline_seconds;
            deadline = if usable && !retried {
                ticket.arrived + allowed
            } else {
                cold_deadline
            };
            let (sender, opened) = oneshot::channel();
            receiver = opened;
            let waiter = Waiter {
                ticket: ticket.clone(),
                sender,
            };
            state
                .queue
                .push(ticket.position, ticket.cost(), ticket.arrived, waiter);
            state.queued_prompt_tokens += ticket.prompt_tokens;
            if !usable {
                self.wake(&mut state);
            }
            self.pump(&mut state);
        }
        // Dropped before the receiver: a lease that was sent meanwhile is dropped with it.
        let _waiting = Waiting {
            service: self,
            position: ticket.position,
        };
        loop {
            match tokio::time::timeout_at(clock::instant(deadline), &mut receiver).await {
                Ok(Ok(lease)) => return Ok(lease),
                Ok(Err(_)) => return Err(Refusal::Removed),
                Err(_) => {
                    let state = self.state.lock();
                    let waiting = state.queue.len();
                    if state.is_usable() {
                        let retry_after = self.predict(&state, waiting / 2).max(1.0);
                        return Err(Refusal::Busy {
                            retry_after,
                            waiting,
                        });
                    }
                    if deadline >= cold_deadline {
                        let waited = clock::now() - ticket.arrived;
                        return Err(Refusal::NoReplica { waited });
                    }
                    deadline = cold_deadline;
                }
            }
        }
    }

    /// Gives waiting requests what room there is.
    pub(crate) fn pump(self: &Arc<Self>, state: &mut MutexGuard<'_, State>) {
        while let Some(waiter) = state.queue.peek() {
            let ticket = waiter.ticket.clone();
            let Some(lease) = self.take(state, &ticket) else {
                return;
            };
            let Some(waiter) = state.queue.pop() else {
                return;
            };
            state.queued_prompt_tokens -= ticket.prompt_tokens;
            if let Err(mut lease) = waiter.sender.send(lease) {
                // Its request leaves the queue before the receiver goes, so this can't be; but
                // a lease must not be dropped under the lock.
                lease.release(state);
            }
        }
    }

    /// Room may have come about without a lease ending: a longer cap, a replica back.
    pub fn refresh(self: &Arc<Self>) {
        let mut state = self.state.lock();
        if !state.queue.is_empty() {
            self.pump(&mut state);
        }
    }

    fn take(self: &Arc<Self>, state: &mut State, ticket: &Ticket) -> Option<Lease> {
        let now = clock::now();
        let mut scratch = std::mem::take(&mut state.scratch);
        scratch.clear();
        for (place, replica) in state.replicas.iter().enumerate() {
            if let Some(mut candidate) = replica.candidate(now) {
                candidate.own_tokens += ticket.cost() as f64;
                candidate.tried = ticket.tried.contains(&replica.slot);
                scratch.push((place, candidate));
            }
        }
        if scratch.len() > 1 {
            let most = ticket.prompt_tokens as f64;
            state.prefixes.find(&ticket.prefix, |slot, bytes| {
                let replicas = &state.replicas;
                let same = scratch
                    .iter_mut()
                    .find(|(place, _)| replicas.get(*place).is_some_and(|r| r.slot == slot));
                if let Some((_, candidate)) = same {
                    let tokens = self.estimates.prompt_tokens(bytes).min(most);
                    candidate.cached_tokens = candidate.cached_tokens.max(tokens);
                }
            });
        }
        let policy = self.settings.read().policy;
        let chosen = choose(&scratch, policy, &mut state.random);
        let replica = chosen.and_then(|index| {
            let (place, candidate) = scratch.get(index)?;
            if candidate.cached_tokens > 0.0 {
                self.metrics.affinity_hits.inc();
            }
            state.replicas.get(*place).cloned()
        });
        state.scratch = scratch;
        let replica = replica?;
        state.prefixes.insert(&ticket.prefix, replica.slot);
        if let Some(since) = state.cold_since.take() {
            self.woken.store(false, Relaxed);
            self.metrics.cold_start_seconds.observe(now - since);
        }
        Some(Lease::new(
            Arc::clone(self),
            replica,
            ticket.prompt_tokens,
            ticket.output_tokens,
        ))
    }

    fn wake(&self, state: &mut State) {
        if state.cold_since.is_none() {
            state.cold_since = Some(clock::now());
        }
        if !self.woken.swap(true, Relaxed) {
            // Nobody listening is fine: the operator also reads the queue.
            let _ = self.wakes.send(Arc::clone(&self.key));
        }
    }

    /// Seconds until a request with so many before it gets its turn, by Little's law.
    fn predict(&self, state: &State, ahead: usize) -> f64 {
        let usable = state.replicas.iter().filter(|replica| replica.is_usable());
        let slots: u32 = usable.map(|replica| replica.slots()).sum();
        (ahead as f64 + 1.0) * self.duration.get() / f64::from(slots.max(1))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(crate) fn learn_duration(&self, seconds: f64) {
        if self.duration.get() == 0.0 {
            self.duration.set(seconds);
        } else {
            self.duration.observe(seconds);
        }
    }

    /// Some replica in the rotation is healthy.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.state.lock().is_usable()
    }

    /// Raw numbers for the queue report.
    #[must_use]
    pub fn load(&self) -> Load {
        let now = clock::now();
        let state = self.state.lock();
        Load {
            queue_length: state.queue.len(),
            oldest_age_seconds: state.queue.oldest().map_or(0.0, |arrived| now - arrived),
            queued_prompt_tokens: state.queued_prompt_tokens,
            queued_tokens: state.queue.tokens(),
            arrivals: self.arrivals.load(Relaxed),
            idle_seconds: now - self.last_arrival_ms.load(Relaxed) as f64 / 1000.0,
            usable: state.is_usable(),
            replicas: state.replicas.clone(),
        }
    }
}

/// What a service has to do at this moment.
#[derive(Debug)]
pub struct Load {
    pub queue_length: usize,
    pub oldest_age_seconds: f64,
    pub queued_prompt_tokens: u64,
    pub queued_tokens: u64,
    /// Since the router knows the service.
    pub arrivals: u64,
    /// Since the last request came.
    pub idle_seconds: f64,
    pub usable: bool,
    pub replicas: Vec<Arc<Replica>>,
}

impl State {
    fn is_usable(&self) -> bool {
        self.replicas.iter().any(|replica| replica.is_usable())
    }
}

fn allowed_wait(entry: &ServiceEntry, prompt_tokens: f64) -> f64 {
    entry
        .max_queue_wait_seconds
        .unwrap_or_else(|| entry.objectives.ttft_seconds(prompt_tokens))
}
