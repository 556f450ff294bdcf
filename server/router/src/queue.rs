//! The queue of one service: fair between API keys, by priority within a key, then first come
//! first served.
//!
//! Fairness is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) over tokens: each
//! flow (key) has a virtual start time, the flow with the lowest goes next and moves on by the
//! tokens of what it sent. A flow that sends little is therefore served at once, whatever the
//! others have waiting. Without keys all requests are one flow, and `priority` alone decides.
//! A priority counts within its key only: otherwise one key could push itself ahead of all.

use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Names a flow: 0 for requests without a key.
pub type FlowId = u64;

/// Where an entry is, to take it out again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub flow: FlowId,
    /// Lower goes first, as in vLLM.
    pub priority: i32,
    /// Order of arrival; unique.
    pub sequence: u64,
}

/// Waiting entries of type `T`.
#[derive(Debug)]
pub struct Queue<T> {
    flows: HashMap<FlowId, Flow<T>>,
    /// Flows with something waiting, by virtual start time.
    order: BTreeSet<(u64, FlowId)>,
    /// Sequence and arrival of all, to know the oldest.
    arrivals: BTreeMap<u64, f64>,
    virtual_time: u64,
    tokens: u64,
}

#[derive(Debug)]
struct Flow<T> {
    entries: BTreeMap<(i32, u64), Entry<T>>,
    start: u64,
}

#[derive(Debug)]
struct Entry<T> {
    cost: u64,
    value: T,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            flows: HashMap::new(),
            order: BTreeSet::new(),
            arrivals: BTreeMap::new(),
            virtual_time: 0,
            tokens: 0,
        }
    }
}

impl<T> Queue<T> {
    /// Adds an entry of `cost` tokens that came at `arrival` (seconds).
    pub fn push(&mut self, position: Position, cost: u64, arrival: f64, value: T) {
        let virtual_time = self.virtual_time;
        let flow = self.flows.entry(position.flow).or_insert_with(|| Flow {
            entries: BTreeMap::new(),
            start: virtual_time,
        });
        if flow.entries.is_empty() {
            flow.start = flow.start.max(virtual_time);
            self.order.insert((flow.start, position.flow));
        }
        let cost = cost.max(1);
        self.tokens += cost;
        self.arrivals.insert(position.sequence, arrival);
        flow.entries.insert(
            (position.priority, position.sequence),
            Entry { cost, value },
        );
    }

    /// What goes next.
    #[must_use]
    pub fn peek(&self) -> Option<&T> {
        let (_, flow) = self.order.first()?;
        let (_, entry) = self.flows.get(flow)?.entries.first_key_value()?;
        Some(&entry.value)
    }

    /// Takes what goes next; its flow moves on by its cost.
    pub fn pop(&mut self) -> Option<T> {
        let (start, id) = self.order.pop_first()?;
        self.virtual_time = start;
        let flow = self.flows.get_mut(&id)?;
        let ((_, sequence), entry) = flow.entries.pop_first()?;
        flow.start = start.saturating_add(entry.cost);
        if !flow.entries.is_empty() {
            self.order.insert((flow.start, id));
        }
        self.forget(sequence, entry.cost);
        Some(entry.value)
    }

    /// Takes one entry out, if it is still there; nobody is charged for it.
    pub fn remove(&mut self, position: Position) -> Option<T> {
        let flow = self.flows.get_mut(&position.flow)?;
        let key = (position.priority, position.sequence);
        let entry = flow.entries.remove(&key)?;
        if flow.entries.is_empty() {
            self.order.remove(&(flow.start, position.flow));
        }
        self.forget(position.sequence, entry.cost);
        Some(entry.value)
    }

    /// Takes all out, in no particular order.
    pub fn clear(&mut self) -> Vec<T> {
        let queue = std::mem::take(self);
        let flows = queue.flows.into_values();
        flows
            .flat_map(|flow| flow.entries.into_values().map(|entry| entry.value))
            .collect()
    }

    fn forget(&mut self, sequence: u64, cost: u64) {
        self.tokens -= cost;
        self.arrivals.remove(&sequence);
        if self.arrivals.is_empty() {
            // Nobody waits: nobody owes anything.
            self.flows.clear();
            self.virtual_time = 0;
        } else if self.flows.len() > 2 * self.order.len() + 64 {
            let now = self.virtual_time;
            self.flows
                .retain(|_, flow| !flow.entries.is_empty() || flow.start > now);
        }
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.arrivals.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.arrivals.is_empty()
    }

    /// Tokens of all that wait.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Arrival of the entry that came first.
    #[must_use]
    pub fn oldest(&self) -> Option<f64> {
        Some(*self.arrivals.first_key_value()?.1)
    }

