"""AnyUp: upsamples the features of any vision encoder, guided by the image (Wimmer et al., arXiv 2510.12764)."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import checks
from core.attention import WindowAttention, empty_output
from core.batch import Context
from core.encoder import Encoder
from core.fast.memory import keep_temporaries
from core.fast.norm_act_conv import Buffers, autocast_dtype
from core.hooks import AFTER_ATTENTION, Attention, Decoder, Refiner, Temporal, Unifier
from core.passthrough import NoDecoder, NoRefiner, NoTemporal
from core.points import pixel_centres
from core.pretrained import Pretrained
from core.registry import describe
from core.rotary import Rotary
from core.streams import named_stream
from core.uncertainty import Uncertainty, uncertain
from core.unifiers import BasisConvolution, LearnedBasis


class AnyUp(nn.Module, Pretrained):
    """Upsamples features with any number of channels to any resolution, guided by the image.

    Each hook point has a filler: a registered class, or a `functools.partial` of one with its settings. The model
    calls it with `embed_dim`. `core/hooks.py` says what each filler may do.

    Args:
        unifier, attention, decoder, refiner, temporal: the fillers; the defaults are the published model.
        embed_dim: D, width of guidance, queries and keys; a multiple of 8.
        seed: seed of the initial weights, and of the default `generator` of a call. Each child module has its own
            random stream, so changing one filler changes no other child's initial weights.
        compile: run the image-sized encoders through `torch.compile`. It needs a C++ compiler on CPU, and the first
            call is slow.
        check_finite: refuse images and features with NaN or infinite values (one more pass over the inputs).

    Raises:
        ValueError: `embed_dim` is not a positive multiple of 8, or a filler refuses its settings.
        RuntimeError: `compile` on CPU without a C++ compiler.
    """

    def __init__(
        self,
        unifier: Callable[..., Unifier] = LearnedBasis,
        attention: Callable[..., Attention] = WindowAttention,
        decoder: Callable[..., Decoder] = NoDecoder,
        refiner: Callable[..., Refiner] = NoRefiner,
        temporal: Callable[..., Temporal] = NoTemporal,
        embed_dim: int = 128,
        seed: int = 0,
        compile: bool = False,
        check_finite: bool = False,
    ):
        super().__init__()
        if embed_dim < 8 or embed_dim % 8:
            raise ValueError(f"embed_dim must be a positive multiple of 8 (GroupNorm has 8 groups), got {embed_dim}")
        self.embed_dim, self.seed, self.check_finite = embed_dim, seed, check_finite
        self.factories = {
            "unifier": unifier,
            "attention": attention,
            "decoder": decoder,
            "refiner": refiner,
            "temporal": temporal,
        }
        self._child("image_encoder", lambda: _encoder(3, embed_dim))
        self._child("rotary", lambda: Rotary(embed_dim))
        self._child("query_encoder", lambda: _encoder(embed_dim, embed_dim))
        self._child("key_encoder", lambda: _encoder(embed_dim, embed_dim))
        self._child("aggregation", lambda: _encoder(2 * embed_dim, embed_dim, kernel_size=3))
        for hook, factory in self.factories.items():
            self._child(hook, lambda factory=factory: factory(embed_dim=embed_dim))
        if compile:
            self.compile_encoders()
        keep_temporaries()
        self._hub_mixin_config = None  # no config.json: the weight file contains the configuration

    def forward(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int] | None = None,
        out: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        state: object | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, object | None]:
        """Upsamples features to `output_size`.

        Args:
            image: (B,3,H,W), normalised with ImageNet mean and standard deviation (`core.imagenet_normalize`).
            features: (B,C,h,w) of the same images; any C; h and w at least 2.
            output_size: (Qh,Qw); None: the image's size.
            out: (B,C,Qh,Qw) tensor, for example a memory map. The output is written into it band by band, and no
                gradient is recorded.
            generator: random numbers for fillers that draw them, on the CPU. By default every call draws the same
                numbers, so evaluations are repeatable; give a generator to get different samples.
            state: for video: the state that the call for the previous frame returned; None at the first frame.
            return_state: return (output, state) instead of the output alone.

        Returns:
            (B,C,Qh,Qw); `out` if it was given. With `return_state` also the state for the next frame.

        Raises:
            TypeError, ValueError: an input has the wrong type, shape, dtype or device; the message names it.
            RuntimeError: under `torch.jit.trace`, or under `torch.func` without `twice_differentiable()`.
        """
        output_size = checks.check_inputs(self, image, features, output_size)
        if out is not None:
            checks.check_no_state(state, return_state)
            return self._write(image, features, output_size, out, generator)
        room = self._output_memory(features, output_size)
        buffers = Buffers(None if room is None else room.permute(0, 2, 3, 1))
        guidance, query, key = self._guide(image, features, output_size, buffers)
        context = self._context(image, features, pixel_centres(output_size, like=query), guidance, generator)
        del guidance
        seen = self.attention.seen(image)
        output = self.attention(query, key, features, *([] if room is None else [room]), **seen)
        del query
        output, state = self._finish(output, context, state)
        return (output, state) if return_state else output

    def _write(self, image, features, output_size, out, generator):
        checks.check_out(out, (*features.shape[:2], *output_size))
        with torch.no_grad():
            for rows, band in self.stream(image, features, output_size, generator):
                out[:, :, rows] = band
        return out

    def stream(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields the output in bands of rows, top to bottom, for outputs larger than memory: (rows, (B,C,rows,Qw)).

        Raises:
            ValueError: the refiner or temporal filler needs the whole output. Otherwise as `forward`.
        """
        output_size = checks.check_inputs(self, image, features, output_size)
        checks.check_no_whole_output(self, "be streamed or written to out=; call the model without out=")
        return self._stream(image, features, output_size, generator)

    def _stream(self, image, features, output_size, generator):
        guidance, query, key = self._guide(image, features, output_size, Buffers())
        coords = pixel_centres(output_size, like=query)
        context = self._context(image, features, coords, guidance, generator)
        for rows, band in self.attention.bands(query, key, features, **self.attention.seen(image)):
            yield rows, self._finish(band, replace(context, coords=coords[rows]))[0]

    def query(
        self,
        image: Tensor,
        features: Tensor,
        coords: Tensor,
        output_size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Upsamples the features at arbitrary points, for example of a rotated crop or a non-integer zoom.

        At the pixel centres of the `output_size` grid, (i + 0.5)/n along each axis, the result equals `forward`'s.
        With the baseline's attention, queries are encoded on that grid and interpolated bilinearly at the points, and
        each window is centred on its point. Other attentions may interpolate their output instead (`Attention.at`).
        The decoder gets the exact coordinates.

        Args:
            image, features, output_size, generator: as for `forward`.
            coords: (N,2), or (B,N,2) if each image has its own points: (row, column) in the unit square of the image.

        Returns:
            (B,C,N).

        Raises:
            ValueError: a point is outside the image, or the refiner or temporal filler needs the whole output.
                Otherwise as `forward`.
        """
        output_size = checks.check_inputs(self, image, features, output_size)
        coords = checks.check_coords(coords, features)
        checks.check_no_whole_output(self, "answer single points; call the model on a grid")
        guidance, query, key = self._guide(image, features, output_size, Buffers())
        context = self._context(image, features, coords, guidance, generator)
        if coords.dim() == 2:
            return self._at(query, key, context)
        per_image = []
        for i, points in enumerate(coords):
            alone = None if guidance is None else guidance[i : i + 1]
            own = replace(context, image=image[i : i + 1], features=features[i : i + 1], coords=points, guidance=alone)
            per_image.append(self._at(query[i : i + 1], key[i : i + 1], own))
        return torch.cat(per_image)

    def attention_weights(
        self, image: Tensor, features: Tensor, coords: Tensor, output_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Which cells the attention of `query` looks at from each point, and how much. Without gradients.

        Args:
            image, features, output_size: as for `forward`.
            coords: (N,2), as for `query`.

        Returns:
            (B,N,h,w): of each point, the weight of every cell of `features`. Without fillers after attention, the
            features in these proportions are `query`'s answer.

        Raises:
            ValueError: a point is outside the image, or attention weighs cells differently in each channel.
                Otherwise as `forward`.
        """
        output_size = checks.check_inputs(self, image, features, output_size)
        coords = checks.check_coords(coords, features)
        if coords.dim() != 2:
            raise ValueError(f"all images must have the same points, (N,2), got {tuple(coords.shape)}")
        if not self.attention.linear_in_values:
            name = type(self.attention).__name__
            raise ValueError(f"attention {name} weighs cells differently in each channel, so there is no one map of it")
        with torch.no_grad():
            _, query, key = self._guide(image, features, output_size, Buffers())
            return self.attention.weights_at(query, key, coords, **self.attention.seen(image))

    def readout(
        self,
        image: Tensor,
        features: Tensor,
        head: nn.Linear | nn.Conv2d | tuple[Tensor, Tensor | None],
        output_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Returns `head(model(image, features))` for a linear head, without computing the upsampled features.

        Attention gives a cell the same weight in all channels, so the head can be applied first: W·up(F) = up(W·F).
        With 21 classes instead of 384 channels, the values take 18 times less memory and time.

        Args:
            image, features, output_size: as for `forward`.
            head: `nn.Linear(C, K)`, `nn.Conv2d(C, K, 1)`, or weight (K,C) and bias (K,) or None.

        Returns:
            (B,K,Qh,Qw): equal to the head on `forward`'s output, up to rounding.

        Raises:
            TypeError, ValueError: the head does not fit, or a filler's output is not linear in the features. Otherwise
                as `forward`.
        """
        output_size = checks.check_inputs(self, image, features, output_size)
        weight, bias = checks.check_head(head, features)
        checks.check_linear(self)
        values = F.conv2d(features, weight[..., None, None])  # (B,K,h,w)
        _, query, key = self._guide(image, features, output_size, Buffers())
        seen = self.attention.seen(image)
        output = self.attention(query, key, values, *([None] if self.attention.takes_out else []), **seen)
        output = checks.check_filled(self, "attention", output, (len(features), len(weight), *output_size))
        return output if bias is None else output + bias.to(output)[:, None, None]

    def with_uncertainty(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int] | None = None,
        *,
        generator: torch.Generator | None = None,
        num_samples: int = 0,
    ) -> tuple[Tensor, Uncertainty]:
        """Upsamples, and says pixel by pixel how uncertain attention is: `core.uncertainty`. Without gradients.

        Args:
            image, features, output_size, generator: as for `forward`.
            num_samples: run the fillers after attention so often, with different random numbers, for the spread of
                samples; 0: no spread. The output is the first sample, which `forward` gives with the same generator.

        Returns:
            `forward`'s output (B,C,Qh,Qw), up to rounding, and the measures of uncertainty, (B,1,Qh,Qw) each. Those of
            attention describe its own output, whatever decoder, refiner and temporal filler do afterwards. To a
            temporal filler the image is the first frame of a video.

        Raises:
            ValueError: the weights of a query do not sum to 1, or are negative; `num_samples` is 1 or negative, or no
                filler draws random numbers. Otherwise as `forward`.
        """
        return uncertain(self, image, features, output_size, generator, num_samples)

    @property
    def linear_in_values(self) -> bool:
        """Whether `readout` may be asked: attention, and every filler after it, is linear in the features."""
        return all(getattr(self, hook).linear_in_values for hook in ("attention", *AFTER_ATTENTION))

    @property
    def answers_points(self) -> bool:
        """Whether `query` may be asked: no filler needs to see the whole output."""
        return not any(getattr(self, hook).needs_whole_output for hook in AFTER_ATTENTION)

    def _at(self, query, key, context):
        points, features = context.coords, context.features
        output = self.attention.at(query, key, features, points, **self.attention.seen(context.image))
        output = checks.check_filled(self, "attention", output, (*features.shape[:2], len(points)))
        one_row = replace(context, coords=points[None])
        return self._finish(output[:, :, None], one_row)[0][:, :, 0]  # (B,C,N)

    def _context(self, image, features, coords, guidance, generator):
        if generator is None and not torch.compiler.is_compiling():
            generator = torch.Generator().manual_seed(self.seed)
        return Context(image, features, coords, guidance, generator)

    def _finish(self, output, context, state=None):
        """Runs decoder, refiner and temporal on attention's output -> (B,C,rows,Qw), state."""
        shape = (*context.features.shape[:2], *context.coords.shape[:2])
        output = checks.check_filled(self, "attention", output, shape)
        output = self.decoder(output, self._seen_by(self.decoder, context))
        output = checks.check_filled(self, "decoder", output, shape)
        if not (self.refiner.needs_guidance or self.temporal.needs_guidance):
            context.guidance = None  # frees its memory
        output = self.refiner(output, self._seen_by(self.refiner, context))
        output = checks.check_filled(self, "refiner", output, shape)
        answer = self.temporal(output, self._seen_by(self.temporal, context), state)
        output, state = checks.check_pair(self.temporal, answer)
        return checks.check_filled(self, "temporal", output, shape), state

    def _seen_by(self, filler, context):
        as_it_is = filler.needs_guidance or context.guidance is None
        return context if as_it_is else replace(context, guidance=None)

    def _output_memory(self, features, output_size):
        """Memory for attention's output, used by the encoders before attention; None if they cannot share it."""
        needed_as_is = torch.is_grad_enabled() or torch.compiler.is_compiling() or autocast_dtype(features) is not None
        if needed_as_is or self._needs_guidance or not self.attention.takes_out:
            return None
        return empty_output(features, output_size)

    def _guide(self, image, features, output_size, buffers):
        """Guidance (None if no filler needs it), query and key.

        Only the guidance may lie in `buffers.room`, which attention overwrites.
        """
        grid = tuple(features.shape[-2:])
        guidance = self.rotary(self.image_encoder(image, buffers=buffers))  # (B,D,H,W)
        unified = self.unifier(features, guidance)  # (B,D,h,w)
        checks.check_filled(self, "unifier", unified, (len(features), self.embed_dim, *grid))
        key = self.aggregation(torch.cat([self.key_encoder(guidance, grid, buffers), unified], 1))  # (B,D,h,w)
        query = self.query_encoder(guidance, output_size, buffers)  # (B,D,Qh,Qw)
        return guidance if self._needs_guidance else None, query, key

    @property
    def _needs_guidance(self):
        return any(getattr(self, hook).needs_guidance for hook in AFTER_ATTENTION)

    def _child(self, name: str, make: Callable[[], nn.Module]) -> None:
        with named_stream(self.seed, name):
            self.add_module(name, make())

    @property
    def config(self) -> dict:
        """Everything that `core.from_config` needs to build this model again."""
        return {"embed_dim": self.embed_dim, "seed": self.seed} | {
            hook: describe(factory) for hook, factory in self.factories.items()
        }

    def twice_differentiable(self, on: bool = True) -> "AnyUp":
        """Uses plain operations, differentiable any number of times (second-order MAML); `on=False`: the fast ones."""
        for module in self.modules():
            if isinstance(module, (Encoder, Rotary, BasisConvolution)):
                module.twice_differentiable = on
        return self

    def compile_encoders(self) -> "AnyUp":
        """Runs the image-sized encoders through `torch.compile` from now on, for up to 64 shapes each.

        Raises:
            RuntimeError: on CPU, without a C++ compiler.
        """
        if next(self.parameters()).device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise RuntimeError("compile=true needs a C++ compiler on CPU: install g++, or leave it off")
        for encoder in (self.image_encoder, self.query_encoder, self.key_encoder):
            encoder.compiles = True
        return self


def _encoder(in_channels: int, embed_dim: int, kernel_size: int = 1) -> Encoder:
    stem = nn.Conv2d(in_channels, embed_dim, kernel_size, padding=kernel_size // 2, padding_mode="reflect", bias=False)
    return Encoder(stem, embed_dim, embed_dim)
