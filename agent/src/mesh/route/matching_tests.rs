use super::super::testing::{get, prefix};
use super::*;

#[test]
fn a_prefix_is_of_whole_segments_and_its_trailing_slash_says_nothing() {
    for (path, target, expected) in [
        ("/abc", "/abc", true),
        ("/abc", "/abc/", true),
        ("/abc", "/abc/def", true),
        ("/abc/", "/abc", true),
        ("/abc", "/abcd", false),
        ("/abc", "/ab", false),
        ("/abc", "/x/abc", false),
        ("/", "/", true),
        ("/", "/anything", true),
        ("/abc/def", "/abc/def/ghi", true),
        ("/abc/def", "/abc/defg", false),
    ] {
        assert_eq!(
            prefix(path).matches(&get(target)),
            expected,
            "{path} {target}"
        );
    }
}

#[test]
fn a_parameter_without_a_value_is_empty() {
    let empty = QueryMatch {
        name: "debug".into(),
        value: ValueMatch::Exact("".into()),
    };
    assert!(empty.matches("debug"));
    assert!(empty.matches("a=b&debug="));
    assert!(!empty.matches("debug=1"));
    assert!(!empty.matches(""));
    let pattern = QueryMatch {
        name: "page".into(),
        value: ValueMatch::Regex(Pattern::new("[0-9]+").unwrap()),
    };
    assert!(pattern.matches("page=12"));
    assert!(!pattern.matches("page=12x"));
    assert!(!pattern.matches("page=x&page=12"));
}

#[test]
fn a_match_is_written_so_that_it_can_be_told_from_others() {
    let mut one = prefix("/v2");
    one.method = Some(Method::GET);
    one.query = vec![QueryMatch {
        name: "page".into(),
        value: ValueMatch::Regex(Pattern::new("[0-9]+").unwrap()),
    }];
    assert_eq!(one.to_string(), "GET /v2/… ?page=~\"[0-9]+\"");
    let call = RequestMatch::grpc(GrpcMatch {
        service: Some(ValueMatch::Exact("shop.Cart".into())),
        method: None,
    });
    assert_eq!(call.to_string(), "/shop.Cart/*");
}
