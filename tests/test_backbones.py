"""Backbones: shapes, geometry, layers, normalisation, weight files, the hub, and every refusal."""

import os
import pickle
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from core.backbones import (
    CHOICES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    WeightsUnavailable,
    backbone_from_config,
    imagenet_normalize,
    load_backbone,
)
from core.weight_files import WeightsError, read_weights

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("ANYUP_SHARED", ROOT.parent / "shared"))

DECLARED = {  # name -> channels, stride, layers, aligned
    "embedded": (192, 16, 4, True),
    "dinov2_vits14": (384, 14, 12, True),
    "dinov2_vitb14": (768, 14, 12, True),
    "dinov2_vitl14": (1024, 14, 24, True),
    "dinov2_vits14_reg": (384, 14, 12, True),
    "dino_vits16": (384, 16, 12, True),
    "dino_vitb16": (768, 16, 12, True),
    "clip_vitb16": (768, 16, 12, True),
    "clip_vitb32": (768, 32, 12, True),
    "siglip2_vitb16": (768, 16, 12, True),
    "dinov3_vits16": (384, 16, 12, True),
    "dinov3_vits16plus": (384, 16, 12, True),
    "dinov3_vitb16": (768, 16, 12, True),
    "mae_vitb16": (768, 16, 12, True),
    "vit_tiny16": (192, 16, 12, True),
    "vit_small16": (384, 16, 12, True),
    "vit_base16": (768, 16, 12, True),
    "deit_tiny16": (192, 16, 12, True),
    "resnet50": (2048, 32, 5, False),
    "convnext_tiny": (768, 32, 4, True),
    "mobilenetv2": (96, 16, 5, False),
    "mobilenetv2_tf": (96, 16, 5, False),
    "squeezenet": (512, 16, 4, False),
    "hog8": (87, 8, 1, True),
    "hog16": (87, 16, 1, True),
    "daisy8": (142, 8, 1, True),
    "daisy16": (142, 16, 1, True),
}
ACTIVATIONS = {"clip_vitb16": "QuickGELU", "clip_vitb32": "QuickGELU", "vit_small16": "GELU"}
CLASSICAL = ("hog8", "hog16", "daisy8", "daisy16")
LARGE = {name for name, (channels, *_) in DECLARED.items() if channels in (768, 1024)} - {"convnext_tiny"}
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in DECLARED]
SMALL = [name for name in DECLARED if name not in LARGE]
NETWORKS = [name for name in SMALL if name not in CLASSICAL]


@cache
def get(name: str) -> Backbone:
    return load_backbone(name, None if name in CLASSICAL else "random")


