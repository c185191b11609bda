"""The fault matrix as a table: which test covers which fault, what was done, and the figure that came out.

A test names its row with `@pytest.mark.fault("R1", "killed at seven steps")` and reports through the fixture `figure`.
`make faults` runs all of them and writes tests/faults/RESULTS.md.
"""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROWS = {"R": 25, "I": 11, "P": 7, "D": 8, "S": 9, "C": 5}
IDS = [f"{letter}{number}" for letter, last in ROWS.items() for number in range(1, last + 1)]


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Report the figure of a fault test, as `figure("17 of 17 identical")`."""
    return lambda text: request.node.user_properties.append(("figure", text))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, metavar="FILE", help="run the fault tests only and write their table")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("fault"):
            assert mark.args[0] in IDS, f"{item.nodeid}: no row {mark.args[0]} in the fault matrix"
    if config.getoption("--fault-table"):
        chosen = [item for item in items if item.get_closest_marker("fault")]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    outcome = yield
    outcome.get_result().faults = [mark.args for mark in item.iter_markers("fault")]


class _Table:
    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.started = path, {name: [] for name in IDS}, time.time()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.skipped or report.failed:
            figures = "; ".join(text for name, text in report.user_properties if name == "figure")
            for name, done in report.faults:
                self.rows[name].append((report.nodeid, done, figures, report.outcome))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        lines = [
            "# Fault tests",
            "",
            "Written by `make faults`. One row for each test of a fault; what must happen stands in the test.",
            "",
            f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {time.time() - self.started:.0f} s for all of them.",
            "",
            "| id | test | what was done | figure | result |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, tests in self.rows.items():
            merged: dict[tuple[str, str], list[tuple[str, str]]] = {}
            for nodeid, done, figures, outcome in tests:
                merged.setdefault((nodeid.partition("[")[0], done), []).append((figures, outcome))
            for (nodeid, done), found in merged.items():
                figures = "; ".join(dict.fromkeys(text for text, _ in found if text))
                outcomes = [outcome for _, outcome in found]
                passed, ran = outcomes.count("passed"), len(outcomes) - outcomes.count("skipped")
                result = "skipped" if not ran else "pass" if passed == ran else "FAIL"
                result += f" ({passed} of {ran})" if ran > 1 else ""
                lines.append(f"| {name} | `{nodeid}` | {done} | {figures or '-'} | {result} |")
            if not tests:
                lines.append(f"| {name} | - | - | - | NOT TESTED |")
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--fault-table")
    if path:
        config.pluginmanager.register(_Table(path), "fault-table")
