"""The command on prefixes that are URLs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_tools import Command

import gpusaver

pytest.importorskip("obstore")
SECRET = "the-secret-0123456789"


@pytest.fixture(params=["memory", "s3"])
def directory(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
    directory = f"{'s3://bucket' if request.param == 's3' else 'memory://cli'}/command"
    with gpusaver.Saver({"w": np.arange(6.0).reshape(2, 3), "text": "x"}) as saver:
        for step in (1, 2, 3):
            saver.save(f"{directory}/k", step)
    return directory


def test_looking_checking_and_pruning(directory: str, cli: Command) -> None:
    listed = cli("ls", directory)
    assert listed.code == 0
    assert [f"k-{step}" in listed.out for step in (1, 2, 3, 4)] == [True, True, True, False]
    assert cli("latest", directory).out == f"{directory}/k-3\n"
    for path in (directory, f"{directory}/k-2"):
        shown = cli("show", path)
        assert shown.code == 0
        assert "w" in shown.out
        assert cli("verify", path) == (0, "", "")
    assert cli("diff", f"{directory}/k-1", f"{directory}/k-2").code == 0
    assert json.loads(cli("ls", directory, "--json").out)
    gpusaver.storage.routing.RoutedStorage().remove(f"{directory}/k-1.data-00000-of-00001")
    assert cli("verify", f"{directory}/k-1").code == 1


@pytest.mark.parametrize("command", ["ls", "latest", "show", "verify"])
def test_credentials_in_a_url_are_not_repeated(command: str, cli: Command) -> None:
    outcome = cli(command, f"s3://user:{SECRET}@bucket/run/k")
    assert outcome.code != 0
    assert "no place in the URL" in outcome.out + outcome.err
    assert SECRET not in outcome.out + outcome.err