def noise(height: int, width: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def smooth(height: int, width: int) -> torch.Tensor:
    """Structure of some pixels' size, as photographs have."""
    return F.interpolate(noise(height // 4, width // 4), size=(height, width), mode="bicubic").clamp(0, 1)


def shared(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"needs {path} of the shared folder (ANYUP_SHARED)")
    return SHARED / path


# --- what the table declares ---------------------------------------------------------------------------------------


def test_every_choice_has_a_row_here():
    assert set(DECLARED) == set(CHOICES) - {"timm"}


def test_every_pretrained_tag_is_known_to_timm():
    for name, choice in CHOICES.items():
        if choice.kind == "timm" and name not in ("timm", "mobilenetv2_tf", "embedded"):
            assert "." in choice.model, name
            assert timm.is_model_pretrained(choice.model), name


@pytest.mark.parametrize("name", EVERY)
def test_shape_and_declarations(name):
    backbone = get(name) if name in SMALL else load_backbone(name, "random")
    channels, stride, layers, aligned = DECLARED[name]
    declared = (backbone.name, backbone.channels, backbone.patch_size, backbone.num_layers, backbone.aligned)
    assert declared == (name, channels, stride, layers, aligned)
    rgb = noise(75, 101, batch=2)
    short = 1 if name == "squeezenet" else 0  # unpadded convolutions lose one row and column
    expected = (2, channels, round(75 / stride) - short, round(101 / stride) - short)
    features = backbone(rgb)
    assert features.shape == expected
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert features.std() > 0
    if name not in CLASSICAL:
        model = backbone.trunk
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize("size", [(32, 32), (33, 97), (160, 64), (47, 250)])
@pytest.mark.parametrize("name", ["vit_tiny16", "dinov2_vits14_reg", "dinov3_vits16", "mobilenetv2", "hog8", "daisy16"])
def test_any_size_is_tiled_by_the_nearest_number_of_cells(name, size):
    backbone = get(name)
    cells = tuple(int(side / backbone.patch_size + 0.5) for side in size)
    assert backbone(noise(*size)).shape == (1, backbone.channels, *cells)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_has_its_declared_width_and_stride(name):
    backbone = get(name)
    rgb = noise(64, 96)
    for layer, (channels, stride) in enumerate(zip(backbone.layer_channels, backbone.layer_strides, strict=True)):
        features = backbone(rgb, layer=layer)
        short = 1 if name == "squeezenet" else 0
        assert features.shape == (1, channels, round(64 / stride) - short, round(96 / stride) - short)
        assert torch.equal(features, backbone(rgb, layer=layer - backbone.num_layers))


def test_importing_the_table_imports_no_encoder_package():
    code = "import sys, core.backbones; print([m for m in ('timm', 'torchvision', 'skimage') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# --- geometry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 160), (101, 171)])
@pytest.mark.parametrize("name", [name for name in SMALL if DECLARED[name][3]])
def test_a_blob_at_a_cells_centre_changes_that_cell_most(name, size):
    backbone = get(name)
    height, width = size
    blank = torch.full((1, 3, *size), 0.3)
    before = backbone(blank)  # the blob is faint: normalised descriptors of a strong one are as large beside it
    h, w = before.shape[-2:]
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height * h, (torch.arange(width) + 0.5) / width * w, indexing="ij"
    )
    for i, j in ((0, 0), (h // 2, w // 2), (h - 1, w - 1), (h - 1, 0)):
        blob = torch.exp(-((y - i - 0.5) ** 2 + (x - j - 0.5) ** 2) / (2 * 0.15**2))  # in cells: well inside its own
        change = (backbone(blank + 0.05 * blob) - before).norm(dim=1)[0]
        assert divmod(change.argmax().item(), w) == (i, j)


def mirrored(backbone: Backbone) -> Backbone:
    """The same network seen in a mirror: kernels and position embeddings flipped left to right."""
    twin = load_backbone(backbone.name, "random")
    for module in twin.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.flip(-1)
    embedding = getattr(twin.trunk, "pos_embed", None)
    if embedding is not None:
        prefix = embedding.shape[1] - twin.trunk.patch_embed.num_patches
        grid = embedding[:, prefix:].unflatten(1, twin.trunk.patch_embed.grid_size).flip(2).flatten(1, 2)
        embedding.data = torch.cat([embedding[:, :prefix], grid], dim=1)
    return twin


@pytest.mark.parametrize("name", ["vit_tiny16", "dinov2_vits14_reg", "convnext_tiny", "resnet50", "mobilenetv2"])
def test_aligned_means_symmetric_about_the_cells_centres(name):
    rgb = noise(96, 128)
    features, flipped = get(name)(rgb), mirrored(get(name))(rgb.flip(-1)).flip(-1)
    off = (flipped - features).norm() / features.norm()
    assert (off < 1e-3) if DECLARED[name][3] else (off > 0.05)


@pytest.mark.parametrize(
    ("name", "end"), [("resnet50", 0), ("mobilenetv2", 0), ("mobilenetv2_tf", 1), ("squeezenet", 1)]
)
def test_unaligned_cells_look_where_the_table_says(name, end):
    backbone = get(name)
    stride, cell = backbone.patch_size, 4
    energy = torch.zeros(256)
    for seed in range(4):
        rgb = noise(256, 256, seed=seed).requires_grad_()
        mix = torch.randn(backbone.channels, generator=torch.Generator().manual_seed(seed))
        (gradient,) = torch.autograd.grad((backbone(rgb)[0, :, cell, cell] * mix).sum(), rgb)
        energy += gradient.square().sum((0, 1, 2))
    centroid = (energy * torch.arange(256)).sum() / energy.sum()
    assert centroid.item() == pytest.approx(stride * (cell + end) - end, abs=0.2 * stride)
    assert abs(centroid.item() - (stride * (cell + 0.5) - 0.5)) > 0.25 * stride


def test_non_multiples_are_resized_not_padded():
    rgb = noise(75, 101)
    resized = F.interpolate(rgb, size=(80, 96), mode="bilinear", antialias=True)
    assert torch.equal(get("vit_tiny16")(rgb), get("vit_tiny16")(resized))


# --- what the network sees and gives -------------------------------------------------------------------------------


class Mirror(Backbone):
    """Gives back the image it gets."""

    def __init__(self, stride: int = 1, channels: int = 3):
        super().__init__("mirror", (channels,), (stride,), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))

    def features(self, image, layer):
        return image


def test_normalisation_by_hand():
    rgb = noise(5, 7)
    image = Mirror()(rgb)
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 2.0)]):
        assert torch.allclose(image[:, channel], (rgb[:, channel] - mean) / std)


