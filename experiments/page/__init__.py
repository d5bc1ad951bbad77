"""The demo page (`python -m experiments.demo`). `uploads` lets a visitor's file in, or says why not; `models` builds
what is chosen; `engine` makes pictures of one image and `clips` of a video, as functions that know no widgets.
`image_tab` and `video_tab` hold a visitor's widgets, with `controls` for the choices, `elements` for pictures, slider
and upload, and `guard` for what goes wrong. `serve` offers it all on an address.
"""
