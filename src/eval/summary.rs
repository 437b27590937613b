//! From scores to a record: figures, intervals, how the stage ended.

use super::figures::Statistics;
use super::metrics::{DocumentScore, Metrics};
use super::record::{Record, Status};
use super::score::Scored;
use super::scores::Header;
use super::statistics::{Bootstrap, Reference, Sample, statistics};

/// How a stage ended, and what is to be said of it.
pub(super) type Ended = (Status, Option<String>);

/// What a stage's statistics are made of.
pub(super) struct Summary<'a> {
    pub header: &'a Header,
    /// By document.
    pub documents: Vec<DocumentScore>,
    /// By document, of its tokens.
    pub divergence: Vec<Vec<f32>>,
    /// The baseline's stage and documents, where it did not run beside.
    pub others: Option<(String, Vec<DocumentScore>)>,
}

impl Summary<'_> {
    pub fn statistics(&self, bootstrap: Bootstrap, unit: &str) -> Option<Statistics> {
        let Self { header, documents, divergence, others } = self;
        let sample =
            Sample { documents, subset: &header.subset_of, names: &header.subsets, kl: divergence };
        let beside = header.baseline.as_deref().map(|stage| Reference { stage, documents: &[] });
        let apart = others.as_ref().map(|(stage, documents)| Reference { stage, documents });
        let reference = beside.or(apart);
        statistics(&sample, reference.as_ref(), bootstrap, unit)
    }
}

/// The record's figures, and how the stage ended.
pub(super) fn conclude(documents: &[DocumentScore], scored: &Scored, record: &mut Record) -> Ended {
    let bad = documents.iter().filter(|d| !(d.nll.is_finite() && d.entropy.is_finite()));
    match (bad.count(), Metrics::new(documents)) {
        (0, Some(metrics)) => {
            record.set_metrics(&metrics, scored.seconds);
            let halved = scored
                .halved_to
                .map(|rows| format!("out of memory: batches cut to as few as {rows} documents"));
            (Status::Ok, halved)
        }
        (0, None) => (Status::Failed, Some("no token was scored".into())),
        (bad, _) => {
            let documents = documents.len();
            let text = format!(
                "the loss is not finite in {bad} of {documents} documents: the model returns NaN or \
                 Inf"
            );
            (Status::Failed, Some(text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_was_cut_is_a_remark_and_nan_a_failure() {
        let document =
            |nll| DocumentScore { nll, entropy: 1.0, tokens: 2, bytes: 7, ..Default::default() };
        let documents = |nll| [document(nll), document(3.0)];
        let scored = |halved_to| Scored { seconds: 1.0, halved_to, ..Scored::default() };
        let mut record = Record::new("m", "baseline", "cuda:0", Status::Failed);
        let ended = conclude(&documents(1.0), &scored(None), &mut record);
        assert_eq!(ended, (Status::Ok, None));
        assert_eq!(record.xent, Some(1.0));
        let (status, reason) = conclude(&documents(1.0), &scored(Some(4)), &mut record);
        assert!(status == Status::Ok && reason.unwrap().contains("as few as 4"));
        let (status, reason) = conclude(&documents(f64::NAN), &scored(None), &mut record);
        assert!(status == Status::Failed && reason.unwrap().contains("1 of 2 documents"));
    }
}
