"""What the hook contracts must allow, each shown by a small filler: a refiner that draws noise, a video filler that
needs its state in training, a learner that copies the model, losses with weights of their own."""

import copy
from collections.abc import Sequence

import learn2learn
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import core
from core import AnyUp, Batch, Context, Decoder, Learner, Objective, Refiner, Temporal
from core.batch import OPTIONAL_PARTS, crops_of
from core.training import PlainStep, Trainable, all_losses, backward, lr_scale

WIDTH = 16


def inputs(batch: int = 1, channels: int = 5) -> tuple[Tensor, Tensor, tuple[int, int]]:
    generator = torch.Generator().manual_seed(4)
    image = torch.randn(batch, 3, 11, 14, generator=generator)
    return image, torch.randn(batch, channels, 3, 4, generator=generator), (13, 9)


def batch_of(images: int = 2, seed: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return Batch(
        image=draw(images, 3, 12, 16),
        features=draw(images, 5, 3, 4),
        target=draw(2 * images, 5, 4, 5),
        output_size=(6, 8),
        corners=torch.tensor([[i % 3, (2 * i) % 4] for i in range(2 * images)]),
        augmented_image=draw(images, 3, 12, 16),
    )


def objective_of(**settings) -> Objective:
    return core.build_filler("objective", {"name": "cosine_mse", "self_consistency_size": 7, **settings})


# --- a filler's own loss ---------------------------------------------------------------------------------------------


class Denoiser(Refiner):
    """Keeps what it was given, and compares it with the target in a loss of its own."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.calls, self.kept = 0, None

    def forward(self, output: Tensor, context: Context) -> Tensor:
        self.calls += 1
        self.kept = output
        return output

    def auxiliary_loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        assert torch.equal(self.kept, output), "the latest forward is another one than the batch's own"
        return {"denoising_loss": F.mse_loss(self.gain * crops_of(self.kept, batch), batch.target)}


def test_a_fillers_own_loss_is_of_the_batch_and_sees_its_target():
    """Under cosine_mse two more forwards follow, for self-consistency: they come too late to be mistaken for it."""
    model, batch = AnyUp(refiner=Denoiser, embed_dim=WIDTH), batch_of()
    losses = all_losses(model, objective_of(), batch)
    assert model.refiner.calls == 3
    with torch.no_grad():
        output = model(batch.image, batch.features, batch.output_size)
        expected = F.mse_loss(crops_of(output, batch), batch.target)
    torch.testing.assert_close(losses["denoising_loss"].detach(), expected)
    losses["denoising_loss"].backward()
    assert model.refiner.gain.grad != 0


class OwnForwards(Objective):
    """Looks at masked features only."""

    needs_output = False

    def forward(self, model: nn.Module, batch: Batch, output: Tensor | None) -> dict[str, Tensor]:
        self.seen = output
        masked = model(batch.image, batch.features * (batch.features > 0), batch.output_size)
        return {"inpainting_loss": masked.square().mean()}


def test_what_nobody_asks_for_is_not_computed():
    objective = OwnForwards()
    calls = []
    model = AnyUp(embed_dim=WIDTH)
    model.register_forward_hook(lambda *_: calls.append(1))
    assert all_losses(model, objective, batch_of()).keys() == {"inpainting_loss"}
    assert len(calls) == 1
    assert objective.seen is None
    model = AnyUp(refiner=Denoiser, embed_dim=WIDTH)  # asks for the batch's own forward
    assert all_losses(model, objective, batch_of()).keys() == {"inpainting_loss", "denoising_loss"}
    assert objective.seen is not None


# --- random numbers --------------------------------------------------------------------------------------------------


class Noisy(Refiner):
    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output: Tensor, context: Context) -> Tensor:
        return output + context.noise_like(output)


def test_a_refiner_may_draw_noise():
    """An evaluation repeats itself whatever happened before; a generator gives other samples, the same every time."""
    model, (image, features, size) = AnyUp(refiner=Noisy, embed_dim=WIDTH).eval(), inputs()
    with torch.no_grad():
        first = model(image, features, size)
        state = torch.get_rng_state()
        assert torch.equal(model(image, features, size), first)
        assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
        samples = [model(image, features, size, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 1)]
    assert torch.equal(samples[0], samples[2])
    assert not torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], first)


def test_each_training_step_has_noise_of_its_own():
    model, batch = AnyUp(refiner=Noisy, embed_dim=WIDTH), batch_of()
    found = []
    for seed in (1, 2, 1):
        batch.generator = torch.Generator().manual_seed(seed)
        found.append(all_losses(model, objective_of(self_consistency=0), batch)["reconstruction_loss"].item())
    assert found[0] == found[2] != found[1]


def test_noise_is_the_same_in_every_dtype():
    context = Context(*inputs()[:2], torch.zeros(13, 9, 2), generator=torch.Generator().manual_seed(3))
    wide = context.noise_like(torch.zeros(2, 3, dtype=torch.float64))
    context.generator.manual_seed(3)
    torch.testing.assert_close(context.noise_like(torch.zeros(2, 3)).double(), wide)


def test_random_numbers_under_a_compiler_are_refused():
    with pytest.raises(RuntimeError, match=r"random numbers cannot be drawn under torch.compile"):
        Context(*inputs()[:2], torch.zeros(13, 9, 2)).noise_like(torch.zeros(2))


# --- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("hook", ["decoder", "refiner", "temporal"])
def test_guidance_is_there_for_who_asks_and_for_nobody_else(hook, asks):
    seen = {}

    def filler(base, name, needs):
        class Looks(base):
            needs_guidance = needs

            def __init__(self, embed_dim: int):
                super().__init__()

            def forward(self, output, context, *state):
                seen[name] = context.guidance
                return (output, None) if name == "temporal" else output

        return Looks

    bases = {"decoder": Decoder, "refiner": Refiner, "temporal": Temporal}
    fillers = {name: filler(base, name, asks and name == hook) for name, base in bases.items()}
    image, features, size = inputs()
    AnyUp(**fillers, embed_dim=WIDTH)(image, features, size)
    for name in bases:
        if asks and name == hook:
            assert seen[name].shape == (1, WIDTH, *image.shape[-2:])
        else:
            assert seen[name] is None


# --- video -----------------------------------------------------------------------------------------------------------


class Blend(Temporal):
    """The natural filler: if there is a state, blend with it."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.3))

    def forward(self, output: Tensor, context: Context, state: object | None) -> tuple[Tensor, object | None]:
        if state is not None:
            output = torch.lerp(output, state, self.share)
        return output, output


class OnClips(Objective):
    """Frame by frame with the state, as a video is upsampled."""

    batch_parts = frozenset({"clip"})
    needs_output = False

    def forward(self, model: nn.Module, batch: Batch, output: Tensor | None) -> dict[str, Tensor]:
        clip, state, total = batch.part("clip", self), None, 0
        self.dtypes = []
        for image, features in zip(clip.image.unbind(1), clip.features.unbind(1), strict=True):
            result, state = model(image, features, batch.output_size, state=state, return_state=True)
            self.dtypes.append(result.dtype)
            total = total + result.float().square().mean()
        return {"clip_loss": total}


def test_a_video_is_upsampled_frame_by_frame_with_a_state():
    model, (image, features, size) = AnyUp(temporal=Blend, embed_dim=WIDTH).eval(), inputs()
    with torch.no_grad():
        first, state = model(image, features, size, return_state=True)
        second, state = model(image.flip(-1), features, size, state=state, return_state=True)
        alone = model(image.flip(-1), features, size)
    torch.testing.assert_close(second, torch.lerp(alone, first, 0.3))
    assert torch.equal(state, second)
    with pytest.raises(ValueError, match="call the model without out="):
        model(image, features, size, out=torch.empty(1, 5, *size), return_state=True)


def test_videos_train_in_half_precision():
    """The state goes through `forward`, which is what autocast and several processes wrap."""
    objective, batch = OnClips(), batch_of()
    batch.clip = core.Clip(torch.randn(2, 3, 3, 12, 16), torch.randn(2, 3, 5, 3, 4), None)
    trainable = prepared(Trainable(AnyUp(temporal=Blend, embed_dim=WIDTH), objective, PlainStep()), "bf16")
    [losses] = PlainStep().step(trainable, [batch], torch.optim.SGD(trainable.parameters(), lr=0.1))
    assert losses["clip_loss"].dtype == torch.float32
    assert objective.dtypes == [torch.bfloat16] * 3
    assert trainable.model.temporal.share.grad != 0


def test_a_part_that_nobody_asked_for_is_missed_by_name():
    with pytest.raises(ValueError, match=r"OnClips needs batch.clip: name it in OnClips.batch_parts"):
        all_losses(AnyUp(embed_dim=WIDTH), OnClips(), batch_of())


def test_parts_are_collected_from_all_fillers():
    class Wrong(Objective):
        batch_parts = frozenset({"clips"})

        def forward(self, model, batch, output):
            return {}

    assert Trainable(AnyUp(embed_dim=WIDTH), OnClips(), PlainStep()).batch_parts == {"clip"}
    assert Trainable(AnyUp(embed_dim=WIDTH), objective_of(), PlainStep()).batch_parts == {"augmented_image"}
    assert not Trainable(AnyUp(embed_dim=WIDTH), objective_of(self_consistency=0), PlainStep()).batch_parts
    with pytest.raises(ValueError, match=rf"Wrong.batch_parts names 'clips'; it may be {', '.join(OPTIONAL_PARTS)}"):
        Trainable(AnyUp(embed_dim=WIDTH), Wrong(), PlainStep()).batch_parts  # noqa: B018  a property


# --- several tasks, and copies ---------------------------------------------------------------------------------------


class InnerStep(Learner):
    """One step on the first task from a functional copy of the model, judged on the second."""

    def __init__(self):
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(-3.0))
        self.moved: Tensor | None = None

    def forward(self, model: nn.Module, objective: Objective, tasks: Sequence[Batch]) -> list[dict[str, Tensor]]:
        support, query = tasks
        copied = learn2learn.clone_module(model)
        before = sum(all_losses(copied, objective, support).values())
        weights = [weight for weight in copied.parameters() if weight.requires_grad]
        grads = torch.autograd.grad(before, weights, create_graph=True, allow_unused=True)
        moves = [None if grad is None else -self.log_rate.exp() * grad for grad in grads]
        for weight, move in zip(weights, moves, strict=True):
            weight.update = move
        learn2learn.update_module(copied)
        after = all_losses(copied, objective, query)
        with torch.no_grad():
            unmoved = sum(all_losses(model, objective, query).values())
        self.moved = sum(after.values()).detach() - unmoved
        return [{f"query_{name}": loss for name, loss in after.items()}]

    def step(self, trainable, tasks, optimizer) -> list[dict[str, Tensor]]:
        optimizer.zero_grad()
        [losses] = trainable(tasks)
        backward(sum(losses.values()), optimizer)
        optimizer.step()
        return [{name: loss.detach() for name, loss in losses.items()}]

    def adapt(self, model: nn.Module, objective: Objective, support: Sequence[Batch]) -> nn.Module:
        adapted = copy.deepcopy(model)
        optimizer = torch.optim.SGD(adapted.parameters(), lr=self.log_rate.exp().item())
        for batch in support:
            optimizer.zero_grad()
            sum(all_losses(adapted, objective, batch).values()).backward()
            optimizer.step()
        return adapted


