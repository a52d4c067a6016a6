//! Sets of ports.

use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// Ports, as an annotation lists them: numbers and ranges, `3306,9000-9100`. At most 32,768 ranges,
/// as those that touch are one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortSet {
    /// First and last of each range, in order, with a gap between any two.
    ranges: Arc<[(u16, u16)]>,
}

/// A text that is no list of ports.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not a port or a range: 1 to 65535, or two of them like \"9000-9100\"")]
pub struct PortSetError(pub String);

impl PortSet {
    /// Whether the port is one of them.
    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        let after = self.ranges.partition_point(|(first, _)| *first <= port);
        let candidate = after.checked_sub(1).map(|index| self.ranges[index]);
        candidate.is_some_and(|(_, last)| port <= last)
    }
}

impl FromStr for PortSet {
    type Err = PortSetError;

    /// Ports and ranges, separated by commas; blanks around them do not count. Nothing is no port.
    fn from_str(text: &str) -> Result<Self, PortSetError> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let ranges = text.split(',').map(|item| {
            let item = item.trim();
            range(item).ok_or_else(|| PortSetError(item.to_owned()))
        });
        let mut ranges = ranges.collect::<Result<Vec<_>, _>>()?;
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::new();
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => {
                    before.1 = before.1.max(last);
                }
                _ => merged.push((first, last)),
            }
        }
        Ok(Self {
            ranges: merged.into(),
        })
    }
}

fn range(item: &str) -> Option<(u16, u16)> {
    let (first, last) = item.split_once('-').unwrap_or((item, item));
    let (first, last) = (port(first)?, port(last)?);
    (first <= last).then_some((first, last))
}

fn port(text: &str) -> Option<u16> {
    // `parse` takes a sign.
    let is_number = text.bytes().all(|c| c.is_ascii_digit());
    let number = text.parse().ok().filter(|_| is_number)?;
    (number != 0).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_ranges_are_read_in_any_order() {
        let ports: PortSet = " 9000-9100, 25,3306 ,9050-9200,26".parse().unwrap();
        for port in [25, 26, 3306, 9000, 9100, 9101, 9200] {
            assert!(ports.contains(port), "{port}");
        }
        for port in [0, 1, 24, 27, 3305, 3307, 8999, 9201, 65535] {
            assert!(!ports.contains(port), "{port}");
        }
        assert_eq!(ports, "25-26,3306,9000-9200".parse().unwrap());
        assert!("65535,1-65535".parse::<PortSet>().unwrap().contains(65535));
        assert!(!" ".parse::<PortSet>().unwrap().contains(80));
    }

    #[test]
    fn what_is_no_port_is_refused_by_name() {
        for (text, item) in [
            ("http", "http"),
            ("80,0", "0"),
            ("80,65536", "65536"),
            ("80,,81", ""),
            ("80,", ""),
            ("90-80", "90-80"),
            ("80-", "80-"),
            ("-80", "-80"),
            ("80-81-82", "80-81-82"),
            ("+80", "+80"),
        ] {
            let error = text.parse::<PortSet>().unwrap_err();
            assert_eq!(error, PortSetError(item.to_owned()), "{text}");
        }
    }
}