def test_a_broken_declaration_is_caught():
    with pytest.raises(RuntimeError, match=r"mirror: layer 0 must give \(B, 4, h, w\) as declared, got \(1, 3, 5, 7\)"):
        Mirror(channels=4)(noise(5, 7))


def test_imagenet_normalize():
    rgb = noise(4, 6, batch=2)
    expected = torch.stack([(rgb[:, c] - IMAGENET_MEAN[c]) / IMAGENET_STD[c] for c in range(3)], dim=1)
    assert torch.allclose(imagenet_normalize(rgb), expected)
    assert imagenet_normalize(rgb.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["vit_tiny16", "dinov2_vits14_reg", "dinov3_vits16"])
def test_last_layer_is_the_normed_patch_tokens_of_timm(name):
    backbone = get(name)
    rgb = noise(4 * backbone.patch_size, 3 * backbone.patch_size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    tokens = backbone.trunk.forward_features((rgb - mean) / std)
    assert tokens.shape[1] == 12 + backbone.trunk.num_prefix_tokens > 12
    expected = tokens[:, backbone.trunk.num_prefix_tokens :].transpose(1, 2).unflatten(2, (4, 3))
    assert torch.allclose(backbone(rgb), expected, atol=1e-5)
    assert torch.equal(backbone(rgb), backbone(rgb, layer=-1))
    assert backbone(rgb).mean(dim=1).abs().max() < 1e-3  # what a layer norm leaves
    assert backbone(rgb, layer=-2).mean(dim=1).abs().max() > 1e-3


def test_intermediate_layers_are_what_the_blocks_give():
    backbone, outputs = get("vit_tiny16"), []
    hooks = [block.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for block in backbone.trunk.blocks]
    features = backbone(noise(48, 64), layer=5)
    for hook in hooks:
        hook.remove()
    assert len(outputs) == 6  # later blocks are not computed
    assert torch.equal(features, outputs[5][:, 1:].transpose(1, 2).unflatten(2, (3, 4)))


def test_squeezenets_layers_end_where_a_pool_or_the_classifier_follows():
    backbone, rgb = get("squeezenet"), noise(64, 96)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    features, layer = (rgb - mean) / std, 0
    for module in backbone.trunk:
        if isinstance(module, nn.MaxPool2d):
            assert torch.allclose(backbone(rgb, layer=layer), features, atol=1e-5)
            layer += 1
        features = module(features)
    assert layer == 3
    assert torch.allclose(backbone(rgb), features, atol=1e-5)


def test_stays_in_eval_mode_inside_a_training_model():
    backbone = get("mobilenetv2")
    nn.Sequential(backbone).train()
    before = backbone.trunk.bn1.running_mean.clone()
    backbone(noise(32, 32))
    assert not backbone.trunk.bn1.training
    assert torch.equal(before, backbone.trunk.bn1.running_mean)


def test_gradients_reach_the_image_but_no_weight():
    rgb = noise(32, 32).requires_grad_()
    get("vit_tiny16")(rgb).square().sum().backward()
    assert rgb.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in get("vit_tiny16").parameters())


def test_image_and_weights_of_other_dtypes():
    rgb = noise(40, 32)
    full = get("vit_tiny16")(rgb)
    assert get("vit_tiny16")(rgb.half()).dtype == torch.float32
    assert torch.allclose(get("vit_tiny16")(rgb.double()), full, atol=1e-4)
    low = load_backbone("vit_tiny16", "random").to(torch.bfloat16)(rgb)
    assert low.dtype == torch.bfloat16
    assert F.cosine_similarity(low.float(), full).mean() > 0.99


def test_random_weights_are_fixed_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_backbone("mobilenetv2", "random")
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.trunk.conv_stem.weight, get("mobilenetv2").trunk.conv_stem.weight)


# --- classical descriptors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSICAL)
def test_classical_descriptors_are_deterministic_and_per_image(name):
    rgb = noise(64, 48, batch=2)
    both = get(name)(rgb)
    assert torch.equal(both, get(name)(rgb))
    # Sums of at most (3·16)² terms, in an order that may depend on the batch, of descriptors no longer than 1.
    torch.testing.assert_close(get(name)(rgb[1:]), both[1:], rtol=0, atol=48**2 * torch.finfo(torch.float32).eps / 2)
    length = both[:, :-6].norm(dim=1)
    assert length.min() > 0.9
    assert length.max() < 1
    assert get(name)(torch.full((1, 3, 75, 101), 0.3))[:, :-6].norm(dim=1).max() < 1e-3  # no noise in flat cells


