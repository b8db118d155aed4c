//! A table that can be printed as markdown and written as CSV.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;

/// A table of text.
#[derive(Clone, Debug, Default)]
pub struct Table {
    title: String,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new<const N: usize>(title: &str, head: [&str; N]) -> Self {
        let head = head.map(str::to_owned).to_vec();
        Self { title: title.to_owned(), head, rows: Vec::new() }
    }

    /// Adds a row.
    ///
    /// # Panics
    /// When it has not as many cells as the head.
    pub fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.head.len(), "{}: a cell for each column", self.title);
        self.rows.push(cells);
    }

    /// The table in markdown.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let rule = vec!["---".to_owned(); self.head.len()];
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        format!("### {}\n\n{}{}{rows}", self.title, line(&self.head), line(&rule))
    }

    /// The table as comma-separated values (RFC 4180).
    pub fn csv(&self) -> String {
        let mut csv = String::new();
        for row in std::iter::once(&self.head).chain(&self.rows) {
            let quoted = row.iter().map(|cell| {
                let plain = !cell.contains([',', '"', '\n']);
                if plain { cell.clone() } else { format!("\"{}\"", cell.replace('"', "\"\"")) }
            });
            let cells: Vec<String> = quoted.collect();
            // Writing to a string cannot fail.
            let _ = writeln!(csv, "{}", cells.join(","));
        }
        csv
    }

    /// Prints the table and writes `NAME.csv`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn publish(&self, out: &Path, name: &str) -> anyhow::Result<()> {
        println!("{}", self.markdown());
        let path = out.join(format!("{name}.csv"));
        std::fs::write(&path, self.csv()).with_context(|| format!("writing {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_and_quotes_are_quoted() {
        let mut table = Table::new("t", ["a", "b"]);
        table.row(vec!["1, 2".to_owned(), "say \"x\"".to_owned()]);
        assert_eq!(table.csv(), "a,b\n\"1, 2\",\"say \"\"x\"\"\"\n");
        assert_eq!(table.markdown(), "### t\n\n| a | b |\n| --- | --- |\n| 1, 2 | say \"x\" |\n");
    }
}
