//! YAML as a tree that knows where each of its fields stands.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_saphyr::Spanned;

/// How deep fields may nest: several times what any Kubernetes kind has, and far less than a
/// thread's stack.
const DEPTH_MAX: usize = 24;

/// Nodes of a document: a `List` of some 5,000 pods as a cluster shows them.
const NODES_MAX: usize = 1_000_000;

/// A YAML node and its place.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    /// Line of the file, from 1: of the key, where the node is a field's value.
    pub(super) line: u64,
    node: Node,
}

#[derive(Debug, Clone)]
enum Node {
    Scalar(Value),
    Sequence(Vec<Tree>),
    Mapping(Vec<(String, Tree)>),
}

/// Text that is not YAML, or too much of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SyntaxError {
    /// Line of the file, from 1.
    pub(super) line: u64,
    /// Column, from 1.
    pub(super) column: Option<u64>,
    pub(super) reason: String,
}

impl Tree {
    /// Reads one document that begins at this line of its file. None if there is nothing in it.
    ///
    /// The parser's budget bounds what a document may become: nodes, depth, and what aliases
    /// expand to.
    pub(super) fn parse(text: &str, first_line: u64) -> Result<Option<Self>, SyntaxError> {
        let options = serde_saphyr::options! {
            with_snippet: false,
            // YAML 1.2: `no` and `y` are texts, and may be names.
            strict_booleans: true,
            budget: serde_saphyr::budget! {
                max_depth: DEPTH_MAX,
                flow_nesting_limit: DEPTH_MAX,
                max_nodes: NODES_MAX,
                max_events: 2 * NODES_MAX,
            },
        };
        let mut tree: Self =
            serde_saphyr::from_str_with_options(text, options).map_err(|error| {
                let location = error.location();
                SyntaxError {
                    line: location
                        .map_or(first_line, |at| first_line + at.line().saturating_sub(1)),
                    column: location.map(|at| at.column()),
                    reason: reason(&error),
                }
            })?;
        if matches!(tree.node, Node::Scalar(Value::Null)) {
            return Ok(None);
        }
        tree.move_down(first_line - 1);
        Ok(Some(tree))
    }

    fn move_down(&mut self, lines: u64) {
        self.line += lines;
        match &mut self.node {
            Node::Scalar(_) => {}
            Node::Sequence(items) => items.iter_mut().for_each(|item| item.move_down(lines)),
            Node::Mapping(fields) => fields
                .iter_mut()
                .for_each(|(_, value)| value.move_down(lines)),
        }
    }

    /// The field of this name, if it is a mapping that has one.
    pub(super) fn get(&self, name: &str) -> Option<&Self> {
        match &self.node {
            Node::Mapping(fields) => fields
                .iter()
                .find(|(field, _)| field == name)
                .map(|(_, value)| value),
            Node::Scalar(_) | Node::Sequence(_) => None,
        }
    }

    /// The text, if it is one.
    pub(super) fn as_str(&self) -> Option<&str> {
        match &self.node {
            Node::Scalar(value) => value.as_str(),
            Node::Sequence(_) | Node::Mapping(_) => None,
        }
    }

    /// Its items, if it is a list.
    pub(super) fn items(&self) -> Option<&[Self]> {
        match &self.node {
            Node::Sequence(items) => Some(items),
            Node::Scalar(_) | Node::Mapping(_) => None,
        }
    }

    /// Whether it has fields.
    pub(super) fn is_mapping(&self) -> bool {
        matches!(self.node, Node::Mapping(_))
    }

    /// The same without places.
    pub(super) fn to_json(&self) -> Value {
        match &self.node {
            Node::Scalar(value) => value.clone(),
            Node::Sequence(items) => items.iter().map(Self::to_json).collect(),
            Node::Mapping(fields) => Value::Object(
                fields
                    .iter()
                    .map(|(name, value)| (name.clone(), value.to_json()))
                    .collect(),
            ),
        }
    }

    /// Line of the field of this path (`spec.ports[0].port`, `metadata.labels[a.b/c]`), or of the
    /// innermost one around it that is there.
    pub(super) fn line_of(&self, path: &str) -> u64 {
        let mut at = self;
        for step in steps(path) {
            let next = match &at.node {
                Node::Mapping(_) => at.get(step),
                Node::Sequence(items) => step.parse().ok().and_then(|i: usize| items.get(i)),
                Node::Scalar(_) => None,
            };
            match next {
                Some(next) => at = next,
                None => break,
            }
        }
        at.line
    }
}

