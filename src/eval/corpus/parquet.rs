//! Parquet: one row a document, columns `text` and, optionally, `meta`.

use super::jsonl::list;
use super::{Document, Documents, subset_of_json};
use crate::eval::error::{Error, Result};
use arrow_array::{
    Array, LargeStringArray, RecordBatch, StringArray, StringViewArray, StructArray,
};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Rows decoded at a time; documents are a few kilobytes, some a megabyte.
const ROWS: usize = 64;

/// Streams the documents of `file`; `path` is for messages.
pub(super) fn open(path: &Path, file: File) -> Result<Documents> {
    let error = |reason: String| Error::Corpus { path: path.into(), reason };
    let builder = ParquetRecordBatchReaderBuilder::try_new(file)
        .map_err(|e| error(format!("not a readable parquet file: {e}")))?;
    let names: Vec<_> = builder.schema().fields().iter().map(|f| f.name().as_str()).collect();
    let Some(text) = names.iter().position(|name| *name == "text") else {
        return Err(error(format!("no `text` column; found {}", list(&names))));
    };
    let roots = names.iter().position(|name| *name == "meta").into_iter().chain([text]);
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let reader = builder
        .with_projection(mask)
        .with_batch_size(ROWS)
        .build()
        .map_err(|e| error(format!("cannot read: {e}")))?;
    let path = PathBuf::from(path);
    let mut row = 0;
    Ok(Box::new(reader.flat_map(move |batch| {
        let documents = match batch {
            Ok(batch) => documents(&path, &batch, row),
            Err(e) => Err(Error::Corpus {
                path: path.clone(),
                reason: format!("cannot read the rows from {row} on: {e}"),
            }),
        };
        match documents {
            Ok(documents) => {
                row += documents.len();
                documents.into_iter().map(Ok).collect()
            }
            Err(e) => vec![Err(e)],
        }
    })))
}

fn documents(path: &Path, batch: &RecordBatch, first_row: usize) -> Result<Vec<Document>> {
    let error = |reason: String| Error::Corpus { path: path.into(), reason };
    let column = batch.column_by_name("text").ok_or_else(|| error("no `text` column".into()))?;
    let text = Strings::new(column.as_ref())
        .ok_or_else(|| error(format!("column `text` is {}, not text", column.data_type())))?;
    let meta = batch.column_by_name("meta").map(|meta| Meta::new(meta.as_ref()));
    (0..batch.num_rows())
        .map(|row| {
            let text = text
                .get(row)
                .ok_or_else(|| error(format!("row {}: `text` is null", first_row + row)))?;
            let subset = meta.as_ref().and_then(|meta| meta.subset(row));
            Ok(Document { text: text.to_owned(), subset })
        })
        .collect()
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
