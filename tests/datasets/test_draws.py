"""Test what a training image draws against fb.resnet.torch's distributions, over 2 million images.

Seeds are fixed. `ALPHA` separates: the right distributions have larger p-values, the twins smaller.
"""

import itertools
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from datasets.colour import colour_draws
from datasets.cuts import Cut, random_sized_crop
from datasets.draws import uniforms
from helpers import fb_resnet

ALPHA = 1e-3
COUNT, CHUNK = 2_000_000, 4_000
WIDTH, HEIGHT = 40_000, 30_000  # so large that whole pixels do not show in the distributions
FITS = HEIGHT**2 / (4 / 3) / (WIDTH * HEIGHT)  # up to this share of the area, all crops fit
FACTORS = ("brightness", "contrast", "saturation")


class Drawn(NamedTuple):
    """Hold what 2 million images draw."""

    boxes: np.ndarray  # (n, 4) left, top, width, height
    first: np.ndarray  # (n, 5) uniforms of the first attempt: area, aspect, swap, down, right
    colours: np.ndarray  # (n, 10), of `colour_draws`


def crop(draws: np.ndarray, width: int, height: int) -> Cut:
    return random_sized_crop(width, height, 224, draws, "antialias")


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    chunks = []
    for first in range(0, COUNT, CHUNK):
        draws = uniforms(seed=1, epoch=1, first=first, count=CHUNK)
        boxes = np.array([crop(row, WIDTH, HEIGHT).box for row in draws], dtype=np.int32)
        chunks.append((boxes, draws[:, :5].copy(), colour_draws(draws).numpy()))
    return Drawn(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))


def twin(**rule) -> np.ndarray:
    """Draw as many crops by the restatement, or by a wrong rule."""
    boxes, fitted = fb_resnet.draw_crops(np.random.default_rng(3), COUNT, HEIGHT, WIDTH, **rule)
    return boxes[fitted]  # all but one or two


def areas_and_aspects(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    width, height = boxes[:, 2].astype(float), boxes[:, 3].astype(float)
    return width * height / (WIDTH * HEIGHT), width / height


def fit(sample: np.ndarray, distribution) -> float:
    """Return the p-value of a Kolmogorov-Smirnov test of one sample (given a CDF) or of two."""
    return stats.kstest(sample, distribution, method="asymp").pvalue


def uniform(low: float, high: float):
    return stats.uniform(low, high - low).cdf


def swapped_aspect(aspect: np.ndarray) -> np.ndarray:
    """Distribute an aspect that is uniform from 3/4 to 4/3, then inverted half of the time."""
    from_3_4_to_4_3 = uniform(3 / 4, 4 / 3)
    return (from_3_4_to_4_3(aspect) + 1 - from_3_4_to_4_3(1 / aspect)) / 2


def test_areas_and_aspects_are_those_of_fb_resnet(drawn):
    for got, wanted in zip(*map(areas_and_aspects, (drawn.boxes, twin())), strict=True):
        assert fit(got, wanted) > ALPHA


@pytest.mark.parametrize("rule", [{"log_aspect": True}, {"swap": False}])
def test_log_uniform_or_unswapped_aspects_are_found_out(drawn, rule):
    _, aspects = areas_and_aspects(drawn.boxes)
    assert fit(aspects, areas_and_aspects(twin(**rule))[1]) < ALPHA / 10


def test_first_crops_have_uniform_areas_and_aspects(drawn):
    """Take images whose first crop fits whatever its aspect, so that none is selected by it."""
    always = drawn.first[:, 0] < (FITS - 0.08) / 0.92
    assert always.sum() > COUNT / 2
    areas, aspects = areas_and_aspects(drawn.boxes[always])
    assert fit(areas, uniform(0.08, FITS)) > ALPHA
    assert fit(aspects, swapped_aspect) > ALPHA
    is_swapped = drawn.first[always, 2] < 0.5
    before = np.where(is_swapped, 1 / aspects, aspects)
    assert fit(before, uniform(3 / 4, 4 / 3)) > ALPHA
    for wrong in (aspects, np.where(is_swapped, aspects, 1 / aspects)):
        assert fit(wrong, uniform(3 / 4, 4 / 3)) < ALPHA / 10
    log_uniform = stats.loguniform(3 / 4, 4 / 3).cdf
    assert min(fit(aspects, log_uniform), fit(before, log_uniform)) < ALPHA / 10


def test_offsets_are_uniform_integers_up_to_the_edge(drawn):
    rng = np.random.default_rng(2)
    left, top, width, height = drawn.boxes.T
    for offset, room in ((left, WIDTH - width), (top, HEIGHT - height)):
        assert offset.min() == 0 and (offset <= room).all() and (offset == room).any()
        assert fit((offset + rng.random(COUNT)) / (room + 1), uniform(0, 1)) > ALPHA


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (1, 12), (3, 3), (16, 6)])
def test_boxes_of_tiny_pictures_are_as_frequent_as_by_the_rules(shape):
    """Count each box, where rounding and the last offset matter, and all rare ones together."""
    height, width = shape
    cuts = [crop(row, width, height) for row in uniforms(4, 1, 0, 30_000)]
    boxes, fitted = fb_resnet.draw_crops(np.random.default_rng(5), 300_000, height, width)
    boxes = boxes[fitted & (boxes[:, 2:] > 0).all(axis=1)]
    got = Counter(cut.box for cut in cuts if cut.scaled == (224, 224))
    wanted = Counter(map(tuple, boxes.tolist()))
    common = [box for box, count in wanted.items() if count > 200]
    table = [
        [*(counts[box] for box in common), 1 + counts.total() - sum(counts[box] for box in common)]
        for counts in (got, wanted)
    ]
    assert len(common) > 1 and stats.chi2_contingency(table).pvalue > ALPHA


