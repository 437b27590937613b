//! Names beside points, none over another.

/// A box in pixels: left, top, right, bottom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame(pub i32, pub i32, pub i32, pub i32);

impl Frame {
    fn overlaps(self, other: Self) -> bool {
        self.0 < other.2 && other.0 < self.2 && self.1 < other.3 && other.1 < self.3
    }

    fn holds(self, other: Self) -> bool {
        other.0 >= self.0 && other.1 >= self.1 && other.2 <= self.2 && other.3 <= self.3
    }
}

/// Finds places for labels, the nearest free one first.
pub(super) struct Places {
    bounds: Frame,
    taken: Vec<Frame>,
}

/// Where a label goes.
pub(super) struct Place {
    /// Its left end, half way up.
    pub at: (i32, i32),
    /// Whether it is far enough from its point to need a line.
    pub far: bool,
}

impl Places {
    pub(super) fn new(bounds: Frame) -> Self {
        Self { bounds, taken: Vec::new() }
    }

    /// Keeps labels off a box.
    pub(super) fn take(&mut self, frame: Frame) {
        self.taken.push(frame);
    }

    /// A place for a label of this size near `point`; `None` where there is none at all.
    pub(super) fn find(&mut self, point: (i32, i32), size: (i32, i32)) -> Option<Place> {
        let (width, height) = size;
        for radius in (9..400).step_by(9) {
            for step in 0..16 {
                let angle = f64::from(step) * std::f64::consts::TAU / 16.0;
                let (dx, dy) = (angle.cos() * f64::from(radius), -angle.sin() * f64::from(radius));
                let middle = point.1 + dy.round() as i32;
                // A label to the left ends at the circle, one above or below is centred on it.
                let share = (1.0 - angle.cos()) / 2.0;
                let left = point.0 + dx.round() as i32 - (share * f64::from(width)) as i32;
                let frame = Frame(left, middle - height / 2, left + width, middle + height / 2);
                let free = !self.taken.iter().any(|taken| taken.overlaps(frame));
                if free && self.bounds.holds(frame) {
                    self.taken.push(frame);
                    return Some(Place { at: (left, middle), far: radius > 18 });
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_points_in_one_place_do_not_overlap() {
        let mut places = Places::new(Frame(0, 0, 700, 400));
        for _ in 0..12 {
            places.find((350, 200), (120, 14)).unwrap();
        }
        for (index, one) in places.taken.iter().enumerate() {
            assert!(places.bounds.holds(*one));
            assert!(!places.taken[..index].iter().any(|other| other.overlaps(*one)));
        }
        assert!(places.find((350, 200), (900, 14)).is_none());
    }
}
