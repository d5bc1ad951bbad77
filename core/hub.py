"""Gets one file of the Hugging Face hub with a single request, or from the local cache if the hub does not answer."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError


def hub_file(
    repo: str,
    filename: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> str:
    """Path of a hub file in the local cache. The arguments are those of `huggingface_hub.hf_hub_download`.

    `hf_hub_download` asks an unreachable hub five times over half a minute, and logs a line each time. This function
    asks once, for at most HF_HUB_ETAG_TIMEOUT seconds. If there is no answer, it returns the cached file.

    Raises:
        OSError, huggingface_hub.errors.HTTPError: neither the hub nor the cache gives the file.
    """

    def get(only_local: bool) -> str:
        return huggingface_hub.hf_hub_download(
            repo,
            filename,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=only_local,
        )

    if not local_files_only:
        try:
            huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(repo, filename, revision=revision), token=token
            )
        except (OSError, HTTPError) as error:
            if force_download:
                raise
            try:
                return get(only_local=True)
            except LocalEntryNotFoundError:
                raise error from None
    return get(local_files_only)
