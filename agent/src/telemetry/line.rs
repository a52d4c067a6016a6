//! The lines of the access log, written field by field into the log's buffer.
//!
//! There is one for each connection and each request, with some forty fields: handed to tracing's
//! formatters one by one they cost several times what they do here. So such an event has one field,
//! of which the `Debug` output is the line ([`Line::write`]), and [`AccessLines`] puts what every
//! line of the log begins with before it.

use std::fmt::{self, Display, Write as _};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use tracing::Event;
use tracing::field::{Field, Visit};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::LogFormat;
use super::access_log::TARGET;

/// Fields that lines have in common, as they stand there: written once, when the first of these lines is, and copied
/// into all others.
#[derive(Debug, Default)]
pub(super) struct Common(OnceLock<(LogFormat, Box<str>)>);

/// A line on its way into the log. Text is quoted and escaped, in both formats, so what a peer put
/// into a name or an error cannot forge a line.
pub(super) struct Line<'a, 'f> {
    out: &'a mut fmt::Formatter<'f>,
    format: LogFormat,
    written: fmt::Result,
}

impl<'a, 'f> Line<'a, 'f> {
    /// Writes a line: its message, and the fields that `fields` adds. As JSON if the formatter asks
    /// for the alternate form.
    pub fn write(
        out: &'a mut fmt::Formatter<'f>,
        message: &'static str,
        fields: impl FnOnce(&mut Self),
    ) -> fmt::Result {
        let mut line = Self::new(out);
        line.written = match line.format {
            LogFormat::Text => line.out.write_str(message),
            LogFormat::Json => write!(line.out, "\"message\":\"{message}\""),
        };
        fields(&mut line);
        line.written
    }

    fn new(out: &'a mut fmt::Formatter<'f>) -> Self {
        Self {
            format: match out.alternate() {
                true => LogFormat::Json,
                false => LogFormat::Text,
            },
            out,
            written: Ok(()),
        }
    }

    /// Adds the fields that `fields` adds, which must be the same for every line with this `common`.
    pub fn common(&mut self, common: &Common, fields: impl Fn(&mut Line<'_, '_>)) -> &mut Self {
        let (format, text) = common
            .0
            .get_or_init(|| (self.format, Fields(&fields).written(self.format)));
        if *format != self.format {
            // Of a log of another format, which there is in tests.
            fields(self);
        } else if self.written.is_ok() {
            self.written = self.out.write_str(text);
        }
        self
    }

    /// Adds a text, if there is one.
    pub fn text(&mut self, name: &str, value: Option<&(impl AsRef<str> + ?Sized)>) -> &mut Self {
        match value {
            Some(value) => self.add(name, |line| {
                line.quoted(|escaped| escaped.write_str(value.as_ref()))
            }),
            None => self,
        }
    }

    /// Adds what something is displayed as, if there is one, as text.
    pub fn shown(&mut self, name: &str, value: Option<&impl Display>) -> &mut Self {
        match value {
            Some(value) => self.add(name, |line| {
                line.quoted(|escaped| write!(escaped, "{value}"))
            }),
            None => self,
        }
    }

    /// Adds a number, if there is one.
    pub fn number(&mut self, name: &str, value: Option<impl Into<u64>>) -> &mut Self {
        match value {
            Some(value) => self.add(name, |line| {
                line.out.write_str(itoa::Buffer::new().format(value.into()))
            }),
            None => self,
        }
    }

    /// Adds a time, if there is one, as a number of seconds to the millisecond.
    pub fn seconds(&mut self, name: &str, value: Option<Duration>) -> &mut Self {
        let Some(value) = value else {
            return self;
        };
        let rounded = value.saturating_add(Duration::from_micros(500));
        self.add(name, |line| {
            let seconds = rounded.as_secs();
            line.out.write_str(itoa::Buffer::new().format(seconds))?;
            // Three digits behind one that is no part of it.
            let millis = 1_000 + rounded.subsec_millis();
            let mut digits = itoa::Buffer::new();
            line.out.write_char('.')?;
            line.out.write_str(&digits.format(millis)[1..])
        })
    }

    /// Adds a moment, as RFC 3339 in UTC.
    pub fn moment(&mut self, name: &str, value: SystemTime) -> &mut Self {
        self.add(name, |line| {
            line.out.write_char('"')?;
            write_moment(line.out, value)?;
            line.out.write_char('"')
        })
    }

