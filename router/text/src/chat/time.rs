//! `strftime_now`: today's date in a template. The time is UTC, as in a container.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

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
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

pub(super) fn strftime_now(format: &str) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    strftime(format, now)
}

/// A moment as its parts.
struct Parts {
    year: u64,
    /// From 0.
    month: usize,
    /// From 1.
    day: u64,
    /// From 0.
    day_of_year: u64,
    /// From 0, Sunday.
    weekday: usize,
    second_of_day: u64,
}

/// `seconds` since 1970-01-01 UTC, formatted as C's `strftime` does in the C locale.
/// A directive that is not known is left as it is.
pub(super) fn strftime(format: &str, seconds: u64) -> String {
    let parts = Parts::of(seconds);
    let mut out = String::with_capacity(format.len() + 16);
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            // glibc: no padding.
            Some('-') => {
                if let Some(directive) = chars.next() {
                    let mut padded = String::new();
                    parts.push(directive, seconds, &mut padded);
                    let bare = padded.trim_start_matches(['0', ' ']);
                    let all = if bare.is_empty() && !padded.is_empty() {
                        "0"
                    } else {
                        bare
                    };
                    out.push_str(all);
                }
            }
            Some(directive) => parts.push(directive, seconds, &mut out),
            None => out.push('%'),
        }
    }
    out
}

// === impl Parts ===

impl Parts {
    fn of(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let mut year = 1970;
        let mut day = days;
        while day >= year_days(year) {
            day -= year_days(year);
            year += 1;
        }
        let day_of_year = day;
        let mut month = 0;
        while day >= month_days(year, month) {
            day -= month_days(year, month);
            month += 1;
        }
        // 1970-01-01 was a Thursday.
        let weekday = usize::try_from((days + 4) % 7).unwrap_or_default();
        Self {
            year,
            month,
            day: day + 1,
            day_of_year,
            weekday,
            second_of_day: seconds % 86_400,
        }
    }

    fn push(&self, directive: char, seconds: u64, out: &mut String) {
        let (hour, minute) = (self.second_of_day / 3600, self.second_of_day / 60 % 60);
        let second = self.second_of_day % 60;
        let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };
        let written = match directive {
            'Y' => write!(out, "{}", self.year),
            'y' => write!(out, "{:02}", self.year % 100),
            'C' => write!(out, "{:02}", self.year / 100),
            'm' => write!(out, "{:02}", self.month + 1),
            'd' => write!(out, "{:02}", self.day),
            'e' => write!(out, "{:2}", self.day),
            'j' => write!(out, "{:03}", self.day_of_year + 1),
            'B' => write!(out, "{}", MONTHS[self.month]),
            'b' | 'h' => write!(out, "{}", &MONTHS[self.month][..3]),
            'A' => write!(out, "{}", DAYS[self.weekday]),
            'a' => write!(out, "{}", &DAYS[self.weekday][..3]),
            'w' => write!(out, "{}", self.weekday),
            'u' => write!(out, "{}", if self.weekday == 0 { 7 } else { self.weekday }),
            'H' => write!(out, "{hour:02}"),
            'I' => write!(out, "{hour12:02}"),
            'k' => write!(out, "{hour:2}"),
            'l' => write!(out, "{hour12:2}"),
            'M' => write!(out, "{minute:02}"),
            'S' => write!(out, "{second:02}"),
            'f' => write!(out, "000000"),
            'p' => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            's' => write!(out, "{seconds}"),
            // A naive datetime has no zone.
            'z' | 'Z' => Ok(()),
            'n' => writeln!(out),
            't' => write!(out, "\t"),
            '%' => write!(out, "%"),
            'F' => return self.push_all("Y-m-d", seconds, out),
            'T' | 'X' => return self.push_all("H:M:S", seconds, out),
            'R' => return self.push_all("H:M", seconds, out),
            'D' | 'x' => return self.push_all("m/d/y", seconds, out),
            'c' => return self.push_all("a b e T Y", seconds, out),
            other => write!(out, "%{other}"),
        };
        written.expect("writing to a string cannot fail; this is a fault of the standard library");
    }

    /// Directives with the characters between them as they are.
    fn push_all(&self, pattern: &str, seconds: u64, out: &mut String) {
        for c in pattern.chars() {
            if c.is_ascii_alphabetic() {
                self.push(c, seconds, out);
            } else {
                out.push(c);
            }
        }
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn year_days(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn month_days(year: u64, month: usize) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn formats_as_python_does() {
        // datetime(2024, 2, 29, 5, 7, 9) and datetime(1999, 12, 31, 23, 59, 59)
        let leap = 1_709_183_229;
        let eve = 946_684_799;
        assert_eq!(strftime("%d %b %Y", leap), "29 Feb 2024");
        assert_eq!(
            strftime("%A, %B %-d, %Y %H:%M:%S", leap),
            "Thursday, February 29, 2024 05:07:09"
        );
        assert_eq!(
            strftime("%F %T %j %I%p %-I %y", leap),
            "2024-02-29 05:07:09 060 05AM 5 24"
        );
        assert_eq!(
            strftime("%a %e %-m %j %% %Q %", eve),
            "Fri 31 12 365 % %Q %"
        );
        assert_eq!(strftime("%c", eve), "Fri Dec 31 23:59:59 1999");
        assert_eq!(strftime("%Y-%m-%d", 0), "1970-01-01");
    }
}
