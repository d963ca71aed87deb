"""Recognises what a column contains by its name, in several languages and spellings."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from llmrec.data.read.nested import ELEMENT_SUFFIX, is_nested_path

# Weight 1: an unambiguous name in tables of interactions. Names with lower weights also have other uses.
_ROLE_WORDS: Mapping[str, Mapping[float, str]] = {
    "user": {
        1.0: """user customer cust member reviewer client buyer shopper purchaser visitor reader viewer listener player
            subscriber patron guest uid consumer rater kunde kunden benutzer nutzer kaufer utilisateur acheteur
            usuario cliente clientes utente acquirente comprador gebruiker klant uzytkownik klient zakaznik
            пользователь клиент покупатель 用户 顾客 客户 会员 ユーザー 顧客 会員 사용자 고객 회원""",
        0.9: "email mail",
        0.8: "account person people student learner patient employee participant household",
        0.5: "session cookie device profile author critic subject visit",
    },
    "item": {
        1.0: """item product prod asin sku isbn movie film book song track iid ean upc gtin barcode business restaurant
            artikel produkt ware article prodotto articolo producto articulo produto artigo produit livre libro livro
            buch boek pelicula cancion towar ksiazka товар продукт книга фильм артикул 商品 产品 物品 电影 图书 書籍
            映画 상품 제품 영화""",
        0.9: "game app show series episode course video podcast album hotel venue recipe listing offer anime beer wine",
        0.8: "goods material service dish joke artist place poi pid mid bid",
        0.5: "ad news story post page url work document doc content",
    },
    "rating": {
        1.0: """rating ratings rate rated stars star score scores overall bewertung sterne wertung evaluation etoiles
            calificacion puntuacion valoracion estrellas puntaje voto valutazione stelle punteggio avaliacao estrelas
            beoordeling sterren ocena gwiazdki оценка рейтинг 评分 星级 評価 평점 별점""",
        0.8: "grade mark marks points vote preference satisfaction note nota thumbs liked cijfer",
        0.5: "like feedback value",
    },
    "time": {
        1.0: """timestamp ts time date datetime when epoch unixtime datum zeit zeitpunkt uhrzeit fecha tijd tijdstip
            czas дата время 时间 日期 日時 日付 날짜 시간""",
        0.9: "at on ordered purchased bought created viewed watched heure hora ora data",
        0.5: "day week month year jour giorno dia tag hour",
    },
    "title": {
        1.0: """title titel titre titulo titolo tytul bezeichnung designation название наименование 名称 标题 书名
            商品名 タイトル 제목 상품명""",
        0.9: "name nom nombre nome naam nazwa имя 이름 名前",
        0.6: "headline label caption",
    },
    "text": {
        1.0: """text review comment comments body remark remarks opinion kommentar rezension meinung commentaire avis
            comentario comentarios resena opiniones commento recensione resenha opiniao opmerking recensie komentarz
            opinia recenzja отзыв комментарий 评论 評論 レビュー コメント 리뷰 후기""",
        0.8: "feedback message explanation reason tip content notes note reviewtext reviewbody",
    },
    # Names of text columns that always refer to an item; a comment may refer to an order.
    "review": {
        1.0: """review reviews reviewtext reviewbody opinion opinions explanation rezension meinung avis resena
            opiniones recensione resenha opiniao recensie opinia recenzja отзыв 评论 評論 レビュー 리뷰 후기""",
    },
    "field": {
        1.0: """genre genres category categories brand price manufacturer publisher kategorie marke preis verlag prix
            marque categorie genero categoria precio marca prezzo preco merk prijs cena kategoria категория цена бренд
            жанр 类别 类目 品牌 价格 カテゴリ ブランド 価格 ジャンル 카테고리 브랜드 가격""",
        0.8: """department author artist director colour color size type style topic section tags platform language
            gattung autor auteur autore editor couleur farbe maker vendor class subcategory format""",
    },
    "count": {
        1.0: """count counts quantity qty plays playcount listens clicks views purchases frequency freq helpful votes
            upvotes downvotes anzahl menge stuck quantite cantidad quantita quantidade aantal ilosc количество 数量 個数
            수량""",
        0.9: "amount sum total units pieces duration seconds length age",
    },
    # Names of orders, lines and reviews, which are never users or items.
    "row": {
        1.0: """order invoice transaction txn receipt basket cart row index line record log bestellung bestell
            rechnung auftrag commande facture pedido factura ordine fattura bestelling zamowienie
            заказ 订单 注文 주문 unnamed""",
    },
    # Times of events other than the interaction: a release, a delivery, the last change.
    "other": {1.0: "updated modified changed shipped delivered delivery birth born release released published due"},
    "id": {
        1.0: """id ids nr no number num nummer code key idx pk uuid guid hash numero ref kode codigo codice номер код
            编号 番号 번호""",
    },
}
# Words that have a meaning only together with other words.
_FILLERS = frozenset(
    {"e", "the", "of", "de", "del", "di", "du", "da", "la", "le", "les", "unix", "parent", "main", "raw"}
)
_MIN_PART_LENGTH = 4
_SHORT_ENDINGS = ("id", "ids", "nr", "no", "ts", "at", "key", "name", "date", "time", "code", "text")


def _build_roles_by_word() -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = {}
    for role, by_weight in _ROLE_WORDS.items():
        for weight, words in by_weight.items():
            for word in words.split():
                known = result.setdefault(_normalise_text(word), {})
                known[role] = max(weight, known.get(role, 0.0))
    return result


def _normalise_text(text: str) -> str:
    """Return a text in lower case without accents."""
    apart = unicodedata.normalize("NFKD", text.replace("ł", "l").replace("Ł", "L").replace("ß", "ss"))
    bare = "".join(c for c in apart if not "\u0300" <= c <= "\u036f")
    return unicodedata.normalize("NFKC", bare).casefold()


_ROLES_BY_WORD = _build_roles_by_word()


@dataclass(frozen=True)
class ColumnMeaning:
    """What the name of a column means.

    Attributes:
        roles: Weight in (0, 1] of each role that a word of the name has.
        is_id: Whether a word of it means an id or a number.
    """

    roles: Mapping[str, float]
    is_id: bool

    def weight(self, role: str) -> float:
        """Return how strongly the name indicates a role such as user or item; 0 if it does not."""
        return self.roles.get(role, 0.0)


def tokenise_name(name: str) -> list[str]:
    """Split a name into words in lower case without accents: ``unixReviewTime`` gives unix, review, time."""
    apart = re.sub(r"(?<=[a-zà-ÿ0-9])(?=[A-ZÀ-Þ])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return [part for part in re.split(r"[\W_]+", _normalise_text(apart)) if part]


def _split_into_words(name: str) -> list[str]:
    """Split a name into words, and compounds into known words where possible."""
    return [word for token in tokenise_name(name) for word in _split_compound(token.rstrip("0123456789") or token)]


def _main_part(path: str) -> str:
    """Return the relevant part of a path: ``sku`` of ``lines[].sku``, but ``user id`` of ``user.id``.

    An id or a name belongs to the object around it; in a list, to one of its elements.
    """
    *outer, last = (_singular_name(part) for part in path.split("."))
    meanings = [_ROLES_BY_WORD.get(word, {}) for word in _split_into_words(last)]
    bare = all("id" in roles or roles.get("title") == 0.9 for roles in meanings)
    return f"{outer[-1]} {last}" if outer and bare else last


def _singular_name(part: str) -> str:
    """Return the singular of a list name, such as ``item`` for ``items``."""
    name = part.removesuffix(ELEMENT_SUFFIX)
    return name[:-1] if part != name and name.endswith("s") and _normalise_text(name[:-1]) in _ROLES_BY_WORD else name


def interpret_column_name(name: str) -> ColumnMeaning:
    """Return what a column name means. The noun comes last: ``product_rating`` is a rating."""
    words = _split_into_words(_main_part(name) if is_nested_path(name) else name)
    roles: dict[str, float] = {}
    for word in words:
        for role, weight in _ROLES_BY_WORD.get(word, {}).items():
            # "id" alone does not mean an item, and "at" or "on" means a time only with another word.
            if not (word in ("at", "on") and len(words) == 1):
                roles[role] = max(weight, roles.get(role, 0.0))
    unknown = any(word not in _ROLES_BY_WORD and word not in _FILLERS and not word.isdigit() for word in words)
    both = {word for word in words if {"item", "field"} <= _ROLES_BY_WORD.get(word, {}).keys()}
    if words[:1] in (["num"], ["number"], ["no"]) and len(words) > 1:
        return ColumnMeaning({"count": 1.0}, False)
    is_id = roles.pop("id", 0.0) > 0
    settled = _resolve_roles(roles, is_id)
    if both and "field" in settled and not any("item" in _ROLES_BY_WORD.get(word, {}) for word in set(words) - both):
        settled["item"] = 0.6  # an artist is an attribute of a song, and an item if there are no songs
    if unknown and not is_id:
        # the city of a customer is not a customer
        settled = {r: 0.6 * weight if r in ("user", "item") else weight for r, weight in settled.items()}
    return ColumnMeaning(settled, is_id)


def _resolve_roles(roles: dict[str, float], is_id: bool) -> dict[str, float]:
    """Return the possible roles of a column, after considering all words of its name."""
    removed: set[str] = set()
    if "count" in roles:
        removed = set(roles) - {"count"}
    elif is_id:
        # The id of a review or the number of a category is neither a text nor an item attribute.
        removed = {"rating", "time", "title", "text", "field", "other"}
        if removed & roles.keys() and not {"user", "item"} & roles.keys():
            roles = {**roles, "row": 1.0}
    elif "other" in roles:
        roles = {role: weight * 0.6 if role == "time" else weight for role, weight in roles.items()}
    elif "time" in roles:
        removed = {"user", "item", "text", "title", "rating", "row"} if roles["time"] > 0.8 else {"row"}
    elif {"title", "text"} <= roles.keys():
        removed = {"title", "text"} if roles["text"] == 1.0 else {"text"}
        roles = {**roles, "headline": 1.0}
    elif {"user", "title"} <= roles.keys():
        # A user name can identify the user if there is no id.
        roles = {**roles, "user": 0.7}
        removed = {"title", "item"}
    if {"rating", "title", "text", "field"} & (roles.keys() - removed):
        removed |= {"item", "row"} | ({"user"} if "title" not in roles else set())
        if "field" in roles:
            removed |= {"title"}
        if "rating" in roles and roles.get("text") == 1.0:
            removed |= {"text"}
    return {role: weight for role, weight in roles.items() if role not in removed}


def _split_compound(token: str) -> list[str]:
    """Split a compound such as ``kundennummer`` or ``movieid`` into known words; only the token if it is not one."""
    if token in _ROLES_BY_WORD or token in _FILLERS:
        return [token]
    for cut in range(len(token) - 2, 1, -1):
        head, tail = token[:cut], token[cut:]
        wide = max(map(ord, token)) > 0x2E80
        head_ok = head in _ROLES_BY_WORD and (len(head) >= _MIN_PART_LENGTH or wide)
        tail_ok = tail in _ROLES_BY_WORD and (len(tail) >= _MIN_PART_LENGTH or tail in _SHORT_ENDINGS or wide)
        if head_ok and tail_ok:
            return [head, tail]
    for cut in range(len(token) - 1, 0, -1):
        head, tail = token[:cut], token[cut:]
        if head in _ROLES_BY_WORD and (len(head) > _MIN_PART_LENGTH or max(map(ord, head)) > 0x2E80):
            return [head, *([tail] if tail in _ROLES_BY_WORD else [])]
    for cut in range(1, len(token) - _MIN_PART_LENGTH):
        if token[cut:] in _ROLES_BY_WORD and len(token[cut:]) > _MIN_PART_LENGTH:
            return [token[cut:]]
    return [token]


def plural_noun(word: str) -> str | None:
    """Return an English plural such as "films" for the items of a column or file; None if unknown."""
    for part in _split_into_words(word):
        result = _NOUNS.get(part) or (part if part in _NOUNS.values() else None)
        if result is not None:
            return result
    return None


# Event types in logs of shops and trackers, ordered from the strongest to the weakest sign of interest.
_EVENTS = (
    "purchase purchased buy bought order ordered sale transaction checkout kauf bestellung achat compra acquisto",
    "cart addtocart basket addtobasket warenkorb",
    "fav favorite favourite wishlist like save bookmark",
    "click clicked",
    "pv view viewed pageview itemview productview detail impression visit",
)
_EVENT_WORDS = {word: rank for rank, words in enumerate(_EVENTS) for word in words.split()}
_OTHER_EVENTS = frozenset({"removefromcart", "remove", "return", "refund", "cancel", "search", "login"})


def event_rank(value: str) -> int | None:
    """Return the rank of an event type by strength of interest, 0 for a purchase; None if unknown."""
    word = "".join(tokenise_name(value))
    if word in _OTHER_EVENTS:
        return len(_EVENTS)
    return _EVENT_WORDS.get(word, _EVENT_WORDS.get(word.removeprefix("add").removeprefix("to")))


# Words in names of columns about an order and its delivery.
_ORDER = """order bestell bestellung commande pedido ordine bestelling delivery deliver shipping shipment liefer
    lieferung versand livraison envio entrega consegna courier gift internal admin"""
_ORDER_WORDS = frozenset(_ORDER.split())


def is_about_orders(name: str) -> bool:
    """Whether a column name is about an order or its delivery, such as ``delivery_note``."""
    return any(part in _ORDER_WORDS for token in tokenise_name(name) for part in (token, *_split_compound(token)))


_REGULAR_NOUNS = """product movie film book song track game app show episode course video podcast album hotel restaurant
    venue recipe listing offer article joke beer wine place artist post page document"""
_NOUNS: Mapping[str, str] = {
    **{word: f"{word}s" for word in _REGULAR_NOUNS.split()},
    **dict.fromkeys(("sku", "asin", "artikel", "produkt", "producto", "produit", "prodotto", "produto"), "products"),
    **dict.fromkeys(("isbn", "buch", "livre", "libro", "livro", "boek"), "books"),
    **{"business": "businesses", "news": "news stories", "story": "stories", "dish": "dishes", "pelicula": "films"},
    **{"anime": "anime", "series": "series", "poi": "places", "商品": "products", "电影": "films"},
}
