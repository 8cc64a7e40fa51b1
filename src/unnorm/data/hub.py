"""Data sets on the Hugging Face hub, streamed."""

import re
from collections.abc import Callable, Iterable
from functools import partial

import datasets

from unnorm.data.files import Row
from unnorm.errors import UnnormError, short

_SUBSETS = re.compile(r"available configs: \[(.+?)\]", re.DOTALL)
"""Error of `datasets` when a hub data set has several subsets and none was named."""

_SCRIPT = "scripts are no longer supported"
"""Error of `datasets` 4 and later for a hub data set that is a script, e.g. OpenWebText."""
_CONVERTED = "refs/convert/parquet"
"""Branch where the hub keeps such data sets as Parquet files, one folder per subset."""


def hub_rows_by_split(source: str) -> dict[str, Callable[[], Iterable[Row]]]:
    """For each split of a hub data set, `owner/name` or `owner/name:subset`, a function that starts streaming its rows.

    Raises:
        UnnormError: there is no such data set or subset, or the hub can't be reached.
    """
    name, _, subset = source.partition(":")
    try:
        splits, options = _splits_and_options(name, subset or None)
    except Exception as error:
        if subsets := _SUBSETS.search(str(error)):
            names = subsets[1].replace("'", "")
            first = names.partition(",")[0]
            raise UnnormError(
                f"'{source}' has several subsets: {names}. Name one of them, as in '{name}:{first}'."
            ) from error
        raise UnnormError(
            f"No data at '{source}': neither a local file, directory or glob nor a hub data set "
            f"that can be reached ({short(error)}). If this machine is offline, download it on another "
            f"(hf download {name} --repo-type dataset --local-dir DIR) and name that directory."
        ) from error
    return {split: partial(datasets.load_dataset, name, split=split, streaming=True, **options) for split in splits}


def _splits_and_options(name: str, subset: str | None) -> tuple[list[str], dict[str, str | None]]:
    """A hub data set's splits, and the arguments of `load_dataset` besides its name."""
    try:
        return datasets.get_dataset_split_names(name, subset), {"name": subset}
    except RuntimeError as error:
        if _SCRIPT not in str(error):
            raise
    options = {"revision": _CONVERTED, "data_dir": subset}
    files = datasets.load_dataset_builder(name, **options).config.data_files
    subsets = sorted({path.split("/")[-3] for paths in files.values() for path in paths})
    if len(subsets) > 1:
        raise ValueError(f"Several available configs: {subsets}")
    return [str(split) for split in files], options
