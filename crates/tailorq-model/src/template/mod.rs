//! Chat templates: Jinja as model makers write it.
//!
//! Rendered as the transformers library does: blocks trimmed, loop controls, Python's string methods, `tojson` in
//! Python's spelling, `raise_exception`, `strftime_now`.

mod date;
mod json;

use crate::error::ModelError;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A compiled chat template with the model's special tokens.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    /// The Jinja source, for the artifact.
    pub source: String,
    /// Text of the BOS token ("" if none).
    pub bos_token: String,
    /// Text of the EOS token ("" if none).
    pub eos_token: String,
}

impl ChatTemplate {
    /// Renders a conversation; `generation_prompt` opens the assistant's turn. Templates that ask for the date get today's.
    pub fn render(&self, messages: &[ChatMessage], generation_prompt: bool) -> Result<String, ModelError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        self.render_at(messages, generation_prompt, now)
    }

    /// As [`ChatTemplate::render`] with a given time in seconds since 1970 (UTC), where the same bytes must come out on
    /// every day.
    pub fn render_at(
        &self,
        messages: &[ChatMessage],
        generation_prompt: bool,
        unix_seconds: u64,
    ) -> Result<String, ModelError> {
        let mut environment = Environment::new();
        environment.set_syntax(jinja_syntax()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", json::to_python_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", move |format: String| date::strftime(&format, unix_seconds));
        let source = without_generation_marks(&self.source);
        let template = environment.template_from_str(&source).map_err(template_error)?;
        template
            .render(context! {
                messages => messages.iter().map(turn).collect::<Vec<_>>(),
                add_generation_prompt => generation_prompt,
                bos_token => self.bos_token.as_str(),
                eos_token => self.eos_token.as_str(),
                // transformers passes these as None, and templates ask for that.
                tools => Value::from(()),
                documents => Value::from(()),
            })
            .map_err(template_error)
    }
}

/// A message as templates see it.
fn turn(message: &ChatMessage) -> Value {
    Value::from_pairs([("role", message.role.as_str()), ("content", message.content.as_str())])
}

/// Jinja with the white space rules of transformers.
fn jinja_syntax() -> Result<SyntaxConfig, ModelError> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(template_error)
}

fn template_error(error: minijinja::Error) -> ModelError {
    let line = error.line().map(|n| format!(" (line {n})")).unwrap_or_default();
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    ModelError::Template(format!("{detail}{line}"))
}

/// Replaces the training marks `{% generation %}` and `{% endgeneration %}`, which only transformers knows, by a
/// condition that always holds.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|at| start + at) else { break };
        let (open, tag) = rest[..end].split_at(start + 2);
        out.push_str(open);
        match tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => out.push_str(&tag.replace("generation", " if true ")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", " endif ")),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate { source: source.into(), bos_token: "<s>".into(), eos_token: "</s>".into() }
    }

    fn turns() -> Vec<ChatMessage> {
        let turn = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
        vec![turn("user", " Hi "), turn("assistant", "Hello")]
    }

    #[test]
    fn renders_as_transformers_does() {
        let source = "{{ bos_token }}{% for m in messages %}\n    {%- if m['role'] == 'user' %}\n[{{ m.content.strip() }}]\n    {% else %}\n{{ m.content.upper() + eos_token }}\n    {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}>{% endif %}";
        assert_eq!(template(source).render(&turns(), true).unwrap(), "<s>[Hi]\nHELLO</s>\n>");
        assert_eq!(template(source).render(&turns(), false).unwrap(), "<s>[Hi]\nHELLO</s>\n");
    }

    #[test]
    fn tools_are_none_and_loops_can_break() {
        let source = "{% if tools is none and not documents %}{% for m in messages[1:] %}{{ loop.index0 }}{{ m.role }}{% break %}{% endfor %}{% endif %}";
        assert_eq!(template(source).render(&turns(), false).unwrap(), "0assistant");
    }

    #[test]
    fn exceptions_of_the_template_come_through() {
        let message = template("{{ raise_exception('roles must alternate') }}").render(&turns(), false).unwrap_err();
        assert!(message.to_string().contains("roles must alternate"), "{message}");
        let message = template("{% if %}").render(&turns(), false).unwrap_err().to_string();
        assert!(message.contains("line 1"), "{message}");
    }

    #[test]
    fn generation_marks_change_nothing() {
        let source = "{%- for m in messages %}{%- generation %} {{ m.role }}{% endgeneration -%} {% endfor %}";
        assert_eq!(template(source).render(&turns(), false).unwrap(), " user assistant");
    }

    #[test]
    fn the_date_is_the_callers() {
        let template = template("{{ strftime_now('%d %b %Y') }}");
        assert_eq!(template.render_at(&[], false, 1_709_251_200).unwrap(), "01 Mar 2024");
    }
}
