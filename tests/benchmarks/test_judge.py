"""What `make judge` makes of pytest's report."""

from pathlib import Path

import pytest
from conftest import ROOT

REPORT = """<testsuites><testsuite>
<testcase classname="" name="tests.server.test_editor_page" time="0.0"><skipped message="it needs"/></testcase>
<testcase classname="tests.model.test_families" name="test_a[sdxl]" time="38.6"/>
<testcase classname="tests.model.test_families" name="test_b" time="1.2"><failure message="no"/></testcase>
<testcase classname="tests.model.test_families" name="test_c" time="0"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_each_test_is_told_and_files_that_are_skipped_whole_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from judge import outcomes

    (tmp_path / "report.xml").write_text(REPORT)
    assert outcomes(tmp_path / "report.xml") == {
        "tests.model.test_families::test_a[sdxl]": "passed in 39 s",
        "tests.model.test_families::test_b": "failure in 1 s",
        "tests.model.test_families::test_c": "skipped in 0 s",
    }