@pytest.mark.parametrize("name", CLASSICAL)
def test_colour_channels_are_the_cells_lab_mean_and_deviation(name):
    rgb = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 32, 48)
    colour = get(name)(rgb)[:, -6:].amax((2, 3))[0]
    assert torch.allclose(colour[:3], torch.tensor([0.5324, 0.8009, 0.6720]), atol=1e-3)  # sRGB red in CIELAB / 100
    assert colour[3:].abs().max() < 1e-5
    stripes = torch.zeros(1, 3, 32, 48)
    stripes[..., ::2] = 1
    assert torch.allclose(get(name)(stripes)[:, -3:].mean((2, 3))[0], torch.tensor([0.5, 0.0, 0.0]), atol=1e-3)


def hog_by_definition(pixels: np.ndarray, p: int) -> np.ndarray:
    """Dalal & Triggs written out: (H,W,3) -> (h,w,81), for 9 hard bins of 20 degrees and blocks of 3 x 3 cells."""
    roots = np.pad(np.sqrt(pixels.astype(np.float64)), ((p + 1, p + 1), (p + 1, p + 1), (0, 0)), mode="symmetric")
    down, right = roots[2:, 1:-1] - roots[:-2, 1:-1], roots[1:-1, 2:] - roots[1:-1, :-2]
    strongest = np.hypot(down, right).argmax(-1)[..., None]
    down, right = (np.take_along_axis(part, strongest, -1)[..., 0] for part in (down, right))
    bins = (np.degrees(np.arctan2(down, right)) % 180 // 20).astype(int)
    h, w = pixels.shape[0] // p, pixels.shape[1] // p
    cells = np.zeros((h + 2, w + 2, 9))
    for y, x in np.ndindex(bins.shape):
        cells[y // p, x // p, bins[y, x]] += np.hypot(down[y, x], right[y, x]) / p**2
    blocks = np.stack([[cells[i : i + 3, j : j + 3].ravel() for j in range(w)] for i in range(h)])
    return blocks / np.sqrt((blocks**2).sum(-1, keepdims=True) + 0.05**2)


@pytest.mark.parametrize("name", ["hog8", "hog16"])
def test_hog_is_its_definition(name):
    rgb = noise(48, 64)
    expected = hog_by_definition(rgb[0].permute(1, 2, 0).numpy(), get(name).patch_size)
    assert np.allclose(get(name)(rgb)[0, :81].permute(1, 2, 0).numpy(), expected, atol=1e-4)


def test_daisy_is_scikit_images_at_the_centre_of_each_inner_cell():
    from skimage.color import rgb2lab
    from skimage.feature import daisy

    rgb = noise(128, 128)
    lightness = rgb2lab(rgb[0].permute(1, 2, 0).numpy())[..., 0] / 100
    everywhere = daisy(lightness, step=1, radius=12, rings=2, histograms=8, orientations=8, normalization="off")
    features = get("daisy8")(rgb)[0, :136]
    for i, j in ((7, 8), (8, 6)):
        expected = everywhere[8 * i + 3 - 12, 8 * j + 3 - 12]
        expected = expected / np.sqrt((expected**2).sum() + 0.5**2)
        assert np.allclose(features[:, i, j], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["hog8", "hog16"])
def test_hog_of_a_mirrored_image_is_mirrored(name):
    rgb = noise(64, 96)
    flipped = get(name)(rgb.flip(-1)).flip(-1)[:, :81].unflatten(1, (3, 3, 9)).flip(2, 3).flatten(1, 3)
    assert torch.allclose(flipped, get(name)(rgb)[:, :81], atol=1e-4)


@pytest.mark.parametrize("name", ["daisy8", "daisy16"])
def test_daisy_of_a_mirrored_image_is_mirrored(name):
    rgb = smooth(128, 160)
    turn = [(4 - i) % 8 for i in range(8)]
    flipped = get(name)(rgb.flip(-1)).flip(-1)[:, :136].unflatten(1, (17, 8))[:, :, turn]
    rings = flipped[:, 1:].unflatten(1, (2, 8))[:, :, turn].flatten(1, 2)
    flipped = torch.cat([flipped[:, :1], rings], dim=1).flatten(1, 2)
    assert F.cosine_similarity(flipped, get(name)(rgb)[:, :136]).min() > 0.97  # forward differences: half a pixel


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rgb", "error", "message"),
    [
        (torch.rand(3, 32, 32), ValueError, r"vit_tiny16: the image must be \(B, 3, H, W\), got \(3, 32, 32\)"),
        (torch.rand(1, 4, 32, 32), ValueError, r"got \(1, 4, 32, 32\)"),
        (torch.rand(0, 3, 32, 32), ValueError, r"got \(0, 3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, r"floating point in \[0, 1\], got torch.uint8"),
        (torch.rand(1, 3, 32, 32) * 4 - 2, ValueError, r"must lie in \[0, 1\], got .* neither normalised"),
        (torch.rand(1, 3, 32, 32) * 255, ValueError, r"must lie in \[0, 1\]"),
        (torch.full((1, 3, 32, 32), torch.nan), ValueError, r"must lie in \[0, 1\], got nan"),
        (torch.rand(1, 3, 15, 32), ValueError, r"15x32 pixels, at least 16x16 are needed \(stride 16\)"),
    ],
)
def test_bad_images_are_named(rgb, error, message):
    with pytest.raises(error, match=message):
        get("vit_tiny16")(rgb)


def test_slight_overshoot_of_resizing_is_taken():
    get("vit_tiny16")(noise(32, 32) * 1.1 - 0.05)


def test_squeezenet_names_its_smallest_image():
    with pytest.raises(ValueError, match="31x64 pixels, at least 32x32"):
        get("squeezenet")(noise(31, 64))
    assert get("squeezenet")(noise(32, 32)).shape == (1, 512, 1, 1)


@pytest.mark.parametrize("layer", [12, -13])
def test_layer_out_of_range_says_how_many_there_are(layer):
    with pytest.raises(IndexError, match=f"vit_tiny16 has no layer {layer}: it has 12, 0 to 11 or -12 to -1"):
        get("vit_tiny16")(noise(32, 32), layer=layer)


def test_classical_descriptors_refuse_gradients_and_weights():
    with pytest.raises(ValueError, match=r"hog8 cannot be differentiated: pass rgb.detach"):
        get("hog8")(noise(32, 32).requires_grad_())
    with pytest.raises(ValueError, match=r"hog8 is a classical descriptor and has no weights; got weights='x.pth'"):
        load_backbone("hog8", "x.pth")


@pytest.mark.parametrize(
    ("rgb", "error", "message"),
    [
        (torch.rand(3, 4, 4), ValueError, r"imagenet_normalize: the image must be \(B, 3, H, W\), got \(3, 4, 4\)"),
        (torch.rand(1, 1, 4, 4), ValueError, r"got \(1, 1, 4, 4\)"),
        (torch.ones(1, 3, 4, 4, dtype=torch.int64), TypeError, "got torch.int64: divide by 255"),
        (torch.rand(1, 3, 4, 4) * 255, ValueError, "nor in 0..255"),
    ],
)
def test_imagenet_normalize_refuses(rgb, error, message):
    with pytest.raises(error, match=message):
        imagenet_normalize(rgb)


def test_unknown_name_lists_all():
    listed = r"no backbone is called 'dinov2'; there are: embedded, dinov2_vits14, .*daisy16, timm"
    with pytest.raises(ValueError, match=listed):
        load_backbone("dinov2")


# --- any encoder of timm -------------------------------------------------------------------------------------------


def test_any_timm_model():
    backbone = load_backbone("timm", "random", model="swin_tiny_patch4_window7_224")
    assert (backbone.channels, backbone.patch_size, backbone.aligned) == (768, 32, None)
    assert backbone(noise(64, 96)).shape == (1, 768, 2, 3)


def test_a_timm_model_of_one_size_says_so():
    backbone = load_backbone("timm", "random", model="mixer_s32_224")
    assert backbone(noise(224, 224)).shape == (1, 512, 7, 7)
    with pytest.raises(ValueError, match="MlpMixer takes images of 224x224 pixels only, got 224x225"):
        backbone(noise(224, 225))


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("timm", "vit_tiny_patch16_225", "has no model 'vit_tiny_patch16_225'; close: vit_tiny_patch16_224"),
        ("timm", "resnet50.no_such_tag", "has no model 'resnet50.no_such_tag'"),
        ("timm", None, "`model` is for backbone=timm only, which needs one .*; got None"),
        ("hog8", "resnet50", "backbone hog8: `model` .* got 'resnet50'"),
    ],
)
def test_wrong_timm_ids_are_named(name, model, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(name, None if name == "hog8" else "random", model=model)


# --- configuration -------------------------------------------------------------------------------------------------


def test_every_choice_is_a_hydra_choice():
    for name in CHOICES:
        node = ConfigStore.instance().load(f"backbone/{name}.yaml").node
        assert node.name == name
        assert node.weights is None
        assert ("model" in node.keys()) == (name == "timm")  # noqa: SIM118  a missing value is not "in"


def test_backbone_from_config():
    node = ConfigStore.instance().load("backbone/mobilenetv2.yaml").node
    backbone = backbone_from_config(OmegaConf.merge(node, {"weights": "random"}))
    assert backbone.name == "mobilenetv2"
    assert backbone_from_config({"name": "hog16"}).name == "hog16"
    with pytest.raises(ValueError, match="`model` is for backbone=timm only, which needs one"):
        backbone_from_config(ConfigStore.instance().load("backbone/timm.yaml").node)
    with pytest.raises(ValueError, match="can have the keys name, weights, model; got name, wieghts"):
        backbone_from_config({"name": "hog16", "wieghts": None})


# --- weight files --------------------------------------------------------------------------------------------------


def other_trunk(name: str, scale: float = 0.5) -> dict[str, torch.Tensor]:
    """Weights that differ from the random ones, under the names a weight file has."""
    prefix = "features." if name == "squeezenet" else ""
    state = get(name).trunk.state_dict()
    return {prefix + key: value * scale if value.is_floating_point() else value for key, value in state.items()}


def write(path: Path, state: dict) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "name", ["vit_tiny16", "resnet50", "convnext_tiny", "mobilenetv2", "squeezenet", "dinov3_vits16"]
)
def test_a_file_of_the_trunk_loads(name, tmp_path):
    state = other_trunk(name)
    loaded = load_backbone(name, write(tmp_path / "trunk.safetensors", state)).trunk.state_dict()
    assert all(torch.equal(value, state[key if key in state else f"features.{key}"]) for key, value in loaded.items())


