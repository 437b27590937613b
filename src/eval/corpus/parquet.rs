//! Parquet: one row a document, columns `text` and, optionally, `meta`.
//!
//! Row groups are read one after the other, a few rows at a time, page by page; memory does not grow
//! with the file or with its row groups.

use super::http::Blocks;
use super::jsonl::list;
use super::{Document, Documents, subset_of_json};
use crate::eval::error::{Error, Result};
use arrow_array::{
    Array, LargeStringArray, RecordBatch, StringArray, StringViewArray, StructArray,
};
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader,
    ParquetRecordBatchReaderBuilder, RowSelection,
};
use parquet::errors::ParquetError;
use parquet::file::metadata::{PageIndexPolicy, ParquetStatisticsPolicy, RowGroupMetaData};
use parquet::file::reader::{ChunkReader, Length};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most rows decoded at a time.
const ROWS: u64 = 64;

/// Bytes that the rows decoded at a time have on average, at most.
const BATCH: u64 = 4 << 20;

/// The largest part that a file may ask to hold in memory: a page or the footer. Writers cut pages
/// at about a megabyte; what is larger than this is damaged or hostile.
const LARGEST_PART: usize = 1 << 30;

/// What a parquet file is read from.
#[derive(Clone)]
pub(super) enum Input {
    /// A local file.
    File(Arc<File>),
    /// A file on a web server.
    Remote(Blocks),
}

impl Input {
    pub(super) fn file(path: &Path) -> Result<Self> {
        Ok(Self::File(File::open(path).map_err(Error::io(path))?.into()))
    }
}

impl Length for Input {
    fn len(&self) -> u64 {
        match self {
            Self::File(file) => file.len(),
            Self::Remote(blocks) => blocks.len(),
        }
    }
}

impl ChunkReader for Input {
    type T = Box<dyn Read + Send>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(match self {
            Self::File(file) => Box::new(file.get_read(start)?),
            Self::Remote(blocks) => Box::new(blocks.get_read(start)?),
        })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        if length > LARGEST_PART {
            return Err(ParquetError::General(format!("a part of {length} bytes: damaged")));
        }
        match self {
            Self::File(file) => file.get_bytes(start, length),
            Self::Remote(blocks) => blocks.get_bytes(start, length),
        }
    }
}

/// An open parquet file.
pub(super) struct Table {
    path: PathBuf,
    input: Input,
    metadata: ArrowReaderMetadata,
    mask: ProjectionMask,
    rows: u64,
}

/// What is read of a row group: the rows with these numbers, counted in the file.
struct Part {
    group: usize,
    selection: Option<RowSelection>,
    numbers: Box<dyn Iterator<Item = u64> + Send>,
}

impl Table {
    /// Reads the footer; with `pages` also where pages lie, so that rows can be picked without
    /// passing over those before them. `path` is for messages.
    pub(super) fn open(path: &Path, input: Input, pages: bool) -> Result<Self> {
        let error = |reason: String| Error::Corpus { path: path.into(), reason };
        let policy = if pages { PageIndexPolicy::Optional } else { PageIndexPolicy::Skip };
        let options = ArrowReaderOptions::new()
            .with_offset_index_policy(policy)
            // Smallest and largest texts of every row group may be most of a footer.
            .with_column_stats_policy(ParquetStatisticsPolicy::SkipAll);
        let metadata = guarded(path, || ArrowReaderMetadata::load(&input, options))?
            .map_err(|e| error(format!("not a readable parquet file: {e}")))?;
        let names: Vec<_> = metadata.schema().fields().iter().map(|f| f.name().as_str()).collect();
        if !names.contains(&"text") {
            return Err(error(format!("no `text` column; found {}", list(&names))));
        }
        let schema = metadata.parquet_schema();
        let wanted = (0..schema.num_columns()).filter(|&at| {
            let column = schema.column(at);
            let path: Vec<_> = column.path().parts().iter().map(String::as_str).collect();
            matches!(path[..], ["text", ..] | ["meta"] | ["meta", "pile_set_name"])
        });
        let mask = ProjectionMask::leaves(schema, wanted);
        let mut rows = 0u64;
        for (number, group) in metadata.metadata().row_groups().iter().enumerate() {
            let counted = check(group, &mask, input.len()).and_then(|more| rows.checked_add(more));
            rows = counted.ok_or_else(|| {
                error(format!("row group {number} is not where the footer says: damaged"))
            })?;
        }
        Ok(Self { path: path.into(), input, metadata, mask, rows })
    }

    /// Number of rows.
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    /// All rows.
    pub(super) fn documents(self) -> Documents {
        let mut first = 0;
        let part = |(group, rows): (usize, u64)| {
            let numbers = Box::new(first..first + rows);
            first += rows;
            Part { group, selection: None, numbers }
        };
        let parts = self.group_rows().into_iter().enumerate().map(part).collect::<Vec<_>>();
        self.read(parts)
    }

