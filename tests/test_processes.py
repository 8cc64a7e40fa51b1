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


def test_any_failure_of_the_main_process_is_an_answer_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "broadcast_object_list", lambda answer: sent.extend(answer))
    with pytest.raises(ZeroDivisionError):
        processes.agree(lambda: 1 // 0)
    assert isinstance(sent[1], UnnormError)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_one_process_fails_on_all_and_is_told_once(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(errors: list[Any], own: Any) -> None:
        errors[:] = [None, UnnormError("No room.")] if own is None else [None, own]

    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_gather_object", gather)
    monkeypatch.setattr(processes, "rank", lambda: rank)
    with pytest.raises(UnnormError, match="No room") as failed:
        processes.together(lambda: "made")
    assert failed.value.told_elsewhere is (rank == 0)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_launch_that_shards_models_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(UnnormError, match=f"sharded by {kind} are not supported"):
        processes.join("cpu")
