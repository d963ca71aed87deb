"""A small catalogue, and a recommender that ranks by shared genres."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.answer.rules import Rules
from llmrec.chat.conversation import Conversation
from llmrec.chat.facts import Facts
from llmrec.chat.managers import Manager, RuleManager
from llmrec.chat.reading import Reader
from llmrec.chat.tools import Tools
from llmrec.errors import DataError
from llmrec.types import Item

_FILMS = """
Night Ferry (1984)|Horror, Thriller|1984|Ann Vale
The Cellar Door (1991)|Horror|1991|Bo Quist
Harvest of Teeth (1997)|Horror, Comedy|1997|Cy Marsh
Laughing Gas Station (1993)|Comedy|1993|Ann Vale
Two Left Feet (1996)|Comedy, Romance|1996|Dee Okoro
Paper Moon Landing (1989)|Comedy, Sci-Fi|1989|Bo Quist
Orbit of Glass (1995)|Sci-Fi, Drama|1995|Cy Marsh
Signal, The (1998)|Sci-Fi, Thriller|1998|Ann Vale
Red Dust Station (1977)|Sci-Fi, Horror|1977|Dee Okoro
Letters to Lena (1994)|Romance, Drama|1994|Bo Quist
A Quiet Harbour (1992)|Drama|1992|Cy Marsh
The Long Verdict (1990)|Drama, Thriller|1990|Ann Vale
Copper Creek (1962)|Western|1962|Dee Okoro
Dry River Showdown (1969)|Western, Comedy|1969|Bo Quist
Little Drummer (1985)|Children's, Musical|1985|Cy Marsh
Songs of the Reef (1999)|Musical, Romance|1999|Ann Vale
Cold Trail (1988)|Thriller|1988|Dee Okoro
Zero Hour Garden (2000)|Thriller, Sci-Fi|2000|Cy Marsh
""".strip().splitlines()


def items() -> dict[str, Item]:
    """Return the catalogue."""
    result = {}
    for number, line in enumerate(_FILMS):
        title, genres, year, director = line.split("|")
        result[f"f{number:02}"] = Item(
            item_id=f"f{number:02}", title=title, fields={"genres": genres, "year": year, "director": director}
        )
    return result


class MadeLists:
    """Ranks by shared genres, then by id."""

    def __init__(self, known: dict[str, Item], rules: Rules | None = None) -> None:
        self._items, self.rules = known, rules or Rules()

    def rank(self, liked: Sequence[str], rules: Rules, k: int, candidates: Sequence[str] = ()) -> list[str]:
        allowed = self.rules.joined(rules).allowed(self._items)
        pool = [name for name in candidates or self._items if name in allowed]
        if not pool:
            raise DataError("the rules exclude every item", kind="empty")
        liked_genres = {genre for name in liked for genre in self._genres(name)}
        order = sorted(pool, key=lambda name: (-len(liked_genres & self._genres(name)), name))
        return [name for name, _ in self.rules.arrange([(name, 0.0) for name in order], self._items, k)]

    def similar(self, named: Sequence[str], rules: Rules, k: int) -> list[str]:
        return [name for name in self.rank(named, rules, k) if name not in named]

    def _genres(self, name: str) -> set[str]:
        return set(self._items[name].fields["genres"].split(", "))


def conversation(
    manager: Manager | None = None, known: dict[str, Item] | None = None, rules: Rules | None = None
) -> Conversation:
    """Return a conversation over the catalogue."""
    known = known or items()
    facts = Facts(known)
    return Conversation(Tools(facts, MadeLists(known, rules)), manager or RuleManager(), Reader(facts))
