"""`from_pretrained`, `save_pretrained` and `push_to_hub` of AnyUp: weights by name, from a folder or the hub."""

from pathlib import Path
from typing import Self

from huggingface_hub import ModelHubMixin
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from core import checkpoint
from core.hub import hub_file
from core.published import PUBLISHED


class Pretrained(ModelHubMixin):
    """Adds `from_pretrained`, `save_pretrained` and `push_to_hub` to a model class."""

    def _save_pretrained(self, save_directory: Path) -> None:
        checkpoint.save(self, save_directory / checkpoint.WEIGHTS_NAME)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Loads a trained model in eval mode: by name, or one saved with `save_pretrained` or `push_to_hub`.

        Names: `bundled` (also for None) and `bundled_released` are baselines that were trained here and come with this
        package, for the two orderings of the feature path (docs/weights.md). `anyup_paper` (trained on DINOv2
        ViT-S/14) and `anyup_multi_backbone` (on five backbones) are the weights that AnyUp's authors published:
        Wimmer et al., arXiv 2510.12764, CC-BY-4.0; credit them. They are downloaded from the authors' release (3.5 MB
        each), checked by their sha256, and kept in torch.hub's folder of checkpoints.

        Anything else is a local folder, or a repository OWNER/NAME of the hub. The keyword arguments are those of
        `huggingface_hub.hf_hub_download`, and are used for repositories only.

        Raises:
            OSError: no such name or folder, a folder without a model, a file (`core.load` takes those), or the hub
                does not give the repository. WeightsError: as `core.load`.
        """
        where = "bundled" if pretrained_model_name_or_path is None else pretrained_model_name_or_path
        if str(where) in (*checkpoint.BUNDLED, *PUBLISHED) or Path(where).expanduser().is_dir():
            path = checkpoint.find(where)
        else:
            _check_repository(where)
            try:
                path = hub_file(
                    str(where),
                    checkpoint.WEIGHTS_NAME,
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                )
            except (OSError, HTTPError) as error:
                raise OSError(
                    f"{where} is no local folder, and cannot be downloaded from the hub ({type(error).__name__}): go "
                    "online, or give a local file to core.load"
                ) from error
        return checkpoint.rebuild(cls, *checkpoint.read(path), path)


def _check_repository(where: str | Path) -> None:
    """Refuses what cannot be a repository of the hub."""
    if Path(where).expanduser().is_file():
        raise OSError(f"{where} is a file: core.load({str(where)!r}) reads it, from_pretrained takes a folder")
    try:
        validate_repo_id(str(where))
        known = isinstance(where, str) and where.count("/") == 1
    except HFValidationError:
        known = False
    if not known:
        names = ", ".join([*checkpoint.BUNDLED, *PUBLISHED])
        raise FileNotFoundError(
            f"{where}: there is no such folder, and it is no repository OWNER/NAME of the hub; known names are {names}"
        )
