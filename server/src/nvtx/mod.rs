//! Phases of the engine as NVTX ranges: what nsys and ncu show beside the kernels.
//!
//! The engine's phases are `tracing` spans. Where a profiler has started the program, a layer hands
//! them on; elsewhere nobody listens, and a span costs one load.

mod injection;

use std::ffi::CString;

use tracing::{Subscriber, span};
use tracing_subscriber::{
    Layer,
    filter::filter_fn,
    layer::{Context, Filter},
    registry::LookupSpan,
};

use injection::Injection;

/// Hands spans on as ranges of their thread.
pub struct Ranges(Injection);

/// A span's name, as C has it.
struct Name(CString);

/// The layer, if a profiler has left its library (NVTX_INJECTION64_PATH); called once, at the start.
pub fn ranges<S>() -> Option<impl Layer<S>>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    Injection::load().map(|injection| Ranges(injection).with_filter(of_stoker()))
}

/// Spans of our own crates.
fn of_stoker<S>() -> impl Filter<S> {
    filter_fn(|metadata| metadata.is_span() && metadata.target().starts_with("stoker"))
}

impl<S> Layer<S> for Ranges
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, _: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Ok(name) = CString::new(span.name())
        {
            span.extensions_mut().insert(Name(name));
        }
    }

    fn on_enter(&self, id: &span::Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(Name(name)) = span.extensions().get()
        {
            self.0.push(name);
        }
    }

    fn on_exit(&self, _: &span::Id, _: Context<'_, S>) {
        self.0.pop();
    }
}
