//! Values with their units, as they are written.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::mesh::parse_duration;

/// A duration as in Gateway API (GEP-2257): `500ms`, `1m30s`. A number without a unit is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl Span {
    /// The duration, or none for `0s`, which stands for no limit.
    pub(super) fn or_none(self) -> Option<Duration> {
        (!self.0.is_zero()).then_some(self.0)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Text::deserialize(deserializer)?.0;
        parse_duration(&text).map(Self).ok_or_else(|| {
            D::Error::custom(format!(
                "{text:?} is not a duration: numbers with units h, m, s, ms, like \"1s\" or \"1m30s\""
            ))
        })
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (hours, rest) = (self.0.as_secs() / 3600, self.0.as_secs() % 3600);
        let (minutes, seconds, milliseconds) = (rest / 60, rest % 60, self.0.subsec_millis());
        if self.0.is_zero() {
            return f.write_str("0s");
        }
        for (number, unit) in [(hours, "h"), (minutes, "m"), (seconds, "s")] {
            if number > 0 {
                write!(f, "{number}{unit}")?;
            }
        }
        if milliseconds > 0 {
            write!(f, "{milliseconds}ms")?;
        }
        Ok(())
    }
}

impl JsonSchema for Span {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$" })
    }
}

/// Text, or what was written in its place, so that it can be named in the refusal.
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl serde::de::Visitor<'_> for Visitor {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration with units, like \"1s\" or \"1m30s\"")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Text, E> {
                Ok(Text(text.to_owned()))
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Text, E> {
                Ok(Text(number.to_string()))
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Text, E> {
                Ok(Text(number.to_string()))
            }

            fn visit_f64<E: Error>(self, number: f64) -> Result<Text, E> {
                Ok(Text(number.to_string()))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

/// A share in per cent, 0 to 100; it may have a fraction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Percentage(f64);

impl Percentage {
    /// From 0 to 1.
    pub(super) fn share(self) -> f64 {
        self.0 / 100.0
    }
}

impl<'de> Deserialize<'de> for Percentage {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = f64::deserialize(deserializer)?;
        if (0.0..=100.0).contains(&number) {
            return Ok(Self(number));
        }
        Err(D::Error::custom(format!(
            "{number} is not a percentage: must be from 0 to 100"
        )))
    }
}

impl Serialize for Percentage {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0)
    }
}

impl JsonSchema for Percentage {
    fn schema_name() -> Cow<'static, str> {
        "Percentage".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "number", "minimum": 0.0, "maximum": 100.0 })
    }
}

/// Whether a mechanism works at all. Neither is called `On` or `Off`: YAML 1.1, as kubectl reads it,
/// takes these for booleans.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
pub enum Switch {
    /// It does.
    Enabled,
    /// It does not.
    Disabled,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_duration_needs_a_unit() {
        let read = |value| serde_json::from_value::<Span>(value).map_err(|e| e.to_string());
        assert_eq!(read(json!("1m30s")), Ok(Span(Duration::from_secs(90))));
        for (value, said) in [
            (json!(5), "\"5\""),
            (json!("5"), "\"5\""),
            (json!(1.5), "\"1.5\""),
        ] {
            let error = read(value).unwrap_err();
            assert!(
                error.starts_with(&format!("{said} is not a duration")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_duration_is_written_as_it_is_read() {
        for text in ["0s", "500ms", "1m30s", "24h", "1h1m1s1ms"] {
            let span: Span = serde_json::from_value(json!(text)).unwrap();
            assert_eq!(span.to_string(), text);
        }
    }

    #[test]
    fn a_percentage_of_200_is_refused() {
        let error = serde_json::from_value::<Percentage>(json!(200)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "200 is not a percentage: must be from 0 to 100"
        );
        let half: Percentage = serde_json::from_value(json!(0.5)).unwrap();
        assert_eq!(half.share(), 0.005);
    }
}
