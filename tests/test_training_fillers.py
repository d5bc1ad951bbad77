"""What training gives to fillers that ask: frames, pixels, the encoder, noise, and weights of their own."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

import core
from core import Batch, Context, Objective, Refiner, Temporal
from core.registry import discover
from experiments.settings import SettingError
from experiments.training.loop import Training, train
from experiments.training.state import STATE_NAME

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "embed_dim=16", "attention.num_heads=2", "unifier.num_basis=8", "backbones=[{name: hog8}]", "views.view=32",
    "batch_size=2", "views.crops=2", "objective.self_consistency=0", "steps=6", "checkpoint_every=2",
    "validate_every=0", "log_every=1", "tracking.enabled=false", "device=cpu", "data.path=[bundled]",
]  # fmt: skip
VIDEOS = ["data=scenes", "data.num=2", "data.frames=3", "data.size=[48,40]"]


@pytest.fixture
def config(tmp_path, own_registry):
    """Overrides -> the configuration of a tiny training in tmp_path."""
    discover()

    def make(*overrides: str, without: tuple[str, ...] = ()) -> DictConfig:
        given = [one for one in TINY if not one.startswith(without)] if without else TINY
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            return compose("train", [*given, f"out_dir={tmp_path / 'out'}", *overrides])

    return make


# --- weights of an objective's own -----------------------------------------------------------------------------------

LEARNED = '''
import torch
from torch import Tensor, nn
import core
from core import Batch, Objective


@core.register("learned")
class Learned(Objective):
    """Squared error after a learned map from channel to channel-wise gain."""

    lr_scales = {"gain": 5.0}

    def __init__(self, start: float = 1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.full((), start))
        self.head = nn.Linear(1, 1)

    def forward(self, model: nn.Module, batch: Batch, output: Tensor | None) -> dict[str, Tensor]:
        crops = core.batch.crops_of(output, batch)
        return {"learned_loss": (self.gain * self.head(crops[..., None])[..., 0] - batch.target).square().mean()}
'''


def register_learned() -> None:
    exec(LEARNED, {"__name__": "test_learned"})


OWN = ("objective.gain", "objective.head.weight", "objective.head.bias")


def test_an_objectives_weights_are_trained_averaged_saved_and_resumed(config, tmp_path):
    register_learned()
    more = ["objective=learned", "optimiser.ema=0.5", "optimiser.lr=1e-3"]
    made = [config(*more, f"out_dir={tmp_path / name}", *last, without=("objective.",)) for name, last in
            (("whole", []), ("parts", ["stop_after=3"]), ("parts", ["resume=must"]))]  # fmt: skip
    start = {name: tensor.clone() for name, tensor in Training(made[0]).inner.state_dict().items()}
    for one in made:
        train(one)
    whole, parts = (load_file(tmp_path / name / STATE_NAME) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for name in OWN:
        assert not torch.equal(whole[f"weights/{name}"], start[name]), f"{name} was not trained"
        assert not torch.equal(whole[f"ema/{name}"], whole[f"weights/{name}"]), f"{name} has no average"
        assert f"adam/exp_avg/{name}" in whole


def test_rates_of_their_own_reach_the_optimiser(config):
    register_learned()
    training = Training(config("objective=learned", "optimiser.lr=1e-3", "optimiser.weight_decay=0.1",
                               "optimiser.schedule=constant", without=("objective.",)))  # fmt: skip
    training.step(training.views[0])
    groups = {group["lr_scale"]: group for group in training.optimiser.adam.param_groups}
    assert {scale: group["lr"] for scale, group in groups.items()} == {1.0: 1e-3, 5.0: pytest.approx(5e-3)}
    assert [len(groups[5.0]["params"]), groups[5.0]["weight_decay"]] == [1, pytest.approx(0.02)]
    before = training.inner.objective.gain.item()
    training.step(training.views[1])
    assert abs(training.inner.objective.gain.item() - before) == pytest.approx(5e-3, rel=0.5)  # Adam's steps


def test_an_objectives_first_weights_do_not_depend_on_the_model(config):
    register_learned()
    starts = [Training(config("objective=learned", *more, without=("objective.",))).inner.objective.head.weight
              for more in ([], ["decoder=inr"], ["seed=1"])]  # fmt: skip
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_two_processes_train_an_objective_as_one(config, tmp_path):
    """Its gradients are averaged over the processes too."""
    register_learned()
    more = ["objective=learned", "steps=2"]
    expected = train(config(*more, f"out_dir={tmp_path / 'one'}", without=("objective.",)))
    shared = config(*more, f"out_dir={tmp_path / 'two'}", without=("objective.",))
    (tmp_path / "two.yaml").write_text(OmegaConf.to_yaml(shared, resolve=True))
    script = "\n".join([
        LEARNED.replace("import torch\n", "import sys\nimport torch\n", 1),
        "from omegaconf import OmegaConf", "from experiments.training.loop import train",
        'if __name__ == "__main__":', "    train(OmegaConf.load(sys.argv[1]))",
    ])  # fmt: skip
    (tmp_path / "script.py").write_text(script)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    done = subprocess.run(
        [*launch, f"--main_process_port={port}", str(tmp_path / "script.py"), str(tmp_path / "two.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / STATE_NAME) for name in ("one", "two"))
    for name in OWN:  # float32 gradients of some thousand terms, summed in another order
        torch.testing.assert_close(two[f"adam/exp_avg/{name}"], one[f"adam/exp_avg/{name}"], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(two[f"weights/{name}"], one[f"weights/{name}"], rtol=1e-3, atol=1e-5)
    assert expected.state.step == 2


# --- optional parts of a batch ---------------------------------------------------------------------------------------


def asking(*parts: str) -> type[Objective]:
    @core.register("asking")
    class Asking(Objective):
        batch_parts = frozenset(parts)

        def forward(self, model: nn.Module, batch: Batch, output: Tensor | None) -> dict[str, Tensor]:
            return {"some_loss": output.square().mean()}

    return Asking


def batch_of(config: DictConfig) -> tuple[Training, Batch]:
    training = Training(config)
    return training, training.batch(training.views[0])


def test_nothing_is_prepared_that_nobody_looks_at(config):
    asking()
    _, batch = batch_of(config("objective=asking", without=("objective.",)))
    assert [batch.augmented_image, batch.whole, batch.crops, batch.encoder, batch.clip] == [None] * 5
    assert batch.backbone == "hog8"


def test_pixels_and_the_encoder(config):
    asking("whole", "crops", "encoder", "augmented_image")
    training, batch = batch_of(config("objective=asking", without=("objective.",)))
    backbone = training.backbones[0]
    torch.testing.assert_close(batch.encoder(batch.whole), batch.features)
    torch.testing.assert_close(batch.encoder(batch.crops), batch.target)
    smaller = F.interpolate(batch.whole, 16, mode="area")
    expected = backbone(smaller).half().float()  # what comes from the cache is in half precision
    assert torch.equal(batch.encoder(smaller), expected)
    assert batch.augmented_image.shape == batch.image.shape


def test_a_steps_noise_is_its_own_and_the_same_again(config):
    first, second = (Training(config()) for _ in range(2))
    draws = [torch.rand(2, generator=training.batch(training.views[step]).generator).tolist()
             for training, step in ((first, 0), (first, 1), (second, 0))]  # fmt: skip
    assert draws[0] == draws[2] != draws[1]


def test_frames_follow_one_another_and_flow_leads_from_one_to_the_next(config):
    asking("clip")
    made = config("objective=asking", *VIDEOS, "data.size=[120,100]", "views.clip=2", "views.view=64",
                  "views.guidance=128", "views.crops=0", without=("objective.", "data.", "views."))  # fmt: skip
    clip = (batch := batch_of(made)[1]).clip
    assert clip.image.shape == (2, 2, 3, 128, 128)
    assert clip.features.shape == (2, 2, *batch.features.shape[1:])
    assert clip.flow.shape == (2, 1, 2, 128, 128)
    assert torch.equal(clip.image[:, 0], batch.image)
    assert torch.equal(clip.features[:, 0], batch.features)
    right = carried(clip, clip.flow)
    assert right < 0.9 * carried(clip, 0 * clip.flow)
    assert right < 0.7 * carried(clip, -clip.flow)
    assert right < 0.7 * carried(clip, clip.flow.flip(2)), "x and y are exchanged"


def test_mirrored_clips_have_mirrored_flow(config):
    asking("clip")
    sizes = ["data.size=[120,100]", "views.clip=2", "views.view=64", "views.guidance=128", "views.crops=0"]
    without = ("objective.", "data.", "views.")
    clips = [batch_of(config("objective=asking", *VIDEOS, *sizes, f"views.flip={flip}", without=without))[1].clip
             for flip in (0, 1)]  # fmt: skip
    torch.testing.assert_close(clips[1].image, clips[0].image.flip(-1))
    mirrored = clips[0].flow.flip(-1) * torch.tensor([-1.0, 1.0]).view(2, 1, 1)
    torch.testing.assert_close(clips[1].flow, mirrored, equal_nan=True)
    assert carried(clips[1], clips[1].flow) < 0.9 * carried(clips[1], 0 * clips[1].flow)


def carried(clip: core.Clip, flow: Tensor) -> float:
    """Mean difference of the first frames to the second ones, fetched along the flow, where they are seen."""
    side, total, count = flow.shape[-1], 0.0, 0
    centres = torch.stack(torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="xy"))
    for frames, shift in zip(clip.image, flow[:, 0], strict=True):
        place = centres + shift  # x, y in the next frame
        seen = ((place > 1) & (place < side - 1)).all(0)  # hidden ones, NaN, are not
        grid = (2 * place.nan_to_num() / side - 1).permute(1, 2, 0)[None]
        fetched = F.grid_sample(frames[1:], grid, align_corners=False)[0]
        total, count = total + (fetched - frames[0])[:, seen].abs().sum().item(), count + 3 * int(seen.sum())
    assert count > 0.5 * clip.image[:, 0].numel()
    return total / count


@pytest.mark.parametrize(
    ("asks", "more", "message"),
    [
        (("clip",), [], r"a filler looks at clips of a video: set views.clip to their number of frames"),
        (("clip",), ["views.clip=2"], r"views.clip=2 needs videos .*data=images has single images: use data=frames"),
        ((), ["views.clip=2"], r"views.clip=2, but no filler looks at clips: set it to 0"),
    ],
)
def test_clips_that_cannot_be_are_refused(config, asks, more, message):
    asking(*asks)
    with pytest.raises(SettingError, match=message):
        Training(config("objective=asking", *more, without=("objective.",)))


def test_videos_that_are_too_short_are_refused(config):
    asking("clip")
    made = config("objective=asking", *VIDEOS, "views.clip=4", without=("objective.", "data."))
    with pytest.raises(SettingError, match=r"views.clip=4 needs videos .*data=scenes has one of 3"):
        Training(made)


def test_an_objectives_pictures_are_logged_at_each_validation(config):
    class Shown:
        run_id, pictures = "known", {}

        def metrics(self, values: dict, step: int) -> None:
            pass

        def picture(self, image: Tensor, path: str) -> None:
            self.pictures[path] = image

    class Measured:
        def measure(self, model: nn.Module, run: Shown, step: int) -> dict[str, float]:
            return {"val/detail": 0.5}

    training = Training(config("objective=detail"))
    training._validate(Measured(), Shown())
    assert not Shown.pictures, "nothing was looked at before the first step"
    training.step(training.views[0])
    training.state.step = 1
    training._validate(Measured(), Shown())
    assert list(Shown.pictures) == ["validation/000001_objective.png"]


# --- fillers of the model, trained for real --------------------------------------------------------------------------


def test_a_refiner_with_noise_and_a_video_filler_train_and_resume_bit_for_bit(config, tmp_path):
    @core.register("noisy")
    class Noisy(Refiner):
        lr_scales: ClassVar[Mapping[str, float]] = {"amount": 10.0}

        def __init__(self, embed_dim: int):
            super().__init__()
            self.amount = nn.Parameter(torch.full((), 0.1))

        def forward(self, output: Tensor, context: Context) -> Tensor:
            return output + self.amount * context.noise_like(output)

        def auxiliary_loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
            return {"noise_loss": self.amount.square()}

    @core.register("blend")
    class Blend(Temporal):
        def __init__(self, embed_dim: int):
            super().__init__()
            self.share = nn.Parameter(torch.full((), 0.2))

        def forward(self, output: Tensor, context: Context, state: object | None) -> tuple[Tensor, object | None]:
            return (output if state is None else torch.lerp(output, state, self.share)), output

    @core.register("on_clips")
    class OnClips(Objective):
        batch_parts = frozenset({"clip"})

        def forward(self, model: nn.Module, batch: Batch, output: Tensor | None) -> dict[str, Tensor]:
            clip, state, total = batch.part("clip", self), None, 0
            for i in range(clip.image.shape[1]):
                given = clip.image[:, i], clip.features[:, i], batch.output_size
                result, state = model(*given, state=state, return_state=True, generator=batch.generator)
                total = total + F.mse_loss(result, output.detach())
            return {"clip_loss": total, "reconstruction_loss": F.mse_loss(output, batch.target)}

    more = ["objective=on_clips", "refiner=noisy", "temporal=blend", *VIDEOS, "views.clip=2", "views.crops=0",
            "mixed_precision=bf16", "steps=4"]  # fmt: skip
    without = ("objective.", "data.", "steps")
    for name, last in (("whole", []), ("parts", ["stop_after=1"]), ("parts", ["resume=must"])):
        train(config(*more, f"out_dir={tmp_path / name}", *last, without=without))
    whole, parts = (load_file(tmp_path / name / STATE_NAME) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert whole["weights/model.temporal.share"] != 0.2
    assert whole["weights/model.refiner.amount"] != 0.1


@pytest.mark.parametrize(
    "chosen",
    [
        ["temporal=temporal_consistency", "temporal.fusion=learned", "temporal.flow=given"],
        ["temporal=cross_frame_attention"],
    ],
    ids=lambda chosen: chosen[0],
)
def test_the_gates_of_video_fillers_train_on_clips_beside_a_single_image_objective(config, tmp_path, chosen):
    """Their loss comes from the clip's features and exact flow; the images of the batch have no past."""
    videos = [*VIDEOS, "views.clip=3", "steps=3"]
    train(config(*chosen, *videos, without=("data.", "steps")))
    trained = load_file(tmp_path / "out" / STATE_NAME)
    assert trained["weights/model.temporal.gate"].abs().max() > 0
    with pytest.raises(SettingError, match=r"a filler looks at clips of a video: set views.clip to their number"):
        Training(config(*chosen, *VIDEOS, without="data."))
