"""Adaptation of an upsampler to one encoder, from a folder of images. `adapt` opens what the settings name, adapts
(`core.adapt`) and writes the delta; `experiments.measuring.support` encodes the images, and measures on those that are
held out; `curve` keeps what was measured after each step, says whether it helped, and draws it.
"""
