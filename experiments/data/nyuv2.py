"""NYU Depth v2 (Silberman et al. 2012): as folders of images, or as its authors' MATLAB file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.data.base import IGNORE, DataError, DataSet, Sample, register_data
from experiments.data.class_names import NYU_13, NYU_40
from experiments.data.files import IMAGES, PNG, FileSet, Record, fingerprint
from experiments.data.labels import classes_of, table
from experiments.data.normals import Intrinsics, decode_normals, normals_from_depth
from experiments.data.rgbd import check_depth_scale, read_depth

COLOUR_CAMERA = Intrinsics(518.857901, 519.469611, 325.582449, 253.736166)
"""Of the 640x480 images and of the depth aligned with them (`camera_params.m` of the authors' toolbox)."""


@register_data("nyuv2")
class NYUv2(FileSet):
    """NYUv2 as folders of equally named files. No folder layout is official, so the folders' names are settings.

    Args:
        path: the folder that holds the others.
        split: a folder between `path` and the others, such as train or test; None: there is none.
        images, depth: the folders of images, and of 16-bit PNGs of depth.
        normals: the folder of 8-bit RGB PNGs, (n + 1) / 2 * 255; None: `normals`, if that folder exists.
        labels: the folder of PNG class ids, where 0 and 255 are unlabelled; None: `labels`, if that folder exists.
        num_classes: 40 (Gupta et al. 2013) or 13 (Couprie et al. 2013).
        depth_scale: units per metre in the depth files.
        normal_signs: factors that turn stored normals into x right, y down, z forward; [1, -1, -1] if the files have
            y up and z towards the camera.
        intrinsics: `[fx, fy, cx, cy]` in pixels, to compute normals from depth if no files have them. For
            complete 640x480 images: [518.857901, 519.469611, 325.582449, 253.736166].

    Raises:
        DataError: folders or files are missing or do not belong together, or a setting makes no sense.
    """

    layout = "images/, depth/ and perhaps normals/ and labels/ of equally named files (official .mat: data=nyuv2_mat)"

    def __init__(
        self,
        path: str,
        split: str | None = None,
        images: str = "images",
        depth: str = "depth",
        normals: str | None = None,
        labels: str | None = None,
        num_classes: int = 40,
        depth_scale: float = 1000.0,
        normal_signs: list[int] = [1, 1, 1],  # noqa: B006  read only; Hydra wants a list
        intrinsics: list[float] | None = None,
    ):
        root = Path(path).expanduser()
        root = root if split is None else self._folder(root, split)
        found = self._find(self._folder(root, images), IMAGES)
        parts = {"depth": self._find(self._folder(root, depth), PNG)}
        for part, inside in (("normals", normals), ("labels", labels)):
            if inside is not None or (root / part).is_dir():
                parts[part] = self._find(self._folder(root, inside or part), PNG)
        if num_classes not in (13, 40):
            raise DataError(f"data=nyuv2: data.num_classes={num_classes} must be 13 or 40")
        if len(normal_signs) != 3 or any(abs(sign) != 1 for sign in normal_signs):
            raise DataError(f"data=nyuv2: data.normal_signs={normal_signs}: give three of 1 and -1")
        if intrinsics is not None and "normals" in parts:
            raise DataError(
                f"data=nyuv2: {root} has files of normals, and data.intrinsics would compute them: keep one"
            )
        self.depth_scale, self.normal_signs = check_depth_scale(depth_scale), list(normal_signs)
        self.camera = None if intrinsics is None else Intrinsics.of(intrinsics, "data.intrinsics")
        if "labels" in parts:
            self.classes = tuple(NYU_40 if num_classes == 40 else NYU_13)
        self.label_classes = table({i + 1: i for i in range(num_classes)} | {0: IGNORE, 255: IGNORE})
        settings = {
            "num_classes": num_classes if "labels" in parts else None,
            "depth_scale": depth_scale,
            "normal_signs": self.normal_signs if "normals" in parts else None,
            "camera": self.camera,
        }
        self._keep(self._match(found, parts), settings)

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return sample if self.camera is None else replace(sample, normals=normals_from_depth(sample.depth, self.camera))

    def _read_depth(self, path: Path) -> Tensor:
        return read_depth(path, self.depth_scale)

    def _read_normals(self, path: Path) -> Tensor:
        return decode_normals(path, self.normal_signs)


@register_data("nyuv2_mat")
class NYUv2Mat(DataSet):
    """The 1449 labelled images of NYUv2 in the authors' `nyu_depth_v2_labeled.mat`, with its 894 classes.

    Normals are computed from depth.

    Args:
        path: the file, or the folder that holds it.
        split: all, or the authors' train or test, which `splits.mat` beside the file lists.
        raw_depth: depth as measured, 0 where it is missing, instead of the authors' filled-in depth.

    Raises:
        DataError: a file is missing, or the file is not NYUv2's.
    """

    def __init__(self, path: str, split: str = "all", raw_depth: bool = False):
        file = Path(path).expanduser()
        self.file = file / "nyu_depth_v2_labeled.mat" if file.is_dir() else file
        self.depth_key = "rawDepths" if raw_depth else "depths"
        with self._opened() as content:
            count = len(content["images"])
            for key in (self.depth_key, "labels"):
                if content[key].shape != (count, *content["images"].shape[2:]):
                    raise DataError(f"{self.file}: {key} has shape {content[key].shape}: this is another file")
            self.classes = tuple("".join(map(chr, content[name][:].ravel())) for name in content["names"][0])
        self.label_classes = table({i + 1: i for i in range(len(self.classes))} | {0: IGNORE}, len(self.classes) + 1)
        self.numbers = list(range(1, count + 1)) if split == "all" else self._split(split, count)
        self.names = [f"{number:04d}" for number in self.numbers]
        settings = {"numbers": self.numbers, "raw_depth": raw_depth}
        self.fingerprint = fingerprint(self.choice, settings, [Record("", self.file)])

    def __getitem__(self, index: int) -> Sample:
        at = self.numbers[index] - 1
        with self._opened() as content:  # MATLAB writes columns first
            image = content["images"][at].transpose(0, 2, 1)  # (3,H,W)
            depth = content[self.depth_key][at].T.astype(np.float32)  # (H,W)
            ids = content["labels"][at].T  # (H,W)
        depth = torch.from_numpy(np.where(np.isfinite(depth) & (depth > 0), depth, 0))
        labels = classes_of(ids, self.label_classes, f"{self.file}, image {self.names[index]}: data=nyuv2_mat")
        pixels = torch.from_numpy(np.ascontiguousarray(image)).float() / 255
        return Sample(self.names[index], pixels, labels, depth, normals_from_depth(depth, COLOUR_CAMERA))

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        import h5py

        try:
            with h5py.File(self.file, "r") as content:
                yield content
        except OSError as error:
            raise DataError(f"{self.file} is missing, damaged or not an HDF5 file: {error}") from error
        except KeyError as error:
            raise DataError(f"{self.file} is not nyu_depth_v2_labeled.mat: {error}") from error

    def _split(self, split: str, count: int) -> list[int]:
        if split not in ("train", "test"):
            raise DataError(f"data=nyuv2_mat has no split {split!r}; there are: all, train, test")
        from scipy.io import loadmat

        file = self.file.with_name("splits.mat")
        try:
            numbers = sorted(int(number) for number in loadmat(file)[f"{split}Ndxs"].ravel())
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"split {split} is listed in {file}, which is missing or damaged: {error}") from error
        if not numbers or numbers[0] < 1 or numbers[-1] > count or len(set(numbers)) < len(numbers):
            raise DataError(f"{file}: the numbers of split {split} are not distinct numbers in 1..{count}")
        return numbers
