"""Fuzzes one target with atheris (libFuzzer), guided by the coverage of gpusaver's own code.

    fuzz.py TARGET SECONDS [WORK_DIRECTORY]      0 seconds: only adds to the committed corpus what reaches new lines

Begins with the golden files and tests/fuzz/corpus/TARGET.  Prints, as its last line, the number of executions and the
lines of gpusaver that its inputs reach.  An input that breaks a promise is left in the working directory, as crash-*.
"""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

IS_FUZZER = "GPUSAVER_FUZZ_CHILD" in os.environ

if IS_FUZZER:
    import atheris

    with atheris.instrument_imports(include=["gpusaver"], enable_loader_override=False):
        import targets
else:  # measures coverage, which instruments code in its own way
    import targets


def fuzz(name: str, seconds: int, work: Path) -> None:
    """Never returns: libFuzzer ends the process."""

    def one(data: bytes) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        targets.run(name, data)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < targets.MEMORY_NBYTES + len(data), f"{name} took {grown >> 20} MiB for {len(data)} bytes"

    arguments = [sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", "-timeout=30", "-rss_limit_mb=2048"]
    arguments += [f"-artifact_prefix={work}/", "-print_final_stats=1", "-verbosity=0", str(work / "corpus")]
    atheris.Setup(arguments, one)
    with targets.prepared():
        atheris.Fuzz()


def seed(name: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for data in targets.seeds(name):
        (directory / hashlib.sha1(data).hexdigest()).write_bytes(data)


def reached_lines(name: str, paths: Sequence[Path]) -> set[tuple[str, int]]:
    """Lines of gpusaver that run when the target reads these inputs."""
    import coverage

    recorder = coverage.Coverage(include=["*/gpusaver/*"], data_file=None)
    recorder.start()
    with targets.prepared():
        for path in paths:
            targets.run(name, path.read_bytes())
    recorder.stop()
    data = recorder.get_data()
    return {(file, line) for file in data.measured_files() for line in data.lines(file) or ()}


def keep(name: str, work: Path) -> None:
    """Copies into the committed corpus, smallest first, every input that reaches a line that none before it does."""
    seeds = work / "seeds"
    seed(name, seeds)
    reached = reached_lines(name, sorted(seeds.iterdir()))
    for path in sorted((work / "corpus").iterdir(), key=lambda path: path.stat().st_size):
        lines = reached_lines(name, [path])
        if lines - reached:
            reached |= lines
            (targets.CORPUS / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, targets.CORPUS / name / path.name[:12])
    shutil.rmtree(seeds)


def main() -> None:
    name, seconds = sys.argv[1], int(sys.argv[2])
    work = Path(sys.argv[3] if len(sys.argv) > 3 else f"build/fuzz/{name}").resolve()
    seed(name, work / "corpus")
    if IS_FUZZER:
        fuzz(name, seconds, work)
    if seconds == 0:
        keep(name, work)
        return
    done = subprocess.run(
        [sys.executable, __file__, name, str(seconds), work],
        env=os.environ | {"GPUSAVER_FUZZ_CHILD": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}{done.stderr[-4000:]}\n{name}: an input broke a promise; see {work}/crash-*")
    [executions] = re.findall(r"stat::number_of_executed_units: *(\d+)", done.stderr)
    inputs = len(os.listdir(work / "corpus"))
    lines = reached_lines(name, sorted((work / "corpus").iterdir()))
    print(f"{name}: {int(executions):,} executions, {inputs} inputs, {len(lines)} lines of gpusaver reached")


if __name__ == "__main__":
    main()
