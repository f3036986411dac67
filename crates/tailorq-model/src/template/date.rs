//! `strftime` for chat templates, in UTC.

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Formats a time as Python's `strftime` does; an unknown directive is an error.
pub(super) fn strftime(format: &str, unix_seconds: u64) -> Result<String, Error> {
    let (days, second) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let (year, month, day) = civil(days);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next().unwrap_or('%');
        let text = match directive {
            'Y' => year.to_string(),
            'y' => format!("{:02}", year % 100),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'B' => MONTHS[month as usize - 1].to_owned(),
            'b' => MONTHS[month as usize - 1][..3].to_owned(),
            // 1 January 1970 was a Thursday.
            'A' => DAYS[((days + 4) % 7) as usize].to_owned(),
            'a' => DAYS[((days + 4) % 7) as usize][..3].to_owned(),
            'H' => format!("{:02}", second / 3600),
            'I' => format!("{:02}", (second / 3600 + 11) % 12 + 1),
            'p' => (if second < 43_200 { "AM" } else { "PM" }).to_owned(),
            'M' => format!("{:02}", second / 60 % 60),
            'S' => format!("{:02}", second % 60),
            '%' => "%".to_owned(),
            other => {
                let problem = format!("strftime_now does not know %{other}");
                return Err(Error::new(ErrorKind::InvalidOperation, problem));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// Year, month and day of a number of days since 1 January 1970 (Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms": years begin in March, so that the leap day is the last).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let format = "%A %a %d %B %b %Y %y %H:%M:%S %I %p %%";
        assert_eq!(strftime(format, 0).unwrap(), "Thursday Thu 01 January Jan 1970 70 00:00:00 12 AM %");
        assert_eq!(strftime("%Y-%m-%d %H:%M", 951_868_740).unwrap(), "2000-02-29 23:59");
        assert_eq!(strftime("%d %b %Y %I %p", 4_102_444_799).unwrap(), "31 Dec 2099 11 PM");
        assert!(strftime("%Q", 0).is_err());
    }
}
