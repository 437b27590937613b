//! Plots as SVG, drawn by `plotters`.
//!
//! Every plot carries a title, a description and a role for those who do not see it, has a light
//! background whatever the page's, and uses blue, grey and orange, which the colour-blind tell apart.

mod bars;
mod divergence;
mod heat;
mod labels;
mod scale;
mod scatter;
mod sensitivity;
mod subsets;

pub(super) use bars::cost;
pub(super) use divergence::divergence;
pub(super) use scatter::{bits, candidates, front};
pub(super) use sensitivity::{sensitivity, value as sensitivity_value};
pub(super) use subsets::subsets;

use super::number::clean;
use super::table::Level;
use plotters::coord::Shift;
use plotters::element::PathElement;
use plotters::prelude::{
    DrawingArea, DrawingAreaErrorKind, IntoDrawingArea as _, IntoFont as _, RGBColor, Rectangle,
    SVGBackend, ShapeStyle, Text,
};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color as _, FontTransform, TextStyle};

/// A plot, ready for a page.
pub(super) struct Plot {
    pub title: String,
    /// What it shows, in a sentence.
    pub description: String,
    /// The `svg` element.
    pub svg: String,
}

/// Why there is no plot: no data, or a failure to draw.
pub(super) type Missing = String;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

const WIDTH: u32 = 760;
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const FAINT: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);
const PAPER: RGBColor = RGBColor(0xff, 0xff, 0xff);
/// Okabe and Ito's colours.
const BLUE: RGBColor = RGBColor(0x00, 0x72, 0xb2);
const ORANGE: RGBColor = RGBColor(0xd5, 0x5e, 0x00);
const GREY: RGBColor = RGBColor(0x70, 0x70, 0x70);

fn colour(level: Level) -> RGBColor {
    match level {
        Level::Better => BLUE,
        Level::Small | Level::Medium | Level::Large => ORANGE,
        Level::Same | Level::TooFew | Level::Unknown => GREY,
    }
}

/// Draws a plot of `size` pixels.
fn plot(
    size: (u32, u32),
    title: String,
    description: String,
    draw: impl FnOnce(&Area<'_>) -> Drawn,
) -> Result<Plot, Missing> {
    let mut buffer = String::new();
    {
        let area = SVGBackend::with_string(&mut buffer, size).into_drawing_area();
        let drawn = area.fill(&PAPER).and_then(|()| draw(&area)).and_then(|()| area.present());
        drawn.map_err(|error| format!("it could not be drawn: {error}"))?;
    }
    // The backend's own opening tag has fixed sizes and no words.
    let body = buffer.split_once('>').map_or("", |(_, body)| body);
    let (width, height) = size;
    let (name, words) = (attribute(&title), attribute(&description));
    let svg = format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{name}. {words}\">\
         <title>{name}</title><desc>{words}</desc>\n{body}"
    );
    Ok(Plot { title, description, svg })
}

fn attribute(text: &str) -> String {
    let clean = clean(text);
    clean.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Text of `size` pixels; the backend divides sizes by 1.24.
fn style(size: u32, colour: RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    let font = ("sans-serif", f64::from(size) * 1.24).into_font();
    TextStyle { font, color: colour.to_backend_color(), pos: Pos::new(h, v) }
}

/// Writes text beside a point.
fn write(area: &Area<'_>, text: &str, at: (i32, i32), style: &TextStyle<'_>) -> Drawn {
    area.draw(&Text::new(clean(text), at, style.clone()))
}

/// Writes text from a point upwards.
fn write_up(area: &Area<'_>, text: &str, at: (i32, i32), style: &TextStyle<'_>) -> Drawn {
    area.draw(&Text::new(clean(text), at, style.transform(FontTransform::Rotate270)))
}

fn rectangle(area: &Area<'_>, from: (i32, i32), to: (i32, i32), fill: RGBColor) -> Drawn {
    area.draw(&Rectangle::new([from, to], fill.filled()))
}

fn line(area: &Area<'_>, points: &[(i32, i32)], style: impl Into<ShapeStyle>) -> Drawn {
    area.draw(&PathElement::new(points.to_vec(), style))
}

/// Width of text of `size` pixels, estimated: no font is at hand.
fn text_width(text: &str, size: u32) -> i32 {
    (text.chars().count() as f64 * f64::from(size) * 0.63).ceil() as i32
}

/// At most `limit` characters.
fn shorten(text: &str, limit: usize) -> String {
    let clean = clean(text);
    if clean.chars().count() <= limit {
        return clean;
    }
    // The end tells long names apart more often than the middle does.
    let chars: Vec<char> = clean.chars().collect();
    let (head, tail) = (limit / 2, limit - limit / 2 - 1);
    chars[..head].iter().chain(&['…']).chain(&chars[chars.len() - tail..]).collect()
}

/// Between two colours.
fn mix(from: RGBColor, to: RGBColor, share: f64) -> RGBColor {
    let share = share.clamp(0.0, 1.0);
    let channel =
        |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * share).round() as u8;
    RGBColor(channel(from.0, to.0), channel(from.1, to.1), channel(from.2, to.2))
}

/// Black or white, whichever is easier to read on `paper` (WCAG's relative luminance).
fn ink_on(paper: RGBColor) -> RGBColor {
    let linear = |c: u8| {
        let c = f64::from(c) / 255.0;
        if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
    };
    let luminance = 0.2126 * linear(paper.0) + 0.7152 * linear(paper.1) + 0.0722 * linear(paper.2);
    if luminance > 0.18 { INK } else { PAPER }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_keep_both_ends() {
        assert_eq!(shorten("baseline", 8), "baseline");
        assert_eq!(shorten("abcdefghijkl", 7), "abc…jkl");
        assert_eq!(shorten("a\tb", 7), "a b");
    }

    #[test]
    fn a_plot_says_what_it_is() {
        let plot = plot((40, 20), "a <b>".into(), "\"c\" & d".into(), |area| {
            write(area, "<x>", (1, 1), &style(12, INK, HPos::Left, VPos::Top))
        });
        let svg = plot.ok().unwrap().svg;
        assert!(svg.starts_with("<svg viewBox=\"0 0 40 20\" role=\"img\" aria-label=\"a &lt;b&gt;. &quot;c&quot; &amp; d\">"));
        assert!(svg.contains("<title>a &lt;b&gt;</title>") && svg.contains("&lt;x&gt;"));
        assert!(svg.trim_end().ends_with("</svg>") && !svg.contains("http"));
    }

    #[test]
    fn text_is_legible_on_every_shade() {
        assert_eq!(ink_on(PAPER), INK);
        assert_eq!(ink_on(RGBColor(0, 0, 0x80)), PAPER);
    }
}
