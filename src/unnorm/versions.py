"""Versions that results depend on."""

from importlib.metadata import version

from unnorm import __version__


def versions() -> dict[str, str]:
    """Of unnorm and of the packages beneath it; unnorm itself may be run without being installed."""
    return {"unnorm": __version__, **{name: version(name) for name in ("torch", "transformers", "datasets")}}
