//! `usctl plan`: which code a swarm needs, and the lines over it. Asks nobody.

use std::fmt::Write as _;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use us_core::durability::plan::{Churn, Outlook, Target};
use us_core::geometry::Code;

use super::JsonArgs;

mod lines;

pub(super) use lines::{LinesArgs, lines};

const HOURS_A_YEAR: f64 = 365.0 * 24.0;

/// A time as people write it: `36h`, `90d`, `2y`.
fn years(text: &str) -> anyhow::Result<f64> {
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().with_context(|| format!("{text:?} is no time"))?;
    let hours = match unit {
        "h" => 1.0,
        "d" => 24.0,
        "w" => 7.0 * 24.0,
        "y" => HOURS_A_YEAR,
        _ => bail!("{text:?}: a time ends in h, d, w or y"),
    };
    Ok(number * hours / HOURS_A_YEAR)
}

/// Flags of `usctl plan code`.
#[derive(Debug, clap::Args)]
pub struct CodeArgs {
    /// Mean time to the death of a provider
    #[arg(long, value_name = "TIME", default_value = "1y", value_parser = years)]
    mttf: f64,
    /// Mean time from a loss to the end of its repair
    #[arg(long, value_name = "TIME", default_value = "1d", value_parser = years)]
    repair: f64,
    /// The share of the time a provider is online
    #[arg(long, value_name = "0..1", default_value_t = 1.0)]
    presence: f64,
    /// The most that the probability of a block's loss in a year may be
    #[arg(long, value_name = "P", default_value_t = 1e-9)]
    target: f64,
    /// The most that the probability of a block being unreadable at a moment may be
    #[arg(long, value_name = "P", default_value_t = 1e-4)]
    unreadable: f64,
    /// Providers there are: a block has no more fragments
    #[arg(long, value_name = "N", default_value_t = 40)]
    peers: usize,
    /// Say only what this code would give, at every laziness
    #[arg(long, value_name = "S+R")]
    code: Option<Code>,
    #[command(flatten)]
    json: JsonArgs,
}

pub(super) fn code(args: &CodeArgs) -> anyhow::Result<()> {
    let churn = Churn { mttf_years: args.mttf, repair_years: args.repair, presence: args.presence };
    let target = Target { loss_a_year: args.target, unreadable: args.unreadable };
    let outlooks = match args.code {
        Some(code) => {
            let all = (0..code.r().max(1)).rev().map(|r0| churn.outlook(code, r0));
            all.collect::<Result<Vec<_>, _>>()?
        }
        None => churn.plan(&target, args.peers)?,
    };
    let value = Value::Array(outlooks.iter().map(outlook_json).collect());
    super::print(args.json, &value, || to_text(&outlooks))
}

fn outlook_json(outlook: &Outlook) -> Value {
    json!({
        "code": outlook.code.to_string(),
        "r0": outlook.r0,
        "space": outlook.space(),
        "loss_a_year": outlook.loss_a_year,
        "unreadable": outlook.unreadable,
        "fragments_a_year": outlook.fragments_a_year,
        "traffic_a_year": outlook.traffic_a_year,
    })
}

fn to_text(outlooks: &[Outlook]) -> String {
    let mut out = String::from(
        "CODE     R0   SPACE  LOSS A YEAR   UNREADABLE  REPAIR A YEAR (fragments, share of data)\n",
    );
    for outlook in outlooks {
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{:<7}{:>4}{:>8.2}{:>13.1e}{:>13.1e}{:>15.1}{:>8.2}",
            outlook.code.to_string(),
            outlook.r0,
            outlook.space(),
            outlook.loss_a_year,
            outlook.unreadable,
            outlook.fragments_a_year,
            outlook.traffic_a_year,
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        assert_eq!(years("2y").unwrap(), 2.0);
        assert!((years("73d").unwrap() - 0.2).abs() < 1e-12);
        assert!(years("12").is_err() && years("d").is_err() && years("1m").is_err());
    }

    #[test]
    fn a_plan_is_a_table() {
        let churn = Churn { mttf_years: 1.0, repair_years: 1.0 / 365.0, presence: 1.0 };
        let outlook = churn.outlook(Code::new(16, 15).unwrap(), 4).unwrap();
        let text = to_text(&[outlook]);
        assert!(
            text.contains("16+15") && text.contains("5.2e-7") && text.contains("60."),
            "{text}"
        );
        assert_eq!(outlook_json(&outlook)["r0"], 4);
    }
}
