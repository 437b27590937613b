//! Which format for which layer: a multiple-choice knapsack.
//!
//! Of each item one option has to be taken; costs add up, losses add up, and the least loss within a
//! budget is wanted. The linear relaxation is solved exactly by the items' convex hulls (Sinha and
//! Zoltners, "The multiple-choice knapsack problem", Operations Research 27, 1979; the same steps
//! allocate bits in Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers",
//! IEEE TASSP 36, 1988): from the cheapest option of every item, the step that saves most loss for its
//! cost comes next. All steps in that order are the Pareto front of every budget at once; at most one
//! step of a budget's relaxation is taken in part, so the gap to the optimum is less than that step.

/// What an item may become.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    /// Bytes.
    pub cost: u64,
    /// What is to be kept small.
    pub loss: f64,
}

/// The options that were taken, by item.
pub(crate) type Taken = Vec<usize>;

/// From one point of the front to the next: an item's option is replaced.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Step {
    item: usize,
    to: usize,
    cost: u64,
    saves: f64,
}

/// The front of a set of items.
#[derive(Clone, Debug)]
pub(crate) struct Front {
    items: Vec<Vec<Choice>>,
    /// The cheapest options that are worth it.
    first: Taken,
    steps: Vec<Step>,
}

/// What fits into a budget.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Solution {
    pub taken: Taken,
    pub cost: u64,
    pub loss: f64,
    /// No choice within the budget can have less loss.
    pub bound: f64,
}

impl Front {
    /// Items without options are left out of nothing: each has to have one.
    pub(crate) fn new(items: Vec<Vec<Choice>>) -> Self {
        let mut first = Vec::with_capacity(items.len());
        let mut steps = Vec::new();
        for (item, options) in items.iter().enumerate() {
            let hull = hull(options);
            first.push(hull.first().copied().unwrap_or(0));
            steps.extend(hull.windows(2).map(|pair| Step {
                item,
                to: pair[1],
                cost: options[pair[1]].cost - options[pair[0]].cost,
                saves: options[pair[0]].loss - options[pair[1]].loss,
            }));
        }
        // Stable: an item's own steps stay in their order where they save equally.
        steps.sort_by(|a, b| slope(b).total_cmp(&slope(a)));
        Self { items, first, steps }
    }

    /// Cost and loss of a choice.
    pub(crate) fn sums(&self, taken: &Taken) -> (u64, f64) {
        let chosen = self.items.iter().zip(taken).filter_map(|(options, &to)| options.get(to));
        chosen.fold((0, 0.0), |(cost, loss), one| (cost + one.cost, loss + one.loss))
    }

    /// Points of the front; the first is the cheapest.
    pub(crate) fn len(&self) -> usize {
        self.steps.len() + 1
    }

    /// A point of the front.
    pub(crate) fn point(&self, index: usize) -> Taken {
        let mut taken = self.first.clone();
        for step in self.steps.iter().take(index) {
            taken[step.item] = step.to;
        }
        taken
    }

    /// The least loss within `budget`, to less than one step of the front; `None` when nothing is cheap
    /// enough. What the front leaves of the budget goes to later steps that fit.
    pub(crate) fn within(&self, budget: u64) -> Option<Solution> {
        let mut taken = self.first.clone();
        let (mut cost, mut loss) = self.sums(&taken);
        if cost > budget {
            return None;
        }
        let mut bound = None;
        let mut passed = vec![false; self.items.len()];
        for step in &self.steps {
            if passed[step.item] {
                continue;
            }
            if cost + step.cost <= budget {
                taken[step.item] = step.to;
                cost += step.cost;
                loss -= step.saves;
            } else {
                let part = (budget - cost) as f64 / step.cost as f64;
                bound.get_or_insert(loss - step.saves * part);
                passed[step.item] = true;
            }
        }
        // Summed anew: differences of floats leave a trace.
        let (cost, loss) = self.sums(&taken);
        Some(Solution { taken, cost, loss, bound: bound.unwrap_or(loss).min(loss) })
    }
}