    fn add(&mut self, name: &str, value: impl FnOnce(&mut Self) -> fmt::Result) -> &mut Self {
        if self.written.is_ok() {
            self.written = self.name(name).and_then(|()| value(self));
        }
        self
    }

    fn name(&mut self, name: &str) -> fmt::Result {
        let (before, after) = match self.format {
            LogFormat::Text => (" ", "="),
            LogFormat::Json => (",\"", "\":"),
        };
        self.out.write_str(before)?;
        self.out.write_str(name)?;
        self.out.write_str(after)
    }

    fn quoted(&mut self, write: impl FnOnce(&mut Escaped<'_, 'f>) -> fmt::Result) -> fmt::Result {
        self.out.write_char('"')?;
        write(&mut Escaped {
            out: self.out,
            format: self.format,
        })?;
        self.out.write_char('"')
    }
}

/// The inside of a quoted text.
struct Escaped<'a, 'f> {
    out: &'a mut fmt::Formatter<'f>,
    format: LogFormat,
}

impl fmt::Write for Escaped<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let is_plain = |c: u8| (0x20..0x7f).contains(&c) && c != b'"' && c != b'\\';
        // Looks at all of them whatever it has seen, many at a time.
        if text.bytes().fold(true, |all, c| all & is_plain(c)) {
            return self.out.write_str(text);
        }
        let quoted = match self.format {
            // As tracing's text format has it.
            LogFormat::Text => format!("{text:?}"),
            LogFormat::Json => serde_json::to_string(text).map_err(|_| fmt::Error)?,
        };
        self.out.write_str(&quoted[1..quoted.len() - 1])
    }
}

/// To the microsecond.
fn write_moment(out: &mut impl fmt::Write, moment: SystemTime) -> fmt::Result {
    let moment = OffsetDateTime::from(moment);
    let (year, month, day) = moment.to_calendar_date();
    let (hour, minute, second, micros) = moment.to_hms_micro();
    // Beyond them RFC 3339 has no way to say it.
    let year = year.clamp(0, 9_999).unsigned_abs();
    let mut text = *b"0000-00-00T00:00:00.000000Z";
    let numbers = [
        (0..4, year),
        (5..7, u8::from(month).into()),
        (8..10, day.into()),
        (11..13, hour.into()),
        (14..16, minute.into()),
        (17..19, second.into()),
        (20..26, micros),
    ];
    for (place, mut number) in numbers {
        for digit in text[place].iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
        }
    }
    out.write_str(str::from_utf8(&text).map_err(|_| fmt::Error)?)
}

/// Fields without a line.
struct Fields<F>(F);

impl<F: Fn(&mut Line<'_, '_>)> Fields<F> {
    fn written(self, format: LogFormat) -> Box<str> {
        match format {
            LogFormat::Text => format!("{self:?}"),
            LogFormat::Json => format!("{self:#?}"),
        }
        .into()
    }
}

impl<F: Fn(&mut Line<'_, '_>)> fmt::Debug for Fields<F> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = Line::new(out);
        (self.0)(&mut line);
        line.written
    }
}

/// Writes the lines of the access log, and leaves all others to tracing's own format.
pub(super) struct AccessLines<F> {
    others: F,
    format: LogFormat,
}

impl<F> AccessLines<F> {
    /// Beside `others`, which is of the same format.
    pub fn new(others: F, format: LogFormat) -> Self {
        Self { others, format }
    }
}

impl<S, N, F> FormatEvent<S, N> for AccessLines<F>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if event.metadata().target() != TARGET {
            return self.others.format_event(context, writer, event);
        }
        let level = event.metadata().level();
        match self.format {
            LogFormat::Text => {
                write_moment(&mut writer, SystemTime::now())?;
                write!(writer, " {level:>5} {TARGET}: ")?;
            }
            LogFormat::Json => {
                writer.write_str("{\"timestamp\":\"")?;
                write_moment(&mut writer, SystemTime::now())?;
                write!(writer, "\",\"level\":\"{level}\",")?;
            }
        }
        let mut line = LineField {
            writer: writer.by_ref(),
            format: self.format,
            written: Ok(()),
        };
        event.record(&mut line);
        line.written?;
        match self.format {
            LogFormat::Text => writer.write_char('\n'),
            LogFormat::Json => writeln!(writer, ",\"target\":\"{TARGET}\"}}"),
        }
    }
}

