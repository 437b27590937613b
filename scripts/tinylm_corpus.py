"""The text that tinylm is trained on: documents taken out of Debian packages.

Packages are downloaded with apt-get and unpacked into a folder of their own; nothing is installed and no
root is needed. Each source below names a package, the files in it, how to read them and how many
characters to take at most, so that no source drowns the others.
"""

import gzip
import hashlib
import html.parser
import re
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Files of one Debian package, read by `reader` (a key of READERS)."""

    package: str
    licence: str
    pattern: str
    reader: str
    limit: int  # characters


MB = 1_000_000
# Licences as the packages' copyright files name them.
SOURCES = (
    Source("r-cran-janeaustenr", "MIT; the novels are in the public domain",
           "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", "r_strings", 5 * MB),
    Source("dict-gcide", "GPL-1+ (Webster 1913, public domain, and additions)",
           "usr/share/dictd/gcide.dict.dz", "dictionary", 10 * MB),
    Source("dict-foldoc", "GFDL-1.1+, no invariant sections", "usr/share/dictd/foldoc.dict.dz", "dictionary", 6 * MB),
    Source("dict-jargon", "public domain", "usr/share/dictd/jargon.dict.dz", "dictionary", 2 * MB),
    Source("python3.11-doc", "PSF-2", "usr/share/doc/python3.11/html/_sources/**/*.rst.txt", "text", 10 * MB),
    Source("libpython3.11-stdlib", "PSF-2", "usr/lib/python3.11/**/*.py", "text", 8 * MB),
    Source("postgresql-doc-15", "PostgreSQL", "usr/share/doc/postgresql-doc-15/html/*.html", "html", 8 * MB),
    Source("apache2-doc", "Apache-2.0", "usr/share/doc/apache2-doc/manual/en/**/*.html", "html", 5 * MB),
    Source("linux-doc-6.1", "GPL-2", "usr/share/doc/linux-doc-6.1/Documentation/**/*.rst.gz", "text", 8 * MB),
    Source("perl-doc", "Artistic or GPL-1+", "usr/share/perl/**/*.pod", "text", 6 * MB),
    Source("git-doc", "GPL-2", "usr/share/doc/git/html/*.html", "html", 3 * MB),
    Source("debian-handbook", "GPL-2+ or CC-BY-SA-3.0", "usr/share/doc/debian-handbook/html/en-US/*.html",
           "html", 3 * MB),
    Source("debian-reference-en", "GPL-2+", "usr/share/debian-reference/*.en.html", "html", 2 * MB),
    Source("debian-policy", "GPL-2+", "usr/share/doc/debian-policy/policy.txt.gz", "text", 1 * MB),
    Source("developers-reference", "GPL-2+", "usr/share/developers-reference/*.html", "html", 1 * MB),
    Source("debian-faq", "own copyleft notice (copies and changes allowed)", "usr/share/doc/debian/FAQ/*.html", "html", 1 * MB),
    Source("gimp-help-en", "GFDL-1.2+", "usr/share/gimp/2.0/help/en/*.html", "html", 4 * MB),
    Source("python-sympy-doc", "BSD-3", "usr/share/doc/python-sympy-doc/html/_sources/**/*.txt", "text", 2 * MB),
    Source("maxima-doc", "GPL-2+", "usr/share/doc/maxima-doc/html/*.html", "html", 2 * MB),
)  # fmt: skip
SHORTEST = 400  # characters; shorter documents are mostly indices and redirects
# Reference pages that hold no sentences: symbol tables, indices, generated device lists.
UNWANTED = re.compile(r"genindex|bookindex|searchindex|/changelog|devices\.rst|/translations/|/test/|_pydecimal")


def fetch(root):
    """Downloads and unpacks the packages under `root`; returns {package: version}."""
    debs = root / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    versions = {}
    for source in SOURCES:
        have = list(debs.glob(f"{source.package}_*.deb"))
        if not have:
            command = ["apt-get", "download", "-q", source.package]
            done = subprocess.run(command, check=False, cwd=debs, capture_output=True, text=True)
            have = list(debs.glob(f"{source.package}_*.deb"))
            if done.returncode or not have:
                reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
                raise SystemExit(f"error: cannot download {source.package}: {reason}; run apt-get update first")
            subprocess.run(["dpkg-deb", "-x", str(have[0]), str(root / source.package)], check=True)
        field = subprocess.run(["dpkg-deb", "-f", str(have[0]), "Version"], capture_output=True, text=True, check=True)
        versions[source.package] = field.stdout.strip()
    return versions


# --------------------------------------------------------------------------------------------- readers


class TextOnly(html.parser.HTMLParser):
    """The readable text of a page; blocks end in a newline, <pre> keeps its spaces."""

    BLOCKS = frozenset(
        {"p", "div", "li", "tr", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "pre", "br", "table", "ul", "ol"}
    )
    HIDDEN = frozenset({"script", "style", "head", "nav", "title"})
    # Classes of page furniture in the packages above: the same words on every page teach nothing.
    FURNITURE = re.compile(r"nav|header|footer|toc|sidebar|related|apache|preamble|top-langs|bottomlangs")

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.hidden, self.pre, self.stack = [], 0, 0, []

    def handle_starttag(self, tag, attrs):
        if tag in ("br", "img", "hr", "meta", "link", "input", "col"):
            self.parts.append("\n" if tag == "br" else "")
            return
        values = dict(attrs)
        furniture = f"{values.get('class') or ''} {values.get('id') or ''}"
        hide = tag in self.HIDDEN or (tag in ("div", "table", "ul") and bool(self.FURNITURE.search(furniture)))
        self.stack.append((tag, hide))
        self.hidden += hide
        self.pre += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n\n" if tag in ("p", "pre", "h1", "h2", "h3") else "\n")
        elif tag == "td":
            self.parts.append(" ")

    def handle_endtag(self, tag):
        if not any(open_tag == tag for open_tag, _ in self.stack):
            return
        while self.stack:
            name, hide = self.stack.pop()
            self.hidden -= hide
            self.pre -= name == "pre"
            if name == tag:
                break
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def read_text(path):
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    return [raw.decode("utf-8", "replace")]


def read_html(path):
    parser = TextOnly()
    parser.feed(read_text(path)[0])
    return ["".join(parser.parts)]


def read_dictionary(path):
    """A dictd file: entries start at column 0. Some dozens of entries make one document."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    text = re.sub(r"\[(?:1913 Webster|WordNet 1\.5|PJC|Webster 1913 Suppl\.)[^\]]*\]", "", text)
    entries = re.split(r"\n(?=\S)", text)
    return [unwrap("\n\n".join(entries[i : i + 24])) for i in range(0, len(entries), 24)]