@pytest.mark.parametrize("classes", [1000, 10])
@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("vit_tiny16", {"head.weight": (192,), "head.bias": ()}),
        ("convnext_tiny", {"head.fc.weight": (768,), "head.fc.bias": ()}),
        ("squeezenet", {"classifier.1.weight": (512, 1, 1), "classifier.1.bias": ()}),
    ],
)
def test_the_classifier_of_a_file_is_left_out(name, head, classes, tmp_path):
    state = other_trunk(name) | {key: torch.zeros(classes, *shape) for key, shape in head.items()}
    backbone = load_backbone(name, write(tmp_path / "whole.safetensors", state))
    first = next(iter(backbone.trunk.state_dict().items()))
    assert torch.equal(first[1], state[first[0] if first[0] in state else f"features.{first[0]}"])


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_pickled_state_dicts_load(suffix, nest, tmp_path):
    state = other_trunk("mobilenetv2")
    path = write(tmp_path / f"weights{suffix}", {nest: state, "epoch": 3} if nest else state)
    assert torch.equal(load_backbone("mobilenetv2", str(path)).trunk.conv_stem.weight, state["conv_stem.weight"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("name", ["vit_tiny16", "squeezenet"])
def test_prefixes_of_wrappers_are_taken_off(name, prefix, tmp_path):
    state = other_trunk(name)
    path = write(tmp_path / "wrapped.pth", {"state_dict": {prefix + key: value for key, value in state.items()}})
    first, loaded = next(iter(load_backbone(name, path).trunk.state_dict().items()))
    assert torch.equal(loaded, state[first if first in state else f"features.{first}"])


def test_an_outer_key_is_named_with_the_way_out(tmp_path):
    state = other_trunk("vit_tiny16")
    path = write(tmp_path / "dino.pth", {"student": state, "teacher": state, "epoch": 3})
    with pytest.raises(WeightsError, match=r"dino.pth: no state dict .*; it has one under each of student, teacher"):
        load_backbone("vit_tiny16", path)


@pytest.mark.parametrize("name", ["vit_tiny16", "squeezenet"])
def test_an_outer_name_is_named_with_the_way_out(name, tmp_path):
    state = {f"teacher.backbone.{key}": value for key, value in other_trunk(name).items()}
    path = write(tmp_path / "dino.pth", state | {"teacher.head.weight": torch.zeros(3)})
    way_out = (
        r"has these weights under teacher\.backbone\.(features\.)?: save them alone, without the prefix: torch\.save"
    )
    with pytest.raises(WeightsError, match=way_out) as caught:
        load_backbone(name, path)
    prefix = re.search(r"removeprefix\('(.*?)'\)", str(caught.value)).group(1)
    write(path, {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    assert load_backbone(name, path).name == name


def test_half_precision_weights_are_cast(tmp_path):
    state = {
        key: value.half() if value.is_floating_point() else value for key, value in other_trunk("vit_tiny16").items()
    }
    backbone = load_backbone("vit_tiny16", write(tmp_path / "half.safetensors", state))
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())
    assert torch.equal(backbone.trunk.pos_embed, state["pos_embed"].float())
    assert backbone(noise(32, 32)).dtype == torch.float32


@pytest.mark.parametrize("asked", ["mobilenetv2", "mobilenetv2_tf"])
@pytest.mark.parametrize("classes", [1000, 1001, 10, None])
def test_the_number_of_classes_tells_tensorflows_mobilenet(classes, asked, tmp_path):
    state = other_trunk("mobilenetv2")
    if classes is not None:
        state |= {"classifier.weight": torch.zeros(classes, 1280), "classifier.bias": torch.zeros(classes)}
    backbone = load_backbone(asked, write(tmp_path / "mobilenet.safetensors", state))
    assert backbone.name == {1000: "mobilenetv2", 1001: "mobilenetv2_tf"}.get(classes, asked)
    assert backbone.mean == ((0.5,) * 3 if backbone.name == "mobilenetv2_tf" else IMAGENET_MEAN)
    assert type(backbone.trunk.conv_stem).__name__ == ("Conv2dSame" if backbone.name == "mobilenetv2_tf" else "Conv2d")


def fault(state: dict, drop: str = "", **extra) -> dict:
    return {key: value for key, value in state.items() if not drop or not key.startswith(drop)} | extra


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "vit_tiny16",
            {"drop": "blocks.3."},
            r"not of this model \(VisionTransformer\).*12 missing: blocks.3.norm1.weight",
        ),
        (
            "vit_tiny16",
            {"cls_token": torch.zeros(1, 1, 9)},
            r"1 of another shape: cls_token \(1, 1, 9\), not \(1, 1, 192\)",
        ),
        ("vit_tiny16", {"mystery": torch.zeros(1)}, "1 unknown: mystery"),
        ("squeezenet", {"drop": "features.0."}, "2 missing: 0.weight, 0.bias"),
    ],
)
def test_files_of_another_model_are_named(name, changes, message, tmp_path):
    path = write(tmp_path / "wrong.safetensors", fault(other_trunk(name), **changes))
    with pytest.raises(WeightsError, match=f"backbone {name}: .*wrong.safetensors .*{message}"):
        load_backbone(name, path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth: there is no such file"):
        load_backbone("vit_tiny16", tmp_path / "nowhere.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(suffix, share, tmp_path):
    path = write(tmp_path / f"cut{suffix}", other_trunk("mobilenetv2"))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(WeightsError, match=f"cut{suffix}: truncated or damaged .*download it again"):
        load_backbone("mobilenetv2", path)


@pytest.mark.parametrize("zipped", [True, False])
def test_altered_bytes_never_escape_as_another_error(zipped, tmp_path):
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    torch.save({"a": torch.rand(9, 9), "b.weight": torch.rand(3)}, good, _use_new_zipfile_serialization=zipped)
    content, draw, refused = good.read_bytes(), np.random.default_rng(0), 0
    for _ in range(200):
        altered = np.frombuffer(content, np.uint8).copy()
        altered[draw.integers(0, min(len(content), 900), 4)] = draw.integers(0, 256, 4)
        bad.write_bytes(altered.tobytes())
        try:
            read_weights(bad)
        except WeightsError:
            refused += 1
    assert refused > 50


def test_a_file_of_unknown_kind_is_named(tmp_path):
    (tmp_path / "weights.npz").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"cannot read '.npz', only .safetensors, .pth, .pt, .ckpt, .bin"):
        load_backbone("vit_tiny16", tmp_path / "weights.npz")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}])