/// The one field of such an event.
struct LineField<'a> {
    writer: Writer<'a>,
    format: LogFormat,
    written: fmt::Result,
}

impl Visit for LineField<'_> {
    fn record_debug(&mut self, _: &Field, line: &dyn fmt::Debug) {
        let written = match self.format {
            LogFormat::Text => write!(self.writer, "{line:?}"),
            LogFormat::Json => write!(self.writer, "{line:#?}"),
        };
        self.written = self.written.and(written);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use time::format_description::well_known::Rfc3339;

    use super::*;

    struct Told<'a>(&'a str);

    impl fmt::Debug for Told<'_> {
        fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
            Line::write(out, "told", |line| {
                line.text("text", Some(self.0))
                    .text("absent", None::<&str>)
                    .shown("shown", Some(&format_args!("<{}>", self.0)))
                    .number("number", Some(7_u32))
                    .seconds("seconds", Some(Duration::from_micros(1_012_500)));
            })
        }
    }

    #[test]
    fn a_line_looks_as_tracing_would_have_written_it() {
        let line = format!("{:?}", Told("a \"b\" 'c' \\ ü"));
        let expected = concat!(
            r#"told text="a \"b\" 'c' \\ ü" shown="<a \"b\" 'c' \\ ü>""#,
            " number=7 seconds=1.013"
        );
        assert_eq!(line, expected);
    }

    /// Two lines of the same, of which the second is told of another number.
    struct Alike<'a>(&'a Common, u32);

    impl fmt::Debug for Alike<'_> {
        fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
            Line::write(out, "told", |line| {
                line.number("before", Some(1_u32))
                    .common(self.0, |line| {
                        line.text("text", Some("a \"b\""))
                            .number("number", Some(self.1));
                    })
                    .text("after", Some("c"));
            })
        }
    }

    #[test]
    fn what_lines_have_in_common_is_written_once_for_each_log() {
        let common = Common::default();
        let first = r#"told before=1 text="a \"b\"" number=7 after="c""#;
        assert_eq!(format!("{:?}", Alike(&common, 7)), first);
        assert_eq!(format!("{:?}", Alike(&common, 8)), first);
        let json = format!("{{{:#?}}}", Alike(&common, 8));
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["text"], "a \"b\"");
        assert_eq!((&json["number"], &json["after"]), (&8.into(), &"c".into()));
    }

    #[test]
    fn seconds_are_rounded_to_the_millisecond() {
        for (micros, written) in [
            (0, "0.000"),
            (499, "0.000"),
            (500, "0.001"),
            (999_499, "0.999"),
            (999_500, "1.000"),
            (61_070_000, "61.070"),
        ] {
            let line = format!("{:?}", Lasted(Duration::from_micros(micros)));
            assert_eq!(line, format!("lasted seconds={written}"));
        }
        let line = format!("{:?}", Lasted(Duration::MAX));
        assert_eq!(line, format!("lasted seconds={}.999", u64::MAX));
    }

    struct Lasted(Duration);

    impl fmt::Debug for Lasted {
        fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
            Line::write(out, "lasted", |line| {
                line.seconds("seconds", Some(self.0));
            })
        }
    }

    proptest! {
        #[test]
        fn no_text_leaves_its_line_or_its_field(text: String) {
            let line = format!("{:?}", Told(&text));
            prop_assert!(!line.contains(|c: char| c.is_control()));
            let rest = format!("{text:?}");
            let expected = format!("told text={rest} shown");
            prop_assert!(line.starts_with(&expected));

            let json = format!("{{{:#?}}}", Told(&text));
            let json: serde_json::Value = serde_json::from_str(&json).unwrap();
            prop_assert_eq!(&json["text"], &text);
            prop_assert_eq!(&json["shown"], &format!("<{text}>"));
            prop_assert_eq!(&json["seconds"], 1.013);
            prop_assert!(json.get("absent").is_none());
        }

        #[test]
        fn a_moment_is_what_rfc_3339_says_to_the_microsecond(micros in 0_u64..253_402_300_799_000_000) {
            let moment = SystemTime::UNIX_EPOCH + Duration::from_micros(micros);
            let mut text = String::new();
            write_moment(&mut text, moment).unwrap();
            let read = OffsetDateTime::parse(&text, &Rfc3339).unwrap();
            prop_assert_eq!(read, OffsetDateTime::from(moment));
        }
    }
}
