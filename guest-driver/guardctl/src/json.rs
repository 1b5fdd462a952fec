// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! As much of JSON as this program writes.

use std::fmt;

/// A value.
pub(crate) enum Json {
    Null,
    Bool(bool),
    Number(u64),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(&'static str, Json)>),
}

impl Json {
    /// An address, as text: many readers of JSON have only 53 bits for a number.
    pub(crate) fn address(value: u64) -> Self {
        Self::Text(format!("{value:#x}"))
    }

    /// A list of names.
    pub(crate) fn names(names: impl Iterator<Item = &'static str>) -> Self {
        Self::List(names.map(|name| Self::Text(name.into())).collect())
    }
}

fn write_text(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    f.write_str("\"")?;
    for c in text.chars() {
        match c {
            '"' | '\\' => write!(f, "\\{c}")?,
            c if c < ' ' => write!(f, "\\u{:04x}", u32::from(c))?,
            c => write!(f, "{c}")?,
        }
    }
    f.write_str("\"")
}

impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Number(value) => write!(f, "{value}"),
            Self::Text(text) => write_text(f, text),
            Self::List(values) => {
                f.write_str("[")?;
                for (n, value) in values.iter().enumerate() {
                    write!(f, "{}{value}", if n > 0 { "," } else { "" })?;
                }
                f.write_str("]")
            }
            Self::Object(fields) => {
                f.write_str("{")?;
                for (n, (name, value)) in fields.iter().enumerate() {
                    f.write_str(if n > 0 { "," } else { "" })?;
                    write_text(f, name)?;
                    write!(f, ":{value}")?;
                }
                f.write_str("}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind() {
        let json = Json::Object(vec![
            ("none", Json::Null),
            ("yes", Json::Bool(true)),
            ("most", Json::Number(u64::MAX)),
            ("at", Json::address(0x1000)),
            ("list", Json::names(["a", "b"].into_iter())),
            ("text", Json::Text("\"\\\n".into())),
            ("nothing", Json::List(vec![])),
        ]);
        assert_eq!(
            json.to_string(),
            r#"{"none":null,"yes":true,"most":18446744073709551615,"at":"0x1000","list":["a","b"],"text":"\"\\\u000a","nothing":[]}"#
        );
    }
}
