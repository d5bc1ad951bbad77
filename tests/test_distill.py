"""Distillation: the student is some of the teacher's blocks, learns its features, and loads as a backbone."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import core
from core.registry import discover
from experiments.settings import SettingError
from experiments.training.distillation import distill, distillation_loss, student_of, tokens

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def teacher():
    return core.load_backbone("vit_tiny16", "random")


def test_the_student_is_those_blocks(teacher):
    student = student_of(teacher, [0, 7, 11])
    assert len(student.blocks) == 3
    for ours, theirs in zip(student.blocks, (0, 7, 11), strict=True):
        assert torch.equal(ours.mlp.fc1.weight, teacher.trunk.blocks[theirs].mlp.fc1.weight)
    whole = student_of(teacher, list(range(12))).eval()
    image = torch.rand(1, 3, 32, 48)
    features = teacher(image)
    with torch.no_grad():
        given = tokens(whole, (image - 0.5) / 0.5)
    torch.testing.assert_close(given.mT.unflatten(2, (2, 3)), features)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("blocks", [[], [12], [-1]])
def test_blocks_that_are_not_there_are_refused(teacher, blocks):
    with pytest.raises(SettingError, match="12 blocks of backbone vit_tiny16"):
        student_of(teacher, blocks)
    with pytest.raises(SettingError, match="0 blocks of backbone hog8"):
        student_of(core.load_backbone("hog8"), [0])


def test_the_loss_is_zero_for_the_teacher_and_in_its_units():
    features = torch.randn(2, 5, 4)
    assert distillation_loss(features, features).item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(
        distillation_loss(-3 * features, -6 * features), distillation_loss(features, 2 * features)
    )


def test_what_is_written_is_a_backbone(tmp_path):
    discover()
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        config = compose(
            "distill",
            ["backbone.weights=random", "steps=2", "batch_size=2", "sizes=[32]", "blocks=[0,3,7,11]", "warmup=1",
             "tracking.enabled=false", "device=cpu", f"out={tmp_path / 'small.safetensors'}"],
        )  # fmt: skip
    path = distill(config)
    backbone = core.load_backbone("embedded", path)
    assert backbone(torch.rand(1, 3, 48, 32)).shape == (1, 192, 3, 2)
    assert not torch.equal(backbone.trunk.norm.weight, core.load_backbone("embedded").trunk.norm.weight)


def test_the_embedded_backbone_needs_no_download():
    backbone = core.load_backbone("embedded")
    assert (backbone.channels, backbone.patch_size) == (192, 16)
    assert backbone(torch.rand(1, 3, 64, 96)).isfinite().all()
