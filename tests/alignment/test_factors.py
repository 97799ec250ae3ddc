"""Index sets: products, sums, families, and what makes two of them the same."""

from __future__ import annotations

from pnanalysis.alignment.cells import cells_of
from pnanalysis.alignment.factors import EACH, JOINT, NONE, Factors


def test_views_split_factors_and_merge_them() -> None:
    factors = Factors()
    whole = factors.new(12)
    groups = factors.regroup([whole], [3, 4])
    assert groups is not None
    assert [factors.size(group[0]) for group in groups] == [3, 4]
    assert factors.regroup([groups[0][0], groups[1][0]], [12]) == [[groups[0][0], groups[1][0]]]
    assert factors.expand(whole) == [groups[0][0], groups[1][0]]
    halves = factors.regroup([whole], [6, 2])  # the four become two times two
    assert halves is not None
    assert [factors.size(leaf) for leaf in factors.expand(whole)] == [3, 2, 2]
    assert factors.regroup([whole], [4, 3]) is None
    assert factors.regroup([factors.new(6)], [4, 2]) is None


def test_what_is_known_of_a_factor_holds_for_its_parts_and_its_likes() -> None:
    factors = Factors()
    one, other = factors.new(6), factors.new(6)
    factors.regroup([one], [2, 3])
    factors.unify(one, other)
    assert factors.expand(other) == factors.expand(one)
    factors.limit_signs(other, EACH)
    assert {factors[leaf].signs for leaf in factors.expand(one)} == {EACH}
    factors.limit_signs(other, JOINT)  # of all six at once: of no smaller part alone
    assert {factors[leaf].signs for leaf in factors.expand(one)} == {NONE}
    factors.unify(one, factors.new(6, fixed=True))
    assert all(factors[leaf].fixed for leaf in factors.expand(other))


def test_products_that_do_not_fit_are_fixed() -> None:
    factors = Factors()
    one, other = factors.new(6), factors.new(6)
    factors.regroup([one], [2, 3])
    factors.regroup([other], [3, 2])
    factors.unify(one, other)
    assert all(factors[leaf].fixed for factor in (one, other) for leaf in factors.expand(factor))


def test_a_constant_axis_takes_over_what_it_is_combined_with() -> None:
    factors = Factors()
    wild, own = factors.new(4, wild=True), factors.new(4)
    assert factors.unify(wild, own) == own == factors.unify(own, wild)
    assert not factors[own].fixed


def test_slices_make_sums_with_channels_of_their_own() -> None:
    """Queries, keys and values: an axis of three times two heads times four channels."""
    factors = Factors()
    rows = factors.new(24)
    (part,), (heads,), (channels,) = factors.regroup([rows], [3, 2, 4]) or []
    taken = [factors.take(part, [heads, channels], k, k + 1)[1] for k in range(3)]
    assert len({factors.find(own) for _, own in taken}) == 3
    factors.unify(taken[0][1], taken[1][1])  # queries times keys
    for own_heads, _ in taken[1:]:
        factors.unify(taken[0][0], own_heads)
    cells = cells_of(factors, [[rows]])
    assert [cell.offsets for cell in cells] == [(0,), (8,), (16,)]
    (q_heads, q), (k_heads, k), (v_heads, v) = ([entry[0] for entry in cell.entries] for cell in cells)
    assert q_heads == k_heads == v_heads
    assert q == k != v
    assert [(dim, stride) for _, dim, stride in cells[2].entries] == [(0, 4), (0, 1)]


def test_members_of_a_family_are_the_same_where_something_has_them_all() -> None:
    factors = Factors()
    rows = factors.new(6)
    (part,), (channels,) = factors.regroup([rows], [2, 3]) or []
    first, second = (factors.take(part, [channels], k, k + 1)[1][0] for k in range(2))
    assert factors.find(first) != factors.find(second)
    cells_of(factors, [[channels]])  # a tensor with the channels, but not with the parts
    assert factors.find(first) == factors.find(second)


def test_sums_line_up_with_sums_of_the_same_parts_only() -> None:
    factors = Factors()
    a, b, c, d = factors.new(2), factors.new(3), factors.new(2), factors.new(3)
    factors.unify(factors.joined([a, b]), factors.joined([c, d]))
    assert (factors.find(a), factors.find(b)) == (factors.find(c), factors.find(d))
    factors.unify(factors.joined([a, b]), factors.joined([factors.new(1), factors.new(4)]))
    assert factors[a].fixed
    assert factors[d].fixed
