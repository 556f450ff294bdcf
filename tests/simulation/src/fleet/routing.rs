//! Who gets a request, and who waits.

use stoker_autoscaler::Queue;

use super::Routing;
use super::pods::Pod;
use super::run::Fleet;
use crate::flight::{Flight, State};

/// Weight of a new duration in the average of those before, as in the router.
const NEW_DURATION: f64 = 0.05;

pub(super) struct Connection {
    replica: u32,
    opened: f64,
}

/// What a router does with a request that came just now.
enum Fate {
    To(usize),
    Wait,
    Refuse,
}

impl Fleet<'_> {
    /// Sends a request to a replica, or holds it until there is one.
    pub(super) fn route(&mut self, request: u32) {
        let fate = match self.setup.routing {
            Routing::LeastOutstanding => self.least_outstanding().map_or(Fate::Wait, Fate::To),
            Routing::Connections {
                connections,
                max_age,
            } => (self.connection(connections, max_age)).map_or(Fate::Wait, Fate::To),
            Routing::Router => self.admit(request),
        };
        let state = match fate {
            Fate::To(place) => self.send(place, request),
            Fate::Wait => {
                self.held.push_back(request);
                State::Held
            }
            Fate::Refuse => State::Failed,
        };
        self.settle(request, state);
    }

    /// The replica may answer at once to what it is told.
    fn send(&mut self, place: usize, request: u32) -> State {
        let (ledger, now) = (&self.ledger, self.now);
        let sent = self.pods.list.get_mut(place).map(|pod| {
            let sent = pod.send(request, ledger, now);
            (pod.id, sent)
        });
        self.refresh_one(place);
        match sent {
            Some((id, true)) => State::Sent(id),
            _ => State::Failed,
        }
    }

    /// Notes what became of a request that is new or was held.
    fn settle(&mut self, request: u32, state: State) {
        let now = self.now;
        if let Some(flight) = self.ledger.get_mut(request) {
            let was_open = flight.state == State::Held;
            flight.state = state;
            if matches!(state, State::Sent(_)) {
                flight.sent = now;
            }
            match (was_open, state == State::Failed) {
                (false, false) => self.open += 1,
                (true, true) => self.open -= 1,
                _ => {}
            }
        }
    }

    /// The router's rule for a request that has just come: to a replica with room unless others wait,
    /// else into the queue, and away where Little's law says that it would wait for longer than its
    /// objective allows.
    fn admit(&mut self, request: u32) -> Fate {
        let room = self.held.is_empty();
        if let Some(place) = room.then(|| self.with_room(request)).flatten() {
            return Fate::To(place);
        }
        let slots: u32 = self.usable().map(|(_, pod)| pod.slots()).sum();
        let wait =
            (self.held.len() as f64 + 1.0) * self.duration_of_answers / f64::from(slots.max(1));
        if slots > 0 && wait > self.allowed_wait(request) {
            Fate::Refuse
        } else {
            Fate::Wait
        }
    }

    /// Sends on what waits in the router, first come first served, as far as there is room.
    pub(super) fn pump(&mut self) {
        if self.setup.routing != Routing::Router {
            return;
        }
        while let Some(&request) = self.held.front() {
            let Some(place) = self.with_room(request) else {
                return;
            };
            self.held.pop_front();
            let state = self.send(place, request);
            self.settle(request, state);
        }
    }

    /// Of the usable replicas with room the one with the fewest tokens to do for its weight.
    fn with_room(&mut self, request: u32) -> Option<usize> {
        let cost = self.ledger.get(request).map_or(0.0, Flight::tokens);
        let n = self.pods.list.len().max(1);
        self.turn = (self.turn + 1) % n;
        let turn = self.turn;
        (self.usable())
            .filter(|(_, pod)| pod.outstanding < pod.slots())
            .min_by(|(a, x), (b, y)| {
                let score = |pod: &Pod| (pod.to_do + cost) / pod.weight;
                let order = score(x).total_cmp(&score(y));
                order.then(((a + n - turn) % n).cmp(&((b + n - turn) % n)))
            })
            .map(|(place, _)| place)
    }

    /// Ready replicas in the rotation: all of them where none has a weight.
    fn usable(&self) -> impl Iterator<Item = (usize, &Pod)> {
        let ready = || {
            self.pods
                .list
                .iter()
                .enumerate()
                .filter(|(_, pod)| pod.ready())
        };
        let any = ready().any(|(_, pod)| pod.weight > 0.0);
        ready().filter(move |(_, pod)| !any || pod.weight > 0.0)
    }

    fn allowed_wait(&self, request: u32) -> f64 {
        let prompt = self
            .ledger
            .get(request)
            .map_or(0.0, |f| f64::from(f.prompt));
        self.setup.goals.ttft_within(prompt)
    }

    /// When a request that waits in the router has waited for as long as it may, while there are
    /// replicas.
    pub(super) fn patience(&self) -> f64 {
        if self.setup.routing != Routing::Router || self.usable().next().is_none() {
            return f64::INFINITY;
        }
        let ends = self.held.iter().filter_map(|&request| {
            let flight = self.ledger.get(request)?;
            Some((flight.arrival + self.allowed_wait(request)).max(self.now))
        });
        ends.fold(f64::INFINITY, f64::min)
    }

    /// Refuses those that have waited for that long.
    pub(super) fn refuse_late(&mut self) {
        let due = self.now + 1e-9;
        let late = |fleet: &Self, request: u32| {
            (fleet.ledger.get(request))
                .is_some_and(|flight| flight.arrival + fleet.allowed_wait(request) <= due)
        };
        let held = std::mem::take(&mut self.held).into_iter();
        let (gone, kept): (Vec<u32>, Vec<u32>) = held.partition(|request| late(self, *request));
        self.held = kept.into();
        for request in gone {
            self.settle(request, State::Failed);
        }
    }

    /// What the router learns from an answer that has ended.
    pub(super) fn learn_duration(&mut self, seconds: f64) {
        let average = &mut self.duration_of_answers;
        *average = match *average {
            0.0 => seconds,
            before => before + NEW_DURATION * (seconds - before),
        };
    }

    /// What a router tells the operator of its queue.
    pub(super) fn queue(&self) -> Option<Queue> {
        if self.setup.routing != Routing::Router {
            return None;
        }
        let held = || {
            self.held
                .iter()
                .filter_map(|&request| self.ledger.get(request))
        };
        let oldest = held().map(|flight| flight.arrival).fold(self.now, f64::min);
        let last = self.next_arrival.checked_sub(1);
        let last = last.and_then(|place| self.ledger.flights.get(place));
        Some(Queue {
            requests: self.held.len() as u32,
            prompt_tokens: held().map(|flight| u64::from(flight.prompt)).sum(),
            oldest_age_seconds: self.now - oldest,
            outstanding_requests: self.pods.list.iter().map(|pod| pod.outstanding).sum(),
            idle_seconds: self.now - last.map_or(0.0, |flight| flight.arrival),
        })
    }

    /// Ties go round.
    fn least_outstanding(&mut self) -> Option<usize> {
        let pods = &self.pods.list;
        let n = pods.len().max(1);
        self.turn = (self.turn + 1) % n;
        (self.turn..n)
            .chain(0..self.turn)
            .filter(|&place| pods.get(place).is_some_and(|pod| pod.ready()))
            .min_by(|&a, &b| {
                let load = |place: usize| pods.get(place).map_or(f64::INFINITY, Pod::load);
                load(a).total_cmp(&load(b))
            })
    }

    fn connection(&mut self, connections: u32, max_age: f64) -> Option<usize> {
        let ready: Vec<usize> = (self.pods.list.iter().enumerate())
            .filter(|(_, pod)| pod.ready())
            .map(|(place, _)| place)
            .collect();
        if ready.is_empty() {
            return None;
        }
        let index = self.random.below(connections.max(1) as usize);
        let pods = &self.pods.list;
        let open = self.connections.get(index).and_then(|connection| {
            let young = self.now - connection.opened < max_age;
            let place = pods.iter().position(|pod| pod.id == connection.replica)?;
            (young && ready.contains(&place)).then_some(place)
        });
        if open.is_some() {
            return open;
        }
        let place = *ready.get(self.random.below(ready.len()))?;
        let fresh = Connection {
            replica: pods.get(place)?.id,
            // Connections weren't all opened at once.
            opened: self.now - self.random.uniform() * max_age,
        };
        while self.connections.len() <= index {
            self.connections.push(Connection {
                replica: u32::MAX,
                opened: f64::NEG_INFINITY,
            });
        }
        if let Some(connection) = self.connections.get_mut(index) {
            *connection = fresh;
        }
        Some(place)
    }
}
