"""Named random streams: torch's CPU generator is borrowed and given back, no other is touched."""

import torch

from core.streams import named_stream


def test_no_generator_of_a_gpu_is_touched(monkeypatch):
    """Seeding torch as a whole would reseed them all, and nothing would put them back."""
    touched = []
    for device in ("cuda", "mps", "xpu"):
        for function in ("manual_seed", "manual_seed_all", "set_rng_state", "get_rng_state"):
            if hasattr(getattr(torch, device), function):
                monkeypatch.setattr(
                    f"torch.{device}.{function}", lambda *_, name=f"{device}.{function}": touched.append(name)
                )
    before = torch.get_rng_state()
    with named_stream(3, "child"):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    with named_stream(3, "child"):
        assert torch.equal(torch.rand(4), first)
    with named_stream(3, "other"):
        assert not torch.equal(torch.rand(4), first)
    assert touched == []
