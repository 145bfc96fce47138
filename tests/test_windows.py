"""The arithmetic of windows against every (output, tap, input) triple, found one by one."""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.windows import Axis, Blocks, Gather, Strips, equal_rows


def starts(strips):
    """The first source of each strip."""
    return [strips.first + i * strips.step for i in range(strips.count)]


def random_axes(count):
    draw = random.Random(0)
    axes = []
    while len(axes) < count:
        size, kernel, stride, dilation, pad_lo, pad_hi = (
            draw.randint(*bounds) for bounds in ((1, 13), (1, 13), (1, 4), (1, 4), (-3, 14), (-3, 14))
        )
        axis = Axis(size, kernel, stride, dilation, pad_lo, pad_hi)
        if axis.out > 0:
            axes.append(axis)
    return axes


ODD = [
    Axis(7, 31, pad_lo=15, pad_hi=15),
    Axis(1, 1),
    Axis(3, 2, 4, 4, 9, 9),  # taps that no output reads through, outputs that read nothing
    Axis(56, 3, 2, 1, 1, 1),
    Axis(4, 4, 2, 6, 9, 9),  # stride and dilation have a common divisor
    Axis(5, 3, 3, 1, -4, 9),  # all but the last pixel is cropped
]
AXES = ODD + random_axes(60)
GATHERS = [Gather(axis, transposed) for axis in AXES for transposed in (False, True)]
each_axis = pytest.mark.parametrize("axis", AXES, ids=lambda a: "-".join(map(str, a)))
each_gather = pytest.mark.parametrize(
    "gather", GATHERS, ids=lambda g: "-".join(map(str, (*g.axis, "transposed" * g.transposed)))
)


def triples(axis):
    """All (output, tap, input) of the definition that exist."""
    return [
        (o, k, axis.stride * o + axis.dilation * k - axis.pad_lo)
        for o in range(axis.out)
        for k in range(axis.kernel)
        if 0 <= axis.stride * o + axis.dilation * k - axis.pad_lo < axis.size
    ]


def reads(gather):
    """target -> the (source, tap) pairs it reads, sorted."""
    found = {target: [] for target in range(gather.targets)}
    for o, k, i in triples(gather.axis):
        target, source = (i, o) if gather.transposed else (o, i)
        found[target].append((source, k))
    return {target: sorted(pairs) for target, pairs in found.items()}


def moved(pairs, by):
    return sorted((source + by, tap) for source, tap in pairs)


def block_sizes(gather):
    """The sizes that launchers choose: all targets, or whole periods of them."""
    smaller = [n * gather.period for n in (1, 2, 3, 5) if n * gather.period < gather.targets]
    return [gather.targets, *smaller]


@each_axis
def test_the_mirrored_axis_gives_the_input_gradient(axis):
    axis = axis._replace(stride=1)
    flipped = {
        target: sorted((source, axis.kernel - 1 - tap) for source, tap in pairs)
        for target, pairs in reads(Gather(axis.mirrored)).items()
    }
    assert flipped == reads(Gather(axis, transposed=True))


@each_axis
def test_out_counts_the_places_of_the_dilated_kernel(axis):
    places = range(-axis.pad_lo, axis.size + axis.pad_hi - axis.dilation * (axis.kernel - 1), axis.stride)
    assert axis.out == len(places)


@each_axis
def test_each_tap_knows_its_outputs(axis):
    found = [(o, k, i) for k in range(axis.kernel) for i, o in axis.tap_range(k).pairs()]
    assert sorted(found) == triples(axis)
    assert axis.pairs == len(found)


@each_axis
def test_live_taps_are_those_between_the_first_and_the_last_in_use(axis):
    used = [k for _, k, _ in triples(axis)] or [0]
    assert axis.live == (min(used), max(used) + 1)


@each_axis
def test_part_of_a_kernel_has_the_same_outputs(axis):
    for lo in range(axis.kernel):
        for hi in range(lo + 1, axis.kernel + 1):
            part = axis.part(lo, hi)
            assert part.out == axis.out
            assert triples(part) == [(o, k - lo, i) for o, k, i in triples(axis) if lo <= k < hi]


@each_gather
def test_each_target_finds_its_pairs_once(gather):
    found = {t: sorted(gather.taps(t).inside(gather.sources).pairs()) for t in range(gather.targets)}
    assert found == reads(gather)


@pytest.mark.parametrize("gather", GATHERS[:24])
def test_traced_taps_are_the_static_ones(gather):
    for target in range(gather.targets):
        static = gather.taps(target)
        traced = static._replace(source=jnp.int32(static.source)).inside(gather.sources)
        bounds = range(int(traced.lo), int(traced.hi))
        assert bounds == range(*static.inside(gather.sources)[-2:])


@each_gather
def test_window_holds_all_that_is_read_and_no_more(gather):
    for count in range(1, gather.targets + 1):
        sources = [source for t in range(count) for source, _ in gather.taps(t).pairs()]
        first, size = gather.window(count)
        if sources:
            assert (first, first + size) == (min(sources), max(sources) + 1)
        assert size >= 1


