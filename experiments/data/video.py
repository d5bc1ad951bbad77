"""Videos as folders of frames: with the object masks of DAVIS 2016 or 2017, or any frames without labels."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from experiments.data.base import IGNORE, DataError, register_data
from experiments.data.files import IMAGES, PNG, FileSet, Record
from experiments.data.labels import table


class Videos(FileSet):
    """Frames in order, video after video."""

    def _keep_videos(self, videos: Mapping[str, list[Record]], settings: Mapping[str, object]) -> None:
        self._keep([record for frames in videos.values() for record in frames], settings)
        self.videos, first = {}, 0
        for name, frames in videos.items():
            self.videos[name] = range(first, first + len(frames))
            first += len(frames)


class Davis(Videos):
    """What both releases share: the folders, one of frames and one of masks for each video."""

    def _keep_pairs(self, root: Path, names: Iterable[str], resolution: str) -> None:
        videos = {}
        for video in names:
            frames = self._find(self._folder(root, f"JPEGImages/{resolution}/{video}"), IMAGES)
            labels = self._find(self._folder(root, f"Annotations/{resolution}/{video}"), PNG)
            pairs = self._match(frames, {"labels": labels})
            videos[video] = [Record(f"{video}/{pair.name}", pair.image, pair.labels) for pair in pairs]
        self._keep_videos(videos, {})


@register_data("davis2016")
class Davis2016(Davis):
    """DAVIS 2016 (Perazzi et al.): the labels are one mask, which may cover several objects.

    Args:
        path: the folder with `JPEGImages/` and `Annotations/` (usually called DAVIS).
        split: train or val, as listed in `ImageSets/`; all: every folder of frames.
        resolution: the folder of frames to use: 480p or 1080p.

    Raises:
        DataError: folders, lists or files are missing, or do not belong together.
    """

    layout = (
        "JPEGImages/480p/VIDEO/*.jpg, Annotations/480p/VIDEO/*.png and, unless data.split=all, "
        "ImageSets/480p/{train,val}.txt"
    )
    classes = ("background", "object")
    label_classes = table({0: 0, 255: 1})

    def __init__(self, path: str, split: str = "train", resolution: str = "480p"):
        root = Path(path).expanduser()
        self._choose("split", split, ("train", "val", "all"))
        self._choose("resolution", resolution, ("480p", "1080p"))
        if split == "all":
            inside = self._folder(root, f"JPEGImages/{resolution}")
            names = sorted(
                found.name for found in inside.iterdir() if found.is_dir() and not found.name.startswith(".")
            )
            if not names:
                raise DataError(f"data=davis2016: {inside} has no folder of frames; expected: {self.layout}")
        else:  # each line is an image and its mask
            listed = self._listed(self._folder(root, f"ImageSets/{resolution}") / f"{split}.txt")
            names = dict.fromkeys(Path(file).parent.name for file in listed)
        self._keep_pairs(root, names, resolution)


@register_data("davis2017")
class Davis2017(Davis):
    """DAVIS 2017 (Pont-Tuset et al.): labels are the objects of a video, numbered within it; 0 is background.

    Args:
        path: the folder with `JPEGImages/`, `Annotations/` and `ImageSets/` (usually called DAVIS).
        split: train or val.
        resolution: the folder of frames to use: 480p or Full-Resolution.

    Raises:
        DataError: folders, lists or files are missing, or do not belong together.
    """

    layout = "JPEGImages/480p/VIDEO/*.jpg, Annotations/480p/VIDEO/*.png and ImageSets/2017/{train,val}.txt"
    classes = ("background", *(f"object {i}" for i in range(1, 21)))
    label_classes = table({i: i for i in range(21)} | {255: IGNORE})

    def __init__(self, path: str, split: str = "train", resolution: str = "480p"):
        root = Path(path).expanduser()
        self._choose("split", split, ("train", "val"))
        self._choose("resolution", resolution, ("480p", "Full-Resolution"))
        self._keep_pairs(root, self._listed(self._folder(root, "ImageSets/2017") / f"{split}.txt"), resolution)


@register_data("frames")
class Frames(Videos):
    """Any video as a folder of its frames, or a folder of such folders; frame10 comes after frame9.

    Args:
        path: the folder. If it holds frames, they are one video of its name; otherwise each folder in it is one video.

    Raises:
        DataError: no frames, or frames next to folders.
    """

    layout = "frames (.jpg, .png), or folders of frames"
    as_stored = False

    def __init__(self, path: str):
        root = self._folder(Path(path).expanduser(), ".")
        folders = sorted(found for found in root.iterdir() if found.is_dir() and not found.name.startswith("."))
        loose = [found for found in root.iterdir() if found.suffix.lower() in IMAGES and found.is_file()]
        if folders and loose:
            raise DataError(
                f"data=frames: {root} has frames ({loose[0].name}) and folders ({folders[0].name}): a video is a "
                "folder with frames only; move one of the two"
            )
        if not folders:
            name = root.resolve().name
            self._keep_videos({name: [Record(*found) for found in self._find(root, IMAGES).items()]}, {})
            return
        videos = {}
        for folder in folders:
            frames = self._find(folder, IMAGES)
            videos[folder.name] = [Record(f"{folder.name}/{name}", file) for name, file in frames.items()]
        self._keep_videos(videos, {})
