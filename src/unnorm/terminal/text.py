"""Text shared by several tables."""

from rich.text import Text


def whole(lines: str) -> Text:
    """Paths and commands, never broken into lines however long, so that they can be copied."""
    return Text(lines, no_wrap=True, overflow="ignore")


def mark(passed: bool) -> str:
    """The verdict on one check or class, as rich markup."""
    return "[green]passed[/]" if passed else "[bold red]FAILED[/]"


def verdict(failed: int, total: int, what: str) -> str:
    """Whether all `total` checks or classes passed, as rich markup."""
    return f"[bold red]{failed} of {total} {what} FAILED[/]" if failed else f"[green]all {total} {what} passed[/]"
