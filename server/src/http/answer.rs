//! What both generating endpoints do around their own request and answer.

use std::future::Future;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::connection::Accepted;
use super::events::{self, EventShape};
use super::generate::{self, Answering, LARGE_BODY, Prepared};
use crate::app::{App, unix_seconds};
use crate::openai::error::ApiError;

/// What every object of one answer begins with.
pub struct Head {
    pub id: Arc<str>,
    pub created: u64,
    pub model: Arc<str>,
    /// Whether events name the usage, null until the last one.
    pub with_usage: bool,
}

/// How one kind of answer looks, whole and as events.
pub trait AnswerShape: EventShape {
    type Whole: Serialize;

    fn collect(
        self,
        answering: Answering,
    ) -> impl Future<Output = Result<Self::Whole, ApiError>> + Send;
}

/// What makes one endpoint another than the other.
pub struct Endpoint<S> {
    /// Of the ids that it gives out.
    pub id_prefix: &'static str,
    /// The field that an error about the prompt names.
    pub prompt_field: &'static str,
    pub prepare: fn(&App, &[u8]) -> Result<Prepared, ApiError>,
    pub shape: fn(Head) -> S,
}

impl<S: AnswerShape> Endpoint<S> {
    pub async fn answer(
        self,
        app: Arc<App>,
        accepted: Accepted,
        body: Body,
    ) -> Result<Response, ApiError> {
        let active = app.lifecycle.admit(accepted.at)?;
        let body = super::read_body(body, app.max_body_bytes).await?;
        let prepared = {
            let (app, prepare) = (app.clone(), self.prepare);
            generate::off_runtime(body.len() > LARGE_BODY, move || prepare(&app, &body)).await?
        };
        let (stream, include_usage) = (prepared.stream, prepared.include_usage);
        let shape = (self.shape)(Head {
            id: generate::new_id(self.id_prefix),
            created: unix_seconds(),
            model: app.model_name.clone(),
            with_usage: include_usage,
        });
        let serving = app.serving()?;
        let answering = generate::start(
            serving,
            prepared,
            self.prompt_field,
            accepted.waited,
            active,
        )
        .await?;
        if stream {
            return Ok(events::respond(answering, shape, include_usage));
        }
        Ok(Json(shape.collect(answering).await?).into_response())
    }
}