def unwrap(text):
    """Joins the lines of a paragraph: hard line ends of the source are no part of the language."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(re.sub(r"\s*\n\s*", " ", p).strip() for p in paragraphs)


def read_r_strings(path):
    """Character vectors of an R lazy-load database: zlib blocks of XDR-serialised strings, a line each."""
    raw, lines = path.read_bytes(), []
    for start in (m.start() for m in re.finditer(rb"x[\x01\x5e\x9c\xda]", raw)):
        try:
            block = zlib.decompressobj().decompress(raw[start:])
        except zlib.error:
            continue
        for match in re.finditer(rb"\x00[\x04\x00][\x00\x80\x40]\x09(....)", block, re.DOTALL):
            (length,) = struct.unpack(">i", match.group(1))
            if 0 <= length < 500:
                lines.append(block[match.end() : match.end() + length].decode("utf-8", "replace"))
    text = unwrap("\n".join(lines))
    # Chapters are the documents.
    return re.split(r"\n\n(?=(?:CHAPTER|Chapter|VOLUME) [IVXLC\d]+)", text)


READERS = {"text": read_text, "html": read_html, "dictionary": read_dictionary, "r_strings": read_r_strings}


def clean(text):
    text = text.replace("\r\n", "\n").replace("\u00a0", " ").replace("\u00b6", "").replace("\ufffd", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip()


def is_english(text):
    """Mostly ASCII, mostly words: leaves out tables of numbers and other languages."""
    sample = text[:20_000]
    letters = sum(c.isascii() and (c.isalpha() or c.isspace()) for c in sample)
    return letters > 0.7 * len(sample)


def rank(text):
    """A pseudo-random number that depends on the document alone: order and split never change."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def collect(root):
    """All documents: {package: [text]}, in an order that mixes each source's files."""
    found, seen = {}, set()
    for source in SOURCES:
        documents = []
        for path in sorted(Path(root / source.package).glob(source.pattern)):
            if path.is_file() and not UNWANTED.search(str(path.relative_to(root))):
                documents += [clean(text) for text in READERS[source.reader](path)]
        documents = sorted({d for d in documents if len(d) >= SHORTEST and is_english(d)} - seen, key=rank)
        taken, size = [], 0
        for document in documents:
            if size + len(document) <= source.limit:
                taken.append(document)
                size += len(document)
        if not taken:
            raise SystemExit(f"error: {source.package} gave no text: {source.pattern} matches nothing readable")
        seen.update(taken)
        found[source.package] = taken
    return found
