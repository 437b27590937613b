//! A map: coloured tiles in rows and columns.

use super::{
    Area, Drawn, INK, PAPER, ink_on, line, rectangle, shorten, style, text_width, write, write_up,
};
use plotters::prelude::RGBColor;
use plotters::style::text_anchor::{HPos, VPos};

/// A tile.
pub(super) struct Tile {
    pub colour: RGBColor,
    /// What stands on it.
    pub text: String,
}

/// Tiles with names of rows and columns.
pub(super) struct Map {
    pub rows: Vec<String>,
    pub columns: Vec<String>,
    /// Row by row; `None` stays blank.
    pub tiles: Vec<Vec<Option<Tile>>>,
    pub tile: (i32, i32),
    /// Rows from the top that stand apart.
    pub apart: usize,
}

/// Characters of a name.
const NAME: usize = 26;
const GAP: i32 = 8;

impl Map {
    /// Room for the names of rows.
    fn left(&self) -> i32 {
        widest(&self.rows) + 14
    }

    /// Whether names of columns are written upwards.
    fn up(&self) -> bool {
        widest(&self.columns) > self.tile.0 - 4
    }

    /// Room for the names of columns.
    fn top(&self) -> i32 {
        if self.up() { widest(&self.columns) + 12 } else { 24 }
    }

    /// Pixels that it takes.
    pub(super) fn size(&self) -> (i32, i32) {
        let (columns, rows) = (self.columns.len() as i32, self.rows.len() as i32);
        let gap = if self.apart > 0 { GAP } else { 0 };
        (self.left() + columns * self.tile.0 + 10, self.top() + rows * self.tile.1 + gap + 6)
    }

    /// Draws it with its upper left corner at `origin`.
    pub(super) fn draw(&self, area: &Area<'_>, origin: (i32, i32)) -> Drawn {
        let (left, top) = (origin.0 + self.left(), origin.1 + self.top());
        let (width, height) = self.tile;
        let centred = style(12, INK, HPos::Center, VPos::Center);
        let column = |index: usize| left + index as i32 * width;
        for (index, name) in self.columns.iter().enumerate() {
            let middle = column(index) + width / 2;
            let name = shorten(name, NAME);
            if self.up() {
                let upwards = style(12, INK, HPos::Left, VPos::Center);
                write_up(area, &name, (middle, top - 6), &upwards)?;
            } else {
                write(area, &name, (middle, top - 11), &centred)?;
            }
        }
        for (index, (name, tiles)) in self.rows.iter().zip(&self.tiles).enumerate() {
            let gap = if self.apart > 0 && index >= self.apart { GAP } else { 0 };
            let y = top + index as i32 * height + gap;
            let end = style(12, INK, HPos::Right, VPos::Center);
            write(area, &shorten(name, NAME), (left - 6, y + height / 2), &end)?;
            for (at, tile) in tiles.iter().enumerate() {
                let Some(tile) = tile else { continue };
                let x = column(at);
                rectangle(area, (x, y), (x + width - 1, y + height - 1), tile.colour)?;
                if !tile.text.is_empty() {
                    let ink = style(11, ink_on(tile.colour), HPos::Center, VPos::Center);
                    write(area, &tile.text, (x + width / 2, y + height / 2), &ink)?;
                }
            }
        }
        Ok(())
    }
}

fn widest(names: &[String]) -> i32 {
    names.iter().map(|name| text_width(&shorten(name, NAME), 12)).max().unwrap_or(0)
}

/// A bar of colours with its ends and its middle named.
pub(super) fn legend(
    area: &Area<'_>,
    (x, y): (i32, i32),
    colour: impl Fn(f64) -> RGBColor,
    names: &[(f64, String)],
) -> Drawn {
    const WIDTH: i32 = 260;
    for step in 0..52 {
        let share = f64::from(step) / 51.0;
        let from = x + step * WIDTH / 52;
        rectangle(area, (from, y), (from + WIDTH / 52, y + 10), colour(share))?;
    }
    line(area, &[(x, y), (x + WIDTH, y), (x + WIDTH, y + 10), (x, y + 10), (x, y)], PAPER)?;
    for (share, name) in names {
        let anchor = match share {
            s if *s <= 0.0 => HPos::Left,
            s if *s >= 1.0 => HPos::Right,
            _ => HPos::Center,
        };
        let at = x + (share * f64::from(WIDTH)) as i32;
        write(area, name, (at, y + 20), &style(12, INK, anchor, VPos::Center))?;
    }
    Ok(())
}
