"""The templates of the pages in this folder."""

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment() -> Environment:
    """Where pages are rendered: everything that is put in is escaped, and nothing may be missing."""
    return Environment(
        loader=PackageLoader("unnorm", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