    /// About how many entries go before a new one of this flow.
    #[must_use]
    pub fn ahead_of(&self, flow: FlowId) -> usize {
        let own = self.flows.get(&flow).map_or(0, |flow| flow.entries.len());
        let others = self.order.len() - usize::from(own > 0);
        self.len().min(own + (own + 1) * others)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(flow: FlowId, priority: i32, sequence: u64) -> Position {
        Position {
            flow,
            priority,
            sequence,
        }
    }

    #[test]
    fn one_flow_goes_by_priority_then_arrival() {
        let mut queue = Queue::default();
        for (sequence, priority) in [(0, 0), (1, -1), (2, 5), (3, -1), (4, 0)] {
            queue.push(at(0, priority, sequence), 10, sequence as f64, sequence);
        }
        assert_eq!(queue.oldest(), Some(0.0));
        let order: Vec<u64> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(order, [1, 3, 0, 4, 2]);
    }

    #[test]
    fn a_flood_delays_others_by_one_entry_each() {
        let mut queue = Queue::default();
        for sequence in 0..1000 {
            queue.push(at(1, -100, sequence), 50, 0.0, 1);
        }
        for sequence in 1000..1010 {
            queue.push(at(2, 0, sequence), 50, 0.0, 2);
        }
        assert_eq!(queue.ahead_of(3), 2);
        let first: Vec<i32> = (0..20).filter_map(|_| queue.pop()).collect();
        assert_eq!(first.iter().filter(|flow| **flow == 2).count(), 10);
    }

    #[test]
    fn a_flow_that_comes_back_has_no_credit_from_its_absence() {
        let mut queue = Queue::default();
        for sequence in 0..100 {
            queue.push(at(1, 0, sequence), 10, 0.0, 1);
        }
        for _ in 0..50 {
            queue.pop();
        }
        for sequence in 100..200 {
            queue.push(at(2, 0, sequence), 10, 0.0, 2);
        }
        let next: Vec<i32> = (0..20).filter_map(|_| queue.pop()).collect();
        let second = next.iter().filter(|flow| **flow == 2).count();
        assert!((9..=11).contains(&second), "{next:?}");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Push(FlowId, i32, u64),
        Pop,
        Remove(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (0..4u64, -2..3i32, 1..100u64).prop_map(|(f, p, c)| Step::Push(f, p, c)),
            2 => Just(Step::Pop),
            1 => (0..50usize).prop_map(Step::Remove),
        ];
        proptest::collection::vec(step, 1..300)
    }

    proptest! {
        /// Nothing is lost or given twice, the sums agree, and within a flow the order holds.
        #[test]
        fn what_goes_in_comes_out_once(steps in steps()) {
            let mut queue = Queue::default();
            let mut inside: Vec<(Position, u64)> = Vec::new();
            for (sequence, step) in (0u64..).zip(steps) {
                match step {
                    Step::Push(flow, priority, cost) => {
                        let position = at(flow, priority, sequence);
                        queue.push(position, cost, sequence as f64, position);
                        inside.push((position, cost));
                    }
                    Step::Pop => {
                        let peeked = queue.peek().copied();
                        let got = queue.pop();
                        prop_assert_eq!(peeked, got);
                        prop_assert_eq!(got.is_some(), !inside.is_empty());
                        let Some(got) = got else { continue };
                        let best = inside.iter().map(|(p, _)| p).filter(|p| p.flow == got.flow)
                            .min_by_key(|p| (p.priority, p.sequence)).copied();
                        prop_assert_eq!(best, Some(got));
                        inside.retain(|(p, _)| *p != got);
                    }
                    Step::Remove(index) => {
                        let Some((position, _)) = inside.get(index).copied() else { continue };
                        prop_assert_eq!(queue.remove(position), Some(position));
                        prop_assert_eq!(queue.remove(position), None);
                        inside.retain(|(p, _)| *p != position);
                    }
                }
                prop_assert_eq!(queue.len(), inside.len());
                prop_assert_eq!(queue.tokens(), inside.iter().map(|(_, cost)| cost).sum::<u64>());
                let oldest = inside.iter().map(|(p, _)| p.sequence).min();
                prop_assert_eq!(queue.oldest().map(|a| a as u64), oldest);
            }
            prop_assert_eq!(queue.clear().len(), inside.len());
        }

        /// While two flows both wait, neither gets more than the other plus one entry each.
        #[test]
        fn backlogged_flows_share_the_tokens(costs in proptest::collection::vec((1..100u64, 1..100u64), 20..100)) {
            let mut queue = Queue::default();
            for (sequence, (first, second)) in (0u64..).zip(&costs) {
                queue.push(at(1, 0, 2 * sequence), *first, 0.0, (1, *first));
                queue.push(at(2, 0, 2 * sequence + 1), *second, 0.0, (2, *second));
            }
            let mut sent = [0i64; 3];
            let mut counts = [0usize; 3];
            while counts[1] < costs.len() && counts[2] < costs.len() {
                let (flow, cost) = queue.pop().unwrap();
                sent[flow] += cost as i64;
                counts[flow] += 1;
                prop_assert!((sent[1] - sent[2]).abs() <= 200, "{sent:?}");
            }
        }
    }
}
