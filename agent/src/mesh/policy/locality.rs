//! Which endpoints come first.

use super::super::Node;

/// How far an endpoint's node is from the client's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Nearness {
    /// It is the same.
    Node,
    /// Of the same zone.
    Zone,
    /// Of the same region.
    Region,
    /// Elsewhere, or nobody knows.
    Elsewhere,
}

impl Nearness {
    /// Between two nodes, where they are known. A zone's name counts within its region only.
    #[must_use]
    pub fn between(client: Option<&Node>, endpoint: Option<&Node>) -> Self {
        let (Some(client), Some(endpoint)) = (client, endpoint) else {
            return Self::Elsewhere;
        };
        if client.name == endpoint.name {
            return Self::Node;
        }
        let same_region = client.region == endpoint.region;
        if same_region && client.zone.is_some() && client.zone == endpoint.zone {
            Self::Zone
        } else if same_region && client.region.is_some() {
            Self::Region
        } else {
            Self::Elsewhere
        }
    }
}

/// Which endpoints come first. A tier keeps its traffic while enough of it stands
/// (`settings.balance.overprovisioning`), then the rest overflows to the next. Runs at the source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Locality {
    /// All are alike.
    #[default]
    Any,
    /// Those of the client's zone, then of its region, then the others.
    Zone,
    /// Those of the client's node, then of its zone, of its region, then the others.
    Node,
}

impl Locality {
    /// The tier of an endpoint, for [`crate::resilience::Member::tier`]: 0 comes first.
    #[must_use]
    pub const fn tier(self, nearness: Nearness) -> u8 {
        match (self, nearness) {
            (Self::Any, _) | (Self::Zone, Nearness::Node | Nearness::Zone) => 0,
            (Self::Zone, Nearness::Region) => 1,
            (Self::Zone, Nearness::Elsewhere) => 2,
            (Self::Node, _) => nearness as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn node(name: &str, region: Option<&str>, zone: Option<&str>) -> Node {
        Node {
            name: name.into(),
            addresses: Vec::new(),
            region: region.map(Arc::from),
            zone: zone.map(Arc::from),
        }
    }

    #[test]
    fn a_zone_counts_within_its_region_only() {
        let here = node("a", Some("eu"), Some("1"));
        for (other, expected) in [
            (node("a", Some("eu"), Some("1")), Nearness::Node),
            (node("b", Some("eu"), Some("1")), Nearness::Zone),
            (node("c", Some("eu"), Some("2")), Nearness::Region),
            (node("d", Some("us"), Some("1")), Nearness::Elsewhere),
            (node("e", None, None), Nearness::Elsewhere),
        ] {
            let nearness = Nearness::between(Some(&here), Some(&other));
            assert_eq!(nearness, expected, "{}", other.name);
        }
        let nowhere = node("x", None, None);
        let other = node("y", None, None);
        let unknown = Nearness::between(Some(&nowhere), Some(&other));
        assert_eq!(unknown, Nearness::Elsewhere);
        assert_eq!(Nearness::between(Some(&here), None), Nearness::Elsewhere);
    }

    #[test]
    fn tiers_follow_the_preference() {
        let all = [
            Nearness::Node,
            Nearness::Zone,
            Nearness::Region,
            Nearness::Elsewhere,
        ];
        let tiers = |locality: Locality| all.map(|nearness| locality.tier(nearness));
        assert_eq!(tiers(Locality::Any), [0, 0, 0, 0]);
        assert_eq!(tiers(Locality::Zone), [0, 0, 1, 2]);
        assert_eq!(tiers(Locality::Node), [0, 1, 2, 3]);
    }
}
