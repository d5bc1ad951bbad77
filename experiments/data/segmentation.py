"""Images with one class per pixel in the folders their authors publish: CamVid, VOC, ADE20K, COCO-Stuff, Cityscapes.

torchvision's loaders of VOC and Cityscapes are not used: they do not compare names or sizes, accept only one folder
layout, and take seconds to import. The tests compare the Cityscapes classes with torchvision's table.
"""

from pathlib import Path

from experiments.data.base import IGNORE, register_data
from experiments.data.class_names import ADE, CAMVID, CITYSCAPES, COCO_STUFF_27, VOC
from experiments.data.files import IMAGES, PNG, FileSet
from experiments.data.labels import table


@register_data("camvid")
class CamVid(FileSet):
    """CamVid (Brostow et al. 2009) with the 11 classes of SegNet; id 11 is ignored.

    Args:
        path: the folder with `train/ trainannot/ val/ valannot/`.
        split: train, val or test.

    Raises:
        DataError: folders or files are missing, or do not belong together.
    """

    layout = "train/ and trainannot/ (val/, test/ likewise): images and, of equal name, PNG class ids 0..11"
    classes = tuple(CAMVID)
    label_classes = table({i: i for i in range(11)} | {11: IGNORE})

    def __init__(self, path: str, split: str = "train"):
        root = Path(path).expanduser()
        self._choose("split", split, ("train", "val", "test"))
        images = self._find(self._folder(root, split), IMAGES)
        labels = self._find(self._folder(root, f"{split}annot"), PNG)
        self._keep(self._match(images, {"labels": labels}), {})


@register_data("voc2012")
class VOC2012(FileSet):
    """Pascal VOC 2012 segmentation (Everingham et al. 2015): 20 classes and background; object outlines are ignored.

    Args:
        path: the folder with `JPEGImages/`, or one above it (`VOC2012/` or `VOCdevkit/VOC2012/` lies inside).
        split: train, val or trainval.

    Raises:
        DataError: folders, lists or files are missing, or do not belong together.
    """

    layout = "JPEGImages/*.jpg, SegmentationClass/*.png and ImageSets/Segmentation/SPLIT.txt"
    classes = tuple(VOC)
    label_classes = table({i: i for i in range(21)} | {255: IGNORE})

    def __init__(self, path: str, split: str = "train"):
        root = Path(path).expanduser()
        self._choose("split", split, ("train", "val", "trainval"))
        for inside in ("VOCdevkit/VOC2012", "VOC2012"):
            root = root / inside if (root / inside).is_dir() else root
        images = self._find(self._folder(root, "JPEGImages"), IMAGES)
        labels = self._find(self._folder(root, "SegmentationClass"), PNG)
        file = self._folder(root, "ImageSets/Segmentation") / f"{split}.txt"
        names = self._listed(file)
        images = self._only(names, images, file, "an image in JPEGImages")
        labels = self._only(names, labels, file, "a file in SegmentationClass")
        self._keep(self._match(images, {"labels": labels}), {})


@register_data("ade20k")
class ADE20K(FileSet):
    """ADE20K scene parsing (Zhou et al. 2017), the 150 classes of the 2016 challenge.

    Args:
        path: the folder `ADEChallengeData2016`, with `images/` and `annotations/`.
        split: train or val.
        background: make id 0 ("none of the 150") class 0 of 151 instead of ignoring it.

    Raises:
        DataError: folders or files are missing, or do not belong together.
    """

    layout = "images/{training,validation}/*.jpg and annotations/{training,validation}/*.png"

    def __init__(self, path: str, split: str = "train", background: bool = False):
        root = Path(path).expanduser()
        self._choose("split", split, ("train", "val"))
        inside = {"train": "training", "val": "validation"}[split]
        images = self._find(self._folder(root, f"images/{inside}"), IMAGES)
        labels = self._find(self._folder(root, f"annotations/{inside}"), PNG)
        self.classes = ("background", *ADE) if background else tuple(ADE)
        first = 0 if background else -1
        self.label_classes = table({i: i + first for i in range(1, 151)} | {0: 0 if background else IGNORE})
        self._keep(self._match(images, {"labels": labels}), {"background": background})


@register_data("cocostuff27")
class CocoStuff27(FileSet):
    """COCO-Stuff (Caesar et al. 2018) in its 27 supercategories, numbered as IIC, PiCIE and STEGO do.

    Args:
        path: the folder with `images/` and `annotations/` (the maps of `stuffthingmaps_trainval2017`).
        split: train or val.
        images_listed_in: a file with one image name per line, to use only these (such as
            `Coco164kFull_Stuff_Coarse_7.txt`, the subset of the papers above); relative to `path`, or absolute.

    Raises:
        DataError: folders, the list or files are missing, or do not belong together.
    """

    layout = "images/{train,val}2017/*.jpg and annotations/{train,val}2017/*.png with pixel values 0..181 and 255"
    classes = tuple(COCO_STUFF_27)
    label_classes = table({i: k for k, ids in enumerate(COCO_STUFF_27.values()) for i in ids} | {255: IGNORE})

    def __init__(self, path: str, split: str = "train", images_listed_in: str | None = None):
        root = Path(path).expanduser()
        self._choose("split", split, ("train", "val"))
        images = self._find(self._folder(root, f"images/{split}2017"), IMAGES)
        labels = self._find(self._folder(root, f"annotations/{split}2017"), PNG)
        if images_listed_in is not None:
            file = root / images_listed_in
            names = self._listed(file)
            images = self._only(names, images, file, f"an image in images/{split}2017")
            labels = self._only(names, labels, file, f"a file in annotations/{split}2017")
        self._keep(self._match(images, {"labels": labels}), {})


@register_data("cityscapes")
class Cityscapes(FileSet):
    """Cityscapes (Cordts et al. 2016), fine annotations, the 19 classes that are evaluated; the others are ignored.

    Args:
        path: the folder with `leftImg8bit/` and `gtFine/`.
        split: train or val (the labels of test are not published).

    Raises:
        DataError: folders or files are missing, or do not belong together.
    """

    layout = "leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png"
    classes = tuple(CITYSCAPES)
    label_classes = table(dict.fromkeys(range(34), IGNORE) | {i: k for k, i in enumerate(CITYSCAPES.values())})

    def __init__(self, path: str, split: str = "train"):
        root = Path(path).expanduser()
        self._choose("split", split, ("train", "val"))
        images = self._find(self._folder(root, f"leftImg8bit/{split}"), IMAGES, "_leftImg8bit", nested=True)
        labels = self._find(self._folder(root, f"gtFine/{split}"), PNG, "_gtFine_labelIds", nested=True)
        self._keep(self._match(images, {"labels": labels}), {})
