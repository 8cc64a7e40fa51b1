"""Words that several tables share."""

from rich.text import Text


def whole(lines: str) -> Text:
    """Paths and commands, which are copied: however long, they are not broken into lines."""
    return Text(lines, no_wrap=True, overflow="ignore")


def verdict(failed: int, total: int, what: str) -> str:
    """Whether all of so many checks or classes passed, as markup."""
    return f"[bold red]{failed} of {total} {what} FAILED[/]" if failed else f"[green]all {total} {what} passed[/]"
