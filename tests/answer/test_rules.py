"""Business rules, compared with a plain implementation."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.answer.known import Catalogue
from llmrec.answer.rules import MAX_FIELD_VALUES, OneOf, Quota, Rules, required_depth
from llmrec.errors import DataError
from llmrec.types import Item
from tests.facts import Facts, raises

Ranked = list[tuple[str, float]]

VALUES = ("comedy", "drama", "war", "noir")
FIELDS = ("genre", "shop")


def item(key: str, **fields: str) -> Item:
    return Item(item_id=key, title=f"title {key}", fields=fields)


def catalogue(*texts: str, field: str = "genre") -> dict[str, Item]:
    return {str(n): item(str(n), **{field: text}) for n, text in enumerate(texts)}


def ranked(items: Mapping[str, Item]) -> Ranked:
    return [(key, -float(position)) for position, key in enumerate(items)]


def ids(chosen: Sequence[tuple[str, float]]) -> list[str]:
    return [key for key, _ in chosen]


def values(text: str) -> set[str]:
    """Return the values in a comma-separated text, with a plain parser."""
    return {part.strip().lower() for part in text.split(",") if part.strip()}


@st.composite
def field_texts(draw: st.DrawFn) -> str:
    """A comma-separated list with mixed case, spaces and empty entries."""
    parts = draw(st.lists(st.sampled_from((*VALUES, "")), max_size=3))
    shapes = (str, str.upper, str.title, lambda part: f"  {part} ")
    return ",".join(draw(st.sampled_from(shapes))(part) for part in parts)


@st.composite
def catalogues(draw: st.DrawFn, largest: int = 12) -> dict[str, Item]:
    fields = st.dictionaries(st.sampled_from(FIELDS), field_texts())
    drawn = draw(st.lists(fields, max_size=largest))
    return {str(n): item(str(n), **each) for n, each in enumerate(drawn)}


@st.composite
def all_rules(draw: st.DrawFn) -> Rules:
    conditions = st.dictionaries(
        st.sampled_from(FIELDS), st.frozensets(st.sampled_from((*VALUES, "Comedy", "comedy,war")), max_size=3)
    )
    quotas = st.lists(st.builds(Quota, st.sampled_from(FIELDS), st.integers(1, 3)), max_size=3)
    return Rules(
        only=draw(conditions),
        without=draw(conditions),
        block=draw(st.frozensets(st.sampled_from("0123"), max_size=2)),
        quotas=tuple(draw(quotas)),
        diversity=draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))),
    )


DIVERSITIES = st.sampled_from((0.0, 0.1, 0.3, 0.5, 0.9, 1.0))
QUOTAS = st.lists(st.builds(Quota, st.sampled_from(FIELDS), st.integers(1, 3)), max_size=2).map(tuple)


def passes(rules: Rules, key: str, fields: Mapping[str, str]) -> bool:
    """Return whether rules allow an item, with a plain implementation."""

    def has(name: str, expected: frozenset[str]) -> bool:
        text = fields.get(name, "")
        return bool({want.lower() for want in expected} & (values(text) | {text.strip().lower()}))

    return (
        key not in rules.block
        and all(has(name, expected) for name, expected in rules.only.items())
        and all(has(each.field, each.values) for each in rules.more)
        and not any(has(name, expected) for name, expected in rules.without.items())
    )


@given(items=catalogues(), rules=all_rules())
def test_allowed_items_by_brute_force(items: dict[str, Item], rules: Rules) -> None:
    assert rules.allowed(items) == {key for key, each in items.items() if passes(rules, key, each.fields)}


def test_values_match_singly_and_as_full_text() -> None:
    items = catalogue("Acme, Inc.", "Inc.", " acme ", "Acmeland", "", field="maker")
    allowed = {
        name: sorted(Rules(only={"maker": frozenset({name})}).allowed(items))
        for name in ("acme", "INC.", "acme, inc. ", "land", "")
    }
    assert allowed == {"acme": ["0", "2"], "INC.": ["0", "1"], "acme, inc. ": ["0"], "land": [], "": []}
    assert Rules(without={"maker": frozenset({"Acme"})}).allowed(items) == {"1", "3", "4"}


def test_values_match_in_any_case() -> None:
    items = catalogue("STRASSE, Ωμέγα", field="place")
    assert Rules(only={"place": frozenset({"straße"})}).allowed(items) == {"0"}
    assert Rules(without={"place": frozenset({"ΩΜΈΓΑ"})}).allowed(items) == frozenset()


def test_items_without_the_field() -> None:
    items = {"1": item("1", genre="war"), "2": item("2"), "3": item("3", genre=" ")}
    assert Rules(only={"genre": frozenset({"war"})}).allowed(items) == {"1"}
    assert Rules(without={"genre": frozenset({"war"})}).allowed(items) == {"2", "3"}
    assert Rules(only={"genre": frozenset()}).allowed(items) == frozenset()


@given(items=catalogues(), one=all_rules(), other=all_rules())
def test_joined_rules_forbid_both(items: dict[str, Item], one: Rules, other: Rules) -> None:
    both = one.joined(other)
    assert both.allowed(items) == one.allowed(items) & other.allowed(items)
    chosen = Counter(
        (name, value)
        for key in ids(both.arrange(ranked(items), items, 6))
        for name in FIELDS
        for value in values(items[key].fields.get(name, ""))
    )
    for quota in (*one.quotas, *other.quotas):
        assert all(times <= quota.most for (name, _), times in chosen.items() if name == quota.field)
    assert both.diversity == max(one.diversity, other.diversity)


@given(one=all_rules(), other=all_rules(), third=all_rules())
def test_joining_is_commutative_and_associative(one: Rules, other: Rules, third: Rules) -> None:
    assert one.joined(other) == other.joined(one)
    assert hash(one.joined(other)) == hash(other.joined(one))
    assert one.joined(other).joined(third) == one.joined(other.joined(third))
    assert one.joined(one) == one.joined(Rules()) == one


def test_joined_conditions_on_one_field() -> None:
    items = catalogue("comedy, war", "comedy", "war")
    comedy, war = (Rules(only={"genre": frozenset({name})}) for name in ("comedy", "war"))
    assert comedy.joined(war).allowed(items) == {"0"}
    assert comedy.joined(war).more == (OneOf("genre", frozenset({"war"})),)
    assert comedy.joined(Rules(only={"genre": frozenset({"Comedy", "noir"})})) == comedy


def test_equal_rules_have_equal_hashes() -> None:
    one = Rules(without={"genre": frozenset({" War"}), "shop": frozenset()}, quotas=(Quota("b", 2), Quota("a", 1)))
    same = Rules(without={"genre": frozenset({"war"})}, quotas=(Quota("a", 1), Quota("b", 5), Quota("b", 2)))
    assert one == same and len({one, same, pickle.loads(pickle.dumps(one))}) == 1
    assert one != Rules(without={"genre": frozenset({"war"})})


def test_any_rule_makes_rules_true() -> None:
    assert Rules(only={"genre": frozenset()}) and Rules(without={"genre": frozenset({"war"})})
    assert Rules(block=frozenset({"1"})) and Rules(quotas=(Quota("genre", 1),)) and Rules(diversity=0.1)
    assert not Rules() and not Rules.read({"without": {"genre": []}})


def fits(chosen: Sequence[str], items: Mapping[str, Item], quotas: Sequence[Quota]) -> bool:
    return all(
        times <= quota.most
        for quota in quotas
        for times in Counter(v for key in chosen for v in values(items[key].fields.get(quota.field, ""))).values()
    )


def test_quota_by_hand() -> None:
    items = catalogue("Comedy, Drama", "comedy", "drama", "", "COMEDY", "war, comedy")
    assert ids(Rules(quotas=(Quota("genre", 2),)).arrange(ranked(items), items, 6)) == ["0", "1", "2", "3"]
    # The first item uses the quotas of the next two, so the list is shorter than possible.
    assert ids(Rules(quotas=(Quota("genre", 1),)).arrange(ranked(items), items, 3)) == ["0", "3"]


def telling(items: Sequence[Item]) -> dict[str, set[tuple[str, str]]]:
    """Return the relevant (field, value) pairs of each item, by id."""
    pairs: dict[str, set[tuple[str, str]]] = {each.item_id: set() for each in items}
    for name in {name for each in items for name in each.fields}:
        times = Counter(value for each in items for value in values(each.fields.get(name, "")))
        if not times or len(times) > MAX_FIELD_VALUES or max(times.values()) == 1 or min(times.values()) == len(items):
            continue
        for each in items:
            pairs[each.item_id] |= {(name, value) for value in values(each.fields.get(name, ""))}
    return pairs


def plainly(rules: Rules, order: Ranked, items: Mapping[str, Item], k: int) -> list[str]:
    """Compute maximal marginal relevance by its definition, one item at a time."""
    pairs = telling([items[key] for key in ids(order)])
    chosen: list[str] = []
    for _ in range(k):
        best, most = None, -math.inf
        for position, (key, _) in enumerate(order):
            if key in chosen or not fits([*chosen, key], items, rules.quotas):
                continue
            alike = max(
                (len(pairs[key] & pairs[one]) / max(1, len(pairs[key] | pairs[one])) for one in chosen), default=0.0
            )
            gain = (1 - rules.diversity) / math.log2(position + 2) - rules.diversity * alike
            if gain > most + 1e-12:
                best, most = key, gain
        if best is None:
            break
        chosen.append(best)
    return chosen


@given(items=catalogues(), quotas=QUOTAS, diversity=DIVERSITIES, k=st.integers(0, 8))
def test_arrange_by_brute_force(items: dict[str, Item], quotas: tuple[Quota, ...], diversity: float, k: int) -> None:
    rules = Rules(quotas=quotas, diversity=diversity)
    assert ids(rules.arrange(ranked(items), items, k)) == plainly(rules, ranked(items), items, k)


def test_diversity_by_hand() -> None:
    items = catalogue("war", "war", "war, noir", "comedy")
    # Second: .5 / log2(3) - .5 = -.185, .5 / 2 - .5 / 2 = 0, .5 / log2(5) = .215. Third: -.185, 0.
    assert ids(Rules(diversity=0.5).arrange(ranked(items), items, 4)) == ["0", "3", "2", "1"]
    # Second: .9 / log2(3) - .1 = .468, .9 / 2 - .1 / 2 = .4, .9 / log2(5) = .388. Third: .4, .388.
    assert ids(Rules(diversity=0.1).arrange(ranked(items), items, 4)) == ["0", "1", "2", "3"]
    # At 1 only similarity counts, and the position breaks ties.
    assert ids(Rules(diversity=1.0).arrange(ranked(items), items, 4)) == ["0", "3", "2", "1"]


@given(items=catalogues(), k=st.integers(-2, 20), scores=st.lists(st.floats(allow_nan=False), min_size=12, max_size=12))
def test_no_rules_keep_the_ranking(items: dict[str, Item], k: int, scores: list[float]) -> None:
    order = list(zip(items, sorted(scores, reverse=True), strict=False))
    assert Rules(block=frozenset({"0"})).arrange(order, {}, k) == order[: max(k, 0)]


@given(items=catalogues(), rules=all_rules(), k=st.integers(0, 8), seed=st.integers(0, 99))
def test_score_scale_does_not_matter(items: dict[str, Item], rules: Rules, k: int, seed: int) -> None:
    numbers = sorted((random.Random(seed).gauss(0, 1) for _ in items), reverse=True)
    order = list(zip(items, numbers, strict=True))
    chosen = rules.arrange(order, items, k)
    for change in (lambda x: 1e9 * x - 5, math.exp, math.atan, lambda x: 0.0):
        changed = [(key, change(score)) for key, score in order]
        assert rules.arrange(changed, items, k) == [(key, change(score)) for key, score in chosen]


@given(items=catalogues(), rules=all_rules(), k=st.integers(0, 8), seed=st.integers(0, 99))
def test_uninformative_fields_do_not_matter(items: dict[str, Item], rules: Rules, k: int, seed: int) -> None:
    """The order of fields and items, the spelling of values, and values of one item or of all items."""
    draw = random.Random(seed)
    shuffled = draw.sample(sorted(items), len(items))
    changed: dict[str, Item] = {}
    for key in draw.sample(sorted(items), len(items)):
        fields = {name: text.upper().replace(",", " ,") for name, text in items[key].fields.items()}
        fields |= {"text": f"about {shuffled[int(key)]}", "shelf": "same", "empty": ""}
        fields |= {"title": draw.choice(VALUES), "item_id": draw.choice(VALUES)}
        changed[key] = item(key, **{name: fields[name] for name in draw.sample(sorted(fields), len(fields))})
    assert rules.arrange(ranked(items), changed, k) == rules.arrange(ranked(items), items, k)


@pytest.mark.parametrize(("distinct", "counts"), [(MAX_FIELD_VALUES, True), (MAX_FIELD_VALUES + 1, False)])
def test_field_with_many_values_is_ignored(distinct: int, counts: bool) -> None:
    items = catalogue("v0", *(f"v{n}" for n in range(distinct)))
    # The second item is similar to the first one if the field counts.
    assert ids(Rules(diversity=0.9).arrange(ranked(items), items, 2)) == (["0", "2"] if counts else ["0", "1"])


@given(items=catalogues(), rules=all_rules(), k=st.integers(0, 8))
def test_deep_enough_is_sufficient(items: dict[str, Item], rules: Rules, k: int) -> None:
    depth = required_depth(rules, k)
    assert (depth is None) == bool(rules.quotas or rules.diversity)
    assert rules.arrange(ranked(items)[:depth], items, k) == rules.arrange(ranked(items), items, k)


def test_last_item_matters_with_quotas_or_diversity() -> None:
    size = 50
    items = catalogue(*["war"] * (size - 1), "comedy")
    for rules in (Rules(quotas=(Quota("genre", 1),)), Rules(diversity=0.5)):
        assert ids(rules.arrange(ranked(items), items, 2)) == ["0", str(size - 1)]
        assert ids(rules.arrange(ranked(items)[:-1], items, 2)) != ["0", str(size - 1)]


def test_reads_rules() -> None:
    read = Rules.read(
        {
            "only": {"Genre": ["Comedy", "war "], "year": [1995]},
            "without": {"in_stock": ["no"]},
            "block": ["7", 8],
            "quotas": [{"field": "brand", "most": 2}],
            "diversity": 1,
        }
    )
    assert read == Rules(
        only={"Genre": frozenset({"comedy", "war"}), "year": frozenset({"1995"})},
        without={"in_stock": frozenset({"no"})},
        block=frozenset({"7", "8"}),
        quotas=(Quota("brand", 2),),
        diversity=1.0,
    )
    assert Rules.read({}) == Rules()


@pytest.mark.parametrize(
    ("record", "facts"),
    [
        ({"onyl": {}}, Facts("unknown-key", column="onyl", says=("'only'", "diversity"))),
        ({"quotas": [{"field": "a", "mots": 1}]}, Facts("unknown-key", column="quotas.0.mots", says="'most'")),
        ({"quotas": [{"field": "a", "most": 1}, {"most": 1}]}, Facts("missing-key", column="quotas.1.field")),
        ({"quotas": [{"field": "a", "most": 0}]}, Facts("bad-value", column="quotas.a", says="without")),
        ({"quotas": [{"field": "a", "most": True}]}, Facts("bad-value", column="quotas.0.most")),
        ({"quotas": [{"field": "a", "most": 1.5}]}, Facts("bad-value", column="quotas.0.most")),
        ({"quotas": [{"field": 3, "most": 1}]}, Facts("bad-value", column="quotas.0.field")),
        ({"quotas": ["a"]}, Facts("bad-value", column="quotas.0")),
        ({"only": {"genre": "war"}}, Facts("bad-value", column="only.genre")),
        ({"only": {"genre": []}}, Facts("empty", column="only.genre")),
        ({"only": {"genre": [" "]}}, Facts("bad-value", column="only.genre")),
        ({"without": {"in_stock": [False]}}, Facts("bad-value", column="without.in_stock", says="quotes")),
        ({"without": {1995: ["a"]}}, Facts("bad-value", column="without", says="quotes")),
        ({"without": ["genre"]}, Facts("bad-value", column="without")),
        ({"block": "17"}, Facts("bad-value", column="block")),
        ({"diversity": 1.01}, Facts("bad-value", column="diversity")),
        ({"diversity": math.nan}, Facts("bad-value", column="diversity")),
        ({"diversity": "0.5"}, Facts("bad-value", column="diversity")),
        ({"diversity": True}, Facts("bad-value", column="diversity")),
        ([], Facts("bad-value", column="rules")),
    ],
)
def test_invalid_rules_are_refused(record: object, facts: Facts) -> None:
    with raises(DataError, facts):
        Rules.read(record)


ONE = frozenset({"x"})


@pytest.mark.parametrize(
    ("rules", "facts"),
    [
        (Rules(only={"genra": ONE}), Facts("unknown-name", column="only.genra", says=("'genre'", "shop"))),
        (Rules(without={"genre": ONE, "Shop": ONE}), Facts("unknown-name", column="without.Shop", says="'shop'")),
        (Rules(quotas=(Quota("brand", 1),)), Facts("unknown-name", column="quotas.brand", says="genre, shop")),
        (Rules(only={"title": ONE}), Facts("unknown-name", column="only.title")),
        (Rules(quotas=(Quota("item_id", 1),)), Facts("unknown-name", column="quotas.item_id")),
    ],
)
def test_rule_on_unknown_field_is_refused(rules: Rules, facts: Facts) -> None:
    with raises(DataError, facts):
        rules.check({"1": item("1", genre="war"), "2": item("2", shop="", title="odd", item_id="odd")})
    rules.check({})


def test_rule_on_rare_field_is_accepted() -> None:
    rules = Rules(only={"genre": frozenset({"never seen"})}, quotas=(Quota("shop", 1),), block=frozenset({"9"}))
    rules.check({"1": item("1", genre="war"), "2": item("2", shop="")})
    with raises(DataError, Facts("unknown-name", column="only.genre", says="none")):
        rules.check({"1": item("1")})


def test_unknown_item_cannot_be_arranged() -> None:
    with raises(DataError, Facts("unknown-name", says="'9'")):
        Rules(diversity=0.5).arrange([("9", 1.0)], catalogue("war"), 1)


def test_allowed_items_follow_catalogue_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items may change while a thread computes: its result matches the items that it read."""
    shop, rules = Catalogue(catalogue("comedy", "drama")), Rules.read({"without": {"genre": ["war"]}})
    plain, late = Rules.allowed, [item("1", genre="war"), item("2", genre="noir")]

    def slow(self: Rules, items: Mapping[str, Item]) -> frozenset[str]:
        if late:
            shop.change([late.pop(0)], ["0"])
            shop.change([late.pop(0)], [])
        return plain(self, items)

    monkeypatch.setattr(Rules, "allowed", slow)
    assert shop.allowed(rules) == {"0", "1"} and shop.allowed(rules) == {"2"}
    assert [each.item_id for each in shop.search("title", limit=9, offset=0)[0]] == ["1", "2"]
