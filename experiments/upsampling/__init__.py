"""Upsampling of a user's own images, to look at them and to keep their features. `upsample` opens the model and the
backbone that the settings name and goes through the images; `image` reads each, encodes it, upsamples its features and
writes picture and features; `video` holds the model, and what it carries from frame to frame.
"""