@each_gather
def test_equal_rows_cover_every_target_once(gather):
    expected = reads(gather)
    for first, count in ((0, gather.targets), (gather.targets // 3, gather.targets // 2)):
        found = {}
        for rows in equal_rows(gather, first, count):
            for n in range(rows.count):
                target = first + rows.first + n * rows.period
                assert target not in found
                found[target] = sorted(rows.taps.shifted(-n * rows.advance).pairs())
        assert found == {t: expected[t] for t in range(first, first + count)}


@each_gather
def test_blocks_cover_every_target_and_read_what_they_hold(gather):
    expected = reads(gather)
    for size in block_sizes(gather):
        blocks = Blocks(gather, size)
        found = {}
        for b in range(blocks.count):
            start = blocks.start(b)
            assert 0 <= start <= gather.sources - blocks.window
            assert int(blocks.start(np.int32(b))) == start
            for rows in blocks.rows(b):
                for n in range(rows.count):
                    pairs = rows.taps.shifted(-n * rows.advance).pairs()
                    assert all(0 <= source < blocks.window for source, _ in pairs)
                    target = b * size + rows.first + n * rows.period
                    assert target in blocks.targets(b) and target not in found
                    found[target] = moved(pairs, start)
        assert found == expected


@each_gather
def test_blocks_of_a_kind_run_the_same_code(gather):
    for size in block_sizes(gather):
        blocks = Blocks(gather, size)
        kinds = blocks.kinds()
        assert sorted(b for same in kinds.values() for b in same) == list(range(blocks.count))
        for first, same in kinds.items():
            assert first == same.start
            for b in same:
                assert len(blocks.targets(b)) == len(blocks.targets(first))
                assert blocks.rows(b) == blocks.rows(first)


@each_axis
def test_blocks_find_the_outputs_of_each_kernel_row(axis):
    for size in block_sizes(Gather(axis)):
        blocks = Blocks(Gather(axis), size)
        found = []
        for b in range(blocks.count):
            for k, taps in enumerate(blocks.kernel_rows(b)):
                assert all(0 <= source < blocks.window for source, _ in taps.pairs())
                found += [(o + b * size, k, i + blocks.start(b)) for i, o in taps.pairs()]
        assert sorted(found) == triples(axis)


@each_axis
def test_blocks_of_a_kind_have_the_same_kernel_rows(axis):
    for size in block_sizes(Gather(axis)):
        blocks = Blocks(Gather(axis), size)
        for first, same in blocks.kinds().items():
            expected = [t.pairs() for t in blocks.kernel_rows(first)]
            assert all([t.pairs() for t in blocks.kernel_rows(b)] == expected for b in same)


@each_gather
def test_strips_cover_every_target_and_read_what_they_hold(gather):
    expected = reads(gather)
    for size in block_sizes(gather):
        strips = Strips(gather, size)
        found = {}
        for s, start in enumerate(starts(strips)):
            for column, taps in enumerate(strips.columns):
                assert all(0 <= source < strips.window for source, _ in taps.pairs())
                pairs = [
                    (source, tap)
                    for source, tap in moved(taps.pairs(), start)
                    if 0 <= source < gather.sources
                ]
                if s * size + column < gather.targets:
                    found[s * size + column] = pairs
        assert found == expected


@each_axis
def test_strips_find_the_outputs_of_each_kernel_column(axis):
    for size in block_sizes(Gather(axis)):
        strips = Strips(Gather(axis), size)
        found = []
        for s, start in enumerate(starts(strips)):
            for k, taps in enumerate(strips.kernel_columns):
                assert all(0 <= i < strips.window and 0 <= o < size for i, o in taps.pairs())
                found += [(o + s * size, k, i + start) for i, o in taps.pairs()]
        inside = [(o, k, i) for o, k, i in found if o < axis.out and 0 <= i < axis.size]
        assert sorted(inside) == triples(axis)


@pytest.mark.sweep
@pytest.mark.parametrize("gather", GATHERS[:24])
def test_strips_cut_pixels_and_fill_with_zeros(gather):
    for size in block_sizes(gather)[:3]:
        for strips in (Strips(gather, size), Strips(gather, size).of_targets()):
            sources = strips.gather.sources
            x = np.arange(1, 2 * sources + 1, dtype=np.float32).reshape(2, 1, sources, 1)
            pieces = np.asarray(strips.cut(jnp.asarray(x)))
            assert pieces.shape == (2 * strips.count, 1, strips.window, 1)
            for s, start in enumerate(starts(strips)):
                for column in range(strips.window):
                    inside = 0 <= start + column < sources
                    expected = x[:, 0, start + column, 0] if inside else 0
                    assert (pieces[2 * s : 2 * s + 2, 0, column, 0] == expected).all()
