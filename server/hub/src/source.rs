//! What `--model` may say.

use std::{fmt, path::PathBuf, str::FromStr};

use url::Url;

use crate::error::HubError;

const DEFAULT_REVISION: &str = "main";

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// A GGUF file, or the folder of a Hugging Face checkpoint.
    Path(PathBuf),
    /// `hf://<org>/<name>[/<file>.gguf][@<revision>]`
    Hub(HubModel),
    /// A GGUF file on a web server.
    Url(Url),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubModel {
    /// `<org>/<name>`
    pub repository: String,
    /// A GGUF file among several; `None`: the repository's only model.
    pub file: Option<String>,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl ModelSource {
    /// What to call the model when nothing else is said.
    pub fn name(&self) -> String {
        let stem = |path: &str| {
            let file = path.rsplit('/').next().unwrap_or(path);
            file.strip_suffix(".gguf").unwrap_or(file).to_owned()
        };
        match self {
            Self::Path(path) => path.file_stem().map_or_else(
                || path.display().to_string(),
                |stem| stem.to_string_lossy().into_owned(),
            ),
            Self::Hub(HubModel {
                file: Some(file), ..
            }) => stem(file),
            Self::Hub(model) => model.repository.clone(),
            Self::Url(url) => stem(url.path()),
        }
    }
}

impl FromStr for ModelSource {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let wrong = |problem: &str| HubError::Source {
            found: text.to_owned(),
            problem: problem.to_owned(),
        };
        if let Some(rest) = text.strip_prefix("hf://") {
            return HubModel::parse(rest).map(Self::Hub).map_err(wrong);
        }
        if text.starts_with("https://") || text.starts_with("http://") {
            let url = Url::parse(text).map_err(|e| wrong(&e.to_string()))?;
            if !url.username().is_empty() || url.password().is_some() {
                return Err(HubError::Source {
                    // Not the text: it holds the password.
                    found: url.host_str().unwrap_or_default().to_owned(),
                    problem: "a URL must not carry a user name or password".to_owned(),
                });
            }
            if !url.path().ends_with(".gguf") {
                return Err(wrong("a URL must lead to a .gguf file"));
            }
            return Ok(Self::Url(url));
        }
        if text.is_empty() {
            return Err(wrong("it is empty"));
        }
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(wrong(&format!(
                "{scheme}:// isn't known; give a path, hf://<org>/<name>[@<revision>] or \
                 https://<host>/<path>.gguf"
            )));
        }
        Ok(Self::Path(PathBuf::from(text)))
    }
}

impl HubModel {
    /// Parses what stands behind `hf://`.
    fn parse(text: &str) -> Result<Self, &'static str> {
        let (path, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let mut parts = path.splitn(3, '/');
        let (Some(org), Some(name)) = (parts.next(), parts.next()) else {
            return Err("it must be hf://<org>/<name>[@<revision>]");
        };
        let file = parts.next();
        if !is_name(org) || !is_name(name) {
            return Err("organisation and name take letters, digits and ._-");
        }
        if !is_path(revision) {
            return Err("a revision takes letters, digits and ._/-");
        }
        if let Some(file) = file
            && !(is_path(file) && file.ends_with(".gguf"))
        {
            return Err("what follows hf://<org>/<name>/ must be the path of a .gguf file");
        }
        Ok(Self {
            repository: format!("{org}/{name}"),
            file: file.map(str::to_owned),
            revision: revision.to_owned(),
        })
    }
}

/// Whether a name can stand as one part of a path and of a URL.
pub(crate) fn is_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !name.is_empty() && name.len() <= 128 && !name.starts_with('.') && name.bytes().all(plain)
}

/// Names separated by slashes.
pub(crate) fn is_path(path: &str) -> bool {
    path.split('/').all(is_name)
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Hub(model) => model.fmt(f),
            // Signed URLs carry their key in the query.
            Self::Url(url) => {
                write!(f, "{}{}", url.origin().ascii_serialization(), url.path())
            }
        }
    }
}

impl fmt::Display for HubModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf://{}", self.repository)?;
        if let Some(file) = &self.file {
            write!(f, "/{file}")?;
        }
        write!(f, "@{}", self.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ModelSource {
        text.parse().unwrap()
    }

    #[test]
    fn sources_are_parsed_and_named() {
        let hub = |file: Option<&str>, revision: &str| {
            ModelSource::Hub(HubModel {
                repository: "org/Name-1.5".into(),
                file: file.map(str::to_owned),
                revision: revision.into(),
            })
        };
        assert_eq!(parse("hf://org/Name-1.5"), hub(None, "main"));
        assert_eq!(parse("hf://org/Name-1.5@refs/pr/3"), hub(None, "refs/pr/3"));
        let file = parse("hf://org/Name-1.5/q/x.Q4.gguf@v1");
        assert_eq!(file, hub(Some("q/x.Q4.gguf"), "v1"));
        assert_eq!(file.to_string(), "hf://org/Name-1.5/q/x.Q4.gguf@v1");
        assert_eq!(file.name(), "x.Q4");
        assert_eq!(parse("hf://org/Name-1.5").name(), "org/Name-1.5");
        let url = parse("https://files.example/a/m.gguf?key=secret");
        assert_eq!(url.name(), "m");
        assert_eq!(url.to_string(), "https://files.example/a/m.gguf");
        assert_eq!(
            parse("/models/m.Q8.gguf"),
            ModelSource::Path("/models/m.Q8.gguf".into())
        );
        assert_eq!(parse("/models/m.Q8.gguf").name(), "m.Q8");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, word) in [
            ("", "empty"),
            ("hf://org", "hf://<org>/<name>"),
            ("hf://org/", "letters"),
            ("hf://../name", "letters"),
            ("hf://org/name@", "revision"),
            ("hf://org/name@a/../b", "revision"),
            ("hf://org/name/model.bin", ".gguf"),
            ("hf://org/name/../x.gguf", ".gguf"),
            ("https://files.example/m.bin", ".gguf"),
            ("https://", "https://"),
            ("s3://bucket/m.gguf", "s3://"),
        ] {
            let error = text.parse::<ModelSource>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        let error = "https://me:hunter2@files.example/m.gguf".parse::<ModelSource>();
        let error = error.unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{error}");
    }
}