fn steps(path: &str) -> impl Iterator<Item = &str> {
    let mut rest = path;
    std::iter::from_fn(move || {
        rest = rest.strip_prefix('.').unwrap_or(rest);
        if rest.is_empty() {
            return None;
        }
        let (step, after) = match rest.strip_prefix('[') {
            Some(inside) => inside.split_once(']').unwrap_or((inside, "")),
            None => rest.split_at(rest.find(['.', '[']).unwrap_or(rest.len())),
        };
        rest = after;
        Some(step)
    })
}

/// The parser's reason on one line; the place is told apart from it.
fn reason(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let line = text.lines().next().unwrap_or_default();
    let end = line.rfind(" at line ").unwrap_or(line.len());
    line[..end].trim_end_matches([':', ',']).to_owned()
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Node>::deserialize(deserializer)?;
        Ok(Self {
            line: spanned.referenced.line(),
            node: spanned.value,
        })
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Node::Sequence(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut fields = Vec::new();
        while let Some(name) = access.next_key::<Spanned<String>>()? {
            let mut value: Tree = access.next_value()?;
            if name.referenced.line() != 0 {
                value.line = name.referenced.line();
            }
            fields.push((name.value, value));
        }
        Ok(Node::Mapping(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
metadata:
  name: web
  labels:
    a.b/c: x
spec:
  ports:
  - port: 80
    name: http

  - port: 443
";

    #[test]
    fn each_field_knows_its_line() {
        let tree = Tree::parse(TEXT, 11).unwrap().unwrap();
        for (path, line) in [
            ("metadata", 11),
            ("metadata.name", 12),
            ("metadata.labels[a.b/c]", 14),
            ("spec.ports", 16),
            ("spec.ports[0].name", 18),
            ("spec.ports[1].port", 20),
            ("spec.ports[1].targetPort", 20),
            ("spec.type", 15),
            ("status.podIP", 11),
        ] {
            assert_eq!(tree.line_of(path), line, "{path}");
        }
    }

    #[test]
    fn values_are_those_of_yaml() {
        let text =
            "{a: 1, b: -1, c: 1.5, d: true, e: ~, f: '1', g: [x, \"true\"], h: 10.0.0.1, i: no}";
        let tree = Tree::parse(text, 1).unwrap().unwrap();
        let expected = serde_json::json!({
            "a": 1, "b": -1, "c": 1.5, "d": true, "e": null, "f": "1", "g": ["x", "true"],
            "h": "10.0.0.1", "i": "no"
        });
        assert_eq!(tree.to_json(), expected);
    }

    #[test]
    fn json_is_read_too() {
        let text = "{\n\t\"a\": {\"b\": [1, \"x\\/y\"]}\n}\n";
        let tree = Tree::parse(text, 1).unwrap().unwrap();
        assert_eq!(tree.to_json(), serde_json::json!({"a": {"b": [1, "x/y"]}}));
        assert_eq!(tree.line_of("a.b"), 2);
    }

    #[test]
    fn nothing_is_no_document() {
        assert!(Tree::parse("# only words\n", 1).unwrap().is_none());
        assert!(Tree::parse("", 1).unwrap().is_none());
    }

    #[test]
    fn an_error_of_syntax_tells_its_place() {
        let error = Tree::parse("a: 1\nb: [1, 2\nc: 3\n", 5).unwrap_err();
        assert!((6..=8).contains(&error.line), "{error:?}");
        assert!(!error.reason.is_empty() && !error.reason.contains('\n'));
    }

    #[test]
    fn a_key_given_twice_is_an_error() {
        let error = Tree::parse("a: 1\nb: 2\na: 3\n", 1).unwrap_err();
        assert_eq!(error.line, 3);
        assert!(error.reason.contains("duplicate"), "{}", error.reason);
    }

    #[test]
    fn an_alias_bomb_is_refused_soon() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let before = format!("*a{}", level - 1);
            let items = vec![before; 10].join(", ");
            text += &format!("a{level}: &a{level} [{items}]\n");
        }
        assert!(Tree::parse(&text, 1).is_err());
    }

    #[test]
    fn depth_is_bounded_so_that_a_small_stack_is_enough() {
        let parse_all = || {
            for depth in [DEPTH_MAX + 1, 1_000, 100_000] {
                assert!(Tree::parse(&"[".repeat(depth), 1).is_err());
                assert!(Tree::parse(&"{a: ".repeat(depth), 1).is_err());
                assert!(Tree::parse(&"- ".repeat(depth), 1).is_err());
            }
            for depth in [DEPTH_MAX + 1, 1_000] {
                let deep: String = (0..depth).map(|n| " ".repeat(n) + "a:\n").collect();
                assert!(Tree::parse(&deep, 1).is_err());
            }
        };
        // Half of what a thread of the runtime has.
        let thread = std::thread::Builder::new().stack_size(1 << 20);
        thread.spawn(parse_all).unwrap().join().unwrap();
    }
}
