#!/bin/sh
# Real data in minutes: three Debian packages -> one tokenizer and three prepared sources in a work folder.
#
#   sh examples/real_data.sh WORK
#
# gimp-help-en              the GIMP manual                         -> WORK/interleaved
# tuxpaint-stamps-default   pictures, each with a short description -> WORK/caption
# dict-gcide                a dictionary of English                 -> WORK/text
#
# Finished steps are skipped, so that an interrupted run can be started again. PYTHON names the interpreter
# that has megamm installed (default: python), WORKERS the number of processes (default: all cores).
set -eu

work=${1:?usage: sh examples/real_data.sh WORK}
python=${PYTHON:-python}
tools=$(cd "$(dirname "$0")/../tools" && pwd)
workers=${WORKERS:-$(nproc)}

for command in apt-get dpkg; do
    if ! command -v "$command" >/dev/null; then
        echo "error: $command not found; this script needs Debian or Ubuntu. Elsewhere, give folders of your own" \
            "to tools/train_tokenizer.py and tools/prepare_data.py" >&2
        exit 2
    fi
done
mkdir -p "$work/packages"
work=$(cd "$work" && pwd)

for package in gimp-help-en tuxpaint-stamps-default dict-gcide; do
    [ -d "$work/unpacked/$package" ] && continue
    if ! ls "$work/packages/${package}_"*.deb >/dev/null 2>&1; then
        (cd "$work/packages" && apt-get download "$package") || {
            echo "error: could not download $package; run 'apt-get update' as root and try again" >&2
            exit 1
        }
    fi
    rm -rf "$work/unpacked/$package.partial"
    mkdir -p "$work/unpacked/$package.partial"
    dpkg -x "$work/packages/${package}_"*.deb "$work/unpacked/$package.partial"
    mv "$work/unpacked/$package.partial" "$work/unpacked/$package"
done
pages=$work/unpacked/gimp-help-en/usr/share/gimp/2.0/help/en
stamps=$work/unpacked/tuxpaint-stamps-default/usr/share/tuxpaint/stamps
dictionary=$work/unpacked/dict-gcide/usr/share/dictd/gcide.dict.dz

# The dictionary is gzipped text: an entry starts in the first column, and its further lines are indented.
# Entries are grouped to about 1,400 characters a document, nearly a row of 512 tokens.
if [ ! -f "$work/dictionary.jsonl" ]; then
    "$python" - "$dictionary" "$work/dictionary.jsonl" <<'PYTHON'
import gzip
import json
import re
import sys

from megamm.files import write_text

text = gzip.open(sys.argv[1]).read().decode("utf-8", errors="replace")
text = re.sub(r" *\[(1913 Webster|PJC|WordNet [\d.]+)[^\]]*\]", "", text)
entries = re.split(r"\n(?=[^\s\d])", text[text.index("\nA \\") :])
documents, group = [], ""
for entry in (re.sub(r"\n\s*\n+", "\n", entry).strip() for entry in entries):
    if group and len(group) + len(entry) > 1400:
        documents.append(group)
        group = ""
    group += f"\n\n{entry}" if group else entry
documents.append(group)
write_text(sys.argv[2], "".join(json.dumps({"text": document}) + "\n" for document in documents))
PYTHON
fi

if [ ! -f "$work/tokenizer.json" ]; then
    "$python" "$tools/train_tokenizer.py" "$pages" "$stamps" "$work/dictionary.jsonl" \
        --vocab-size 4096 --out "$work/tokenizer.json"
fi

prepare() { # prepare KIND INPUT VAL_FRACTION
    [ -f "$work/$1/dataset.json" ] || "$python" "$tools/prepare_data.py" "$2" --kind "$1" --out "$work/$1" \
        --tokenizer "$work/tokenizer.json" --image-size 64 --patch-size 8 --max-length 512 --val-fraction "$3" \
        --workers "$workers"
}
# Of few stamps and pages a tenth, so that validation measures more than a handful of documents.
prepare interleaved "$pages" 0.1
prepare caption "$stamps" 0.1
prepare text "$work/dictionary.jsonl" 0.02
echo "prepared: $work/interleaved $work/caption $work/text"
