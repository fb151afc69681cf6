"""From the name of a model to a folder on this machine: a local folder as it is, a Hub repository by download.

The two small models inside this package have names of their own.

Only the files that are asked for are fetched, into huggingface_hub's cache, where they are found again without a
network.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = {"emoji": ASSETS / "emoji", "emoji-flow": ASSETS / "emoji_flow"}


def local(repo: str | os.PathLike[str]) -> Path:
    """What lies on this machine under a name: a folder, or one of `SHIPPED` where there is no folder of that name."""
    path = Path(repo).expanduser()
    return SHIPPED[repo] if repo in SHIPPED and not path.exists() else path


def fetch(
    repo: str | os.PathLike[str],
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """A folder that holds those files of a repository which match the patterns.

    Args:
      repo: a local folder, which is returned as it is, the id of a Hub repository such as "owner/name", or a name of
        `SHIPPED`.
      patterns: shell patterns of paths in the repository.
      revision: branch, tag or commit; the main branch by default.
      cache_dir: where downloads are kept; huggingface_hub's own place by default.
      local_files_only: use what has been downloaded before, without a network. So does HF_HUB_OFFLINE=1.
      token: for private repositories; by default the one of `hf auth login`.

    Raises:
      FileNotFoundError: neither a folder nor a repository that can be reached or was downloaded before.
    """
    path = local(repo)
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{repo} is a file; give the folder that holds it.")
    from huggingface_hub import errors, snapshot_download

    neither = f"{str(repo)!r} is no folder here (looked in {Path.cwd()})"
    try:
        folder = snapshot_download(
            str(repo),
            allow_patterns=list(patterns),
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
    except errors.HFValidationError as error:
        raise FileNotFoundError(
            f"{neither}, and not the id of a Hub repository; give a folder or 'owner/name'."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"The Hub repository {repo!r} has no revision {revision!r}; leave it out for main."
        ) from error
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"The Hub repository {repo!r} is gated: accept its terms on its page, then log in with `hf auth login` "
            "or give token=."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{neither}, and the Hub has no repository of this name; check the spelling, or give token= if it is "
            "private."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{neither}, and as a Hub repository it was not downloaded before and cannot be reached now "
            f"({type(error).__name__}); check the name and the network, and local_files_only and HF_HUB_OFFLINE."
        ) from error
    return Path(folder)


def locate(source: str | os.PathLike[str], names: Sequence[str], *beside: str, **download: Any) -> Path:
    """A file: the one given, or the first of these names that a folder or Hub repository has.

    Args:
      source: the file, or where to look.
      names: of the file, the best first.
      *beside: patterns of what else to fetch.
      **download: as of `fetch`.

    Raises:
      FileNotFoundError: there is none; says what there is.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    folder = fetch(source, (*names, *beside), **download)
    if found := [folder / name for name in names if (folder / name).is_file()]:
        return found[0]
    there = sorted(p.name for p in folder.iterdir())
    raise FileNotFoundError(f"{source} has none of {list(names)}; it has {there}. Give weight_name= one of them.")


def upload(repo: str, folder: Path, private: bool | None, token: str | bool | None, pr: bool, message: str) -> str:
    """Write what a folder holds to a Hub repository, which is made if it is not there; the address of the commit.

    Raises:
      ValueError: it cannot be done.
    """
    from huggingface_hub import HfApi, errors

    try:
        api = HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, create_pr=pr).commit_url
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.LocalTokenNotFoundError, OSError) as error:
        raise ValueError(
            f"Nothing was written to the Hub repository {repo!r} ({type(error).__name__}: {error}); give 'owner/name', "
            "log in with `hf auth login` or give token=, and check the network."
        ) from error