fn slope(step: &Step) -> f64 {
    step.saves / step.cost as f64
}

/// Options on the lower convex hull of cost and loss, cheapest first.
fn hull(options: &[Choice]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..options.len()).collect();
    let key = |&index: &usize| (options[index].cost, options[index].loss);
    order.sort_by(|a, b| {
        let (a, b) = (key(a), key(b));
        a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
    });
    let mut hull: Vec<usize> = Vec::new();
    for index in order {
        let new = options[index];
        // One that is no better than a cheaper one is never worth it.
        if hull.last().is_some_and(|&last| options[last].loss <= new.loss) {
            continue;
        }
        while let [.., before, last] = hull[..] {
            let (before, last) = (options[before], options[last]);
            let gain =
                |from: Choice, to: Choice| (from.loss - to.loss) / (to.cost - from.cost) as f64;
            if gain(before, last) > gain(last, new) {
                break;
            }
            hull.pop();
        }
        hull.push(index);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn choice(cost: u64, loss: f64) -> Choice {
        Choice { cost, loss }
    }

    #[test]
    fn hulls_leave_out_what_is_never_worth_it() {
        let options =
            [choice(8, 1.0), choice(4, 10.0), choice(6, 8.0), choice(9, 1.5), choice(5, 3.0)];
        assert_eq!(hull(&options), [1, 4, 0]);
        // Of equal costs the one with less loss.
        assert_eq!(hull(&[choice(4, 2.0), choice(4, 1.0)]), [1]);
    }

    #[test]
    fn the_front_goes_from_the_cheapest_to_the_finest() {
        let items = vec![
            vec![choice(4, 10.0), choice(6, 2.0), choice(8, 1.0)],
            vec![choice(40, 50.0), choice(60, 10.0), choice(80, 9.0)],
        ];
        let front = Front::new(items);
        assert_eq!(front.len(), 5);
        let points: Vec<_> = (0..5).map(|index| front.sums(&front.point(index))).collect();
        assert_eq!(points[0], (44, 60.0));
        assert_eq!(points[1], (46, 52.0));
        assert_eq!(points[2], (66, 12.0));
        assert_eq!(points[4], (88, 10.0));
        assert!(front.within(43).is_none());
        let half = front.within(56).unwrap();
        // The second item's step fits by half.
        assert_eq!((half.cost, half.loss, half.bound), (48, 51.0, 32.0));
    }

    /// Every choice there is.
    fn exhaustive(items: &[Vec<Choice>], budget: u64) -> Option<f64> {
        let Some((first, rest)) = items.split_first() else { return Some(0.0) };
        let fits = first.iter().filter(|one| one.cost <= budget);
        let best = fits.filter_map(|one| Some(one.loss + exhaustive(rest, budget - one.cost)?));
        best.min_by(f64::total_cmp)
    }

    proptest! {
        #[test]
        fn solutions_lie_between_the_bound_and_one_step_above_the_optimum(
            items in prop::collection::vec(
                prop::collection::vec((1u64..40, 0u32..100), 1..4), 1..6),
            budget in 1u64..200,
        ) {
            let items: Vec<Vec<Choice>> = items
                .into_iter()
                .map(|options| {
                    options.into_iter().map(|(c, l)| choice(c, f64::from(l))).collect()
                })
                .collect();
            let front = Front::new(items.clone());
            let best = exhaustive(&items, budget);
            let found = front.within(budget);
            prop_assert_eq!(best.is_some(), found.is_some());
            if let Some((best, found)) = best.zip(found) {
                let largest = front.steps.iter().map(|step| step.saves).fold(0.0, f64::max);
                prop_assert!(found.cost <= budget);
                prop_assert!(found.bound <= best + 1e-9 && best <= found.loss + 1e-9);
                prop_assert!(found.loss <= best + largest + 1e-9);
            }
        }
    }
}