    /// The rows with these numbers, which ascend.
    pub(super) fn pick(self, numbers: Vec<u64>) -> Documents {
        let (mut first, mut left, mut parts) = (0, numbers.as_slice(), Vec::new());
        for (group, rows) in self.group_rows().into_iter().enumerate() {
            let own;
            (own, left) = left.split_at(left.partition_point(|&number| number < first + rows));
            if !own.is_empty() {
                let row = |number: &u64| (number - first) as usize;
                let ranges = own.iter().map(|number| row(number)..row(number) + 1);
                let selection = RowSelection::from_consecutive_ranges(ranges, rows as usize);
                let numbers = Box::new(own.to_vec().into_iter());
                parts.push(Part { group, selection: Some(selection), numbers });
            }
            first += rows;
        }
        self.read(parts)
    }

    fn group_rows(&self) -> Vec<u64> {
        let groups = self.metadata.metadata().row_groups().iter();
        groups.map(|group| u64::try_from(group.num_rows()).unwrap_or(0)).collect()
    }

    fn read(self, parts: Vec<Part>) -> Documents {
        let ready = Vec::new().into_iter();
        Box::new(Rows { table: self, parts: parts.into_iter(), open: None, ready, failed: false })
    }

    /// A reader of a part of the file.
    fn reader(&self, part: &mut Part) -> Result<ParquetRecordBatchReader> {
        let group = self.metadata.metadata().row_group(part.group);
        let bytes: i64 = (0..group.num_columns())
            .filter(|&at| self.mask.leaf_included(at))
            .map(|at| group.column(at).uncompressed_size().max(0))
            .fold(0, i64::saturating_add);
        let average = bytes.unsigned_abs() / group.num_rows().unsigned_abs().max(1);
        let rows = (BATCH / average.max(1)).clamp(1, ROWS);
        let (input, metadata) = (self.input.clone(), self.metadata.clone());
        let mut builder = ParquetRecordBatchReaderBuilder::new_with_metadata(input, metadata)
            .with_row_groups(vec![part.group])
            .with_projection(self.mask.clone())
            .with_batch_size(rows as usize);
        if let Some(selection) = part.selection.take() {
            builder = builder.with_row_selection(selection);
        }
        guarded(&self.path, || builder.build())?.map_err(|e| Error::Corpus {
            path: self.path.clone(),
            reason: format!("cannot read row group {}: {e}", part.group),
        })
    }
}

/// The rows of a group, where its columns lie inside a file of `length` bytes.
fn check(group: &RowGroupMetaData, mask: &ProjectionMask, length: u64) -> Option<u64> {
    for (at, column) in group.columns().iter().enumerate() {
        if mask.leaf_included(at) {
            let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
            let (start, size) = (u64::try_from(start), u64::try_from(column.compressed_size()));
            let end = start.ok()?.checked_add(size.ok()?)?;
            (end <= length && column.num_values() >= 0).then_some(())?;
        }
    }
    u64::try_from(group.num_rows()).ok()
}

/// Runs a call into the parquet library, whose panics on damaged files become errors.
fn guarded<T>(path: &Path, call: impl FnOnce() -> T) -> Result<T> {
    Error::catch(|| Ok(call())).map_err(|error| Error::Corpus {
        path: path.into(),
        reason: format!("damaged parquet file: {error}"),
    })
}

/// Reads parts of a table, one after the other.
struct Rows {
    table: Table,
    parts: std::vec::IntoIter<Part>,
    open: Option<(ParquetRecordBatchReader, Part)>,
    ready: std::vec::IntoIter<Result<Document>>,
    failed: bool,
}

impl Rows {
    /// Decodes the next rows; `false` at the end.
    fn advance(&mut self) -> Result<bool> {
        let Some((mut reader, mut part)) = self.open.take() else {
            let Some(mut part) = self.parts.next() else { return Ok(false) };
            self.open = Some((self.table.reader(&mut part)?, part));
            return Ok(true);
        };
        let path = &self.table.path;
        let error = |reason: String| Error::Corpus { path: path.clone(), reason };
        match guarded(path, || reader.next())? {
            Some(Ok(batch)) => {
                self.ready = documents(path, &batch, &mut part.numbers)?.into_iter();
                self.open = Some((reader, part));
            }
            Some(Err(e)) => {
                let row = part.numbers.next().unwrap_or(self.table.rows);
                return Err(error(format!("cannot read the rows from {row} on: {e}")));
            }
            None => {
                if let Some(row) = part.numbers.next() {
                    let group = part.group;
                    return Err(error(format!("row group {group} ends before row {row}: damaged")));
                }
            }
        }
        Ok(true)
    }
}

impl Iterator for Rows {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(document) = self.ready.next() {
                return Some(document);
            }
            if self.failed {
                return None;
            }
            match self.advance() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    self.failed = true;
                    return Some(Err(error));
                }
            }
        }
    }
}

