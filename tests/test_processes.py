"""What several processes of one run tell each other, and their user."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from unnorm import processes
from unnorm.errors import RunInterruptedError, UnnormError


def test_an_error_of_the_main_process_is_raised_as_it_is_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def hear(answer: list[Any]) -> None:
        answer[1] = RunInterruptedError("Stopped")

    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "broadcast_object_list", hear)
    monkeypatch.setattr(processes, "is_main", lambda: False)
    with pytest.raises(RunInterruptedError) as stopped:
        processes.agree(lambda: None)
    assert stopped.value.told_elsewhere and stopped.value.exit_code == 130


def test_an_error_that_another_process_tells_is_not_told_again(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert (told := cli("verify", tmp_path)).err
    monkeypatch.setattr(UnnormError, "told_elsewhere", True)
    silent = cli("verify", tmp_path)
    assert silent.code == told.code == 2 and not silent.err
