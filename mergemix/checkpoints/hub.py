"""Checkpoints on the Hugging Face Hub: pinned to one commit, and only the files that are needed."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from mergemix.checkpoints.adapter import WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from mergemix.checkpoints.adapter_config import ADAPTER_CONFIG_NAME
from mergemix.checkpoints.files import (
    CHAT_TEMPLATES,
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    HubFile,
    check_unambiguous,
    is_side_file,
)
from mergemix.checkpoints.strict_json import read_object
from mergemix.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_UNREACHABLE = (
    "no such local directory; as a Hub id, {} cannot be reached: check the network and run the same command "
    "again (a download goes on where it stopped), or set HF_HUB_OFFLINE=1 to use what the cache holds"
)


def fetch(source: str, *, weights: bool = True) -> tuple[Path, str, tuple[HubFile, ...]]:
    """Fetch the Hub repository `org/name[@revision]` into the Hub cache; what is there already is kept.

    A checkpoint, or a PEFT adapter. Returns the local snapshot directory, the commit (40 hex digits) that the
    revision meant, and, where `weights` is false, a checkpoint's weight files: they were not downloaded. A
    download that was interrupted goes on where it stopped; with HF_HUB_OFFLINE=1 the cache alone is used.
    Raises CheckpointError when repository, revision, file or network is missing, or access is not granted.
    """
    import huggingface_hub
    from huggingface_hub import constants

    repo, _, revision = source.partition("@")
    with translated(source):
        if constants.HF_HUB_OFFLINE:
            if not weights:
                raise CheckpointError(
                    f"{source}: --no-download reads weights from the Hub, but HF_HUB_OFFLINE forbids it: unset "
                    "it, or leave out --no-download to use what the cache holds"
                )
            root = _cached(repo, revision)
            return root, root.name, ()
        # First a request that fails at once without a network: the others would try again for half a minute.
        api = huggingface_hub.HfApi()
        info = api.model_info(repo, revision=revision or None, files_metadata=not weights)
        # One small file pins the revision: its path in the cache holds the commit, and the cache remembers
        # which commit the revision meant, for later runs without a network.
        pinning = ADAPTER_CONFIG_NAME if _is_adapter(_names(info)) else CONFIG_NAME
        root = Path(huggingface_hub.hf_hub_download(repo, pinning, revision=revision or None)).parent
        commit = root.name
        if info.sha != commit:  # the branch moved on between the two requests
            info = api.model_info(repo, revision=commit, files_metadata=not weights)
        names = _names(info)
        remote: tuple[HubFile, ...] = ()
        if _is_adapter(names):
            wanted = _adapter_files(repo, commit, names)
        else:
            wanted = [name for name in names if is_side_file(name) and "/" not in name]
            wanted += [name for name in names if fnmatch(name, CHAT_TEMPLATES)]
            weight_files = _weight_files(repo, commit, names)
            if weights:
                wanted += weight_files
            else:
                remote = _remote_files(repo, commit, info, weight_files)
        patterns = [glob.escape(name) for name in wanted]
        huggingface_hub.snapshot_download(repo, revision=commit, allow_patterns=patterns)
    return root, commit, remote


def _cached(repo: str, revision: str) -> Path:
    """The directory in the cache of a checkpoint or adapter that was downloaded before."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo, CONFIG_NAME, revision=revision or None)).parent
    except errors.LocalEntryNotFoundError:
        return Path(hf_hub_download(repo, ADAPTER_CONFIG_NAME, revision=revision or None)).parent


def _names(info: ModelInfo) -> list[str]:
    return [sibling.rfilename for sibling in info.siblings or ()]


def _is_adapter(names: list[str]) -> bool:
    """As `adapter.is_adapter`, of the files of a repository."""
    if ADAPTER_CONFIG_NAME not in names:
        return False
    weights = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    return CONFIG_NAME not in names or weights == [ADAPTER_WEIGHTS_NAME]


def _adapter_files(repo: str, commit: str, names: list[str]) -> list[str]:
    if ADAPTER_WEIGHTS_NAME not in names:
        raise CheckpointError(
            f"{repo} at commit {commit} is an adapter without {ADAPTER_WEIGHTS_NAME}; other formats can run code "
            "when loaded: convert it with save_pretrained(safe_serialization=True) and give the local directory"
        )
    return [ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME]


def _remote_files(repo: str, commit: str, info: ModelInfo, names: list[str]) -> tuple[HubFile, ...]:
    """The weight files among `names`, as the Hub describes them."""
    files = []
    for sibling in info.siblings or ():
        name, size = sibling.rfilename, sibling.size
        if name in names and name != INDEX_NAME:
            etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            if size is None or etag is None:
                raise CheckpointError(
                    f"{repo}: the Hub tells no size or id of {name}; leave out --no-download"
                )
            files.append(HubFile(repo, commit, name, size, etag))
    return tuple(files)


def _weight_files(repo: str, commit: str, names: list[str]) -> list[str]:
    """The index and its shards, or else the single file, or else every safetensors file of the top folder."""
    from huggingface_hub import hf_hub_download

    if INDEX_NAME in names:
        weight_map = read_object(Path(hf_hub_download(repo, INDEX_NAME, revision=commit))).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else ()
        # Names that are odd or absent are reported by the reader of the index, after the download.
        known = sorted({file for file in files if isinstance(file, str)} & set(names))
        check_unambiguous(f"{repo} at commit {commit}", known, SINGLE_NAME in names)
        return [INDEX_NAME, *known]
    if SINGLE_NAME in names:
        return [SINGLE_NAME]
    weights = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    if not weights:
        raise CheckpointError(
            f"{repo} at commit {commit} holds no *.safetensors file; convert the model with "
            "save_pretrained(safe_serialization=True) and give the local directory"
        )
    return weights


@contextmanager
def translated(source: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one CheckpointError that says what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{source}: access to this repository must be requested on the Hub; when it is granted, "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{source}: neither a local directory nor a repository on {constants.ENDPOINT}; correct it, "
            "or, for a private one, log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{source}: the repository exists, but has no such branch, tag or commit"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{source}: no such local directory; as a Hub id, the cache does not hold it and HF_HUB_OFFLINE is "
            "set: unset it once to download the checkpoint"
            if constants.HF_HUB_OFFLINE
            else f"{source}: {_UNREACHABLE.format(constants.ENDPOINT)}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(
            f"{source}: the repository holds no config.json; is it a Hugging Face model?"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{source}: the download failed: {error}; run the same command again, it goes on where it stopped"
        ) from error
    except errors.HTTPError as error:  # no answer at all
        raise CheckpointError(f"{source}: {_UNREACHABLE.format(constants.ENDPOINT)}") from error