def prepared(trainable: Trainable, precision: str) -> nn.Module:
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, mixed_precision=precision).prepare_model(trainable)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_learner_copies_the_bare_model_and_the_copys_weights_count(precision):
    """learn2learn's copy of a model that bf16 training wrapped would run the original's weights, silently."""
    learner, model = InnerStep(), AnyUp(embed_dim=WIDTH).twice_differentiable()
    trainable = prepared(Trainable(model, objective_of(self_consistency=0), learner), precision)
    optimizer = torch.optim.SGD(trainable.parameters(), lr=0.1)
    [losses] = learner.step(trainable, [batch_of(), batch_of(seed=7)], optimizer)
    assert all(name.startswith("query_") for name in losses)
    assert learner.moved != 0, "the inner step changed nothing: the copy ran the original's weights"
    assert learner.log_rate.grad is not None
    assert learner.log_rate.grad != 0, "the copy's loss does not depend on its weights"
    assert model.attention.project_query.weight.grad.abs().max() > 0


def test_a_learner_adapts_at_test_time():
    learner, model = InnerStep(), AnyUp(embed_dim=WIDTH)
    image, features, size = inputs()
    with torch.no_grad():
        before = model(image, features, size)
    adapted = learner.adapt(model, objective_of(self_consistency=0), [batch_of()])
    with torch.no_grad():
        assert torch.equal(model(image, features, size), before)
        assert not torch.equal(adapted(image, features, size), before)
    assert PlainStep().adapt(model, objective_of(), [batch_of()]) is model


