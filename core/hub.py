"""One file of the Hugging Face hub: asked for once, then taken from the hub's cache."""

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
    """Path of a file of the hub, in its cache. The arguments are those of `huggingface_hub.hf_hub_download`.

    That function asks an unreachable hub five times over half a minute and logs a line each time; here it is asked
    once, for at most HF_HUB_ETAG_TIMEOUT seconds, and what lies in the cache serves where it gives no answer.

    Raises:
        OSError, huggingface_hub.errors.HTTPError: neither from the hub nor in the cache.
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
