"""`pytest --cpu-times`: the CPU seconds of each test file, those of the processes that it started included.

They tell where a suite's time goes on a machine that has other work to do as well, where seconds of the wall do not.
"""

import resource
from collections import Counter

import pytest

_NAME = "cpu_seconds"


def pytest_addoption(parser):
    parser.addoption("--cpu-times", action="store_true", help="print the CPU seconds of each test file")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    before = _cpu_seconds()
    item.user_properties.append((_NAME, lambda: _cpu_seconds() - before))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What has been used until now, in the last of a test's reports; a report may have come from another process."""
    report = yield
    properties = dict(report.user_properties)
    since = properties.pop(_NAME, None)
    report.user_properties = list(properties.items())
    if call.when == "teardown" and since is not None:
        report.user_properties.append((_NAME, since()))
    return report


def pytest_terminal_summary(terminalreporter):
    if not terminalreporter.config.getoption("--cpu-times"):
        return
    seconds = Counter()
    for report in (each for reports in terminalreporter.stats.values() for each in reports):
        for name, value in getattr(report, "user_properties", []):
            if name == _NAME:
                seconds[report.nodeid.partition("::")[0]] += value
    terminalreporter.section(f"CPU seconds: {seconds.total():.0f}, without starting and collecting")
    for path, value in seconds.most_common():
        terminalreporter.line(f"{value:8.1f} {path}")


def _cpu_seconds():
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