# --- rates -----------------------------------------------------------------------------------------------------------


class Gated(Decoder):
    lr_scales = {"gate": 10.0, "inner": 3.0}  # noqa: RUF012  read only

    def __init__(self, embed_dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))
        self.gate_of_another = nn.Parameter(torch.zeros(()))
        self.inner = nn.Linear(2, 2)

    def forward(self, output: Tensor, context: Context) -> Tensor:
        return output + self.gate + self.gate_of_another + self.inner.weight.sum()


def test_learning_rate_scales_are_of_whole_names():
    trainable = Trainable(AnyUp(decoder=Gated, embed_dim=WIDTH), objective_of(), PlainStep())
    scales = {name: lr_scale(trainable, name) for name, _ in trainable.named_parameters()}
    assert scales.pop("model.decoder.gate") == 10
    assert scales.pop("model.decoder.inner.weight") == scales.pop("model.decoder.inner.bias") == 3
    assert set(scales.values()) == {1.0}


# --- settings that may change after training -------------------------------------------------------------------------


def test_a_samplers_steps_may_differ_from_the_checkpoints(own_registry, tmp_path):
    """Without weights of their own they belong to the use of a model; all other settings are the checkpoint's."""

    @core.register("sampler")
    class Sampler(Refiner):
        changeable = ("num_inference_steps",)

        def __init__(self, embed_dim: int, num_inference_steps: int = 10, width: int = 3):
            super().__init__()
            self.steps = num_inference_steps
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, output: Tensor, context: Context) -> Tensor:
            return output + self.steps * self.weight.sum()

    saved, small = tmp_path / "model.safetensors", [f"embed_dim={WIDTH}", "unifier.num_basis=8"]
    model, given = core.build([*small, "refiner=sampler"]).eval(), inputs()
    core.save(model, saved)
    other = core.load(saved, {"refiner.num_inference_steps": 2, "attention.window_ratio": 0})
    assert (other.refiner.steps, other.attention.window_ratio) == (2, 0)
    assert other.config["refiner"]["num_inference_steps"] == 2
    with torch.no_grad():
        shifted = core.load(saved, {"refiner.num_inference_steps": 2})(*given)
        torch.testing.assert_close(shifted, model(*given) - 8 * 3, rtol=1e-4, atol=1e-4)
    message = r"refiner.width cannot be changed after training; these can: .*refiner.num_inference_steps"
    with pytest.raises(ValueError, match=message):
        core.load(saved, {"refiner.width": 2})
    warm = core.build([*small, "refiner=sampler", "refiner.num_inference_steps=1"])
    assert core.warm_start(warm, saved) == []
    broken = core.build([*small, "refiner=sampler", "refiner.width=4"])
    assert core.warm_start(broken, saved) == ["refiner.weight"]


def test_only_settings_can_be_declared_changeable(own_registry):
    with pytest.raises(TypeError, match=r"Wrong.changeable names steps: no setting of its __init__"):

        @core.register("wrong")
        class Wrong(Refiner):
            changeable = ("steps",)

            def __init__(self, embed_dim: int):
                super().__init__()

            def forward(self, output: Tensor, context: Context) -> Tensor:
                return output
