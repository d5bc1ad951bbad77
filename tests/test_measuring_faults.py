"""What measuring must not let pass, or must not stand in the way of."""

import pytest
import torch
import torch.nn.functional as F
from test_tasks_unlabelled import Listed, bench
from torch import Tensor, nn

from experiments.data import IGNORE, Sample
from experiments.measuring.heads import LinearHead
from experiments.measuring.metrics import FidelityError, fidelity_case, same_everywhere
from experiments.measuring.tasks import make_task


class Nearly(nn.Module):
    """An encoder of blank images: the same vector everywhere, but for rounding of a relative size."""

    name, patch_size = "nearly", 8

    def __init__(self, spread: float):
        super().__init__()
        self.spread = spread

    def forward(self, image: Tensor) -> Tensor:
        torch.manual_seed(0)
        side = image.shape[-1] // 8
        return 3 + 3 * self.spread * torch.randn(len(image), 16, side, side)


@pytest.mark.parametrize("spread", [0, 1e-7, 1e-4])
def test_the_fidelity_of_a_blank_image_does_not_count(spread):
    """Its variance is not zero but rounding, and the error would be in units of that."""
    with pytest.raises(FidelityError, match="the same everywhere"):
        fidelity_case(torch.full((1, 3, 64, 64), 0.5), Nearly(spread), view=32)


def test_an_image_with_little_contrast_counts():
    assert fidelity_case(torch.rand(1, 3, 64, 64), Nearly(0.01), view=32).target.shape == (1, 16, 8, 8)
    assert not same_everywhere(torch.randn(1, 3, 4, 4))
    assert same_everywhere(torch.ones(1, 3, 4, 4))


class Optimised(nn.Module):
    """Takes gradients for each image, as Upsample Anything and FeatUp's implicit variant do."""

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        assert not torch.is_grad_enabled(), "who measures asks for no gradient"
        with torch.enable_grad():
            output = F.interpolate(features, output_size, mode="bilinear").detach().requires_grad_()
            optimizer = torch.optim.SGD([output], lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                (F.adaptive_avg_pool2d(output, features.shape[-2:]) - features).square().sum().backward()
                optimizer.step()
        return output


@pytest.mark.parametrize("settings", [{"name": "fidelity", "view": 32}, {"name": "temporal", "flow": "estimated"}])
def test_a_peer_may_optimise_for_each_image(settings):
    frames = [Sample(str(i), torch.rand(3, 64, 64)) for i in range(2)]
    where = bench(Listed(frames, {"a": range(2)}), image=(64, 64))
    task = make_task(settings)
    task.check(where)
    assert list(task.rows(Optimised(), 0, where))


def test_probes_may_be_trained_on_what_a_peer_optimised():
    where = bench(Listed([Sample("0", torch.rand(3, 64, 64))]), image=(64, 64))
    (output,) = where.upsample(Optimised(), [where.val.get(0)])
    assert not output.requires_grad
    head = LinearHead([output.shape[1]], 2)
    head([output]).sum().backward()
    assert head.state_dict()


def test_an_image_without_any_label_is_told(monkeypatch, caplog):
    labels = [torch.zeros(48, 64, dtype=torch.long), torch.full((48, 64), IGNORE)]
    samples = [Sample(name, torch.rand(3, 48, 64), labels=one) for name, one in zip("ab", labels, strict=True)]
    where = bench(Listed(samples, classes=("one", "two")))
    task = make_task({"name": "segmentation"})
    monkeypatch.setattr(
        "experiments.measuring.probes.train_probe",
        lambda task, model, scale, seed, bench: LinearHead([bench.val.get(0).features[0].shape[1]], 2),
    )
    for _ in range(2):  # of two arms it is the same note
        rows = list(task.rows(Optimised(), 0, where))
        assert {row["image"] for row in rows} == {"a"}
    assert task.notes == ["1 of 2 images have no pixel whose target is known, and do not count (b)"]
    assert "do not count (b)" in caplog.text
