"""Judge schedules: which pairs are asked, within which budget, and what the answers are taken to mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sip_engine.judges.schedules.all_pairs import AllPairs
from sip_engine.judges.schedules.base import Pair, Schedule, oriented
from sip_engine.judges.schedules.bradley_terry import expected_mean_wins, fit_strengths
from sip_engine.judges.schedules.open import make_schedule
from sip_engine.judges.schedules.pivot import Pivot
from sip_engine.judges.schedules.tournament import Tournament, tournament_budget

Judge = Callable[[int, int], float | None]
KINDS = ("all_pairs", "pivot", "tournament")


def unerring(strength: Sequence[float] | np.ndarray) -> Judge:
    """Names the stronger one; equals are a tie."""
    return lambda i, j: 0.5 + 0.5 * float(np.sign(strength[i] - strength[j]))


def play(schedule: Schedule, judge: Judge, base: Sequence[float | None]) -> list[list[Pair]]:
    """Run a schedule to its end; the pairs of each round."""
    rounds = []
    while pairs := schedule.propose(base):
        rounds.append(pairs)
        schedule.record([judge(i, j) for i, j in pairs])
        assert len(rounds) < 500
    return rounds


def tournament(num: int, seed: int, share: float = 0.25, both_orders: bool = False) -> Tournament:
    budget = tournament_budget(num, share, both_orders)
    return Tournament(num, (seed,), budget, both_orders=both_orders)


def ends(quality: Sequence[float | None]) -> tuple[int, int]:
    """Numbers of the best and the worst; no ties at the ends."""
    known = {n: q for n, q in enumerate(quality) if q is not None}
    best, worst = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
    assert [n for n in known if known[n] in (known[best], known[worst])] == sorted((best, worst))
    return best, worst


# --- all pairs, pivot ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("both_orders", [False, True])
def test_all_pairs_is_the_mean_win_of_a_table(both_orders: bool) -> None:
    """Against sums over a random table of answers with holes."""
    num, rng = 9, np.random.default_rng(3)
    table = rng.choice([0.0, 0.25, 0.5, 1.0, np.nan], size=(num, num))
    table[4] = table[:, 4] = np.nan
    schedule = AllPairs(num, (5,), both_orders=both_orders)
    (pairs,) = play(schedule, lambda i, j: None if np.isnan(table[i, j]) else float(table[i, j]), [0.0] * num)
    assert {frozenset(pair) for pair in pairs} == {frozenset(pair) for pair in combinations(range(num), 2)}
    assert len(pairs) == num * (num - 1) // (1 if both_orders else 2) == len(set(pairs))
    asked = np.full((num, num), np.nan)
    for i, j in pairs:
        asked[i, j] = table[i, j]
    for n, quality in enumerate(schedule.quality()):
        wins = np.concatenate([asked[n], 1.0 - asked[:, n]])
        if n == 4:
            assert quality is None
        else:
            assert quality == pytest.approx(np.nanmean(wins))


@pytest.mark.parametrize("num", [2, 3, 8, 9, 16])
def test_every_candidate_stands_first_as_often_as_second(num: int) -> None:
    pairs = list(combinations(range(num), 2))
    found = oriented(pairs, num, (1,))
    assert [tuple(sorted(pair)) for pair in found] == pairs
    firsts = Counter(i for i, _ in found)
    allowed = {(num - 1) // 2, num // 2}
    assert {firsts[n] for n in range(num)} == allowed
    assert found != oriented(pairs, num, (2,)) or num == 2
    swapped = sum(oriented(pairs, num, (seed,))[0] == (1, 0) for seed in range(300))
    assert 100 < swapped < 200, "which of two stands first is drawn by seed"


def test_a_pivot_meets_everyone_once() -> None:
    judge = unerring([3, 1, 0, 2, 4, 2.5])
    schedule = Pivot(6, (0,), 3)
    (pairs,) = play(schedule, judge, [0.0] * 6)
    assert sorted(frozenset(pair) for pair in pairs) == sorted(frozenset((3, n)) for n in (0, 1, 2, 4, 5))
    quality = {n: q for n, q in enumerate(schedule.quality()) if q is not None}
    firsts = {i for i, _ in pairs}
    groups = [{quality[n] for n in group} for group in ({0, 4, 5} & firsts, {0, 4, 5} - firsts)]
    assert all(len(group) == 1 for group in groups), "one comparison each: only the place tells winners apart"
    assert quality.pop(3) == 0.4
    assert max(quality[1], quality[2]) < 0.4 < min(quality[0], quality[4], quality[5])
    both = Pivot(6, (0,), 3, both_orders=True)
    assert len(both.propose(None)) == 10


def test_a_pivot_drawn_by_seed_favours_nobody() -> None:
    drawn = Counter()
    for seed in range(600):
        (pairs,) = play(Pivot(3, (seed,)), lambda i, j: 1.0, [0.0] * 3)
        drawn[(set(pairs[0]) & set(pairs[1])).pop()] += 1
    assert min(drawn.values()) > 150 and set(drawn) == {0, 1, 2}


# --- what answers mean --------------------------------------------------------------------------------------


@given(st.integers(2, 7), st.randoms(use_true_random=False))
def test_with_all_answers_the_expectation_is_the_mean_win(num: int, random) -> None:
    answers = [(i, j, random.choice([0.0, 0.3, 0.5, 1.0])) for i, j in combinations(range(num), 2)]
    wins = np.zeros(num)
    for i, j, win in answers:
        wins[i] += win
        wins[j] += 1 - win
    assert expected_mean_wins(num, answers) == pytest.approx(list(wins / (num - 1)))


def test_unasked_pairs_count_by_their_probability() -> None:
    """Against importance sampling of the same model: no Laplace, no probit, no shared code."""
    num = 5
    answers = [(0, 1, 1.0), (2, 0, 0.0), (0, 3, 1.0), (3, 4, 1.0), (2, 1, 1.0), (1, 3, 0.0)]
    rng = np.random.default_rng(0)
    odds, total = np.zeros((num, num)), 0.0
    for spread in (1.4, 5.0):
        draws = rng.normal(size=(200_000, num)) * spread
        place = rng.normal(size=200_000) * 0.5
        weight = np.ones(200_000)
        for i, j, win in answers:
            p = 1 / (1 + np.exp(-(draws[:, i] - draws[:, j] + place)))
            weight *= p if win else 1 - p
        total += weight.sum()
        for i in range(num):
            for j in range(num):
                odds[i, j] += weight @ (1 / (1 + np.exp(-(draws[:, i] - draws[:, j]))))
    odds /= total
    for i, j, win in answers:
        odds[i, j], odds[j, i] = win, 1 - win
    want = (odds.sum(1) - np.diag(odds)) / (num - 1)
    found = np.array(expected_mean_wins(num, answers))
    assert np.abs(found - want).max() < 0.03
    assert found.argsort().tolist() == want.argsort().tolist()


@given(st.integers(2, 8), st.integers(0, 10_000))
def test_candidates_are_told_apart_by_answers_only(num: int, seed: int) -> None:
    """Other numbers for the candidates: the same expectations. Opposite answers: their complement."""
    rng = np.random.default_rng(seed)
    pairs = [pair for pair in combinations(range(num), 2) if rng.random() < 0.6]
    answers = [(i, j, float(rng.choice([0.0, 0.5, 1.0]))) for i, j in pairs]
    found = expected_mean_wins(num, answers)
    names = rng.permutation(num).tolist()
    renamed = expected_mean_wins(num, [(names[i], names[j], win) for i, j, win in answers])
    assert [renamed[names[n]] for n in range(num)] == pytest.approx(found, abs=1e-8)
    opposite = expected_mean_wins(num, [(j, i, win) for i, j, win in answers])
    assert opposite == pytest.approx([None if q is None else 1 - q for q in found], abs=1e-8)


def test_a_liking_for_the_first_place_is_not_taken_for_strength() -> None:
    """0 won from the first place only, and in that place everyone wins; 5 won from the second place too."""
    always_first = [(1, 2, 1.0), (2, 3, 1.0), (3, 4, 1.0), (4, 1, 1.0), (1, 3, 1.0), (2, 4, 1.0)]
    quality = expected_mean_wins(6, [*always_first, (0, 1, 1.0), (2, 5, 0.0)])
    assert quality[5] is not None and quality[0] is not None and quality[5] > quality[0] + 0.02


def test_the_only_clean_records_are_at_the_ends() -> None:
    """4 won once and was never beaten; 0 won four times, and 4 is who beat it. Likewise 9 and 5 below."""
    answers = [(0, n, 1.0) for n in (1, 2, 3, 5)] + [(4, 0, 1.0)]
    answers += [(n, 5, 1.0) for n in (6, 7, 8)] + [(5, 9, 1.0)]
    answers += [(1, 6, 1.0), (2, 7, 1.0), (3, 8, 1.0), (7, 1, 1.0), (8, 2, 1.0)]
    assert ends(expected_mean_wins(10, answers)) == (4, 9)


def test_answers_that_are_not_sure_count_as_what_they_are() -> None:
    """0 beats everyone by little, 1 loses to 0 by little and beats the others in full: 1 has more wins."""
    answers = [(0, 1, 0.7), (0, 2, 0.7), (0, 3, 0.7), (1, 2, 1.0), (1, 3, 1.0), (2, 3, 0.5)]
    assert expected_mean_wins(4, answers) == pytest.approx([0.7, 2.3 / 3, 0.8 / 3, 0.8 / 3])


def test_a_failed_candidate_is_no_opponent() -> None:
    """All pairs among the others are answered: theirs are plain mean wins, whoever failed beside them."""
    answers = [(0, 1, 1.0), (1, 2, 1.0), (2, 0, 0.0), (3, 0, None), (1, 3, None)]
    assert expected_mean_wins(4, answers) == [1.0, 0.5, 0.0, None]


def test_equal_records_have_equal_means_to_the_last_bit() -> None:
    """Ties must be seen as such: one is then drawn, or the prefix dropped. Among them those of the second best."""
    answers = [(0, n, 1.0) for n in range(1, 10)] + [(n, 10, 1.0) for n in range(1, 10)]
    quality = expected_mean_wins(11, answers)
    assert len(set(quality[1:10])) == 1 and quality[1] == pytest.approx(0.5)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        *others, one, twin = rng.permutation(10).tolist()
        answers = [
            (i, j, float(rng.random() < 0.5)) for i, j in combinations(others, 2) if rng.random() < 0.4
        ]
        for other in others:
            if rng.random() < 0.5:
                win = float(rng.random() < 0.5)
                pair = [(one, other, win), (twin, other, win)]
                if rng.random() < 0.5:
                    pair = [(j, i, win) for i, j, _ in pair]
                answers = [pair[0], *answers, pair[1]]
        if seed % 2:
            answers += [(one, twin, 1.0), (twin, one, 1.0)]  # each won from the first place
        quality = expected_mean_wins(10, answers)
        assert quality[one] == quality[twin], seed


def test_a_clean_record_moves_one_candidate_and_nobody_else() -> None:
    """Against the plain expectation: the rest keep their order, and all means keep their sum.

    The strongest candidate meets none but the second one, the weakest none but the last but one.
    """
    moved = Counter[float]()
    for seed in range(120):
        rng = np.random.default_rng([1, seed])
        num = int(rng.integers(4, 11))
        noise, names = rng.choice([0.0, 0.2]), rng.permutation(num).tolist()
        asked = [(0, 1), *(p for p in combinations(range(1, num - 1), 2) if rng.random() < 0.6)]
        asked.append((num - 2, num - 1))
        answers = [(names[i], names[j], float(rng.random() >= noise)) for i, j in asked]
        beaten = {j if win else i for i, j, win in answers}
        winners = {i if win else j for i, j, win in answers}
        met = beaten | winners
        found, plain = expected_mean_wins(num, answers), plain_expectation(num, answers)
        values = {n: q for n, q in enumerate(found) if q is not None}
        assert values.keys() == met
        clean: set[int] = set()
        for ends_, sign in ((met - beaten, 1.0), (met - winners, -1.0)):
            if len(ends_) == 1:
                (end,) = ends_
                clean.add(end)
                assert all(sign * values[end] > sign * values[n] for n in met - {end})
                moved[sign] += any(sign * plain[end] < sign * plain[n] for n in met)
        rest = met - clean
        assert all(values[i] <= values[j] for i in rest for j in rest if plain[i] <= plain[j])
        assert sum(values.values()) == pytest.approx(sum(plain[n] for n in met), abs=1e-7)
        if not clean:
            assert all(values[n] == pytest.approx(plain[n], abs=1e-8) for n in met)
    assert min(moved[1.0], moved[-1.0]) > 10, "the plain expectation often has another one at the end"


def plain_expectation(num: int, answers: Sequence[tuple[int, int, float]]) -> list[float]:
    """Answered pairs as they were answered, the others by their probability; no pair comes twice."""
    beats = fit_strengths(num, answers).beats.copy()
    for i, j, win in answers:
        beats[i, j], beats[j, i] = win, 1.0 - win
    return [(sum(beats[n]) - beats[n, n]) / (num - 1) for n in range(num)]


# --- tournament ---------------------------------------------------------------------------------------------


def test_the_budget_is_a_share_but_never_too_small_to_settle_both_ends() -> None:
    assert [tournament_budget(num, 0.25) for num in range(9)] == [0, 0, 1, 3, 4, 6, 7, 9, 10]
    assert tournament_budget(16, 0.25) == 30 and tournament_budget(16, 0.25, both_orders=True) == 60
    assert tournament_budget(16, 0.0) == 22 and tournament_budget(32, 0.25) == 124
    assert tournament_budget(16, 1.0) == 120
    assert all(
        tournament_budget(num, 0.29) <= max(0.29 * num * (num - 1) / 2 + 1e-6, 1.5 * num) for num in range(40)
    )


@pytest.mark.parametrize("num", range(2, 33))
def test_an_unerring_judges_best_and_worst_are_found(num: int) -> None:
    """With a quarter of the calls, and with the fewest that can be enough: ceil(3 num / 2) - 2."""
    for seed in range(2 if num > 16 else 8):
        strength = np.random.default_rng([num, seed]).permutation(num)
        want = int(strength.argmax()), int(strength.argmin())
        for share in (0.0, 0.25):
            schedule = tournament(num, seed, share)
            rounds = play(schedule, unerring(strength), [0.0] * num)
            assert sum(map(len, rounds)) <= tournament_budget(num, share)
            assert ends(schedule.quality()) == want


@pytest.mark.parametrize("seed", range(12))
def test_among_equals_any_of_the_best_will_do(seed: int) -> None:
    """With a quarter of the calls, and with the fewest: of two equals one stands for both at either end."""
    rng = np.random.default_rng(seed)
    strength = rng.integers(0, 4, size=14)
    for share in (0.0, 0.25):
        schedule = tournament(14, seed, share)
        play(schedule, unerring(strength), [0.0] * 14)
        quality = np.array(schedule.quality())
        assert strength[quality.argmax()] == strength.max() and strength[quality.argmin()] == strength.min()


def test_equals_are_settled_with_the_fewest_calls_too() -> None:
    """Two best and two worst, who may meet each other: that must not look as if neither could be best or worst."""
    strength = np.array([3, 2, 0, 3, 0, 1])
    for seed in range(40):
        schedule = tournament(6, seed, 0.0)
        play(schedule, unerring(strength), [0.0] * 6)
        quality = np.array(schedule.quality())
        assert strength[quality.argmax()] == 3 and strength[quality.argmin()] == 0, seed


def test_where_nothing_differs_all_is_equal_and_no_number_is_favoured() -> None:
    met = Counter()
    for seed in range(200):
        schedule = tournament(5, seed)
        rounds = play(schedule, lambda i, j: 0.5, [0.0] * 5)
        assert schedule.quality() == [0.5] * 5
        met.update(n for pair in rounds[0] for n in pair)
        met.update(("first", pairs[0][0]) for pairs in rounds)
    assert all(130 < met[n] < 190 for n in range(5)), met
    assert max(met["first", n] for n in range(5)) < 2 * min(met["first", n] for n in range(5))


def test_the_best_and_worst_totals_are_found_and_the_middle_is_left_alone() -> None:
    """Bases a whole win apart: who is best and worst lies within the groups, and the middle one is in neither."""
    rng = np.random.default_rng(0)
    calls = []
    for seed in range(20):
        strength, base = rng.permutation(15), rng.permutation(np.repeat([0.0, 1.0, 2.0], 5))
        schedule = tournament(15, seed)
        rounds = play(schedule, unerring(strength), base.tolist())
        asked = {n for pairs in rounds for pair in pairs for n in pair}
        assert asked == set(np.flatnonzero(base != 1.0))
        calls.append(sum(map(len, rounds)))
        quality = schedule.quality()
        totals = [-np.inf if q is None else q + b for q, b in zip(quality, base, strict=True)]
        assert [q is None for q in quality] == (base == 1.0).tolist()
        high, low = np.flatnonzero(base == 2.0), np.flatnonzero(base == 0.0)
        assert np.argmax(totals) == high[strength[high].argmax()]
        known = np.where(base == 1.0, np.inf, totals)
        assert np.argmin(known) == low[strength[low].argmin()]
    assert np.mean(calls) < 20, f"{calls}: budget 26, two groups of five need 8"


def test_the_total_decides_which_pairs_are_worth_asking() -> None:
    """A candidate half a win ahead of the others is best unless it is bad: fewer of the calls go to the top."""

    def meetings_at_the_top(lead: float) -> float:
        met = 0
        for seed in range(25):
            strength = np.random.default_rng(seed).permutation(16)
            base = [lead * float(strength[n] == 15) for n in range(16)]
            rounds = play(tournament(16, seed), unerring(strength), base)
            met += sum(min(strength[i], strength[j]) >= 8 for pairs in rounds[2:] for i, j in pairs)
        return met / 25

    assert meetings_at_the_top(0.5) < 0.75 * meetings_at_the_top(0.0)


def test_a_candidate_out_of_the_race_is_never_asked_about() -> None:
    base = [0.0, None, 0.0, 0.0, None, 0.0]
    schedule = tournament(6, 1)
    rounds = play(schedule, unerring([1, 9, 2, 3, 0, 4]), base)
    assert {n for pairs in rounds for pair in pairs for n in pair} == {0, 2, 3, 5}
    assert schedule.quality()[1] is None and schedule.quality()[4] is None
    assert play(tournament(6, 1), unerring(range(6)), [None] * 5 + [0.0]) == []


def test_a_tournament_waits_for_the_base() -> None:
    schedule = tournament(6, 1)
    assert schedule.propose(None) == [] and len(schedule.propose([0.0] * 6)) == 3


@pytest.mark.parametrize("both_orders", [False, True])
def test_a_candidate_whose_comparisons_fail_is_given_up(both_orders: bool) -> None:
    strength = np.random.default_rng(4).permutation(12)
    judge = unerring(strength)
    schedule = tournament(12, 0, both_orders=both_orders)
    rounds = play(schedule, lambda i, j: None if 7 in (i, j) else judge(i, j), [0.0] * 12)
    assert sum(7 in pair for pairs in rounds for pair in pairs) == 2 * (1 + both_orders)
    quality = schedule.quality()
    assert quality[7] is None and None not in quality[:7] + quality[8:]
    rest = np.delete(np.arange(12), 7)
    assert ends(quality) == (rest[strength[rest].argmax()], rest[strength[rest].argmin()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num", [0, 1, 2, 7])
def test_without_any_answer_there_is_no_number(kind, num: int) -> None:
    schedule = make_schedule(kind, num, (0,), both_orders=False, pivot=None, share=0.25)
    rounds = play(schedule, lambda i, j: None, [0.0] * num)
    assert schedule.quality() == [None] * num
    assert bool(rounds) == (num > 1)
    if kind == "tournament":
        assert max(Counter(n for pairs in rounds for pair in pairs for n in pair).values(), default=0) <= 2


def test_the_order_of_a_pair_is_balanced() -> None:
    """A judge that always names the first place: nobody gains by standing there more often."""
    for seed in range(10):
        rounds = play(tournament(16, seed), lambda i, j: 1.0, [0.0] * 16)
        lead = Counter()
        for i, j in [pair for pairs in rounds for pair in pairs]:
            lead[i] += 1
            lead[j] -= 1
        assert max(map(abs, lead.values())) <= 3 and np.mean([abs(n) for n in lead.values()]) < 1.2


def test_the_seed_decides_everything() -> None:
    rng = np.random.default_rng(1)
    table = rng.random((11, 11)).round(1)
    table = np.triu(table) + np.tril(1 - table.T, -1)

    def judge(i: int, j: int) -> float:
        return float(table[i, j])

    first, again, other = (play(tournament(11, seed), judge, [0.0] * 11) for seed in (3, 3, 4))
    assert first == again != other


def test_a_noisy_judges_choices_are_nearly_all_pairs_at_a_quarter_of_the_calls() -> None:
    """16 candidates, 78 % accuracy: 91 % of all pairs' gap is what a fixed scheme of 28 calls reaches.

    Over 5,000 pools the tournament's share is 93 %; 150 pools leave it an error of 1.5 %. And the mean wins that
    are expected are those that all pairs give: a slope of 1 over all candidates.
    """
    gaps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    wins_of: dict[str, list[float]] = {kind: [] for kind in KINDS}
    calls = []
    for pool in range(150):
        rng = np.random.default_rng([8, pool])
        quality = rng.normal(size=16)
        luck = np.triu(rng.random((16, 16)), 1)
        luck += np.tril(1 - luck.T, -1)
        wins = luck < 1 / (1 + np.exp(-1.43 * (quality[:, None] - quality)))
        for kind in KINDS:
            schedule = make_schedule(kind, 16, (pool,), both_orders=False, pivot=None, share=0.25)
            rounds = play(schedule, lambda i, j, wins=wins: float(wins[i, j]), [0.0] * 16)
            found = np.array(schedule.quality(), float) + 1e-7 * rng.random(16)
            wins_of[kind] += found.tolist()
            gaps[kind].append(quality[found.argmax()] - quality[found.argmin()])
            if kind == "tournament":
                calls.append(sum(map(len, rounds)))
    share = {kind: np.mean(gaps[kind]) / np.mean(gaps["all_pairs"]) for kind in KINDS}
    assert max(calls) <= 30 and share["tournament"] > 0.90 and share["pivot"] < 0.6, share
    for kind in ("pivot", "tournament"):
        assert 0.85 < np.polyfit(wins_of[kind], wins_of["all_pairs"], 1)[0] < 1.15


class AnyAnswers(RuleBasedStateMachine):
    """A tournament whose judge answers anything, or nothing."""

    @initialize(
        num=st.integers(0, 9),
        seed=st.integers(0, 99),
        share=st.sampled_from([0.0, 0.25, 0.6, 1.0]),
        both_orders=st.booleans(),
        base=st.lists(st.sampled_from([None, 0.0, 0.0, 0.0, 0.4, 1.0, 2.5]), min_size=9, max_size=9),
    )
    def start(self, num: int, seed: int, share: float, both_orders: bool, base: list[float | None]) -> None:
        self.num, self.base, self.both_orders = num, base[:num], both_orders
        self.budget = tournament_budget(num, share, both_orders)
        self.schedule = Tournament(num, (seed,), self.budget, both_orders=both_orders)
        self.asked: list[Pair] = []
        self.heard: set[int] = set()
        self.over = False

    @rule(answers=st.lists(st.sampled_from([None, 0.0, 0.2, 0.5, 1.0, 1.0]), min_size=8, max_size=8))
    def play_a_round(self, answers: list[float | None]) -> None:
        pairs = self.schedule.propose(self.base)
        assert not (self.over and pairs), "what is over stays over"
        self.over = not pairs
        once = [frozenset(pair) for pair in pairs]
        if self.both_orders:
            assert all(pairs[n] == pairs[n + 1][::-1] for n in range(0, len(pairs), 2))
            once = once[::2]
        met = [n for pair in once for n in pair]
        assert len(met) == len(set(met)) == 2 * len(once), "nobody meets himself, or two others at once"
        assert not set(once) & {frozenset(pair) for pair in self.asked}, "no pair is asked again"
        assert all(self.base[n] is not None for n in met)
        self.asked += pairs
        assert len(self.asked) <= self.budget
        given = [answers[n % len(answers)] for n in range(len(pairs))]
        if pairs:
            self.schedule.record(given)
        for pair, win in zip(pairs, given, strict=True):
            self.heard |= set(pair) if win is not None else set()

    @invariant()
    def quality_is_a_share_of_wins(self) -> None:
        for n, quality in enumerate(self.schedule.quality()):
            assert (quality is not None) == (n in self.heard)
            assert quality is None or 0.0 <= quality <= 1.0

    def teardown(self) -> None:
        """It ends, and everyone who could be best or worst was asked about."""
        if not hasattr(self, "schedule"):
            return
        while not self.over:
            self.play_a_round([1.0])
        racing = [b for b in self.base if b is not None]
        met = {n for pair in self.asked for n in pair}
        for n, base in enumerate(self.base):
            if base is not None and len(racing) > 1 and (base + 1 > max(racing) or base - 1 < min(racing)):
                assert n in met


AnyAnswers.TestCase.settings = settings(max_examples=150, stateful_step_count=10, deadline=None)
TestAnyAnswers = AnyAnswers.TestCase