/// The documents of a batch whose rows have the next of `numbers`.
fn documents(
    path: &Path,
    batch: &RecordBatch,
    numbers: &mut dyn Iterator<Item = u64>,
) -> Result<Vec<Result<Document>>> {
    let error = |reason: String| Error::Corpus { path: path.into(), reason };
    let column = batch.column_by_name("text").ok_or_else(|| error("no `text` column".into()))?;
    let text = Strings::new(column.as_ref())
        .ok_or_else(|| error(format!("column `text` is {}, not text", column.data_type())))?;
    let meta = batch.column_by_name("meta").map(|meta| Meta::new(meta.as_ref()));
    let document = |(at, row): (usize, u64)| {
        let text = text.get(at).ok_or_else(|| error(format!("row {row}: `text` is null")))?;
        let subset = meta.as_ref().and_then(|meta| meta.subset(at));
        Ok(Document { text: text.to_owned(), subset })
    };
    Ok((0..batch.num_rows()).zip(numbers).map(document).collect())
}

/// A column of strings in any of arrow's layouts.
enum Strings<'a> {
    Utf8(&'a StringArray),
    Large(&'a LargeStringArray),
    View(&'a StringViewArray),
}

impl<'a> Strings<'a> {
    fn new(array: &'a dyn Array) -> Option<Self> {
        let any = array.as_any();
        None.or_else(|| any.downcast_ref().map(Self::Utf8))
            .or_else(|| any.downcast_ref().map(Self::Large))
            .or_else(|| any.downcast_ref().map(Self::View))
    }

    fn get(&self, row: usize) -> Option<&'a str> {
        match self {
            Self::Utf8(a) => a.is_valid(row).then(|| a.value(row)),
            Self::Large(a) => a.is_valid(row).then(|| a.value(row)),
            Self::View(a) => a.is_valid(row).then(|| a.value(row)),
        }
    }
}

/// The `meta` column. Layouts that name no subset are not an error: nothing depends on them.
enum Meta<'a> {
    Struct(&'a StructArray, Strings<'a>),
    Json(Strings<'a>),
    Other,
}

impl<'a> Meta<'a> {
    fn new(array: &'a dyn Array) -> Self {
        if let Some(fields) = array.as_any().downcast_ref::<StructArray>() {
            let name = fields.column_by_name("pile_set_name");
            return match name.and_then(|name| Strings::new(name.as_ref())) {
                Some(name) => Self::Struct(fields, name),
                None => Self::Other,
            };
        }
        Strings::new(array).map_or(Self::Other, Self::Json)
    }

    fn subset(&self, row: usize) -> Option<String> {
        match self {
            Self::Struct(fields, name) if fields.is_valid(row) => name.get(row).map(str::to_owned),
            Self::Json(json) => json.get(row).and_then(subset_of_json),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::all;
    use super::*;
    use arrow_array::{ArrayRef, Int64Array};
    use arrow_schema::{DataType, Field};
    use std::sync::Arc;

    fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) {
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let file = File::create(path).unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    fn subsets(path: &Path) -> Vec<Option<String>> {
        all(path).unwrap().into_iter().map(|d| d.subset).collect()
    }

    #[test]
    fn every_text_layout_and_both_kinds_of_meta() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let rows = ["first", "", "dritte Zeile: é"];
        let texts: [ArrayRef; 3] = [
            Arc::new(StringArray::from(rows.to_vec())),
            Arc::new(LargeStringArray::from(rows.to_vec())),
            Arc::new(StringViewArray::from(rows.to_vec())),
        ];
        let names = StringArray::from(vec![Some("Github"), None, Some("PhilPapers")]);
        let structs: ArrayRef = Arc::new(StructArray::from(vec![(
            Arc::new(Field::new("pile_set_name", DataType::Utf8, true)),
            Arc::new(names) as ArrayRef,
        )]));
        let json: ArrayRef = Arc::new(StringViewArray::from(vec![
            Some("{\"pile_set_name\": \"Github\"}"),
            None,
            Some("{\"pile_set_name\": \"PhilPapers\", \"x\": 1}"),
        ]));
        let expected = vec![Some("Github".to_owned()), None, Some("PhilPapers".to_owned())];
        for text in texts {
            let ids: ArrayRef = Arc::new(Int64Array::from(vec![1, 2, 3]));
            write(&path, vec![("id", ids), ("text", text.clone())]);
            let docs = all(&path).unwrap();
            assert_eq!(docs.iter().map(|d| d.text.as_str()).collect::<Vec<_>>(), rows);
            assert!(docs.iter().all(|d| d.subset.is_none()));
            write(&path, vec![("meta", structs.clone()), ("text", text.clone())]);
            assert_eq!(subsets(&path), expected);
            write(&path, vec![("text", text), ("meta", json.clone())]);
            assert_eq!(subsets(&path), expected);
        }
    }

    #[test]
    fn faults_name_the_columns_and_the_row() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let ids: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
        let null: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None]));
        write(&path, vec![("content", null.clone()), ("id", ids.clone())]);
        let message = |path: &Path| all(path).unwrap_err().to_string();
        assert!(message(&path).contains("no `text` column; found content, id"));
        write(&path, vec![("text", ids)]);
        assert!(message(&path).contains("column `text` is Int64"));
        write(&path, vec![("text", null)]);
        assert!(message(&path).contains("row 1: `text` is null"));
        std::fs::write(&path, "PAR1 not really").unwrap();
        assert!(message(&path).contains("not a readable parquet file"));
    }
}
