"""Every model of the table has a case, and every row of the contract a result or a reason for each case."""

from importlib import import_module

import pytest

from hf_mm import MODELS

from .cases import CASES, FOLDER, ROWS


def test_every_model_class_of_the_table_has_a_case():
    wanted = {(model_type, model) for model_type, entry in MODELS.items() for model in entry.models.values()}
    assert wanted <= {(case.model_type, case.model_class) for case in CASES}


def test_every_auto_class_of_the_table_opens_a_case():
    wanted = {(model_type, auto) for model_type, entry in MODELS.items() for auto in entry.models}
    assert wanted <= {(case.model_type, case.auto_class) for case in CASES}


def rows_with_a_result() -> set[tuple[int, str]]:
    """(row, case) of every test that is parametrised over cases, in the file of that row."""
    results = set()
    for row in ROWS:
        for path in FOLDER.glob(f"test_row{row:02}_*.py"):
            module = import_module(f"{__package__}.{path.stem}")
            tests = [getattr(module, name) for name in dir(module) if name.startswith("test_")]
            marks = [mark for test in tests for mark in getattr(test, "pytestmark", [])]
            for names, values in (mark.args for mark in marks if mark.name == "parametrize"):
                if names == "case":
                    results |= {(row, case.name) for case in values}
                elif names[0] == "case":
                    results |= {(row, case.name) for case, *_ in values}
    return results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_has_a_result_or_a_reason(case):
    tested = {row for row, name in rows_with_a_result() if name == case.name}
    reasoned = {row for row, reason in case.reasons.items() if reason.strip()}
    assert not tested & reasoned
    missing = [f"{row} ({ROWS[row]})" for row in ROWS if row not in tested | reasoned]
    assert not missing, f"{case} has neither a result nor a reason for row {', '.join(missing)}"
