"""What is kept as proof is written as it is."""

import dataclasses
import sys
from dataclasses import asdict

from posttrain.evidence import EvalReport, ItemRecord
from posttrain.files import canonical_json, digest_json

ITEMS = (
    ItemRecord("a", "p1", (1.0, 0.5), "c", ("yes", "no"), ("stop", "length"), (3, 4)),
    ItemRecord("b", "p2", (), error="unscored"),
)


def test_an_item_is_written_and_digested_as_its_fields():
    report = EvalReport("s", "heldout", "d", "m", "exact", ITEMS)
    assert [canonical_json(item.to_json()) for item in ITEMS] == [canonical_json(asdict(item)) for item in ITEMS]
    assert report.digest == digest_json([report._header(), [asdict(item) for item in ITEMS]])


def test_a_report_is_digested_and_saved_without_a_copy_of_every_value(tmp_path):
    """`asdict` walks each field of each item; it was most of what a large report cost."""
    walked = []
    sys.setprofile(lambda frame, event, _: event == "call" and walked.append(frame.f_code.co_filename))
    try:
        EvalReport("s", "heldout", "d", "m", "exact", ITEMS * 50).save(tmp_path / "report")
    finally:
        sys.setprofile(None)
    assert walked
    assert dataclasses.__file__ not in walked
    assert EvalReport.load(tmp_path / "report").items == ITEMS * 50