@pytest.mark.parametrize("shape", [(250, 1000), (1000, 250), (300, 1000)])
def test_as_many_pictures_as_by_the_rules_have_no_fitting_crop(shape):
    height, width = shape
    cuts = [crop(row, width, height) for row in uniforms(6, 1, 0, 20_000)]
    _, fitted = fb_resnet.draw_crops(np.random.default_rng(7), 200_000, height, width)
    misses = sum(cut.scaled != (224, 224) for cut in cuts)
    assert 100 < misses < 4000
    table = [[misses, 20_000 - misses], [(~fitted).sum(), fitted.sum()]]
    assert stats.chi2_contingency(table).pvalue > ALPHA


def test_brightness_contrast_and_saturation_change_by_up_to_four_tenths(drawn):
    for factor in range(len(FACTORS)):
        assert fit(drawn.colours[:, factor], uniform(0.6, 1.4)) > ALPHA
        assert fit(drawn.colours[:, factor], uniform(0.602, 1.402)) < ALPHA / 10


def test_all_orders_of_the_colour_steps_are_equally_frequent(drawn):
    steps = drawn.colours[:, 3:6].astype(int)
    orders, counts = np.unique(steps @ [100, 10, 1], return_counts=True)
    assert orders.tolist() == [100 * a + 10 * b + c for a, b, c in itertools.permutations(range(3))]
    assert stats.chisquare(counts).pvalue > ALPHA


def test_lighting_is_normal_with_a_deviation_of_a_tenth(drawn):
    for component in (6, 7, 8):
        assert fit(drawn.colours[:, component], stats.norm(0, 0.1).cdf) > ALPHA
        assert fit(drawn.colours[:, component], stats.norm(0, 0.101).cdf) < ALPHA / 10


def test_half_of_the_images_are_mirrored(drawn):
    mirrored = drawn.colours[:, 9]
    assert set(np.unique(mirrored)) == {0, 1}
    assert stats.binomtest(int(mirrored.sum()), COUNT).pvalue > ALPHA


def are_unrelated(some: np.ndarray, others: np.ndarray) -> bool:
    """Return whether no column of one (n, a) correlates with a column of another (n, b)."""
    if others is some:
        matrix = np.corrcoef(some.T) - np.eye(some.shape[1])
    else:
        matrix = np.corrcoef(some.T, others.T)[: some.shape[1], some.shape[1] :]
    return np.abs(matrix).max() < 5.5 / np.sqrt(len(some))  # 5.5 deviations: 4 in 10^8


def test_nothing_that_an_image_draws_tells_of_its_other_draws(drawn):
    """Look at squares too: a radius that two components of the lighting share shows there."""
    columns = np.concatenate([drawn.first, drawn.colours[:, :4], drawn.colours[:, 6:]], axis=1)
    columns = columns[::5] - columns.mean(axis=0)
    squares = columns[:, :-1] ** 2  # those of a mirror are its own
    assert are_unrelated(columns, columns) and are_unrelated(squares, squares)
    assert are_unrelated(columns[:, :-1] * columns[:, 1:], columns)


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, 1, 0), (0, 1, 1)), ((0, 1, 0), (0, 1, 16)), ((0, 1, 0), (0, 2, 0)),
     ((0, 1, 0), (1, 1, 0)), ((1, 2, 0), (2, 1, 0)), ((0, 1, 0), (0, 1, 20_000))],
    ids=["next image", "later image", "next epoch", "next seed", "swapped", "far"],
)  # fmt: skip
def test_neighbouring_images_epochs_and_seeds_draw_unrelated_numbers(one, other):
    """Compare each of the 64 numbers with each: a shifted sequence would be found too."""
    assert are_unrelated(*(uniforms(*key, 20_000) for key in (one, other)))


def philox(key: tuple[int, int], counter: int) -> list[int]:
    """Compute four raw numbers by Philox-4x64-10 (Salmon et al., 2011)."""
    mask = 2**64 - 1
    a, b, c, d = (counter >> 64 * word & mask for word in range(4))
    k, m = key
    for _ in range(10):
        ac, bd = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = bd >> 64 ^ b ^ k, bd & mask, ac >> 64 ^ d ^ m, ac & mask
        k, m = (k + 0x9E3779B97F4A7C15) & mask, (m + 0xBB67AE8584CAA73B) & mask
    return [a, b, c, d]


@pytest.mark.parametrize(
    ("seed", "epoch", "image"),
    [(0, 1, 0), (7, 3, 1), (7, 3, 1_281_166), (2**63 - 1, 10_000, 2**40)],
)
def test_draws_are_philoxs_so_that_no_version_of_numpy_changes_a_run(seed, epoch, image):
    """Number the counter from one: numpy counts before it computes."""
    blocks = range(16 * image + 1, 16 * image + 17)
    raw = list(itertools.chain.from_iterable(philox((seed, epoch), block) for block in blocks))
    wanted = [(number >> 11) / 2**53 for number in raw]
    assert uniforms(seed, epoch, image)[0].tolist() == wanted


def test_the_philox_of_this_test_is_the_published_one():
    """Compare with Random123's known answers."""
    assert philox((0, 0), 0) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]  # fmt: skip  # noqa: E501
    ones = 2**64 - 1
    assert philox((ones, ones), 2**256 - 1) == [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("first", [0, 1, 999])
def test_an_image_draws_the_same_however_many_are_drawn_at_once(first):
    many = uniforms(3, 4, first, 40)
    assert many.shape == (40, 64) and many.dtype == np.float64
    assert many.min() >= 0 and many.max() < 1
    for place in (0, 1, 17, 39):
        assert np.array_equal(uniforms(3, 4, first + place), many[place : place + 1])
