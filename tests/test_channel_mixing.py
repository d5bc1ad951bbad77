"""Random rotations and dropped channels: the same for all features of a batch, and known to no upsampler."""

import pytest
import torch
from torch import Tensor

import core
from core import Batch, Clip
from core.channel_mixing import GROUP, dropping, mixing, random_rotation, with_features


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rotations_are_orthogonal_and_uniform():
    found = torch.stack([random_rotation(3, source(seed)) for seed in range(4000)])
    identity = torch.eye(3).expand(len(found), -1, -1)
    torch.testing.assert_close(found @ found.mT, identity, rtol=0, atol=1e-5)
    assert found.mean(0).abs().max() < 0.05  # standard error of an entry: sqrt(1/3/4000) = .009
    torch.testing.assert_close(found.square().mean(0), torch.full((3, 3), 1 / 3), rtol=0, atol=0.03)
    positive = (torch.linalg.det(found) > 0).float().mean().item()
    assert 0.45 < positive < 0.55, "reflections are as likely as rotations"


@pytest.mark.parametrize("channels", [1, 7, GROUP, 3 * GROUP + 5])
def test_mixing_turns_vectors(channels):
    """Lengths and angles stay, in groups of many channels too, and nearly every value changes."""
    x, change = torch.randn(2, channels, 3, 4, generator=source(1)), mixing(channels, source())
    mixed = change(x)
    assert mixed.shape == x.shape
    flat, turned = (y.movedim(1, -1).flatten(0, 2) for y in (x, mixed))
    torch.testing.assert_close(turned @ turned.T, flat @ flat.T, rtol=1e-4, atol=1e-4 * channels**0.5)
    if channels > 1:
        assert ((mixed - x).abs() > 1e-6).float().mean() > 0.99
    for again, expected in ((change(x[:1]), mixed[:1]), (change(x[None])[0], mixed)):
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def test_mixing_groups_are_drawn_anew():
    x = torch.eye(2 * GROUP)[:, :, None, None]
    reached = [mixing(2 * GROUP, source(seed))(x)[:, :GROUP].abs().sum((1, 2, 3)) > 0 for seed in (0, 1)]
    assert [int(mask.sum()) for mask in reached] == [GROUP, GROUP]
    assert not torch.equal(*reached)


def test_dropping_keeps_order_and_at_least_one():
    x = torch.arange(40.0).view(1, 40, 1, 1)
    counts = []
    for seed in range(300):
        kept = dropping(40, 0.5, source(seed))(x).flatten()
        assert (kept.diff() > 0).all()
        counts.append(len(kept))
    assert min(counts) >= 20
    assert max(counts) == 40
    assert 28 < sum(counts) / len(counts) < 32  # uniform from 20 to 40
    assert dropping(1, 0.99, source())(x[:, :1]).shape == (1, 1, 1, 1)
    assert dropping(3, 0.999, source(3))(x[:, :3]).shape[1] >= 1


def test_all_features_of_a_batch_change_alike():
    draw = lambda *shape: torch.randn(shape, generator=source(2))  # noqa: E731
    batch = Batch(
        draw(2, 3, 8, 8), draw(2, 5, 2, 2), draw(4, 5, 2, 2), (4, 4), encoder=lambda x: x.expand(-1, 5, -1, -1),
        clip=Clip(draw(2, 3, 3, 8, 8), draw(2, 3, 5, 2, 2), None),
    )  # fmt: skip
    change = dropping(5, 0.5, source(4))
    changed = with_features(batch, change)
    channels = changed.features.shape[1]
    assert channels < 5
    assert torch.equal(changed.features, change(batch.features))
    assert torch.equal(changed.target, change(batch.target))
    assert torch.equal(changed.clip.features[1], change(batch.clip.features[1]))
    assert torch.equal(changed.encoder(draw(1, 1, 4, 4)), change(batch.encoder(draw(1, 1, 4, 4))))
    assert changed.image is batch.image
    plain = with_features(Batch(batch.image, batch.features, batch.target, (4, 4)), change)
    assert plain.clip is None
    assert plain.encoder is None


def test_attention_turns_with_its_values(perturbed):
    """Why mixing is an augmentation: with given queries and keys the output turns with the features."""
    attention = perturbed(core.attention.WindowAttention(16)).eval()
    query, key, value = (torch.randn(1, n, 6, 6, generator=source(n)) for n in (16, 16, 7))
    change = mixing(7, source())
    with torch.no_grad():
        turned: Tensor = attention(query, key, change(value))
        torch.testing.assert_close(turned, change(attention(query, key, value)), rtol=0, atol=1e-5)
