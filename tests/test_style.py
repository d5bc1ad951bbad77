"""One style for all figures, in colours that everybody tells apart; overlays show what they say."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import rcParams
from matplotlib.colors import to_rgb

from experiments.reports import figures, overlays, style
from experiments.reports.pictures import panel

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
# Machado, Oliveira and Fernandes (2009), complete deuteranopia and protanopia, in linear RGB
DICHROMATS = {
    "none": np.eye(3),
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(linear):
    """CIELAB under D65, in which a distance of about 2 is just noticeable."""
    ratio = TO_XYZ @ np.clip(linear, 0, 1) / TO_XYZ.sum(1)
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", DICHROMATS)
@pytest.mark.parametrize("colours", [style.PALETTE, tuple(figures.COLOURS.values())], ids=["palette", "verdicts"])
def test_colours_differ_for_everybody(vision, colours):
    values = np.array([to_rgb(colour) for colour in colours])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = [lab(np.array(DICHROMATS[vision]) @ one) for one in linear]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 12


def test_only_the_style_makes_figures_and_names_colours():
    for file in EXPERIMENTS.rglob("*.py"):
        if file.name != "style.py":
            found = re.search(r"\bFigure\(|pyplot|\btab:|tab20|[\"']C\d[\"']|dpi=\d|cmap=[\"']", file.read_text())
            assert not found, f"{file.relative_to(EXPERIMENTS)}: {found[0]} belongs to experiments/reports/style.py"


def test_styling_ends_with_the_drawing():
    @style.styled
    def draw(width):
        figure = style.new_figure(width, 2)
        figure.subplots().plot([1, 2])
        return figure, rcParams["font.size"]

    before = dict(rcParams)
    figure, size = draw(30)
    assert dict(rcParams) == before
    assert size != before["font.size"]
    assert figure.axes[0].lines[0].get_color() == style.colour(0) == style.colour(len(style.PALETTE))
    assert style.picture(figure).width <= style.WIDTH * figure.dpi


def test_maps_can_share_a_range():
    ramp = np.linspace(0, 1, 12).reshape(3, 4)
    np.testing.assert_array_equal(style.heat(ramp / 2, limits=(0, 1)), style.heat(ramp, limits=(0, 2)))


def test_similarity_is_the_cosine_without_the_mean():
    features = torch.randn(1, 5, 4, 6, generator=torch.Generator().manual_seed(0)) + 3
    found = overlays.similarity(features, (0.6, 0.9))  # cell (2, 5)
    vectors = (features[0] - features[0].mean((1, 2), keepdim=True)).double()
    for row, column in itertools.product(range(4), range(6)):
        expected = torch.cosine_similarity(vectors[:, row, column], vectors[:, 2, 5], dim=0)
        assert found[row, column].item() == pytest.approx(expected.item(), abs=1e-6)
    maps = overlays.similarity_maps({"low": features, "twice": features.repeat(1, 1, 2, 2)}, (0.99, 0.99), (40, 60))
    assert [one.shape for one in maps.values()] == [(40, 60, 3)] * 2


def test_a_window_darkens_what_its_query_does_not_see():
    image, grid = torch.ones(1, 3, 100, 200), (10, 10)
    shown = overlays.window_overlay(image, (0.55, 0.05), 0.1, grid)
    bright = shown.mean(2) > 0.9  # cells 4 to 6 down (0.45 to 0.65), 0 and 1 across (0 to 0.15)
    rows, columns = bright.nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (40, 69, 0, 39)
    whole = overlays.window_overlay(image, (0.55, 0.05), 0.0, grid)
    assert (whole[80:, 100:] == 1).all()


def test_attention_is_light_where_the_weight_is():
    weights = torch.tensor([[0.0, 0.1], [0.3, 0.6]])
    shown = overlays.attention_overlay(torch.full((1, 3, 8, 8), 0.5), weights)
    quarters = shown.reshape(2, 4, 2, 4, 3).mean((1, 3, 4))
    assert quarters.flatten().argsort().tolist() == [0, 1, 2, 3]
    ring = overlays.marked(np.full((40, 40, 3), 0.5), (0.25, 0.75))
    changed = (ring != ring[0, 0]).any(2).nonzero()
    assert np.mean(changed[0]) == pytest.approx(10, abs=1)
    assert np.mean(changed[1]) == pytest.approx(30, abs=1)


def test_panels_wrap_and_their_text_grows_with_them():
    picture = np.zeros((100, 200, 3))
    six = panel({str(i): picture for i in range(6)})
    assert six.size == (3 * 234 + 10, 2 * (112 + 36) + 10)
    assert panel({str(i): picture for i in range(6)}, across=2).size == (2 * 234 + 10, 3 * (112 + 36) + 10)
    large = panel({str(i): np.ones((1000, 1000, 3)) for i in range(3)})
    assert large.size[0] == 3 * 1010 + 10
    assert large.size[1] == 1000 + 20 + round(26 * 3040 / 1200)


def test_pictures_of_another_shape_keep_it():
    tall = panel({"image": np.zeros((100, 300, 3)), "tall": np.zeros((80, 40, 3))})
    pixels = np.asarray(tall)[46 + 75 + 26 :, 10:-10]  # below the first picture and the second title
    dark = (pixels.max(2) < 10).any(0).sum()
    assert dark == round(100 * 40 / 80), "half as wide as high"
