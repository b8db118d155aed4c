//! Pressure stall information of Linux: how much of the time tasks waited for something.

/// One resource's pressure.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Pressure {
    /// Percent of the last 10 s in which at least one task waited.
    pub some_percent: f64,
}

impl Pressure {
    /// The pressure on "cpu" or "io" now; `None` where the kernel does not say. Blocks shortly.
    pub fn of(resource: &str) -> Option<Self> {
        parse_pressure(&std::fs::read_to_string(format!("/proc/pressure/{resource}")).ok()?)
    }
}

/// Reads the text of a file in `/proc/pressure`.
pub fn parse_pressure(text: &str) -> Option<Pressure> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let value = line.split_whitespace().find_map(|field| field.strip_prefix("avg10="))?;
    let some_percent = value.parse().ok().filter(|percent: &f64| percent.is_finite())?;
    Some(Pressure { some_percent })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_kernels_text() {
        let text = "some avg10=82.48 avg60=57.61 avg300=29.80 total=148413826\n\
                    full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!(parse_pressure(text), Some(Pressure { some_percent: 82.48 }));
        assert_eq!(parse_pressure("full avg10=1.0"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_an_answer(text in "(some )?(avg10=)?.{0,20}") {
            let _ = parse_pressure(&text);
        }
    }
}
