"""`refiner=diffusion`: adds a sampled residual to the initial upsampling, in few denoising steps.

Attention gives close to the mean of what the features may be, so detail is missing. Here a diffusion model samples what
is missing: the residual (target - initial output), as CorrDiff does (Mardani et al., arXiv 2309.15214).

- Any C: the residual lives in K whitened coordinates: the leading principal directions of the image's own
  low-resolution features, each divided by its standard deviation. The complement passes unchanged.
- The denoiser is a field of mixing weights. A light UNet of diffusers' blocks sees only inner products of vectors of
  coordinates, and the guidance. It writes, for each point, weights of differences to the cells around it and of the
  noisy neighbours; the same weights serve all K coordinates. So signs and order of the directions, and rotations of
  directions with equal variance, change nothing (of the image or its samples: the noise is drawn relative to the
  features). One run serves all coordinates. Not invariant: where equal variances straddle the K-th direction, the
  subspace itself is arbitrary.
- Conditioning: initial output and cells (their distances in feature space at each point), encoded guidance and image
  (their values, and their distances to the cells, as in a joint bilateral filter).
- Start: at `strength` s the residual 0, noised to the share s of the noise schedule: the partly noised initial output.
  The result is the denoiser's last estimate of the clean residual, which is what the last step of each sampler
  returns.
- The network is conditioned on the noise level alone (angle: tan = noise / signal). So one training serves all
  samplers, variance-preserving, variance-exploding or flow matching: they differ in scale only.
- Neutral start: the estimate is multiplied by a gate that starts at zero, so the correction is zero, exactly. The gate
  opens by the auxiliary loss. It needs no sampling: the target's residual at random noise levels, noise or
  v-prediction, min-SNR weights (Hang et al., arXiv 2303.09556), the error measured in feature space.

In training mode the refiner returns its input. The objective then trains the initial output (or freeze the core), and
the auxiliary loss trains the refiner; gradients reach the core through the conditioning only.

A single sample has a larger squared error than the mean of samples, and that is close to one step from pure noise
(`num_inference_steps=1`, `strength=1`: the mean predictor). To judge a refinement, compare it with those.

Refinement is made on a grid of at most `refine_scale` times the feature grid; coordinates of the residual are then
interpolated bilinearly. The correction of a larger output is thus smooth below that grid.

Status: measured (docs/diffusion.md). Samples hurt detail. The mean predictor lowers the error by more than blur does,
everywhere and most in the hardest tenth of the image, and with 128 directions it raises detail a little.
"""

from extensions.diffusion.refiner import DiffusionRefiner, Prediction

__all__ = ["DiffusionRefiner", "Prediction"]