def test_a_file_without_a_state_dict_is_named(content, tmp_path):
    with pytest.raises(WeightsError, match="no state dict"):
        load_backbone("vit_tiny16", write(tmp_path / "list.pth", content))


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_executed(zipped, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "malicious.pth"
    content = {"state_dict": other_trunk("mobilenetv2"), "extra": Bomb(marker)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    torch.load(path, weights_only=False) if zipped else pickle.loads(path.read_bytes())
    assert marker.exists()  # the bomb is live
    marker.unlink()
    with pytest.raises(
        WeightsError, match=r"malicious.pth: refused, it holds more than tensors .* nothing was executed"
    ):
        load_backbone("mobilenetv2", path)
    assert not marker.exists()


# --- the hub -------------------------------------------------------------------------------------------------------

BOTH_WAYS = r"Two ways out: \(1\) .* \(2\) .*weights=PATH\) in Python, backbone.weights=PATH on the command line"


def test_an_unreachable_hub_names_both_ways_out(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsUnavailable, match=BOTH_WAYS) as caught:
        load_backbone("vit_tiny16")
    for part in ("backbone vit_tiny16", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "go online", "HF_HUB_CACHE"):
        assert part in str(caught.value)


def test_a_download_that_breaks_names_both_ways_out(monkeypatch):
    from huggingface_hub.errors import HTTPError

    def broken(repo, file):
        raise HTTPError("connection reset")

    monkeypatch.setattr("core.backbones.timm.hub_file", broken)
    with pytest.raises(WeightsUnavailable, match=BOTH_WAYS):
        load_backbone("vit_tiny16")


def test_the_hubs_file_is_loaded(monkeypatch, tmp_path):
    state = other_trunk("dinov2_vits14_reg")
    path, asked = write(tmp_path / "model.safetensors", state), []
    monkeypatch.setattr("core.backbones.timm.hub_file", lambda repo, file: asked.append((repo, file)) or str(path))
    backbone = load_backbone("dinov2_vits14_reg")
    assert asked == [("timm/vit_small_patch14_reg4_dinov2.lvd142m", "model.safetensors")]
    assert torch.equal(backbone.trunk.pos_embed, state["pos_embed"])


def test_tensorflows_mobilenet_is_on_no_hub():
    with pytest.raises(WeightsUnavailable, match=r"the hub has none.*choose another backbone.*weights=PATH"):
        load_backbone("mobilenetv2_tf")


def test_squeezenet_without_a_network_names_both_ways_out(monkeypatch, tmp_path):
    from urllib.error import URLError

    def broken(url, path, hash_prefix, progress):
        raise URLError("no route")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.download_url_to_file", broken)
    with pytest.raises(WeightsUnavailable, match=f"squeezenet1_1.*URLError.*{BOTH_WAYS}"):
        load_backbone("squeezenet")
    state = other_trunk("squeezenet")
    write(tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth", state)
    assert torch.equal(load_backbone("squeezenet").trunk[0].weight, state["features.0.weight"])


# --- real weights --------------------------------------------------------------------------------------------------


def photographs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,3,224,224) RGB in [0,1], (N,) ImageNet class indices."""
    from timm.data import ImageNetInfo

    files = sorted(shared("data/imagenet_samples").glob("*.jpg"))
    classes = ImageNetInfo("imagenet-1k").label_names()
    images, labels = [], []
    for file in files[:: len(files) // count][:count]:
        image = Image.open(file).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        labels.append(classes.index(file.name.split("_")[0]))
    return torch.stack(images), torch.tensor(labels)


def test_vit_tiny_with_real_weights_is_timms():
    path = shared("weights/vit_tiny_patch16_224.safetensors")
    backbone, (rgb, _) = load_backbone("vit_tiny16", path), photographs(2)
    plain = timm.create_model("vit_tiny_patch16_224").eval()
    plain.load_state_dict(load_file(path))
    tokens = plain.forward_features((rgb - 0.5) / 0.5)[:, 1:]
    assert torch.allclose(backbone(rgb), tokens.transpose(1, 2).unflatten(2, (14, 14)), atol=1e-4)
    assert backbone(rgb[..., :200, :170]).shape == (2, 192, 13, 11)
    assert backbone(rgb).isfinite().all()


def test_mobilenet_with_real_weights_classifies():
    path = shared("weights/mobilenetv2_100_tf.safetensors")
    backbone, (rgb, labels) = load_backbone("mobilenetv2", path), photographs(16)
    assert (backbone.name, backbone.mean, backbone.std) == ("mobilenetv2_tf", (0.5,) * 3, (0.5,) * 3)
    assert backbone(rgb).shape == (16, 96, 14, 14)
    plain = timm.create_model("mobilenetv2_100", pad_type="same", num_classes=1001).eval()
    plain.load_state_dict(load_file(path))
    logits = plain.forward_head(plain.bn2(plain.conv_head(backbone(rgb, layer=-1))))
    assert (logits.argmax(1) - 1 == labels).float().mean() > 0.75  # class 0 is background; .89 on all 800


def test_squeezenet_with_real_weights_classifies():
    path = shared("weights/squeezenet1_1.safetensors")
    backbone, (rgb, labels) = load_backbone("squeezenet", path), photographs(16)
    state = load_file(path)
    features = backbone(rgb)
    assert features.shape == (16, 512, 13, 13)
    assert features.isfinite().all()
    assert backbone(noise(352, 480)).shape == (1, 512, 21, 29)
    maps = F.relu(F.conv2d(features, state["classifier.1.weight"].float(), state["classifier.1.bias"].float()))
    best = maps.mean((2, 3)).topk(5).indices
    assert (best == labels[:, None]).any(1).float().mean() > 0.65  # .83 on all 800


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_is_that_of_the_weights(name):
    with torch.device("meta"):
        trunk = timm.create_model(CHOICES[name].model, num_classes=0)
    assert {type(block.mlp.act).__name__ for block in trunk.blocks} == {ACTIVATIONS[name]}
