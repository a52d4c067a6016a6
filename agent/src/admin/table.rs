//! JSON as a readable table: any view can be shown without code of its own.

use std::fmt::Write;

use serde_json::{Map, Value};

use super::Column;

/// Longest cell, in characters; JSON has the whole.
const CELL_LIMIT: usize = 160;

/// A list becomes a table (with these columns, or one for each field), an object becomes lines of
/// names and values followed by its lists as titled tables.
pub(super) fn render(value: &Value, columns: &[Column]) -> String {
    let mut text = String::new();
    match value {
        Value::Array(rows) => render_rows(&mut text, rows, columns),
        Value::Object(fields) => render_object(&mut text, fields),
        scalar => {
            text = cell(scalar);
            text.push('\n');
        }
    }
    text
}

fn render_object(text: &mut String, fields: &Map<String, Value>) {
    let mut flat = Vec::new();
    let mut lists = Vec::new();
    flatten_object("", fields, &mut flat, &mut lists);
    let width = flat.iter().map(|(name, _)| characters(name)).max();
    for (name, value) in flat {
        let padding = width.unwrap_or(0) - characters(&name);
        _ = writeln!(text, "{name}{:padding$}  {}", "", cell(value));
    }
    for (name, rows) in lists {
        if !text.is_empty() {
            text.push('\n');
        }
        _ = writeln!(text, "{name}:");
        render_rows(text, rows, &[]);
    }
}

/// Separates what fits on a line from lists of objects.
fn flatten_object<'a>(
    prefix: &str,
    fields: &'a Map<String, Value>,
    flat: &mut Vec<(String, &'a Value)>,
    lists: &mut Vec<(String, &'a [Value])>,
) {
    for (name, value) in fields {
        let name = format!("{prefix}{}", printable(name));
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                flatten_object(&format!("{name}."), inner, flat, lists);
            }
            Value::Array(rows) if rows.iter().any(Value::is_object) => lists.push((name, rows)),
            _ => flat.push((name, value)),
        }
    }
}

fn render_rows(text: &mut String, rows: &[Value], columns: &[Column]) {
    if rows.is_empty() {
        text.push_str("(none)\n");
        return;
    }
    if !rows.iter().any(Value::is_object) {
        for row in rows {
            _ = writeln!(text, "{}", cell(row));
        }
        return;
    }
    let flat: Vec<Vec<(String, String)>> = rows.iter().map(flat_row).collect();
    let table = if columns.is_empty() {
        with_all_fields(&flat)
    } else {
        with_columns(&flat, columns)
    };
    render_table(text, &table);
}

/// A row as names of fields and their texts; what is null or empty is not there.
fn flat_row(row: &Value) -> Vec<(String, String)> {
    let mut cells = Vec::new();
    match row {
        Value::Object(fields) => flat_fields("", fields, &mut cells),
        other => cells.push((String::new(), cell(other))),
    }
    cells
}

fn flat_fields(prefix: &str, fields: &Map<String, Value>, cells: &mut Vec<(String, String)>) {
    for (name, value) in fields {
        let name = format!("{prefix}{}", printable(name));
        match value {
            Value::Object(inner) => flat_fields(&format!("{name}."), inner, cells),
            Value::Null => {}
            _ => cells.push((name, cell(value))),
        }
    }
}

/// Header and rows, with a column for each field in the order in which they first came.
fn with_all_fields(rows: &[Vec<(String, String)>]) -> Vec<Vec<String>> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in rows.iter().flatten() {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let header = names.iter().map(|name| name.to_uppercase()).collect();
    let body = rows
        .iter()
        .map(|row| names.iter().map(|name| field(row, &[name])).collect());
    std::iter::once(header).chain(body).collect()
}

fn with_columns(rows: &[Vec<(String, String)>], columns: &[Column]) -> Vec<Vec<String>> {
    let header = columns
        .iter()
        .map(|column| column.header.to_owned())
        .collect();
    let body = rows.iter().map(|row| {
        columns
            .iter()
            .map(|column| field(row, column.fields))
            .collect()
    });
    std::iter::once(header).chain(body).collect()
}

fn field(row: &[(String, String)], names: &[&str]) -> String {
    names
        .iter()
        .find_map(|wanted| row.iter().find(|(name, _)| name == wanted))
        .map_or_else(|| "-".to_owned(), |(_, value)| value.clone())
}

fn render_table(text: &mut String, rows: &[Vec<String>]) {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|column| rows.iter().map(|row| characters(&row[column])).max())
        .map(|width| width.unwrap_or(0))
        .collect();
    for row in rows {
        let mut line = String::new();
        for (value, width) in row.iter().zip(&widths) {
            let padding = width - characters(value) + 2;
            _ = write!(line, "{value}{:padding$}", "");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

fn cell(value: &Value) -> String {
    let text = match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => printable(text),
        Value::Array(values) if values.is_empty() => "-".to_owned(),
        Value::Array(values) if !values.iter().any(|value| value.is_object()) => {
            values.iter().map(cell).collect::<Vec<_>>().join(",")
        }
        Value::Object(fields) if fields.is_empty() => "-".to_owned(),
        Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            printable(&value.to_string())
        }
    };
    match text.char_indices().nth(CELL_LIMIT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Control characters are escaped: a name that somebody else chose must not move the cursor of who
/// reads the table.
fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

fn characters(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_list_of_objects_is_an_aligned_table_in_the_order_of_its_fields() {
        let pods = json!([
            {"name": "shop/web-0", "phase": "Enrolled", "ips": ["10.0.0.1", "fd00::1"]},
            {"name": "shop/a", "phase": "Failed", "ips": [], "last_error": "no netns"},
        ]);
        assert_eq!(
            render(&pods, &[]),
            "NAME        PHASE     IPS               LAST_ERROR\n\
             shop/web-0  Enrolled  10.0.0.1,fd00::1  -\n\
             shop/a      Failed    -                 no netns\n"
        );
    }

    #[test]
    fn columns_choose_the_first_field_that_is_there() {
        const COLUMNS: &[Column] = &[
            Column {
                header: "WHO",
                fields: &["pod", "address"],
            },
            Column {
                header: "SEEN",
                fields: &["proof.seen"],
            },
        ];
        let rows = json!([
            {"pod": "shop/web-0", "address": "10.0.0.1", "proof": {"seen": 3}},
            {"pod": null, "address": "10.0.0.2", "proof": null},
        ]);
        assert_eq!(
            render(&rows, COLUMNS),
            "WHO         SEEN\nshop/web-0  3\n10.0.0.2    -\n"
        );
    }

    #[test]
    fn an_object_is_lines_and_then_its_lists() {
        let health = json!({
            "status": "ok",
            "configuration": {"generation": 7, "errors": [{"file": "a.yaml", "line": 3}]},
            "notes": [],
        });
        assert_eq!(
            render(&health, &[]),
            "status                    ok\n\
             configuration.generation  7\n\
             notes                     -\n\
             \n\
             configuration.errors:\n\
             FILE    LINE\n\
             a.yaml  3\n"
        );
    }

    #[test]
    fn an_empty_list_says_so() {
        assert_eq!(render(&json!([]), &[]), "(none)\n");
    }

    #[test]
    fn control_characters_are_escaped_and_long_cells_are_cut() {
        let rows = json!([{"name": "a\n\u{1b}[2Jb", "long": "x".repeat(500)}]);
        let text = render(&rows, &[]);
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("a\\n\\u{1b}[2Jb"), "{text}");
        assert!(text.contains('…'));
        assert!(!text.contains(&"x".repeat(CELL_LIMIT + 1)));
    }
}
