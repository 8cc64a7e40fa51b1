"""`unnorm push`: upload the LN-free model of a finished run, with its card, to the Hugging Face hub."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from unnorm.errors import UnnormError, short
from unnorm.folding.checkpoint import load_sites
from unnorm.paths import named_path, quoted, refuse_links
from unnorm.proof.verify import verify
from unnorm.run_directory import CARD, MODEL, finished_result


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, and where.

    Attributes:
        repo: the repository's full name.
        url: its page.
        files: uploaded paths, sorted.
        private: whether the repository is private.
    """

    repo: str
    url: str
    files: tuple[str, ...]
    private: bool

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def push(directory: str | Path, repo: str, *, private: bool = False, token: str | None = None) -> Pushed:
    """Upload `model/` of a run to the hub; the repository is created if it does not exist.

    Args:
        directory: a finished run; its proof is made again and has to pass.
        repo: `owner/name`, or `name` for a repository of your own.
        private: make a new repository private; by default it is public, unless the organization's default is private.
        token: hub token with write access; by default that of `HF_TOKEN` or of `hf auth login`.

    Raises:
        UnnormError: the run is not finished or its proof failed, the card is damaged, there is no token, the hub can't
            be reached or refuses, or a private repository was asked for and there is a public one.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UnnormError(f"'{repo}' is not a valid repository name: give OWNER/NAME. {short(error)}") from error
    known = token or huggingface_hub.get_token()
    if not known:
        raise UnnormError(
            "There is no token for writing to the hub. Make one at https://huggingface.co/settings/tokens, then run "
            "`hf auth login`, set HF_TOKEN, or give it with --token."
        )
    folder = check_run(named_path(directory))  # Last, as the proof takes longest.
    files = tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
    api = huggingface_hub.HfApi(token=known)
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True, repo_type="model")
        full = made.repo_id
        is_private = bool(api.repo_info(full, repo_type="model").private)
        if private and not is_private:
            raise UnnormError(
                f"'{full}' is public already, so nothing was uploaded. Make it private in its settings, or give "
                "another REPO."
            )
        api.upload_folder(
            repo_id=full,
            folder_path=str(folder),
            repo_type="model",
            commit_message="LN-free model made with unnorm",
            # Deletes weights of an earlier upload: transformers would prefer a single old file to new shards.
            delete_patterns=["model*.safetensors", "model.safetensors.index.json"],
        )
    except UnnormError:
        raise
    except Exception as error:
        raise UnnormError(_why(repo, error)) from error
    return Pushed(full, str(made), files, is_private)


def check_run(directory: Path) -> Path:
    """The folder to upload, after checking that the run is fit to be published.

    Raises:
        UnnormError: says what is missing or wrong, and how to fix it.
    """
    load_sites(directory)
    result = finished_result(directory)
    folder = directory / MODEL
    lacking = [name for name in ("config.json", "modeling_unnorm.py", CARD) if not (folder / name).is_file()]
    lacking += [] if any(folder.glob("*.safetensors")) else ["the weights"]
    if lacking:
        raise UnnormError(f"'{folder}' lacks {', '.join(lacking)}. Do the run again, or copy it again.")
    refuse_links(folder)
    check_card(folder / CARD)
    # The run's own verdict first, since it costs nothing; then the files as they are now.
    if not result.get("verified") or not all(check.passed for check in verify(directory)):
        raise UnnormError(
            f"The proof of the run in '{directory}' does not pass, so it is not published: see unnorm verify "
            f"{quoted(directory)}"
        )
    return folder


def check_card(path: Path) -> None:
    """Check that the hub can read the card's front matter.

    Raises:
        UnnormError: there is no front matter or nothing after it, or it is not a YAML mapping with the fields that a
            model needs.
    """
    remedy = "Rewrite it, between two lines of three hyphens at the top of the card."
    try:
        values = metadata_load(path)
    except (yaml.YAMLError, ValueError) as error:
        raise UnnormError(
            f"The front matter of '{path}' is not YAML ({' '.join(str(error).split())}). {remedy}"
        ) from error
    if values is None or not path.read_text(encoding="utf-8").partition("\n---\n")[2].strip():
        raise UnnormError(f"'{path}' has no front matter, or nothing after it. {remedy}")
    needed = {"library_name": str, "pipeline_tag": str, "tags": list}
    wrong = [key for key, kind in needed.items() if not isinstance(values.get(key), kind)]
    if wrong:
        raise UnnormError(f"The front matter of '{path}' lacks {', '.join(wrong)}. {remedy}")


def _why(repo: str, error: Exception) -> str:
    """Why the upload failed, in terms that help the user."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"The hub rejected the token ({short(error)}). Make a new one and run `hf auth login` again."
    if status in (403, 404):
        return f"The token may not write to '{repo}' ({short(error)}). Give one that may, or another REPO."
    if status is not None:
        return f"The hub refused the upload to '{repo}' ({short(error)}). Try again later."
    return f"The hub could not be reached, so nothing was published ({short(error)}). Go online and try again."
