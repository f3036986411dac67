//! The `tojson` filter as transformers has it: Python's `json.dumps(x, ensure_ascii=False)`.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Writes `value` with Python's spacing (`", "`, `": "`), or over several lines with `indent`. Unlike minijinja's own filter
/// it escapes nothing for HTML.
pub(super) fn to_python_json(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent = kwargs.get::<Option<usize>>("indent")?;
    // Accepted as transformers accepts them; the first is what is done in any case.
    let _ = (kwargs.get::<Option<bool>>("ensure_ascii")?, kwargs.get::<Option<bool>>("sort_keys")?);
    kwargs.assert_all_used()?;
    let mut out = String::new();
    write(value, indent, 0, &mut out)?;
    Ok(out)
}

fn write(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| (None, item)).collect();
            write_items(('[', ']'), items, indent, depth, out)
        }
        ValueKind::Map => {
            let items = (value.try_iter()?).map(|key| Ok((Some(key.to_string()), value.get_item(&key)?)));
            write_items(('{', '}'), items.collect::<Result<_, Error>>()?, indent, depth, out)
        }
        ValueKind::Undefined => Err(Error::new(ErrorKind::UndefinedError, "tojson of an undefined value")),
        ValueKind::None => {
            out.push_str("null");
            Ok(())
        }
        ValueKind::Bool => {
            out.push_str(if value.is_true() { "true" } else { "false" });
            Ok(())
        }
        ValueKind::Number => {
            out.push_str(&value.to_string());
            Ok(())
        }
        ValueKind::String => {
            out.push_str(&quoted(value.as_str().unwrap_or_default()));
            Ok(())
        }
        other => Err(Error::new(ErrorKind::BadSerialization, format!("tojson of a value of kind {other}"))),
    }
}

/// A JSON string literal.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn write_items(
    (open, close): (char, char),
    items: Vec<(Option<String>, Value)>,
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) -> Result<(), Error> {
    let new_line = |depth: usize, out: &mut String| {
        if let Some(n) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', n * depth));
        }
    };
    out.push(open);
    let n_items = items.len();
    for (i, (key, item)) in items.into_iter().enumerate() {
        if i > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        new_line(depth + 1, out);
        if let Some(key) = key {
            out.push_str(&quoted(&key));
            out.push_str(": ");
        }
        write(&item, indent, depth + 1, out)?;
    }
    if n_items > 0 {
        new_line(depth, out);
    }
    out.push(close);
    Ok(())
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, Value};

    fn render(source: &str) -> String {
        let mut environment = Environment::new();
        environment.add_filter("tojson", super::to_python_json);
        let b = Value::from(vec![Value::from(1), Value::from(2.5), Value::from(()), Value::from(true)]);
        let (inner, empty) = (Value::from_pairs([("<", "é\n\"")]), Value::from(Vec::<Value>::new()));
        let x = Value::from_pairs([("b", b), ("a", inner), ("e", empty)]);
        environment.render_str(source, minijinja::context! { x }).unwrap()
    }

    #[test]
    fn as_python_writes_it() {
        assert_eq!(render("{{ x | tojson }}"), r#"{"b": [1, 2.5, null, true], "a": {"<": "é\n\""}, "e": []}"#);
        let lines = render("{{ x.a | tojson(indent=2) }}");
        assert_eq!(lines, "{\n  \"<\": \"é\\n\\\"\"\n}");
    }
}
